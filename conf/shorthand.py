"""What may be typed more briefly: options of the chosen task without `task.`, and `of=RUN_FOLDER` (see conf.evaluated).

`task=zoo model=swin_tiny_w7_vr` is `task=zoo task.model=swin_tiny_w7_vr`.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from conf.evaluated import take_over
from conf.schema import root, tasks


def expand(arguments: list[str], *, planned: Mapping[str, dict[str, Any]] | None = None) -> list[str]:
    """The command line in full. `planned` has the options of runs that have not begun yet, by folder.

    Raises OptionError for an `of` that holds no run.
    """
    return take_over(with_task(arguments), planned or {})


def with_task(arguments: list[str]) -> list[str]:
    """`task.` before every option that belongs to the task and to nothing else, misspelt ones included, so that errors name it."""
    choices = [argument.partition("=")[2] for argument in arguments if argument.startswith("task=")]
    schema = tasks.SCHEMAS.get(("task", choices[-1] if choices else "pretrain"))
    if schema is None:
        return arguments
    everywhere = _names(root.Root)
    own = _names(schema) - everywhere
    return [f"task.{argument}" if _is_meant(_option(argument), own, everywhere) else argument for argument in arguments]


def _is_meant(name: str | None, own: set[str], everywhere: set[str]) -> bool:
    """Whether `name` is one of `own`, or nearer to one of them than to any other option."""
    if name is None or name in everywhere:
        return False
    nearest = difflib.get_close_matches(name, sorted(own | everywhere), n=1)
    return bool(nearest) and nearest[0] in own


def _option(argument: str) -> str | None:
    """The first part of the name in `name.of.option=value`; None for anything else."""
    name, equals, _ = argument.partition("=")
    return name.partition(".")[0] if equals else None


def _names(schema: type) -> set[str]:
    return {field.name for field in dataclasses.fields(schema) if not field.name.startswith("_")}
