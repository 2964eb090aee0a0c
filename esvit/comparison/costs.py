"""What a run's results are weighed against: its time, its options, and the measured throughput of its backbone."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from esvit.comparison.runs import Run


def cost_of(run: Run, name: str) -> float | None:
    """The final metric of that name, or the option; None where it is no number."""
    value: Any = run.final.get(name, run.options.get(name))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def with_throughput(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of task=throughput taken out and their numbers given to the others with the same backbone, as "throughput/...".

    Of several measurements of one backbone the newest counts. Where nothing but throughput was measured, that is what is compared.
    """
    measured = sorted((run for run in runs if run.task == "throughput"), key=lambda run: run.written or 0.0)
    others = [run for run in runs if run.task != "throughput"]
    if not measured or not others:
        return list(runs)
    costs = {_backbone(run): run for run in measured}
    joined = []
    for run in others:
        cost = costs.get(_backbone(run))
        known = {f"throughput/{name}": value for name, value in cost.final.items()} if cost is not None else {}
        joined.append(replace(run, final={**run.final, **known}))
    return joined


def repeated_throughput(runs: Sequence[Run]) -> list[str]:
    """A sentence, where the throughput of one backbone was measured more than once."""
    backbones = [_backbone(run) for run in runs if run.task == "throughput"]
    if len(set(backbones)) == len(backbones) or len(backbones) == len(runs):
        return []
    return ["The throughput of a backbone was measured more than once; the newest counts."]


def _backbone(run: Run) -> str:
    """What makes two networks cost the same."""
    options = {name: value for name, value in run.options.items() if name.startswith("backbone.") and name != "backbone.drop_path_rate"}
    return repr(sorted(options.items(), key=lambda pair: pair[0]))
