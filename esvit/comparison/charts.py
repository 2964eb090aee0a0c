"""The pictures of a comparison: learning curves, the Pareto figure, and parallel coordinates.

A group has one colour in all of them; what belongs to the group of place g carries data-g="g", so that the page can light it up.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esvit.comparison.columns import Column
from esvit.comparison.differences import ABSENT, short_names, text_of
from esvit.comparison.drawing import (
    Box,
    Scale,
    axes,
    fitted,
    line,
    path,
    picture,
    placed_labels,
    spans_decades,
    text,
    text_width,
    tick_text,
)
from esvit.comparison.groups import Group, Summary, pareto_front, telling_options
from esvit.comparison.runs import Run

_POINTS = 160  # of a curve at most
_LABELLED = 12  # groups whose names fit into the Pareto figure
_OPTION_AXES = 7
_METRIC_AXES = 3


def curves(groups: Sequence[Group], colors: Sequence[str], column: Column) -> str | None:
    """The course of a metric in every run, and the mean of each group of several; None if no run has two values of it."""
    courses = [[(run, _finite(run, column)) for run in group.runs] for group in groups]
    points = [point for course in courses for _, some in course if len(some) > 1 for point in some]
    if not points:
        return None
    x = Scale(0, max(step for step, _ in points), 58, 482)
    y = fitted(_without_outliers([value for _, value in points]), 236, 14)
    parts = axes(x, y, x_title="optimizer step", y_title=column.metric, x_count=6, y_count=5)
    for place in reversed(range(len(groups))):  # the best ones on top
        lines = []
        several = len(groups[place].runs) > 1
        for run, some in courses[place]:
            if len(some) > 1:
                dash = "" if run.is_finished else ' stroke-dasharray="5 3"'
                thin = ' stroke-width="1" stroke-opacity=".45"' if several else ""
                lines.append(path([(x(step), y(value)) for step, value in _thinned(some)], f'stroke="{colors[place]}"{thin}{dash}'))
        if mean := _mean([some for run, some in courses[place] if run.is_finished]):
            lines.append(path([(x(step), y(value)) for step, value in _thinned(mean)], f'stroke="{colors[place]}" stroke-width="2.4"'))
        parts.append(_mark(place, groups[place].label, lines))
    return picture(500, 278, parts, title=f"{column.title} over optimizer steps")


def _mark(place: int, title: str, parts: Sequence[str]) -> str:
    return f'<g class="mark" data-g="{place}"><title>{html.escape(title)}</title>{"".join(parts)}</g>' if parts else ""


def _finite(run: Run, column: Column) -> list[tuple[int, float]]:
    series = column.of(run)
    return [] if series is None else [(step, value) for step, value in series.points if math.isfinite(value)]


def _mean(courses: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Over the runs, at the steps that all of them have; empty of fewer than two runs or steps."""
    known = [dict(course) for course in courses if len(course) > 1]
    if len(known) < 2:
        return []
    shared = sorted(set.intersection(*(set(course) for course in known)))
    return [(step, sum(course[step] for course in known) / len(known)) for step in shared] if len(shared) > 1 else []


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over neighbours where there are more points than a line can show; the ends stay as they are."""
    size = math.ceil(len(points) / _POINTS)
    if size == 1:
        return list(points)
    parts = [points[start : start + size] for start in range(1, len(points) - 1, size)]
    inner = [(sum(step for step, _ in part) // len(part), sum(value for _, value in part) / len(part)) for part in parts]
    return [points[0], *inner, points[-1]]


def _without_outliers(values: Sequence[float]) -> list[float]:
    """Without what would press all the rest into one line: a loss that explodes is drawn along the edge."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
    reach = 3 * (high - low) or math.inf
    return [value for value in values if low - reach <= value <= high + reach]


@dataclass(frozen=True)
class Pareto:
    """What the figure shows: groups in terms of a cost and a result, and the places of those on the front."""

    cost: str
    column: Column
    lower_cost: bool
    points: Mapping[int, tuple[float, float]]
    front: Sequence[int]


def pareto_of(groups: Sequence[Group], column: Column, cost: str, *, lower_cost: bool) -> Pareto | None:
    """None if fewer than two groups have both; groups without a finished run are left out."""
    points = {}
    for place, group in enumerate(groups):
        summary, price = group.summary(column), group.cost(cost)
        if summary is not None and not summary.provisional and math.isfinite(summary.mean) and price is not None:
            points[place] = (price, summary.mean)
    if len(points) < 2:
        return None
    return Pareto(cost, column, lower_cost, points, pareto_front(points, lower_cost=lower_cost, lower_value=column.lower_is_better))


def pareto(groups: Sequence[Group], colors: Sequence[str], shown: Pareto) -> str:
    """A dot for each group, with standard deviations; a line through those that no other beats in both."""
    summaries: dict[int, Summary] = {place: summary for place in shown.points if (summary := groups[place].summary(shown.column))}
    reach = [summary.mean + sign * (summary.deviation or 0.0) for summary in summaries.values() for sign in (-1, 1)]
    costs = [cost for cost, _ in shown.points.values()]
    x = fitted(costs, 70, 980, margin=0.08, is_log=spans_decades(costs))
    y = fitted(reach, 330, 20, margin=0.1)
    better = "smaller" if shown.lower_cost else "larger"
    parts = axes(x, y, x_title=f"{unit_of(shown.cost)} ({better} is better)", y_title=shown.column.metric, x_count=8, y_count=6)
    places = {place: (x(cost), y(value)) for place, (cost, value) in shown.points.items()}
    if len(shown.front) > 1:
        parts.append(path([places[place] for place in shown.front], 'class="front"'))
    bars = []
    for place, (left, top) in reversed(places.items()):
        deviation = summaries[place].deviation or 0.0
        low, high = y(summaries[place].mean - deviation), y(summaries[place].mean + deviation)
        bar = line(left, low, left, high, "error") if deviation else ""
        bars.append(Box(left - 1, high, 2, low - high))
        dot = f'<circle cx="{left:.1f}" cy="{top:.1f}" r="6" fill="{colors[place]}"/>'
        title = (
            f"{groups[place].label}: {tick_text(shown.points[place][0])} {shown.cost}, {summaries[place].mean:.4g} {shown.column.metric}"
        )
        parts.append(_mark(place, title, [bar.replace("/>", f' stroke="{colors[place]}"/>'), dot]))
    named = [place for place in places if place in shown.front or len(places) <= _LABELLED][:_LABELLED]
    others = [_dot(*places[place]) for place in places if place not in named]
    parts += _names(named, groups, places, obstacles=[*others, *bars])
    return picture(1000, 372, parts, title=f"{shown.column.title} over {shown.cost}")


def _dot(x: float, y: float) -> Box:
    return Box(x - 7, y - 7, 14, 14)


def _names(
    named: Sequence[int], groups: Sequence[Group], places: Mapping[int, tuple[float, float]], *, obstacles: Sequence[Box]
) -> list[str]:
    """Labels beside their dots."""
    words = [_shortened(groups[place].label, 44) for place in named]
    sizes = [(text_width(each, 12), 14.0) for each in words]
    boxes = placed_labels([_dot(*places[place]) for place in named], sizes, within=Box(60, 4, 930, 330), obstacles=obstacles)
    return [
        f'<g class="mark" data-g="{place}">{text(box.x, box.y + 11, word, anchor="start", kind="name")}</g>'
        for place, box, word in zip(named, boxes, words, strict=True)
    ]


def _shortened(words: str, length: int) -> str:
    return words if len(words) <= length else f"{words[: length - 1]}…"


def unit_of(cost: str) -> str:
    """A cost as the title of an axis."""
    known = {
        "hours": "hours of training",
        "images_per_second": "images / s in training",
        "throughput/images_per_second": "images / s of the backbone's forward pass",
        "throughput/images_per_second_train": "images / s of the backbone's training step",
        "throughput/parameters": "parameters of the backbone",
        "throughput/flops": "multiply-adds of the backbone per image",
    }
    return known.get(cost, cost)


@dataclass(frozen=True)
class _Axis:
    """One vertical axis: where each group's value lies on it, and what is written beside it. A place of None: the group has no value."""

    title: str
    places: Sequence[float | None]
    marks: Sequence[tuple[float, str]]


def parallel(groups: Sequence[Group], colors: Sequence[str], columns: Sequence[Column]) -> str | None:
    """One line for each group through its options and results; None if there are not two groups, or no option differs."""
    options = _most_telling(groups)
    if len(groups) < 2 or not options:
        return None
    top, bottom, absent = 46.0, 316.0, 344.0
    short = short_names(options)
    drawn = [_option_axis(short[name], [group.options[name] for group in groups], bottom, top) for name in options]
    drawn += [axis for column in columns if (axis := _metric_axis(groups, column, bottom, top)) is not None][:_METRIC_AXES]
    gap = 860 / (len(drawn) - 1) if len(drawn) > 1 else 0
    lefts = [60 + gap * number for number in range(len(drawn))]
    parts = []
    for place in reversed(range(len(groups))):
        points = [(left, absent if axis.places[place] is None else axis.places[place]) for left, axis in zip(lefts, drawn, strict=True)]
        parts.append(_mark(place, groups[place].label, [path([(x, y) for x, y in points if y is not None], f'stroke="{colors[place]}"')]))
    for number, (left, axis) in enumerate(zip(lefts, drawn, strict=True)):
        parts.append(line(left, top - 8, left, bottom + 8, "axis"))
        room = int(gap / 7) if gap else 60
        parts.append(_axis_title(axis.title, left, room, number, is_last=number == len(drawn) - 1))
        parts += [text(left + 6, y + 4, _shortened(words, room - 2), anchor="start", kind="tick halo") for y, words in axis.marks]
        if any(place is None for place in axis.places):
            parts.append(text(left + 6, absent + 4, "none", anchor="start", kind="tick halo"))
    return picture(1000, 356, parts, title="Parallel coordinates of options and results")


def _axis_title(title: str, left: float, room: int, number: int, *, is_last: bool) -> str:
    """Titles of neighbours at different heights, those at the sides within the picture."""
    height = 18 if number % 2 == 0 else 32
    if number == 0:
        return text(left - 50, height, _shortened(title, 2 * room), anchor="start", kind="title")
    if is_last:
        return text(left + 70, height, _shortened(title, 2 * room), anchor="end", kind="title")
    return text(left, height, _shortened(title, 2 * room), kind="title")


def _most_telling(groups: Sequence[Group]) -> list[str]:
    """The options with the most different values, in their own order."""
    options = telling_options(groups)
    counts = {name: len({repr(group.options[name]) for group in groups}) for name in options}
    kept = sorted(options, key=lambda name: -counts[name])[:_OPTION_AXES]
    return [name for name in options if name in kept]


def _option_axis(title: str, values: Sequence[Any], bottom: float, top: float) -> _Axis:
    """Numbers by their size, anything else evenly spaced."""
    present = [value for value in values if value is not ABSENT]
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        scale = fitted(present, bottom, top, margin=0, is_log=spans_decades(present))
        numbers = sorted(set(present))
        ticks = [(scale(number), text_of(number)) for number in (numbers if len(numbers) <= 6 else scale.ticks(5))]
        return _Axis(title, [None if value is ABSENT else scale(value) for value in values], ticks)
    different = sorted({text_of(value) for value in present})
    even = Scale(0, max(1, len(different) - 1), bottom, top)
    where = {words: even(number) for number, words in enumerate(different)}
    marks = [(where[words], words) for words in different[:: max(1, len(different) // 12)]]
    return _Axis(title, [None if value is ABSENT else where[text_of(value)] for value in values], marks)


def _metric_axis(groups: Sequence[Group], column: Column, bottom: float, top: float) -> _Axis | None:
    """The group's mean, better values further up; None unless two groups have one."""
    summaries = [group.summary(column) for group in groups]
    means = [summary.mean if summary is not None and math.isfinite(summary.mean) else None for summary in summaries]
    present = [mean for mean in means if mean is not None]
    if len(present) < 2:
        return None
    start, stop = (top, bottom) if column.lower_is_better else (bottom, top)
    scale = fitted(present, start, stop, margin=0)
    marks = sorted({min(present), max(present), *scale.ticks(4)})
    written = [
        (scale(value), f"{value:.4g}") for value in marks if value in (min(present), max(present)) or _is_free(scale, value, present)
    ]
    return _Axis(column.title, [None if mean is None else scale(mean) for mean in means], written)


def _is_free(scale: Scale, value: float, present: Sequence[float]) -> bool:
    """Whether a tick's text has room beside those of the ends."""
    return all(abs(scale(value) - scale(end)) > 14 for end in (min(present), max(present)))
