"""compare.html: the comparison as one page that opens anywhere; tables sort, and what belongs together lights up together."""

import datetime
import html
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from esvit.comparison import charts
from esvit.comparison.columns import Column
from esvit.comparison.comparison import Comparison, protocol_lines
from esvit.comparison.differences import ABSENT, short_names, text_of
from esvit.comparison.drawing import colors
from esvit.comparison.groups import Group, Summary, telling_options, winners
from esvit.comparison.runs import Run
from esvit.evaluation.page import number, section, write_page

_CURVES = 8
_OPTION_COLUMNS = 6
_OPTION_LENGTH = 24  # characters of an option's value in the table of results
_METRIC_COLUMNS = 8
_LEGEND = 8  # groups that have colours of their own
_OPEN_RUNS = 12  # with more, the table of single runs is folded away


def write_comparison(path: Path, comparison: Comparison) -> None:
    """The page at `path`, replaced as a whole."""
    groups, tints = comparison.groups, colors(len(comparison.groups))
    finished = sum(run.is_finished for run in comparison.runs)
    facts = {
        "runs": f"{len(comparison.runs)}, {finished} of them finished" if finished < len(comparison.runs) else str(len(comparison.runs)),
        "groups": f"{len(groups)} (runs that differ in their seed only are one)",
        "from": comparison.sources,
        "ranked by": comparison.by.title if comparison.by else "no metric",
        "made": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
    }
    sections = [
        section("Results", _results(comparison, tints)),
        section("Which options differ", _options(comparison)),
        section("Learning curves", _curves(comparison, tints)),
        section("Result and cost", _pareto(comparison, tints)),
        section("Options and results together", _parallel(comparison, tints)),
        section("Single runs", _runs(comparison, tints, path.parent)),
        section("How the numbers were measured", _protocols(comparison)),
        f"<script>{_SCRIPT}</script>",
    ]
    write_page(
        path, kind="EsViT comparison of runs", title=comparison.title, facts=facts, notes=comparison.notes, sections=sections, style=_STYLE
    )


def measured(summary: Summary | None, *, among: int | None = None) -> str:
    """Mean and deviation with the mean's decimals, e.g. "71.23 ± 0.42"; a dagger marks what has not finished.

    among  how many finished runs the group has: the number of those with a value is told where it is another
    """
    if summary is None:
        return "–"
    fewer = f" (n={summary.count})" if among and not summary.provisional and summary.count != among else ""
    dagger = "†" if summary.provisional else ""
    if not math.isfinite(summary.mean):
        return f"not finite{dagger}{fewer}"
    if summary.mean and not 1e-4 <= abs(summary.mean) < 1e6:
        mean, deviation = (f"{value:.3e}" for value in (summary.mean, summary.deviation or 0.0))
    else:
        decimals = max(0, 3 - math.floor(math.log10(abs(summary.mean)))) if summary.mean else 2
        mean, deviation = (f"{value:,.{decimals}f}" for value in (summary.mean, summary.deviation or 0.0))
    return f"{mean}{'' if summary.deviation is None else f' ± {deviation}'}{dagger}{fewer}"


def _results(comparison: Comparison, tints: Sequence[str]) -> str:
    shown = comparison.columns[:_METRIC_COLUMNS]
    telling = telling_options(comparison.groups)
    names = telling[:_OPTION_COLUMNS]
    short = short_names(names)
    best = {column.title: winners(comparison.groups, column) for column in shown}
    head = "".join(
        ["<th>Group</th>", *(f"<th>{html.escape(short[name])}</th>" for name in names), '<th class="number">Runs</th>', *map(_head, shown)]
    )
    rows = []
    for place, (group, tint) in enumerate(zip(comparison.groups, tints, strict=True)):
        name = group.label if group.is_named or len(telling) > len(names) else str(place + 1)
        cells = "".join(_option_cell(group.options[name]) for name in names)
        cells += _count_cell(group)
        cells += "".join(_result_cell(group, column, is_best=place in best[column.title]) for column in shown)
        rows.append(f'<tr data-g="{place}"><th scope="row">{_dot(tint)}{html.escape(name)}</th>{cells}</tr>')
    more = [f"{len(comparison.columns) - len(shown)} more metrics"] if len(comparison.columns) > len(shown) else []
    more += [f"{len(telling) - len(names)} more options"] if len(telling) > len(names) else []
    rest = f" {' and '.join(more)} are in runs.csv and groups.csv." if more else ""
    caption = (
        "Mean of the final values over a group's finished runs, ± standard deviation of a sample. Below it in grey, where it is another: "
        "the mean of each run's best value on the way, which is what a checkpoint picked afterwards would have had, and flatters. "
        "Bold: the best mean of a column. Of options that tell the same groups apart only the first has a column. A click on a column's "
        f"title sorts.{rest}"
    )
    return f'<div class="card">{_table(head, rows)}<p class="caption">{caption}</p></div>'


def _table(head: str, rows: Sequence[str]) -> str:
    body = "".join(rows)
    return f'<div class="scroll tall"><table class="sorts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _head(column: Column) -> str:
    arrow = "↓" if column.lower_is_better else "↑"
    variant = "".join(f'<br><span class="variant">{html.escape(part)}</span>' for part in column.variant.split(", ") if part)
    apart = f' <span title="does not compare: {html.escape(", ".join(column.apart), quote=True)}">⚠</span>' if column.apart else ""
    return f'<th class="number">{html.escape(column.metric)} {arrow}{apart}{variant}</th>'


def _option_cell(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    order = f' data-v="{value!r}"' if is_number else ""
    text = text_of(value)
    if len(text) > _OPTION_LENGTH:  # paths: their ends differ
        return f'<td title="{html.escape(text, quote=True)}">…{html.escape(text[1 - _OPTION_LENGTH :])}</td>'
    return f"<td{order}{' class=muted' if value is ABSENT else ''}>{html.escape(text)}</td>"


def _count_cell(group: Group) -> str:
    left = len(group.runs) - group.finished
    return f'<td class="number" data-v="{group.finished}">{group.finished}{f" + {left} †" if left else ""}</td>'


def _result_cell(group: Group, column: Column, *, is_best: bool) -> str:
    final, best = group.summary(column), group.summary(column, best=True)
    if final is None:
        return '<td class="number muted">–</td>'
    text = measured(final, among=group.finished)
    text = f"<b>{text}</b>" if is_best else text
    if best is not None and measured(best) != measured(final):
        text += f'<br><span class="variant">best {measured(best)}</span>'
    order = f' data-v="{final.mean!r}"' if math.isfinite(final.mean) else ""
    return f'<td class="number"{order}>{text}</td>'


def _dot(tint: str) -> str:
    return f'<span class="dot" style="background:{tint}"></span>'


def _options(comparison: Comparison) -> str:
    if not comparison.options:
        return '<div class="card"><p class="caption">None but the seed: all runs are one group.</p></div>'
    rows = []
    for name in comparison.options:
        counts: dict[str, int] = {}
        for group in comparison.groups:
            counts[text_of(group.options[name])] = counts.get(text_of(group.options[name]), 0) + len(group.runs)
        values = ", ".join(f"{html.escape(value)} <span class=muted>({count})</span>" for value, count in list(counts.items())[:24])
        more = f" and {len(counts) - 24} more" if len(counts) > 24 else ""
        rows.append(f'<tr><th scope="row"><code>{html.escape(name)}</code></th><td>{values}{more}</td></tr>')
    return (
        f'<div class="card"><div class="scroll tall"><table><thead><tr><th>Option</th><th>Values (runs)</th></tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="caption">All other options are equal, but for those that results do not '
        "depend on: names, folders, tracking, threads. A dash: the run has no such option.</p></div>"
    )


def _curves(comparison: Comparison, tints: Sequence[str]) -> str:
    drawn = [(column, charts.curves(comparison.groups, tints, column)) for column in comparison.columns]
    figures = [f'<figure class="card"><h3>{html.escape(column.title)}</h3>{svg}</figure>' for column, svg in drawn if svg is not None][
        :_CURVES
    ]
    if not figures:
        return ""
    caption = (
        "One thin line for each run; the thick one is the mean of a group's finished runs. Dashed: not finished. "
        "Point at a line, a dot or a row to see its group everywhere."
    )
    return f'{_legend(comparison, tints)}<div class="grid">{"".join(figures)}</div><p class="caption">{caption}</p>'


def _legend(comparison: Comparison, tints: Sequence[str]) -> str:
    if len(comparison.groups) > _LEGEND:
        by = html.escape(comparison.by.title) if comparison.by else "their order"
        return f'<p class="caption legend">Colour goes from strong to pale by {by}, the best group first.</p>'
    chips = "".join(
        f'<span class="chip" data-g="{place}">{_dot(tint)}{html.escape(group.label)}</span>'
        for place, (group, tint) in enumerate(zip(comparison.groups, tints, strict=True))
    )
    return f'<p class="legend">{chips}</p>'


def _pareto(comparison: Comparison, tints: Sequence[str]) -> str:
    if comparison.by is None or comparison.cost is None or comparison.by.apart:
        return ""
    shown = charts.pareto_of(comparison.groups, comparison.by, comparison.cost, lower_cost=comparison.lower_cost)
    if shown is None:
        return ""
    front = ", ".join(html.escape(comparison.groups[place].label) for place in shown.front[:6])
    more = f" and {len(shown.front) - 6} more" if len(shown.front) > 6 else ""
    caption = (
        "One dot for each group with a finished run, with the standard deviation over its runs. The dashed line joins those that no other "
        f"beats in both: {front}{more}."
    )
    return f'<figure class="card">{charts.pareto(comparison.groups, tints, shown)}<figcaption>{caption}</figcaption></figure>'


def _parallel(comparison: Comparison, tints: Sequence[str]) -> str:
    columns = [comparison.by] if comparison.by is not None else []
    columns += [column for column in comparison.columns if column is not comparison.by]
    svg = charts.parallel(comparison.groups, tints, columns)
    if svg is None:
        return ""
    caption = (
        "One line for each group, from option to option to what it reached (further up is better, for losses and errors too). Lines that "
        "fan out at the left and meet at the right: options that do not matter."
    )
    return f'<figure class="card">{svg}<figcaption>{caption}</figcaption></figure>'


def _runs(comparison: Comparison, tints: Sequence[str], start: Path) -> str:
    shown = comparison.columns[:_METRIC_COLUMNS]
    head = "<th>Run</th><th>Status</th><th>Seed</th><th class=number>Steps</th><th class=number>Hours</th>"
    head += "".join(map(_head, shown)) + "<th>Look</th>"
    rows = []
    for place, (group, tint) in enumerate(zip(comparison.groups, tints, strict=True)):
        for run in group.runs:
            hours = run.final.get("hours")
            cells = f'<td class="{_STATUS_KIND.get(run.status, "")}">{run.status}</td>{_option_cell(run.options.get("seed", ABSENT))}'
            cells += f'<td class="number" data-v="{run.steps}">{run.steps:,}</td>'
            cells += "<td></td>" if hours is None else f'<td class="number" data-v="{hours!r}">{hours:.2f}</td>'
            cells += "".join(_run_cell(run, column) for column in shown)
            rows.append(
                f'<tr data-g="{place}"><th scope="row">{_dot(tint)}{html.escape(run.name)}</th>{cells}<td>{_links(run, start)}</td></tr>'
            )
    opened = " open" if len(rows) <= _OPEN_RUNS else ""
    return f'<details class="card"{opened}><summary>{len(rows)} runs, each with its final values</summary>{_table(head, rows)}</details>'


_STATUS_KIND = {"failed": "bad", "killed": "bad", "interrupted": "halted", "running": "halted", "unknown": "halted"}


def _run_cell(run: Run, column: Column) -> str:
    series = column.of(run)
    if series is None:
        return '<td class="number muted">–</td>'
    value, at = series.points[-1][1], series.points[-1][0]
    order = f' data-v="{value!r}"' if math.isfinite(value) else ""
    return f'<td class="number"{order} title="at step {at:,}">{number(value)}{"" if run.is_finished else "†"}</td>'


def _links(run: Run, start: Path) -> str:
    links = []
    if run.folder is not None:
        target = run.folder / "report.html" if (run.folder / "report.html").exists() else run.folder
        name = "report" if target != run.folder else "folder"
        links.append(f'<a href="{quote(os.path.relpath(target, start))}">{name}</a>')
    if run.uri is not None and run.uri.startswith("http") and run.run_id is not None:
        address = f"{run.uri}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
        links.append(f'<a href="{html.escape(address, quote=True)}">MLflow</a>')
    return " ".join(links)


def _protocols(comparison: Comparison) -> str:
    alike: dict[str, list[str]] = {}
    for title, options in protocol_lines(comparison.columns).items():
        lines = "\n".join(f"{html.escape(name)}={html.escape(value)}" for name, value in options.items())
        alike.setdefault(lines, []).append(title)
    folded = []
    for lines, titles in alike.items():
        more = f" and {len(titles) - 6} more" if len(titles) > 6 else ""
        summary = f"<summary>{html.escape(', '.join(titles[:6]))}{more}</summary>"
        folded.append(f'<details class="card">{summary}<pre>{lines}</pre></details>')
    return "".join(folded)


_STYLE = """
.page { max-width: 1180px; }
.card { min-width: 0; }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.tall { max-height: 620px; overflow: auto; }
.tall thead th { position: sticky; top: 0; background: white; box-shadow: 0 1px 0 var(--line); vertical-align: bottom; z-index: 1; }
.sorts th[scope=row] { white-space: nowrap; max-width: 340px; overflow: hidden; text-overflow: ellipsis; }
.sorts td { white-space: nowrap; }
.sorts thead th { cursor: pointer; white-space: nowrap; }
.sorts thead th:hover { color: var(--ink); }
.sorts tbody tr { border-bottom: 1px solid #f0f3f6; }
.sorts tbody tr.on { background: #eaf2fa; }
.variant { color: var(--muted); font-size: 12px; font-weight: 400; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
.legend { margin: 0 0 12px; max-width: none; }
.chip { display: inline-block; margin-right: 20px; font-size: 14px; cursor: default; }
.bad { color: #b3261e; }
.halted { color: #96610a; }
a { color: var(--blue); }
svg.drawn { display: block; width: 100%; height: auto; font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
svg .tick { fill: var(--muted); }
svg .title { fill: var(--muted); font-size: 12px; }
svg .name { fill: var(--ink); font-size: 12px; }
svg .halo { paint-order: stroke; stroke: white; stroke-width: 4px; fill: var(--ink); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .base, svg .axis { stroke: #9aa7b4; stroke-width: 1; }
svg .error { stroke-width: 1.5; }
svg .front { fill: none; stroke: #9aa7b4; stroke-width: 1.4; stroke-dasharray: 6 4; }
svg .mark polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg .mark { transition: opacity .08s; }
svg.dim .mark:not(.on) { opacity: .12; }
svg .mark.on polyline { stroke-opacity: 1; stroke-width: 2.6; }
"""

_SCRIPT = """
let lit = null;
function light(group) {
  if (group === lit) return;
  lit = group;
  document.querySelectorAll('.on').forEach(each => each.classList.remove('on'));
  if (group !== null) document.querySelectorAll(`[data-g="${group}"]`).forEach(each => each.classList.add('on'));
  document.querySelectorAll('svg.drawn').forEach(svg => svg.classList.toggle('dim', group !== null));
}
document.addEventListener('mouseover', event => {
  const mark = event.target.closest('[data-g]');
  light(mark ? mark.dataset.g : null);
});
document.querySelectorAll('table.sorts').forEach(table => {
  table.querySelectorAll('thead th').forEach((head, column) => {
    let down = head.classList.contains('number');
    head.addEventListener('click', () => {
      const body = table.tBodies[0];
      const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
      const isNumber = row => row.cells[column].dataset.v !== undefined;
      const rows = [...body.rows].sort((a, b) => {
        if (isNumber(a) !== isNumber(b)) return isNumber(a) ? -1 : 1;
        const order = isNumber(a) ? value(a) - value(b) : value(a).localeCompare(value(b), undefined, {numeric: true});
        return down ? -order : order;
      });
      down = !down;
      body.append(...rows);
    });
  });
});
"""
