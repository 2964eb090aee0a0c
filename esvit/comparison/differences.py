"""Which options differ between runs, of those that can make a difference; and options as short text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esvit.comparison.runs import Run

# Options that say where a run happens, how often it writes, and what follows it; its results do not depend on them.
_BOOKKEEPING = (
    "name", "output_dir", "tracking", "launcher", "choices.launcher", "choices.tracking", "runtime.threads", "runtime.timeout_minutes",
    "runtime.stall_minutes", "data.workers", "task.log_every", "task.health_every", "task.checkpoint_keep",
    "task.checkpoint_writing", "task.checkpoint_shares", "task.frozen.cache", "task.table", "checkpoint_every", "evaluate_every",
    "evaluate", "then", "of",
)  # fmt: skip
_SEED = "seed"


@dataclass(frozen=True)
class _Absent:
    """In place of the value of an option that a run does not have."""

    def __str__(self) -> str:
        return "–"


ABSENT = _Absent()


def differing_options(runs: Sequence[Run]) -> list[str]:
    """Options that differ between runs and may matter, the chosen presets first.

    An option that follows from a differing choice is not repeated: with loss=view beside loss=view_region, `loss.region_weight` differs
    only if it does so among the runs with the same loss.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    names = [name for name in names if name != _SEED and not is_one_of(name, _BOOKKEEPING)]
    choices = [name for name in names if name.startswith("choices.") and all(name in run.options for run in runs)]
    names = [name for name in names if not name.startswith("choices.")]
    differing = [name for name in choices if _differs(name, runs)]
    for name in names:
        choice = f"choices.{name.partition('.')[0]}"
        alike: dict[Any, list[Run]] = {}
        for run in runs:
            alike.setdefault(run.options.get(choice) if choice in differing else None, []).append(run)
        if any(_differs(name, some) for some in alike.values()):
            differing.append(name)
    return differing


def _differs(name: str, runs: Sequence[Run]) -> bool:
    return any(run.options.get(name, ABSENT) != runs[0].options.get(name, ABSENT) for run in runs)


def is_one_of(name: str, names: Sequence[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in names)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Option -> its last part, or as many of the last parts as tell it from the others."""
    short = {}
    for name in names:
        parts = name.removeprefix("choices.").split(".")
        for count in range(1, len(parts) + 1):
            tail = ".".join(parts[-count:])
            others = [other for other in names if other != name and f".{other.removeprefix('choices.')}".endswith(f".{tail}")]
            if not others:
                break
        short[name] = tail
    return short


def text_of(value: Any) -> str:
    """An option's value, as short as it can be."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {text_of(each)}" for name, each in value.items()) + "}"
    text = str(value)
    return text if len(text) <= 48 else f"…{text[-47:]}"
