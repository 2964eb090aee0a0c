"""The launchers by name, so that what jobs.json remembers of one can be made one again."""

import importlib
from typing import Any

_KINDS = {
    "local": "launchers.local:Local",
    "gpus": "launchers.gpus:Gpus",
    "slurm": "launchers.slurm:Slurm",
    "command": "launchers.command:Command",
}


def launcher_of(options: dict[str, Any]) -> Any:
    """The launcher that `submission.options_of` described; imports no other."""
    module, _, name = _KINDS[options["kind"]].partition(":")
    return getattr(importlib.import_module(module), name)(**{key: value for key, value in options.items() if key != "kind"})
