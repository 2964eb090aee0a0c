"""Columns of results: a column is one metric measured by one protocol, so all numbers in it compare.

What a run measured of itself while it trained (its loss, its online k-NN) has no protocol of its own. There the options that the number
depends on have to be equal; where they are not, the column names those that differ.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from esvit.comparison.differences import ABSENT, differing_options, is_one_of, text_of
from esvit.comparison.runs import Run, Series, images_of
from esvit.evaluation.protocol import protocol_differences

_DATA = ("data.root", "data.val_root", "choices.data")
# What a metric of a run's own depends on, beside the weights: by the beginning of its name.
_DEPENDS = {
    "loss/": ("loss", "choices.loss", "head.prototypes", "augmentation", "task.mixing", "schedule.teacher_temperature", "data.root"),
    "knn/": ("task.online_knn.neighbours", "task.online_knn.temperature", "task.online_knn.resize", "task.online_knn.crop",
             "task.online_knn.max_train_images", "task.normalize", *_DATA),
}  # fmt: skip
_COSTS = ("images_per_second", "speed/", "hours", "memory/", "peak_memory")  # beginnings of metrics that say what a run took
_COSTS_DEPEND = ("device", "precision", "host")
_OF_IMAGES = ("data", "images", "classes", "class_names", "mask_values")  # what a protocol says of its images
_LOWER_IS_BETTER = {"loss", "error", "kl", "seconds", "hours", "memory", "flops", "parameters", "wait", "bad", "distance"}


@dataclass(frozen=True)
class Column:
    """One metric, measured by one protocol.

    way              of its series, what they have in common
    variant          what this protocol has that the metric's others have not, e.g. "frozen.crop=96"; empty if there is one only
    lower_is_better  whether small values are good ones
    apart            options that keep its values from being compared all the same
    """

    metric: str
    protocol: Mapping[str, Any] | None
    way: str
    variant: str
    lower_is_better: bool
    apart: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.metric} ({self.variant})" if self.variant else self.metric

    def of(self, run: Run) -> Series | None:
        """The run's values in this column."""
        return next((series for series in run.series if (series.metric, series.way) == (self.metric, self.way)), None)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether some pattern fits, and none of those with a leading `!`."""
    fits = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns if not pattern.startswith("!"))
    return fits and not any(fnmatch.fnmatchcase(name, pattern[1:]) for pattern in patterns if pattern.startswith("!"))


def lower_is_better(metric: str, best: str) -> bool:
    """best  "max", "min", or "auto": by the metric's name"""
    return bool(_LOWER_IS_BETTER & set(re.split(r"[/_]", metric))) if best == "auto" else best == "min"


def is_cost(metric: str) -> bool:
    """Whether it says what a run took, not what it reached."""
    return metric.startswith(_COSTS)


def columns(runs: Sequence[Run], patterns: Sequence[str], *, best: str) -> list[Column]:
    """The columns of the runs' series that fit one of the patterns, in their order."""
    metrics = {series.metric for run in runs for series in run.series if matches(series.metric, patterns)}
    found = []
    for metric in sorted(metrics, key=lambda name: (_place(name, patterns), name)):
        first: dict[str, tuple[Run, Series]] = {}  # of each way to measure it
        for run in runs:
            for series in run.series:
                if series.metric == metric:
                    first.setdefault(series.way, (run, series))
        for (_, series), variant in zip(first.values(), _variants(list(first.values())), strict=True):
            column = Column(metric, series.protocol, series.way, variant, lower_is_better(metric, best))
            found.append(replace(column, apart=_apart(column, runs)))
    return found


def _place(metric: str, patterns: Sequence[str]) -> int:
    return next((place for place, pattern in enumerate(patterns) if fnmatch.fnmatchcase(metric, pattern)), len(patterns))


def _variants(measured: Sequence[tuple[Run, Series]]) -> list[str]:
    """What each protocol has that not all have; other images go by their folder's name, if that tells them apart."""
    pinned = [(run, series) for run, series in measured if series.protocol is not None]
    protocols = [series.protocol for _, series in pinned if series.protocol is not None]
    differing = list(dict.fromkeys(name for protocol in protocols for name in protocol_differences(protocols[0], protocol)))
    of_images = [name for name in differing if is_one_of(name, _OF_IMAGES)]
    names = [images_of(run, series) for run, series in pinned] if of_images else []
    kinds = {str([_protocol_value(protocol, name) for name in of_images]) for protocol in protocols}
    is_told_by_name = len(set(names)) == len(kinds) > 1
    shown = [name for name in differing if not (is_told_by_name and name in of_images)]
    texts = {}
    for place, (_, series) in enumerate(pinned):
        options = [f"{name}={_protocol_value(protocols[place], name)}" for name in shown]
        texts[id(series)] = ", ".join([names[place], *options] if is_told_by_name else options)
    return [texts.get(id(series), "while training" if pinned else "") for _, series in measured]


def _protocol_value(protocol: Mapping[str, Any], name: str) -> str:
    value: Any = protocol
    for part in name.split("."):
        value = value.get(part, ABSENT) if isinstance(value, Mapping) else ABSENT
    text = text_of(value)
    return text[:8] if re.fullmatch(r"[0-9a-f]{12,}", text) else text  # of a hash


def _apart(column: Column, runs: Sequence[Run]) -> tuple[str, ...]:
    """Options that its values depend on and that differ between the runs that have one."""
    if column.protocol is not None:
        return ()
    having = [run for run in runs if column.of(run) is not None]
    on = next((names for beginning, names in _DEPENDS.items() if column.metric.startswith(beginning)), ())
    on = _COSTS_DEPEND if is_cost(column.metric) else on
    apart = [name for name in differing_options(having) if any(name == each or name.startswith(each) for each in on)]
    if "host" in on and len({run.tags.get("host") for run in having}) > 1:
        apart.append("host")
    return tuple(apart)
