"""Pictures of what a backbone has learned: attention on photos, matched regions, coloured region maps, neighbours, entropy curves.

Letters: r x c rows and columns of a map, N = r * c regions.
Sheets of photos are drawn with Pillow, at sizes that a page about 1000 pixels wide shows sharply; lines and curves with matplotlib, without
pyplot. Whatever a picture means is written into it, for it will be seen without its page.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont

from esvit.evaluation.figures import COLORS, GRID, INK, MUTED, quiet

HEAT = matplotlib.colormaps["inferno"]
SATURATED = 0.99  # quantile of a map that gets the brightest colour: a single cell would leave the others dark
LIKE, UNLIKE = "#2e9467", "#c2445a"  # frames of neighbours of the same and of another class
PAIR_COLORS = ("#4ea3e0", "#ffa14a", "#5cd69a", "#d16ce0", "#f4e04d", "#ff6b6b", "#7d8cff", "#a6e22e", "#ff9ecb", "#3fd8d8")


@dataclass(frozen=True)
class Tile:
    """A picture on a sheet, with a caption below, and a frame in some colour or none."""

    image: Image.Image
    caption: str = ""
    frame: str | None = None


@dataclass(frozen=True)
class Sheet:
    """Rows of tiles under column titles, each row after its title, and a legend below; None leaves a place free."""

    rows: Sequence[Sequence[Tile | None]]
    column_titles: Sequence[str] = ()
    row_titles: Sequence[str] = ()
    legend: Image.Image | None = None
    font_size: int = 14
    gap: int = 10
    margin: int = 8

    @property
    def _font(self) -> ImageFont.FreeTypeFont:
        return lettering(self.font_size)

    def draw(self) -> Image.Image:
        columns = max(len(row) for row in self.rows)
        widths = [max((tile.image.width for tile in self._column(number)), default=0) for number in range(columns)]
        heights = [max((tile.image.height for tile in row if tile), default=0) for row in self.rows]
        line = round(self.font_size * 1.5)
        below = [line if any(tile and tile.caption for tile in row) else 0 for row in self.rows]
        head = line if self.column_titles else 0
        left = self.margin + max((round(self._font.getlength(title)) + self.gap for title in self.row_titles), default=0)
        lefts = np.cumsum([left, *(width + self.gap for width in widths)])
        tops = np.cumsum([self.margin + head, *(height + text + self.gap for height, text in zip(heights, below, strict=True))])

        foot = self.legend.height + self.gap if self.legend else 0
        width = max(int(lefts[-1]) - self.gap + self.margin, left + self.legend.width + self.margin if self.legend else 0)
        canvas = Image.new("RGB", (width, int(tops[-1]) - self.gap + foot + self.margin), "white")
        draw = ImageDraw.Draw(canvas)
        for number, title in enumerate(self.column_titles):
            middle = int(lefts[number]) + widths[number] / 2
            draw.text((middle, self.margin + head / 2 - 3), title, fill=MUTED, font=self._font, anchor="mm")
        for row, title in enumerate(self.row_titles):
            draw.text((self.margin, int(tops[row]) + heights[row] / 2), title, fill=MUTED, font=self._font, anchor="lm")
        for row, tiles in enumerate(self.rows):
            for column, tile in enumerate(tiles):
                if tile is not None:
                    self._place(canvas, draw, tile, int(lefts[column]), int(tops[row]), widths[column], heights[row])
        if self.legend:
            canvas.paste(self.legend, (left, canvas.height - self.margin - self.legend.height))
        return canvas

    def _column(self, number: int) -> list[Tile]:
        return [tile for row in self.rows if number < len(row) and (tile := row[number]) is not None]

    def _place(self, canvas: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int, width: int, height: int) -> None:
        left += (width - tile.image.width) // 2
        canvas.paste(tile.image, (left, top))
        if tile.frame:
            box = (left - 4, top - 4, left + tile.image.width + 3, top + tile.image.height + 3)
            draw.rectangle(box, outline=tile.frame, width=4)
        middle = (left + tile.image.width / 2, top + height + round(self.font_size * 0.85))
        draw.text(middle, _fitting(tile.caption, self._font, width + self.gap), fill=INK, font=self._font, anchor="mm")


@lru_cache
def lettering(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib: it has the signs and accents that Pillow's lacks."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut short where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def heat_over(photo: Image.Image, attention: np.ndarray) -> Image.Image:
    """The photo, dimmed and grey, with attention (r, c) glowing over it, from 0 to the most in the map.

    Or to twice an even share, if that is more: what is next to an even spread is seen to be.
    """
    strongest = max(float(np.quantile(attention, SATURATED)), 2 * float(attention.mean()))
    values = _enlarged(np.clip(attention / strongest, 0, 1), photo.size)
    grey = np.asarray(photo.convert("L"), dtype=np.float32)[:, :, None] / 255 * 0.75
    opacity = 0.15 + 0.65 * values[:, :, None]
    return _image(grey * (1 - opacity) + HEAT(values)[:, :, :3] * opacity)


def spotlight(photo: Image.Image, mask: np.ndarray) -> Image.Image:
    """The photo where the mask (r, c) is true, and grey and dark elsewhere."""
    shown = _enlarged(mask.astype(np.float32), photo.size)[:, :, None] > 0.5
    colored = np.asarray(photo, dtype=np.float32) / 255
    dark = np.asarray(photo.convert("L"), dtype=np.float32)[:, :, None] / 255 * 0.3
    return _image(np.where(shown, colored, dark))


def mark(photo: Image.Image, place: tuple[float, float]) -> Image.Image:
    """A copy with a ring around a place, its row and column as shares of the photo."""
    marked = photo.copy()
    draw = ImageDraw.Draw(marked)
    y, x = place[0] * photo.height, place[1] * photo.width
    radius = max(4, photo.width // 28)
    for grown, color in ((2, "black"), (0, "white")):
        around = radius + grown
        draw.ellipse((x - around, y - around, x + around, y + around), outline=color, width=2 + grown // 2)
    return marked


def paint(colors: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Region colours (r, c, 3) from 0 to 1 as a picture; NaN, the background, becomes nearly black."""
    small = np.where(np.isnan(colors), 0.07, colors)
    return Image.fromarray((small * 255).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def heat_legend(text: str) -> Image.Image:
    """A bar of the colours of `heat_over`, with what they mean."""
    font = lettering(14)
    bar = Image.fromarray((HEAT(np.linspace(0, 1, 160))[None, :, :3] * 255).astype(np.uint8)).resize((160, 14))
    legend = Image.new("RGB", (160 + 12 + round(font.getlength(text)) + 4, 22), "white")
    legend.paste(bar, (0, 4))
    ImageDraw.Draw(legend).text((172, 11), text, fill=MUTED, font=font, anchor="lm")
    return legend


@dataclass(frozen=True)
class Marker:
    """A place that stands out in one of the views.

    view   0 or 1
    place  row and column of its region
    shape  of matplotlib's markers
    label  for the legend
    """

    view: int
    place: tuple[int, int]
    shape: str
    color: str
    label: str


@dataclass(frozen=True)
class RegionPair:
    """Rows and columns of two regions that were matched, and whether each is the other's best match."""

    one: tuple[int, int]
    two: tuple[int, int]
    mutual: bool


def matches_picture(
    views: tuple[Image.Image, Image.Image],
    *,
    titles: tuple[str, str],
    grids: tuple[tuple[int, int], tuple[int, int]],
    pairs: Sequence[RegionPair],
    markers: Sequence[Marker],
) -> bytes:
    """PNG of two views side by side: a line of its own colour from region to region, dashed where only the first chose the second.

    titles  of the views
    grids   rows and columns of their regions
    """
    side, gap = 1.0, 0.12
    figure = Figure(figsize=(6.0, 3.65), layout="constrained")
    axes = figure.add_subplot()
    for number, (view, title) in enumerate(zip(views, titles, strict=True)):
        left = number * (side + gap)
        axes.imshow(np.asarray(view), extent=(left, left + side, side, 0), interpolation="bicubic")
        axes.text(left + side / 2, -0.02, title, ha="center", va="bottom", color=MUTED, size=10)

    def spot(view: int, place: tuple[int, int]) -> tuple[float, float]:
        rows, columns = grids[view]
        return view * (side + gap) + (place[1] + 0.5) / columns * side, (place[0] + 0.5) / rows * side

    for number, pair in enumerate(pairs):
        color = PAIR_COLORS[number % len(PAIR_COLORS)]
        (x1, y1), (x2, y2) = spot(0, pair.one), spot(1, pair.two)
        axes.plot([x1, x2], [y1, y2], color="black", alpha=0.35, linewidth=3.2)  # a dark edge: lines cross bright and dark photos
        axes.plot([x1, x2], [y1, y2], color=color, linewidth=1.8, linestyle="-" if pair.mutual else (0, (3, 2)))
        axes.plot(
            [x1, x2], [y1, y2], "o", color=color if pair.mutual else "white", markeredgecolor=color, markersize=6, markeredgewidth=1.6
        )
    for marker in markers:
        axes.plot(*spot(marker.view, marker.place), marker.shape, color=marker.color, markeredgecolor="white", markersize=11, zorder=3)

    axes.set_xlim(-0.01, 2 * side + gap + 0.01)
    axes.set_ylim(side + 0.01, -0.01)
    axes.set_aspect("equal")
    axes.set_axis_off()
    lines = [
        Line2D([], [], color=MUTED, linewidth=1.8, marker="o", markersize=6, label="most similar, each to the other"),
        Line2D(
            [], [], color=MUTED, linewidth=1.8, linestyle=(0, (3, 2)), marker="o", markersize=6, markerfacecolor="white", label="one way"
        ),
    ]
    kinds = {marker.label: marker for marker in markers}.values()
    lines += [
        Line2D([], [], color=kind.color, marker=kind.shape, linestyle="", markersize=9, markeredgecolor="white", label=kind.label)
        for kind in kinds
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    return _png(figure)


def entropy_figure(
    *, bits: Sequence[np.ndarray], spreads: Sequence[np.ndarray], shares: Sequence[np.ndarray], stages: Sequence[tuple[int, int]]
) -> bytes:
    """PNG of entropy over depth: a point for every head, a line through the means of the blocks; in bits, and as a share of the most.

    bits, spreads, shares  for each block (heads,): mean over the images, standard deviation over them, share
    stages                 for each block rows and columns of its grid: where it changes, a new stage begins
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = list(range(1, len(bits) + 1))
    for axes, values, unit in ((left, bits, "entropy (bits)"), (right, shares, "share of the most possible")):
        _shade_stages(axes, stages)
        for number, of_block in zip(numbers, values, strict=True):
            places = number + np.linspace(-0.18, 0.18, len(of_block)) if len(of_block) > 1 else np.array([number])
            axes.plot(places, of_block, "o", color=COLORS[0], alpha=0.45, markersize=4, markeredgewidth=0)
            if axes is left:
                axes.errorbar(places, of_block, spreads[number - 1], fmt="none", ecolor=COLORS[0], alpha=0.3, linewidth=0.9)
        axes.plot(numbers, [float(of_block.mean()) for of_block in values], color=COLORS[1], linewidth=2, marker="o", markersize=4.5)
        quiet(axes)
        axes.set_xlabel("block", color=MUTED, size=9.5)
        axes.set_ylabel(unit, color=MUTED, size=9.5)
        axes.set_xlim(0.5, len(bits) + 0.5)
        axes.set_xticks(numbers if len(numbers) <= 16 else numbers[::2])
        axes.set_ylim(bottom=0)
    right.set_ylim(0, 1.05)
    handles = [
        Line2D([], [], color=COLORS[0], alpha=0.6, marker="o", linestyle="", markersize=5, label="a head, and its spread over the images"),
        Line2D([], [], color=COLORS[1], marker="o", markersize=5, linewidth=2, label="mean of a block"),
        Patch(color=GRID, alpha=0.5, label="every second stage"),
    ]
    several = len(set(stages)) > 1
    figure.legend(
        handles=handles if several else handles[:2], loc="outside upper left", ncols=3, frameon=False, fontsize=9.5, labelcolor=INK
    )
    return _png(figure)


def _shade_stages(axes: Axes, stages: Sequence[tuple[int, int]]) -> None:
    begins = [number for number, grid in enumerate(stages) if number == 0 or grid != stages[number - 1]]
    for place, begin in enumerate(begins):
        end = begins[place + 1] if place + 1 < len(begins) else len(stages)
        if place % 2:
            axes.axvspan(begin + 0.5, end + 0.5, color=GRID, alpha=0.5, linewidth=0)


def _enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.NEAREST))


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160, facecolor="white")
    return out.getvalue()
