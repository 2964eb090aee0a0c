"""Scales, ticks and text for pictures that are drawn as SVG inside of a page, where a line and a table's row can light up together.

Lengths are in the picture's own units, pixels at its natural size; y grows downwards.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e8ec"
_PALETTE = ("#1f6fb2", "#d9772b", "#2e9467", "#8a5cb8", "#c2445a", "#7a6a3a", "#2a9db0", "#d46a9f")
_STRONG, _PALE = (20, 74, 128), (190, 205, 220)  # ends of the row of colours for more groups than the palette has
_LOG_FROM = 9.0  # ratio of the largest to the smallest value from which an axis of options is logarithmic
_CHARACTER = 0.56  # mean width of a character, in font sizes


def colors(count: int) -> list[str]:
    """A colour for each of the groups, best first: distinct ones for a few, else from strong to pale."""
    if count <= len(_PALETTE):
        return list(_PALETTE[:count])
    shares = [(place / (count - 1)) ** 0.6 for place in range(count)]
    return ["#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(_STRONG, _PALE, strict=True)) for share in shares]


def text_width(text: str, size: float) -> float:
    return _CHARACTER * size * len(text)


@dataclass(frozen=True)
class Scale:
    """From values to places: `low` is at `start`, `high` at `stop`."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The value's place, with values beyond the ends at the ends."""
        low, high, value = (math.log(x) if self.is_log else x for x in (self.low, self.high, max(self.low, min(self.high, value))))
        return self.start + (self.stop - self.start) * ((value - low) / (high - low) if high > low else 0.5)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values within the scale."""
        return _log_ticks(self.low, self.high, count) if self.is_log else _linear_ticks(self.low, self.high, count)


def fitted(values: Sequence[float], start: float, stop: float, *, margin: float = 0.06, is_log: bool = False) -> Scale:
    """A scale that has all values, with a margin at both ends."""
    low, high = min(values), max(values)
    if is_log:
        spread = max(math.log(high / low), 0.1) * margin
        return Scale(low * math.exp(-spread), high * math.exp(spread), start, stop, is_log=True)
    spread = (high - low or abs(high) or 1.0) * margin
    return Scale(low - spread, high + spread, start, stop)


def spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= _LOG_FROM


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    if high <= low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    for factors in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [value for value in values if low * 0.999999 <= value <= high * 1.000001]
        if len(ticks) <= 1.6 * count:
            break
    return ticks if len(ticks) > 1 else _linear_ticks(low, high, count)


def tick_text(value: float) -> str:
    """A round value, short: 25k for 25,000."""
    for beginning, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= beginning:
            return f"{value / unit:g}{letter}"
    return f"{value:.6g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def text(x: float, y: float, words: str, *, anchor: str = "middle", kind: str = "tick", turn: float = 0) -> str:
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{turned}>{html.escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def path(places: Sequence[tuple[float, float]], attributes: str) -> str:
    steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{steps}" {attributes}/>'


def picture(width: float, height: float, parts: Sequence[str], *, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(title, quote=True)}" class="drawn">'
        f"{''.join(parts)}</svg>"
    )


def axes(x: Scale, y: Scale, *, x_title: str, y_title: str, x_count: int, y_count: int) -> list[str]:
    """Horizontal grid lines, ticks and titles."""
    parts = []
    for value in y.ticks(y_count):
        parts.append(line(x.start, y(value), x.stop, y(value), "grid"))
        parts.append(text(x.start - 7, y(value) + 3.5, tick_text(value), anchor="end"))
    for value in x.ticks(x_count):
        parts.append(text(x(value), y.start + 16, tick_text(value)))
    parts.append(line(x.start, y.start, x.stop, y.start, "base"))
    parts.append(text((x.start + x.stop) / 2, y.start + 33, x_title, kind="title"))
    parts.append(text(12, (y.start + y.stop) / 2, y_title, kind="title", turn=-90))
    return parts


@dataclass(frozen=True)
class Box:
    """A rectangle, by its left upper corner."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: "Box") -> float:
        """The area that both have."""
        wide = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        high = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(0.0, wide) * max(0.0, high)


def placed_labels(anchors: Sequence[Box], sizes: Sequence[tuple[float, float]], *, within: Box, obstacles: Sequence[Box] = ()) -> list[Box]:
    """A box of each size beside its anchor (the box of its mark), where it covers least of other marks and of labels before it.

    The nearest places come first, to the right, left, above and below; farther rings follow where all these are taken. What would stick
    out at a side of `within` is moved inside.
    """
    taken = [*anchors, *obstacles]
    boxes = []
    for anchor, (width, height) in zip(anchors, sizes, strict=True):
        best = min(_candidates(anchor, width, height, within), key=lambda pair: _cost(pair[1], taken, within) + pair[0])
        boxes.append(best[1])
        taken.append(best[1])
    return boxes


def _candidates(anchor: Box, width: float, height: float, within: Box) -> list[tuple[float, Box]]:
    """(what its distance costs, box) for places around the anchor."""
    center_x, center_y = anchor.x + anchor.width / 2, anchor.y + anchor.height / 2
    found = []
    for ring, gap in enumerate((2.0, 9.0, 18.0, 30.0, 44.0)):
        left, right = anchor.x - gap - width, anchor.x + anchor.width + gap
        above, below = anchor.y - gap - height, anchor.y + anchor.height + gap
        middle_x, middle_y = center_x - width / 2, center_y - height / 2
        corners = (
            (right, middle_y), (left, middle_y), (middle_x, above), (middle_x, below), (right, above), (right, below), (left, above),
            (left, below), (center_x, above), (center_x, below), (center_x - width, above), (center_x - width, below),
        )  # fmt: skip
        for place, (x, y) in enumerate(corners):
            inside = max(within.x, min(x, within.x + within.width - width))
            found.append((ring * 12.0 + place * 0.5, Box(inside, y, width, height)))
    return found


def _cost(box: Box, taken: Sequence[Box], within: Box) -> float:
    outside = box.width * box.height - box.overlap(within)
    return 10.0 * outside + sum(map(box.overlap, taken))
