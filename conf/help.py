"""What `python run.py --help` prints: groups and their choices from the folder, options and comments from the schemas.

Reads files only: no Hydra, no torch, so that it answers at once.
"""

import re
from pathlib import Path

_CONF = Path(__file__).parent
_OPTION = re.compile(r"^    (?P<name>[a-z]\w*): .*? = (?P<default>.*?)(?:  # (?P<comment>.*?))?$")


def text() -> str:
    groups = {folder.name: sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")) for folder in sorted(_CONF.iterdir()) if any(folder.glob("*.yaml"))}
    order = ["task", "backbone", "head", "loss", "augmentation", "data", "optimizer", "schedule", "tracking", "launcher", "runtime", "experiment"]
    lines = [
        "EsViT: self-supervised pre-training of multi-stage vision transformers",
        "",
        "usage: python run.py [group=choice ...] [option=value ...]",
        "  e.g. python run.py backbone=swin_tiny loss=view_region data.root=/data/imagenet/train epochs=300 data.batch_size=32",
        "       python run.py experiment=demo",
        "",
        "groups:",
        *(f"  {group:<13} {', '.join(groups[group])}" for group in order),
        "",
        "options of every task:",
        *_options((_CONF / "schema" / "root.py").read_text(), prefix=""),
        "",
        "options of a group are GROUP.OPTION, e.g. data.root, schedule.warmup_epochs, augmentation.local_crops_number;",
        "conf/schema/ has them all with their meaning, `python run.py --cfg job [overrides]` prints the composed values.",
    ]
    return "\n".join(lines)


def _options(source: str, *, prefix: str) -> list[str]:
    lines = []
    for match in filter(None, map(_OPTION.match, source.splitlines())):
        if match["default"] == "MISSING" or match["comment"] is None:
            continue
        default = re.sub(r"^\w+\.(\w+)$", r"\1", match["default"].strip('"')) if "${" not in match["default"] else "outputs/..." if match["name"] == "output_dir" else "the backbone"
        lines.append(f"  {prefix + match['name']:<17} {match['comment']} [{default.replace('None', 'null')}]")
    return lines
