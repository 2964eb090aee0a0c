"""Everything that the page and the tables of a comparison show, worked out once: groups in order, columns, what a reader must know."""

from collections.abc import Sequence
from dataclasses import dataclass

from esvit.comparison.columns import Column, columns, is_cost, lower_is_better, matches
from esvit.comparison.costs import repeated_throughput, with_throughput
from esvit.comparison.groups import Group, grouped, ranked
from esvit.comparison.runs import Gathered, Run
from esvit.errors import OptionError
from esvit.evaluation.protocol import protocol_differences
from esvit.run_folder import flatten

_COSTS = ("throughput/images_per_second", "hours", "images_per_second")  # of which the first that two groups differ in is taken
_LISTED = 4  # names in a sentence


@dataclass(frozen=True)
class Comparison:
    """title    what the comparison is called
    sources  where its runs came from, in words
    groups   best first, by the column `by`
    columns  the results, in the order that was asked for
    by       the column that decides; None without any result
    cost     the final metric (or option) that results are weighed against; None where there is none
    notes    sentences a reader has to know first
    """

    title: str
    sources: str
    groups: Sequence[Group]
    columns: Sequence[Column]
    by: Column | None
    cost: str | None
    lower_cost: bool
    notes: Sequence[str]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def options(self) -> list[str]:
        """The options that differ between groups."""
        return list(self.groups[0].options) if self.groups else []


def compared(
    gathered: Gathered, *, title: str, sources: str, metrics: Sequence[str], best: str, rank_by: str | None, cost: str | None
) -> Comparison:
    """Raises OptionError if no run has a metric `rank_by`, or none has the cost."""
    runs = with_throughput(gathered.runs)
    found = columns(runs, metrics, best=best)
    by = _deciding(found, rank_by)
    groups = ranked(grouped(runs), by)
    chosen = _cost(groups, cost)
    notes = [*gathered.notes, *_tasks(runs), *_unfinished(runs), *_protocols(found), *_apart(found), *_repeats(groups), *_versions(runs)]
    notes += repeated_throughput(gathered.runs)
    if not found:
        notes.append(f"No run has a metric that fits {', '.join(metrics)}.")
    return Comparison(
        title=title,
        sources=sources,
        groups=groups,
        columns=found,
        by=by,
        cost=chosen,
        lower_cost=chosen is not None and (chosen in groups[0].options or lower_is_better(chosen, "auto")),
        notes=notes,
    )


def _deciding(found: Sequence[Column], rank_by: str | None) -> Column | None:
    """The column of `rank_by`; by default the first result whose values all compare, or the first."""
    if rank_by is None:
        results = [column for column in found if not is_cost(column.metric)] or list(found)
        return next((column for column in results if not column.apart), results[0] if results else None)
    fitting = [column for column in found if matches(column.metric, [rank_by]) or column.title == rank_by]
    if not fitting:
        there = ", ".join(dict.fromkeys(column.metric for column in found)) or "none"
        raise OptionError("task.rank_by", f"no run has a metric {rank_by!r} among task.metrics", f"there are: {there}")
    return fitting[0]


def _cost(groups: Sequence[Group], cost: str | None) -> str | None:
    if cost is not None:
        if not any(group.cost(cost) is not None for group in groups):
            there = sorted(
                {name for group in groups for run in group.runs for name in run.final if "/" not in name or "throughput/" in name}
            )
            raise OptionError("task.cost", f"no run has a number called {cost!r}", f"there are: {', '.join(there)}, and options")
        return cost
    for name in _COSTS:
        values = {value for group in groups if (value := group.cost(name)) is not None}
        if len(values) > 1:
            return name
    return None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _unfinished(runs: Sequence[Run]) -> list[str]:
    open_ones = [run for run in runs if not run.is_finished]
    if not open_ones:
        return []
    names = _listed([f"{run.name} ({run.status})" for run in open_ones])
    verb = "has" if len(open_ones) == 1 else "have"
    return [
        f"{len(open_ones)} of {len(runs)} runs {verb} not finished: {names}. A dagger (†) marks values that come from unfinished runs "
        "only; where others of the group have finished, unfinished ones stay out of its mean."
    ]


def _protocols(found: Sequence[Column]) -> list[str]:
    """One sentence for all metrics that were measured by the same set of protocols."""
    metrics: dict[str, list[str]] = {}
    for column in found:
        if column.variant:
            metrics.setdefault(column.metric, []).append(column.variant)
    alike: dict[tuple[str, ...], list[str]] = {}
    for metric, variants in metrics.items():
        alike.setdefault(tuple(variants), []).append(metric)
    return [
        f"{_listed(names)}: measured by {len(variants)} protocols ({' / '.join(variants)}). Numbers of different protocols do not "
        "compare, they stand in columns of their own."
        for variants, names in alike.items()
    ]


def _apart(found: Sequence[Column]) -> list[str]:
    alike: dict[tuple[str, ...], list[str]] = {}
    for column in found:
        if column.apart:
            alike.setdefault(column.apart, []).append(column.title)
    return [
        f"{_listed(names)}: the numbers depend on options that differ between these runs ({_listed(options)}), so none of them is called "
        "the best."
        for options, names in alike.items()
    ]


def _tasks(runs: Sequence[Run]) -> list[str]:
    tasks = sorted({run.task for run in runs if run.task})
    return [f"These are runs of different tasks ({_listed(tasks)}), with few options in common."] if len(tasks) > 1 else []


def _repeats(groups: Sequence[Group]) -> list[str]:
    """Equal seeds make a deviation too small, or zero."""
    repeated = [group.label for group in groups if len({run.options.get("seed") for run in group.runs}) < len(group.runs)]
    return [f"Several runs of one seed are counted one by one: {_listed(repeated)}."] if repeated else []


def _versions(runs: Sequence[Run]) -> list[str]:
    commits = list(dict.fromkeys(run.tags["git.commit"][:10] for run in runs if run.tags.get("git.commit", "unknown") != "unknown"))
    return [f"The runs were made by {len(commits)} versions of the code: {_listed(commits)}."] if len(commits) > 1 else []


def protocol_lines(found: Sequence[Column]) -> dict[str, dict[str, str]]:
    """Column title -> its pinned options, of the columns that have a protocol; those that differ between a metric's protocols first."""
    lines = {}
    for column in found:
        if column.protocol is not None:
            others = [each.protocol for each in found if each.metric == column.metric and each.protocol is not None]
            differing = {name for other in others for name in protocol_differences(column.protocol, other)}
            flat = flatten(dict(column.protocol))
            lines[column.title] = {name: str(flat[name]) for name in sorted(flat, key=lambda name: (name not in differing, name))}
    return lines
