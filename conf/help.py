"""What `python run.py --help` prints: groups and their choices from the folder, options and comments from the schemas.

Reads files only: no Hydra, no torch, so that it answers at once.
"""

import re
import textwrap
from pathlib import Path

_CONF = Path(__file__).parent
_GROUPS = [
    "task",
    "backbone",
    "head",
    "loss",
    "augmentation",
    "data",
    "sampler",
    "optimizer",
    "schedule",
    "tracking",
    "launcher",
    "runtime",
    "experiment",
]
_OPTION = re.compile(r"^    (?P<name>[a-z]\w*): .*? = (?P<default>.*?)  # (?P<comment>.*)$")
_COMPUTED = {"name": "the backbone", "output_dir": "outputs/TASK/DATE_TIME_NAME"}  # defaults that refer to other options
_WRITTEN = {"None": "null", "True": "true", "False": "false", "field(default_factory=list)": "[]"}


def text() -> str:
    lines = [
        "EsViT: self-supervised pre-training of multi-stage vision transformers",
        "",
        "usage: python run.py [group=choice ...] [option=value ...]",
        "  e.g. python run.py backbone=swin_tiny loss=view_region data.root=/data/imagenet/train epochs=300 data.batch_size=32",
        "       python run.py experiment=demo",
        "       python run.py -m seed=0,1,2 ...                   (a sweep)",
        "",
        "groups:",
        *(_wrapped(group, ", ".join(_choices(_CONF / group))) for group in _GROUPS),
        "",
        "options of every task:",
        *_options((_CONF / "schema" / "root.py").read_text()),
        "",
        "with plan=true:",
        *_options(_of_class("Planning"), "planning."),
        "",
        "many runs: python run.py -m option=value,value ..., or python run.py -m +sweeps=RECIPE ...; the recipes are",
        _wrapped("+sweeps", ", ".join(_choices(_CONF.parent / "sweeps"))),
        "  every combination is run, or, with search.trials, searched:",
        *_options(_of_class("Search"), "search."),
        "",
        "options of a group are GROUP.OPTION, e.g. data.root, schedule.warmup_epochs, augmentation.local_crops_number;",
        "those of the task also go by their own name, e.g. log_every=50 for task.log_every=50;",
        "conf/schema/ has them all with their meaning, `python run.py --cfg job [overrides]` prints the composed values.",
    ]
    return "\n".join(lines)


def _choices(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def _wrapped(name: str, text: str) -> str:
    return textwrap.fill(text, width=120, initial_indent=f"  {name:<13} ", subsequent_indent=" " * 16, break_on_hyphens=False)


def _of_class(name: str) -> str:
    """The source of one class of conf/schema/sweeps.py."""
    return (_CONF / "schema" / "sweeps.py").read_text().partition(f"class {name}:")[2].partition("\nclass ")[0]


def _options(source: str, prefix: str = "") -> list[str]:
    """One line for each option whose definition says in a comment what it is."""
    lines = []
    for match in filter(None, map(_OPTION.match, source.splitlines())):
        name = match["name"]
        value = match["default"].strip('"').rpartition(".")[2]  # a choice of an Enum goes by its last name
        default = _COMPUTED.get(
            name, {"None": "null", "True": "true", "False": "false", "field(default_factory=list)": "[]"}.get(value, value)
        )
        lines.append(f"  {prefix + name:<{30 if prefix else 17}} {match['comment']} [{default}]")
    return lines
