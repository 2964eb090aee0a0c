"""The paper's figure 1: accuracy over throughput, a circle's area being its parameters; the published models, and runs beside them.

Unusual: accuracies on other images than the published ones get a row of panels of their own, because no two accuracies on different
images compare. Throughputs of different machines share an axis, and the figure says which machine each of them is from.
"""

import io
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from esvit import zoo
from esvit.comparison.columns import Column, columns
from esvit.comparison.costs import repeated_throughput, with_throughput
from esvit.comparison.drawing import GRID, INK, MUTED, Box, placed_labels, tick_text
from esvit.comparison.groups import Group, grouped
from esvit.comparison.runs import Run, images_of

DATA = Path(__file__).parents[1] / "published_results.json"
KINDS = {"linear": "Linear probe", "knn": "k-NN"}
_OURS, _PUBLISHED, _OTHERS = "#d9772b", "#1f6fb2", "#9aa7b4"
_OUR_METHOD = "EsViT"  # of the published rows: the paper's own
_AREA = 2.0  # square points for each million parameters
_SMALLEST_AREA = 28.0
_LEAST_SPREAD = 4.0  # percentage points from bottom to top at least, so that small differences look small
_SIZES = (25e6, 100e6, 400e6)  # parameters of the circles in the legend
_DPI = 160


@dataclass(frozen=True)
class Dot:
    """One circle.

    images_per_second  of a forward pass
    deviation          standard deviation of the accuracy over seeds, None where there is one value
    family             joined by a line; empty: alone
    source             "ours", "published" (the paper's own rows) or "others" (its rows of other methods)
    estimated          whether the throughput was not measured but derived
    """

    label: str
    images_per_second: float
    accuracy: float
    parameters: float
    deviation: float | None
    family: str
    source: str
    estimated: bool


@dataclass(frozen=True)
class Panel:
    """One data set and one kind of accuracy ("linear" or "knn")."""

    dataset: str
    kind: str
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Ours:
    """What runs have to show: their panels, the machines that their throughput was measured on, and why some are not drawn."""

    panels: Sequence[Panel]
    machines: Sequence[str]
    notes: Sequence[str]


@cache
def _published() -> dict[str, Any]:
    return json.loads(DATA.read_text())


def published_panels() -> list[Panel]:
    """The paper's tables; accuracies of models in the zoo are the zoo's."""
    panels = []
    for kind in KINDS:
        dots = []
        for row in _published()["rows"]:
            accuracy = getattr(zoo.models()[row["zoo"]], kind) if "zoo" in row else row[kind]
            if accuracy is not None:
                dots.append(
                    Dot(
                        label=f"{row['method']} {row['architecture']}",
                        images_per_second=row["images_per_second"],
                        accuracy=accuracy,
                        parameters=row["parameters_millions"] * 1e6,
                        deviation=None,
                        family=row["family"],
                        source="published" if row["method"] == _OUR_METHOD else "others",
                        estimated=row.get("estimated", False),
                    )
                )
        panels.append(Panel(_published()["dataset"], kind, dots))
    return panels


def our_panels(runs: Sequence[Run], metrics: Mapping[str, Sequence[str]], *, dataset: str | None) -> Ours:
    """Panels of what runs reached, where the throughput of their backbone was measured too.

    metrics  kind -> patterns; a group's first metric that fits is drawn
    dataset  what the accuracies are of; None: the name of the folder of the images
    """
    others = [run for run in with_throughput(runs) if run.task != "throughput"]
    groups = grouped(others)
    notes, panels = [], []
    for kind, patterns in metrics.items():
        for name, by_column in _by_dataset(groups, columns(others, patterns, best="max"), dataset=dataset).items():
            title, dots = max(by_column.items(), key=lambda pair: len(pair[1]))  # the first of the patterns among equals
            panels.append(Panel(name, kind, dots))
            left = [f"{other} of {_groups(len(some))}" for other, some in by_column.items() if other != title]
            if left:
                notes.append(f"{name}, {KINDS[kind]}: shows {title}; left out: {', '.join(left)}")
    without = [group.label for group in groups if group.cost("throughput/images_per_second") is None]
    if without and panels:
        notes.append(f"not drawn, as the throughput of their backbones was not measured: {', '.join(without)}")
    notes += repeated_throughput(runs)
    machines = dict.fromkeys(_machine(run) for run in runs if run.task == "throughput")
    return Ours(_in_order(panels), list(machines), notes)


def _by_dataset(groups: Sequence[Group], found: Sequence[Column], *, dataset: str | None) -> dict[str, dict[str, list[Dot]]]:
    """Name of the images -> title of the column -> the dots of the groups that have a value in it."""
    panels: dict[str, dict[str, list[Dot]]] = {}
    for column in found:
        for group in groups:
            name, dot = dataset or _dataset(group, column), _dot(group, column)
            if name is not None and dot is not None:
                panels.setdefault(name, {}).setdefault(column.title, []).append(dot)
    return panels


def _groups(count: int) -> str:
    return "1 group" if count == 1 else f"{count} groups"


def _dot(group: Group, column: Column) -> Dot | None:
    summary = group.summary(column)
    speed, parameters = group.cost("throughput/images_per_second"), group.cost("throughput/parameters")
    if summary is None or summary.provisional or math.isnan(summary.mean) or speed is None or parameters is None:
        return None
    return Dot(
        label=f"{group.label}, {parameters / 1e6:.3g} M",
        images_per_second=speed,
        accuracy=summary.mean,
        parameters=parameters,
        deviation=summary.deviation,
        family="",
        source="ours",
        estimated=False,
    )


def _dataset(group: Group, column: Column) -> str | None:
    """The name of the images that a group's accuracy in this column is of."""
    for run in group.runs:
        series = column.of(run)
        if series is not None:
            name = images_of(run, series)
            return _published()["dataset"] if _is_published(name) else name
    return None


def _is_published(name: str) -> bool:
    plain = re.sub("[^a-z0-9]", "", name.lower())
    return plain in ("imagenet", "imagenet1k", "in1k", "ilsvrc2012", "ilsvrc")


def _machine(run: Run) -> str:
    for series in run.series:
        if series.protocol is not None and "machine" in series.protocol:
            return f"{series.protocol['machine']}, {series.protocol.get('precision', '')}".rstrip(", ")
    return f"host {run.tags.get('host', 'unknown')}"


def _in_order(panels: Sequence[Panel]) -> list[Panel]:
    """Row by row: a data set after the other, each with all kinds that it has."""
    names = dict.fromkeys(panel.dataset for panel in panels)
    return sorted(panels, key=lambda panel: (list(names).index(panel.dataset), list(KINDS).index(panel.kind)))


def together(published: Sequence[Panel], ours: Sequence[Panel]) -> list[Panel]:
    """The panels of both; where both have the same data set and kind, one panel."""
    dots: dict[tuple[str, str], list[Dot]] = {}
    for panel in [*published, *ours]:
        dots.setdefault((panel.dataset, panel.kind), []).extend(panel.dots)
    return _in_order([Panel(dataset, kind, some) for (dataset, kind), some in dots.items()])


def draw(panels: Sequence[Panel], machines: Sequence[str]) -> dict[str, bytes]:
    """The figure as {"png": ..., "svg": ...}: a row for each data set, the linear probe before k-NN."""
    rows = [[panel for panel in panels if panel.dataset == name] for name in dict.fromkeys(panel.dataset for panel in panels)]
    count = max(map(len, rows))
    height = 4.6 * len(rows) + 0.95
    figure = Figure(figsize=(6.3 * count + 0.3, height), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), count, squeeze=False)
    sides = {"left": 0.15 / count, "right": 0.985, "top": 1 - 0.42 / height, "bottom": 1.4 / height}
    figure.subplots_adjust(**sides, wspace=0.16, hspace=0.34)
    for row, axes_of_row in zip(rows, grid, strict=True):
        for place, axes in enumerate(axes_of_row):
            if place < len(row):
                _draw_panel(axes, row[place], is_first=place == 0)
            else:
                axes.set_axis_off()
    _legend(figure, panels, machines, height)
    canvas.draw()  # places are known from here on
    for row, axes_of_row in zip(rows, grid, strict=True):
        for panel, axes in zip(row, axes_of_row, strict=False):
            _label(figure, axes, panel.dots, canvas)
    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "efficiency", "svg.fonttype": "none"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            out = io.BytesIO()
            figure.savefig(out, format=kind, dpi=_DPI, metadata=metadata)
            files[kind] = out.getvalue()
    return files


def _draw_panel(axes: Axes, panel: Panel, *, is_first: bool) -> None:
    for family in _families(panel.dots):
        xs, ys = [dot.images_per_second for dot in family], [dot.accuracy for dot in family]
        axes.plot(xs, ys, color=_color(family[0].source), linewidth=1, alpha=0.55, zorder=1)
    for dot in sorted(panel.dots, key=lambda dot: -dot.parameters):
        is_ours = dot.source == "ours"
        face = "none" if dot.estimated else _color(dot.source)
        if dot.deviation is not None:
            axes.errorbar(
                dot.images_per_second, dot.accuracy, yerr=dot.deviation, color=_color(dot.source), linewidth=1.2, capsize=3, zorder=2
            )
        axes.scatter(
            [dot.images_per_second], [dot.accuracy], s=_area(dot), facecolors=face, linewidths=1.4 if is_ours else 1.0,
            edgecolors=INK if is_ours else _color(dot.source) if dot.estimated else "white", alpha=0.9, zorder=4 if is_ours else 3,
            marker="D" if is_ours else "o",
        )  # fmt: skip
    _fit(axes, panel.dots)
    axes.set_title(f"{KINDS[panel.kind]}, {panel.dataset}", fontsize=11, color=INK, loc="left")
    axes.set_xlabel("throughput of a forward pass (images / s, logarithmic)", color=MUTED, fontsize=9.5)
    if is_first:
        axes.set_ylabel("top-1 accuracy (%)", color=MUTED, fontsize=9.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9aa7b4")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, which="both")


def _fit(axes: Axes, dots: Sequence[Dot]) -> None:
    speeds, accuracies = [dot.images_per_second for dot in dots], [dot.accuracy for dot in dots]
    axes.set_xscale("log")
    middle, reach = math.sqrt(min(speeds) * max(speeds)), max(math.sqrt(max(speeds) / min(speeds)) ** 1.32, 2.4)
    axes.set_xlim(middle / reach, middle * reach)
    center, half = (max(accuracies) + min(accuracies)) / 2, max(max(accuracies) - min(accuracies), _LEAST_SPREAD) / 2
    axes.set_ylim(center - 1.28 * half, center + 1.28 * half)
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(round(value, 6))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))


def _color(source: str) -> str:
    return {"ours": _OURS, "published": _PUBLISHED, "others": _OTHERS}[source]


def _label(figure: Figure, axes: Axes, dots: Sequence[Dot], canvas: FigureCanvasAgg) -> None:
    """Names beside their circles, where they cover neither a circle nor each other; a line to those that had to go far."""
    renderer = canvas.get_renderer()
    ordered = sorted(dots, key=lambda dot: (dot.source != "ours", dot.source != "published", -dot.accuracy))
    texts = [figure.text(0, 0, dot.label, fontsize=8, color=MUTED if dot.source == "others" else INK, zorder=6) for dot in ordered]
    sizes = [(box.width, box.height) for box in (text.get_window_extent(renderer) for text in texts)]
    circles = [_circle(axes, dot) for dot in ordered]
    inside = axes.get_window_extent(renderer)
    within = Box(inside.x0, inside.y0, inside.width, inside.height)
    boxes = placed_labels(circles, sizes, within=within, obstacles=_along_lines(axes, dots))
    to_figure = figure.transFigure.inverted()  # shares of the figure hold in every format, pixels do not
    for text, box, circle in zip(texts, boxes, circles, strict=True):
        text.set_position(tuple(to_figure.transform((box.x, box.y))))
        text.set_verticalalignment("bottom")
        center = (circle.x + circle.width / 2, circle.y + circle.height / 2)
        near = (min(max(center[0], box.x), box.x + box.width), min(max(center[1], box.y), box.y + box.height))
        distance, radius = math.dist(near, center), circle.width / 2
        if distance - radius > 5 * _DPI / 72:
            share = 1 - radius / distance
            edge = (near[0] + share * (center[0] - near[0]), near[1] + share * (center[1] - near[1]))
            ends = zip(to_figure.transform(near), to_figure.transform(edge), strict=True)
            figure.add_artist(Line2D(*ends, color=MUTED, linewidth=0.6, transform=figure.transFigure, zorder=2))


def _area(dot: Dot) -> float:
    """Square points of its circle; the smallest networks get a dot that can be seen."""
    return max(_SMALLEST_AREA, _AREA * dot.parameters / 1e6)


def _circle(axes: Axes, dot: Dot) -> Box:
    x, y = axes.transData.transform((dot.images_per_second, dot.accuracy))
    radius = (_area(dot) / math.pi) ** 0.5 * _DPI / 72 * 1.15
    return Box(x - radius, y - radius, 2 * radius, 2 * radius)


def _along_lines(axes: Axes, dots: Sequence[Dot]) -> list[Box]:
    """Small boxes over the lines of families, for names to keep off."""
    size = 3 * _DPI / 72
    boxes = []
    for family in _families(dots):
        places = [axes.transData.transform((dot.images_per_second, dot.accuracy)) for dot in family]
        for (x1, y1), (x2, y2) in itertools.pairwise(places):
            count = max(1, int(math.hypot(x2 - x1, y2 - y1) / size))
            shares = [number / count for number in range(count + 1)]
            boxes += [Box(x1 + (x2 - x1) * share - size / 2, y1 + (y2 - y1) * share - size / 2, size, size) for share in shares]
    return boxes


def _families(dots: Sequence[Dot]) -> list[list[Dot]]:
    """Dots of one family together, by rising throughput."""
    families: dict[str, list[Dot]] = {}
    for dot in sorted(dots, key=lambda dot: dot.images_per_second):
        if dot.family:
            families.setdefault(dot.family, []).append(dot)
    return list(families.values())


def _legend(figure: Figure, panels: Sequence[Panel], machines: Sequence[str], height: float) -> None:
    sources = {dot.source for panel in panels for dot in panel.dots}
    names = {
        "ours": f"ours, throughput on {'; '.join(machines)}",
        "published": f"EsViT as published, throughput on {_published()['machine']}",
        "others": f"other methods as published, throughput on {_published()['machine']}",
    }
    handles = [
        Line2D([], [], linestyle="", marker="D" if source == "ours" else "o", markersize=8, markerfacecolor=_color(source),
               markeredgecolor=INK if source == "ours" else "white", label=name)
        for source, name in names.items() if source in sources
    ]  # fmt: skip
    if any(dot.estimated for panel in panels for dot in panel.dots):
        estimated = {"markerfacecolor": "none", "markeredgecolor": _OTHERS, "label": "throughput estimated"}
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=8, **estimated))  # type: ignore[arg-type]
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.02, 0.01), frameon=False, fontsize=9, labelcolor=INK, ncols=1)
    circles = [
        Line2D([], [], linestyle="", marker="o", markersize=2 * (_AREA * size / 1e6 / math.pi) ** 0.5, markerfacecolor="none",
               markeredgecolor=MUTED, label=f"{size / 1e6:.0f} M")
        for size in _SIZES
    ]  # fmt: skip
    figure.legend(
        handles=circles, loc="lower right", bbox_to_anchor=(0.985, 0.06 / height), frameon=False, fontsize=9, labelcolor=MUTED, ncols=3,
        title="area: parameters", title_fontsize=9, handletextpad=1.4, columnspacing=2.2,
    ).get_title().set_color(MUTED)  # fmt: skip
