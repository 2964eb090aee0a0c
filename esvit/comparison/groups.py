"""Runs that differ in their seed only are one group: what it reached in mean and deviation, and which groups are the best."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esvit.comparison.columns import Column
from esvit.comparison.costs import cost_of
from esvit.comparison.differences import ABSENT, differing_options, short_names, text_of
from esvit.comparison.runs import Run

_LABEL_LENGTH = 36  # of a label made of names and values of options; longer ones do without the names
_LONGEST_LABEL = 60


@dataclass(frozen=True)
class Summary:
    """Of one group in one column.

    deviation    standard deviation of a sample; None of fewer than two runs
    count        runs that the mean is taken over
    provisional  whether these have not finished
    """

    mean: float
    deviation: float | None
    count: int
    provisional: bool


@dataclass(frozen=True)
class Group:
    """Runs with the same options but for the seed.

    label     what tells it from other groups
    is_named  whether that is the runs' own name, else it is made of the options
    options   value of each option that differs between groups
    """

    label: str
    is_named: bool
    options: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def finished(self) -> int:
        return sum(run.is_finished for run in self.runs)

    def summary(self, column: Column, *, best: bool = False) -> Summary | None:
        """Of its finished runs, or of all that have a value where none has finished; None where none has one.

        best  take each run's best value on the way in place of its final one
        """
        having = [(run, series) for run in self.runs if (series := column.of(run)) is not None]
        finished = [pair for pair in having if pair[0].is_finished]
        used = finished or having
        if not used:
            return None
        values = [series.best(lower=column.lower_is_better) if best else series.final for _, series in used]
        return _summary(values, provisional=not finished)

    def cost(self, name: str) -> float | None:
        """Mean of a final metric, or of a number among its options; None where no run has it."""
        values = [value for run in self.runs if (value := cost_of(run, name)) is not None]
        return statistics.fmean(values) if values else None


def _summary(values: Sequence[float], *, provisional: bool) -> Summary:
    is_sound = all(map(math.isfinite, values))
    mean = statistics.fmean(values) if is_sound else math.nan
    deviation = (statistics.stdev(values) if is_sound else math.nan) if len(values) > 1 else None
    return Summary(mean=mean, deviation=deviation, count=len(values), provisional=provisional)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in their seed only together, in the order of their first run."""
    options = differing_options(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr([run.options.get(name, ABSENT) for name in options]), []).append(run)
    members = list(groups.values())
    values = [{name: some[0].options.get(name, ABSENT) for name in options} for some in members]
    names = _names(members)
    labels = names or _labels(values)
    return [Group(label, bool(names), options, tuple(some)) for label, options, some in zip(labels, values, members, strict=True)]


def _names(members: list[list[Run]]) -> list[str]:
    """The runs' own names, where each group has one and no two have the same; else none."""
    names = [{_without_seed(run.name) for run in some} for some in members]
    own = [min(some) for some in names]
    return own if all(len(some) == 1 for some in names) and len(set(own)) == len(own) else []


def _labels(values: list[dict[str, Any]]) -> list[str]:
    """What the groups' options are, with the options' names where these leave the labels short; each another one."""
    names = _telling(values)
    short = short_names(names)
    present = [{name: some[name] for name in names if some[name] is not ABSENT} for some in values]
    labels = [", ".join(f"{short[name]}={text_of(value)}" for name, value in some.items()) for some in present]
    if max(map(len, labels)) > _LABEL_LENGTH:
        labels = [" · ".join(text_of(value) for value in some.values()) for some in present]
    cut = [label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…" for label in labels]
    return [f"{label or '–'} #{cut[:place].count(label) + 1}" if cut.count(label) > 1 else label or "–" for place, label in enumerate(cut)]


def _telling(values: list[dict[str, Any]]) -> list[str]:
    """The options without those that tell the same groups apart as one before them."""
    telling: dict[tuple[int, ...], str] = {}
    for name in values[0] if values else ():
        texts = [repr(some[name]) for some in values]
        telling.setdefault(tuple(map(texts.index, texts)), name)
    return list(telling.values())


def _without_seed(name: str) -> str:
    return re.sub(r"[-_, ]*(?:seed|(?<=[-_, ])s)[-_= ]?\d+$", "", name) or name


def telling_options(groups: Sequence[Group]) -> list[str]:
    """The options that differ between groups, without those that tell the same groups apart as one before them."""
    return _telling([dict(group.options) for group in groups])


def ranked(groups: Sequence[Group], column: Column | None) -> list[Group]:
    """Best first; without a finished run, and without a value, last."""

    def key(group: Group) -> tuple[int, float]:
        summary = group.summary(column) if column is not None else None
        if summary is None or math.isnan(summary.mean):
            return 2, 0.0
        return int(summary.provisional), summary.mean if column is not None and column.lower_is_better else -summary.mean

    return sorted(groups, key=key)


def winners(groups: Sequence[Group], column: Column, *, best: bool = False) -> set[int]:
    """Places of the groups with the best mean, of two or more finished ones; none where the values do not compare."""
    means = {
        place: summary.mean
        for place, group in enumerate(groups)
        if (summary := group.summary(column, best=best)) is not None and not summary.provisional and not math.isnan(summary.mean)
    }
    if column.apart or len(means) < 2:
        return set()
    top = min(means.values()) if column.lower_is_better else max(means.values())
    return {place for place, mean in means.items() if mean == top}


def pareto_front(points: Mapping[int, tuple[float, float]], *, lower_cost: bool, lower_value: bool) -> list[int]:
    """The keys of (cost, value) that no other beats in both, by rising cost. Equal points are all on it."""

    def goodness(key: int) -> tuple[float, float]:
        cost, value = points[key]
        return (-cost if lower_cost else cost), (-value if lower_value else value)

    def is_beaten(key: int) -> bool:
        mine = goodness(key)
        return any(theirs != mine and theirs[0] >= mine[0] and theirs[1] >= mine[1] for theirs in map(goodness, points))

    return sorted((key for key in points if not is_beaten(key)), key=lambda key: points[key])
