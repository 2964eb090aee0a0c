"""Only esvit/backbones knows which architectures there are: all other code asks the object, never its name."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARCHITECTURE = re.compile(r"(?<![a-z])(swin|cvt|vil|vit|deit|resnet|convnext|timm)(?![a-z])")
AS_A_LIBRARY = {  # where timm is meant as a package, whose version is noted or whose format is written
    "timm": ("esvit/tasks/pretrain.py", "esvit/tracking/environment.py", "esvit/export/", "esvit/tasks/export.py"),
}
START_OF_A_CAPITALISED_WORD = re.compile(r"(?<=[A-Za-z])(?=[A-Z][a-z])")


def python_files() -> list[Path]:
    found = [ROOT / "run.py", *(ROOT / "launchers").rglob("*.py"), *(ROOT / "esvit").rglob("*.py")]
    return [path for path in found if not path.is_relative_to(ROOT / "esvit" / "backbones")]


def docstrings(tree: ast.Module) -> set[ast.AST]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, documented)]
    return {body[0].value for body in bodies if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)}


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every name and every string of a program; comments and docstrings may name what they explain."""
    ignored = docstrings(tree)
    for node in ast.walk(tree):
        if node in ignored:
            continue
        for field, value in ast.iter_fields(node):
            if isinstance(value, str) and field != "type_comment":
                yield getattr(node, "lineno", 0), value


def architectures_in(text: str) -> set[str]:
    """Words as in "swin_tiny" or "SwinBlock"; not parts of words, as in "ESVIT" or "vital", nor our own name."""
    text = text.replace("EsViT", "").replace("cvtColor", "")  # nor OpenCV's way to convert colours
    apart = START_OF_A_CAPITALISED_WORD.sub("_", text)
    return {name for spelling in (text, apart) for name in ARCHITECTURE.findall(spelling.lower())}


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_outside_backbones_names_an_architecture(path):
    name = str(path.relative_to(ROOT))
    found = [
        f"{name}:{line} names {architecture}: {text!r}"
        for line, text in texts(ast.parse(path.read_text()))
        for architecture in architectures_in(text)
        if not name.startswith(AS_A_LIBRARY.get(architecture, ()))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "architectures"),
    [
        ("swin_tiny", {"swin"}),
        ("SwinBlock", {"swin"}),
        ("ViTBlock", {"vit"}),
        ("esvit.backbones.vil", {"vil"}),
        ("resnet50", {"resnet"}),
        ("ResNet", {"resnet"}),
        ("choose backbone=vit_small", {"vit"}),
        ("ESVIT_HOME", set()),
        ("EsViT", set()),
        ("vital", set()),
    ],
)
def test_the_search_finds_words_and_no_parts_of_words(text, architectures):
    assert architectures_in(text) == architectures
