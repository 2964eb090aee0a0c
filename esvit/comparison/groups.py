"""What differs between runs, and what they reached: runs that differ in their seed only are one group, with mean and standard deviation.

A column of results is one metric measured by one protocol, so all numbers in it compare. What a run measured of itself while it trained
(its loss, its online k-NN) has no protocol of its own; there the options that the number depends on have to be equal, else the column
names those that are not, and nothing in it is called the best.
"""

import fnmatch
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from esvit.comparison.runs import Run, Series, are_comparable, images_of
from esvit.evaluation.protocol import protocol_differences

# Options that say where a run happens, how often it writes, and what follows it; its results do not depend on them.
_BOOKKEEPING = (
    "name", "output_dir", "tracking", "launcher", "choices.launcher", "choices.tracking", "runtime.threads", "runtime.timeout_minutes",
    "runtime.stall_minutes", "data.workers", "task.log_every", "task.health_every", "task.checkpoint_keep", "task.frozen.cache",
    "task.table", "checkpoint_every", "evaluate_every", "evaluate", "then", "of",
)  # fmt: skip
_SEED = "seed"
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
_LABEL_LENGTH = 36  # of a group made of names and values of its options
_LOWER_IS_BETTER = {"loss", "error", "kl", "seconds", "hours", "memory", "flops", "parameters", "wait", "bad", "distance"}


@dataclass(frozen=True)
class _Absent:
    """In place of the value of an option that a run does not have."""

    def __str__(self) -> str:
        return "–"


ABSENT = _Absent()


@dataclass(frozen=True)
class Column:
    """One metric, measured by one protocol.

    variant          what this protocol has that the metric's others have not, e.g. "frozen.crop=96"; empty if there is one only
    lower_is_better  whether small values are good ones
    apart            options that keep its values from being compared all the same
    """

    metric: str
    protocol: Mapping[str, Any] | None
    variant: str
    lower_is_better: bool
    apart: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.metric} ({self.variant})" if self.variant else self.metric

    def of(self, run: Run) -> Series | None:
        """The run's values in this column."""
        probe = Series(self.metric, self.protocol, ((0, 0.0),))
        return next((series for series in run.series if series.metric == self.metric and are_comparable(series, probe)), None)


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


def cost_of(run: Run, name: str) -> float | None:
    """The final metric of that name, or the option; None where it is no number."""
    value: Any = run.final.get(name, run.options.get(name))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def differing_options(runs: Sequence[Run]) -> list[str]:
    """Options that differ between runs and may matter, the chosen presets first.

    An option that follows from a differing choice is not repeated: with loss=view beside loss=view_region, `loss.region_weight` differs
    only if it does so among the runs with the same loss.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    names = [name for name in names if name != _SEED and not _is_one_of(name, _BOOKKEEPING)]
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


def _is_one_of(name: str, names: Sequence[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in names)


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
    """What the groups' options are, with the options' names where these leave the labels short."""
    short = short_names(list(values[0]))
    present = [{name: value for name, value in some.items() if value is not ABSENT} for some in values]
    full = [", ".join(f"{short[name]}={text_of(value)}" for name, value in some.items()) for some in present]
    if max(map(len, full)) <= _LABEL_LENGTH:
        return [text or "–" for text in full]
    return [" · ".join(text_of(value) for value in some.values()) or "–" for some in values]


def _without_seed(name: str) -> str:
    return re.sub(r"[-_ ]?(?:seed|s)[-_=]?\d+$", "", name) or name


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
    """The columns of the runs' series, in the order of the patterns that they fit."""
    metrics = dict.fromkeys(series.metric for run in runs for series in run.series)
    found = []
    for metric in sorted(metrics, key=lambda name: (_place(name, patterns), name)):
        first: list[tuple[Run, Series]] = []  # of each protocol
        for run in runs:
            for series in run.series:
                if series.metric == metric and not any(are_comparable(series, known) for _, known in first):
                    first.append((run, series))
        for (_, series), variant in zip(first, _variants(first), strict=True):
            column = Column(metric, series.protocol, variant, lower_is_better(metric, best))
            found.append(replace(column, apart=_apart(column, runs)))
    return found


def _place(metric: str, patterns: Sequence[str]) -> int:
    return next((place for place, pattern in enumerate(patterns) if fnmatch.fnmatchcase(metric, pattern)), len(patterns))


def _variants(measured: Sequence[tuple[Run, Series]]) -> list[str]:
    """What each protocol has that not all have; other images go by their folder's name, if that tells them apart."""
    pinned = [(run, series) for run, series in measured if series.protocol is not None]
    protocols = [series.protocol for _, series in pinned if series.protocol is not None]
    differing = list(dict.fromkeys(name for protocol in protocols for name in protocol_differences(protocols[0], protocol)))
    of_images = [name for name in differing if _is_one_of(name, _OF_IMAGES)]
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


def with_throughput(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of task=throughput taken out and their numbers given to the others with the same backbone, as "throughput/...".

    Where there are none but measurements of throughput, they are what is compared.
    """
    measured = [run for run in runs if run.task == "throughput"]
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


def _backbone(run: Run) -> str:
    """What makes two networks cost the same."""
    options = {name: value for name, value in run.options.items() if name.startswith("backbone.") and name != "backbone.drop_path_rate"}
    return repr(sorted(options.items(), key=lambda pair: pair[0]))
