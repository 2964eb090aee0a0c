"""Compares runs: a page, tables for a paper and for programs, and the best run's checkpoint in MLflow's registry. Imports no torch."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esvit.comparison import page, tables
from esvit.comparison.columns import matches
from esvit.comparison.comparison import Comparison, compared
from esvit.comparison.selection import gather
from esvit.comparison.store import BEST_ALIAS, register_best
from esvit.errors import OptionError
from esvit.run_folder import write_atomically
from esvit.tracking.environment import mask_passwords

_CONSOLE_ROWS = 10
_CONSOLE_METRICS = 4


@dataclass(kw_only=True)
class Compare:
    """runs        run folders, folders with runs at any depth, and run ids of the store
    experiment  an MLflow experiment whose runs are compared too, or None
    uri         the store of `experiment` and of run ids, None where there is none
    metrics     patterns of the metrics to show, in order; one with a leading `!` takes out
    best        "max", "min", or "auto": by the metric's name
    rank_by     pattern of the metric that decides; None: the first one that compares
    cost        final metric, or option, that results are weighed against; None: chosen among those that differ
    register    name of a registered model whose version the best checkpoint becomes, or None
    folder      gets compare.html, compare.md, groups.csv and runs.csv
    title       heading of the page
    """

    runs: Sequence[str]
    experiment: str | None
    uri: str | None
    metrics: Sequence[str]
    best: str
    rank_by: str | None
    cost: str | None
    register: str | None
    folder: str
    title: str

    def run(self, runtime: Any = None) -> None:
        """Write the files and print a short table. Raises OptionError if there is nothing to compare, or an option cannot work."""
        start = time.monotonic()
        folder = self._writable_folder()
        wanted = lambda name: matches(name, self.metrics)  # noqa: E731
        gathered = gather(self.runs, experiment=self.experiment, uri=self.uri, wanted=wanted)
        comparison = compared(
            gathered,
            title=self.title,
            sources=self._sources(),
            metrics=self.metrics,
            best=self.best,
            rank_by=self.rank_by,
            cost=self.cost,
        )
        page.write_comparison(folder / "compare.html", comparison)
        write_atomically(folder / "compare.md", tables.markdown(comparison))
        tables.write_groups(folder / "groups.csv", comparison)
        tables.write_runs(folder / "runs.csv", comparison)
        for line in console(comparison):
            print(line)
        print(f"\n{folder / 'compare.html'}  (also compare.md, groups.csv, runs.csv; {time.monotonic() - start:.1f} s)", flush=True)
        if self.register is not None:
            print(self._register(comparison, self.register), flush=True)

    def _sources(self) -> str:
        parts = [f"experiment {self.experiment} in {mask_passwords(str(self.uri))}"] if self.experiment else []
        shown = [each if len(each) < 60 else f"…{each[-58:]}" for each in self.runs]
        return ", ".join(parts + (shown if len(shown) <= 3 else [*shown[:2], f"{len(shown) - 2} more"]))

    def _writable_folder(self) -> Path:
        folder = Path(self.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            found = f"cannot write to '{folder}' ({error.strerror})"
            raise OptionError("output_dir", found, "give a folder that can be written") from None
        return folder

    def _register(self, comparison: Comparison, model: str) -> str:
        column = comparison.by
        if column is None:
            raise OptionError("task.register", "no run has a metric to tell the best by", "give task.metrics or task.rank_by")
        if column.apart:
            found = f"the values of {column.title} do not compare ({', '.join(column.apart)} differ)"
            raise OptionError("task.register", found, "choose another metric with task.rank_by")
        having = [(run, series) for run in comparison.runs if run.is_finished and (series := column.of(run)) is not None]
        having = [pair for pair in having if math.isfinite(pair[1].final)]
        if not having:
            raise OptionError("task.register", f"no finished run has {column.title}", "choose another metric with task.rank_by")
        sign = -1 if column.lower_is_better else 1
        run, series = max(having, key=lambda pair: sign * pair[1].final)
        version = register_best(run, model=model, metric=column.title, value=series.final, protocol=column.protocol)
        return f"registered models:/{model}@{BEST_ALIAS} = version {version}: {run.name}, {column.title} {series.final:.4g}"


def console(comparison: Comparison) -> list[str]:
    """The first groups and metrics, as lines of aligned columns."""
    shown = comparison.columns[:_CONSOLE_METRICS]
    rows = [["group", "runs", *(column.title for column in shown)]]
    for group in comparison.groups[:_CONSOLE_ROWS]:
        left = len(group.runs) - group.finished
        count = f"{group.finished}+{left}†" if left else str(group.finished)
        rows.append([group.label, count, *(page.measured(group.summary(column), among=group.finished) for column in shown)])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(comparison.groups) > _CONSOLE_ROWS:
        lines.append(f"... and {len(comparison.groups) - _CONSOLE_ROWS} more groups")
    return lines + [f"note: {note}" for note in comparison.notes]
