"""The comparison as files for other programs: Markdown for a paper's table, and CSV of the groups and of every run."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esvit.comparison.columns import Column
from esvit.comparison.comparison import Comparison
from esvit.comparison.differences import ABSENT, short_names
from esvit.comparison.differences import text_of as option_text
from esvit.comparison.groups import Group, Summary, telling_options, winners
from esvit.comparison.page import measured

_LEGEND = "Mean ± standard deviation of a sample over n finished runs that differ in their seed only. Bold: the best of the column."
_OPTION_COLUMNS = 6  # of a Markdown table; more options than these are told by the group's label alone


def markdown(comparison: Comparison) -> str:
    """A table of the final values, one of the best on the way where these are others, and what a reader must know."""
    parts = [f"# {comparison.title}", _table(comparison, best=False)]
    if any(_differs(group, column) for group in comparison.groups for column in comparison.columns):
        parts += ["Best value on the way, over the runs' mean:", _table(comparison, best=True)]
    parts.append(_LEGEND)
    if comparison.notes:
        parts.append("\n".join(f"- {note}" for note in comparison.notes))
    return "\n\n".join(parts) + "\n"


def _differs(group: Group, column: Column) -> bool:
    return measured(group.summary(column)) != measured(group.summary(column, best=True))


def _table(comparison: Comparison, *, best: bool) -> str:
    telling = telling_options(comparison.groups)
    names = telling if len(telling) <= _OPTION_COLUMNS else []
    short = short_names(names)
    bold = {column.title: winners(comparison.groups, column, best=best) for column in comparison.columns}
    arrows = {True: "↓", False: "↑"}
    named = not names or comparison.groups[0].is_named
    head = [
        *(["group"] if named else []),
        *(short[name] for name in names),
        "n",
        *(f"{each.title} {arrows[each.lower_is_better]}" for each in comparison.columns),
    ]
    rule = ["---"] * (len(names) + named) + ["---:"] * (1 + len(comparison.columns))
    lines = [_row(head), _row(rule)]
    for place, group in enumerate(comparison.groups):
        results = []
        for column in comparison.columns:
            text = measured(group.summary(column, best=best), among=group.finished)
            results.append(f"**{text}**" if place in bold[column.title] else text)
        count = str(group.finished)
        label = [group.label] if named else []
        lines.append(_row([*label, *(option_text(group.options[name]) for name in names), count, *results]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_groups(path: Path, comparison: Comparison) -> None:
    """CSV, one row for each group: its options, and for each metric mean, deviation and n of the final and of the best values."""
    measures = ("mean", "std", "n")
    head = ["group", *comparison.options, "runs", "finished"]
    head += [f"{column.title} {kind} {measure}" for column in comparison.columns for kind in ("final", "best") for measure in measures]
    rows = []
    for group in comparison.groups:
        row: list[Any] = [group.label, *(_cell(group.options[name]) for name in comparison.options), len(group.runs), group.finished]
        for column in comparison.columns:
            row += _numbers(group.summary(column)) + _numbers(group.summary(column, best=True))
        rows.append(row)
    _write(path, head, rows)


def write_runs(path: Path, comparison: Comparison) -> None:
    """CSV, one row for each run: place, status, options that differ, each metric's final value with its step and its best, costs."""
    head = ["run", "group", "status", "seed", "steps", "folder", "run_id", *comparison.options]
    head += [f"{column.title} {kind}" for column in comparison.columns for kind in ("final", "step", "best")]
    costs = sorted({name for run in comparison.runs for name in run.final if "/" not in name or name.startswith("throughput/")})
    costs = [name for name in costs if name not in ("step", "epoch")]
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            row: list[Any] = [run.name, group.label, run.status, run.options.get("seed", ""), run.steps, run.folder or "", run.run_id or ""]
            row += [_cell(group.options[name]) for name in comparison.options]
            for column in comparison.columns:
                series = column.of(run)
                row += ["", "", ""] if series is None else [series.final, series.points[-1][0], series.best(lower=column.lower_is_better)]
            rows.append(row + [run.final.get(name, "") for name in costs])
    _write(path, head + costs, rows)


def _cell(value: Any) -> Any:
    return "" if value is ABSENT else value if isinstance(value, int | float | str) else option_text(value)


def _numbers(summary: Summary | None) -> list[Any]:
    if summary is None:
        return ["", "", ""]
    deviation = "" if summary.deviation is None else summary.deviation
    return [summary.mean if math.isfinite(summary.mean) else "nan", deviation, summary.count]


def _write(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)
