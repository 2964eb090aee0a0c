"""Pictures of what regions were found to show: matched places in two views, accuracy by the error allowed, masks and their predictions.

Letters: h and w pixels of a view or crop, P pairs drawn, K classes.
"""

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from esvit.data.masks import IGNORED
from esvit.evaluation.correspondence import KINDS, Score
from esvit.evaluation.figures import COLORS, GRID, INK, MUTED

RIGHT, WRONG = COLORS[0], COLORS[1]  # blue and orange: told apart by everyone
KIND_NAMES = {"top": "{pairs} most similar", "all": "all regions", "mutual": "mutual nearest"}
_VIEW_PIXELS, _TILE_PIXELS = 210, 150
_MARGIN, _GAP, _HEAD = 14, 10, 24
_FINER = 2  # lines are drawn so many times larger, then shrunk: smooth edges
_LEGEND_CLASSES = 24


@dataclass(frozen=True)
class DrawnPairs:
    """one, two (C, h, w) uint8 views; starts, ends (P, 2) x, y in pixels of them; right (P,) bool."""

    name: str
    one: Tensor
    two: Tensor
    starts: Tensor
    ends: Tensor
    right: Tensor


def pairs_sheet(pairs: Sequence[DrawnPairs]) -> bytes:
    """PNG: for each, both views side by side and a line between matched places, blue where right, orange where wrong."""
    columns = min(2, len(pairs))
    side = 2 * _VIEW_PIXELS // columns  # a single pair is drawn larger
    width, height = 2 * side + 3 * _GAP, side + _HEAD
    lines = -(-len(pairs) // columns)
    sheet_width = 2 * _MARGIN + columns * width + (columns - 1) * 2 * _GAP
    sheet = Image.new("RGB", (sheet_width, 2 * _MARGIN + _HEAD + lines * (height + _GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((_MARGIN, _MARGIN + 4), "most similar regions of two views:", fill=INK, font=font, anchor="lm")
    left = _MARGIN + font.getlength("most similar regions of two views:") + 12
    for color, text in ((RIGHT, "right"), (WRONG, "wrong")):
        draw.line((left, _MARGIN + 4, left + 22, _MARGIN + 4), fill=color, width=3)
        draw.text((left + 28, _MARGIN + 4), text, fill=INK, font=font, anchor="lm")
        left += 75
    for number, pair in enumerate(pairs):
        corner = (_MARGIN + number % columns * (width + 2 * _GAP), _MARGIN + _HEAD + number // columns * (height + _GAP))
        caption = f"{_shortened(pair.name, 48)}: {int(pair.right.sum())} of {len(pair.right)} right"
        draw.text((corner[0], corner[1] + _HEAD / 2), caption, fill=MUTED, font=font, anchor="lm")
        sheet.paste(_pair(pair, side), (corner[0], corner[1] + _HEAD))
    return _png(sheet)


def _pair(pair: DrawnPairs, pixels: int) -> Image.Image:
    side = pixels * _FINER
    scale, shift = side / pair.one.shape[-1], side + 3 * _GAP * _FINER
    canvas = Image.new("RGB", (side + shift, side), "white")
    canvas.paste(_picture(pair.one, side), (0, 0))
    canvas.paste(_picture(pair.two, side), (shift, 0))
    draw = ImageDraw.Draw(canvas)
    ends = zip((pair.starts * scale).tolist(), (pair.ends * scale).tolist(), pair.right.tolist(), strict=True)
    for (x, y), (x_end, y_end), is_right in sorted(ends, key=lambda end: end[2]):
        color = RIGHT if is_right else WRONG
        draw.line((x, y, x_end + shift, y_end), fill="white", width=3 * _FINER)  # a rim, for lines on any picture
        draw.line((x, y, x_end + shift, y_end), fill=color, width=_FINER + 1)
        for center in ((x, y), (x_end + shift, y_end)):
            draw.circle(center, 3.5 * _FINER, fill=color, outline="white", width=_FINER)
    return canvas.resize((canvas.width // _FINER, canvas.height // _FINER), Image.Resampling.LANCZOS)


def offsets_figure(scores: dict[str, Score], *, cell: float, pairs: int) -> bytes:
    """PNG: percent of matches within an error of 0, 1, ... cells of `cell` pixels, for each kind of pairs."""
    figure = Figure(figsize=(5.6, 3.4), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    for color, kind in zip(COLORS, KINDS, strict=False):
        within, label = scores[kind].within, KIND_NAMES[kind].format(pairs=pairs)
        axes.plot(range(len(within)), within, color=color, linewidth=1.8, marker="o", markersize=3.5, label=label)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.set_xlabel(f"error allowed (regions of {cell:g} pixels)", color=MUTED, size=9)
    axes.set_ylabel("matches within it (%)", color=MUTED, size=9)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_ylim(0, 102)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


@dataclass(frozen=True)
class DrawnMasks:
    """image (C, h, w) uint8, and masks by title, each (h, w) classes, IGNORED where none counts."""

    image: Tensor
    masks: dict[str, Tensor]


def masks_sheet(rows: Sequence[DrawnMasks], class_names: Sequence[str]) -> bytes:
    """PNG: for each image a row of it and its masks, laid over it in grey; the classes' colours below."""
    titles = ["image", *rows[0].masks]
    pitch = _TILE_PIXELS + _GAP
    colors = np.array([_class_color(number) for number in range(len(class_names))], dtype=np.uint8)
    font = ImageFont.load_default(12)
    width = 2 * _MARGIN + len(titles) * pitch - _GAP
    legend = _legend(class_names, colors, font, width - 2 * _MARGIN)
    sheet = Image.new("RGB", (width, 2 * _MARGIN + _HEAD + len(rows) * pitch + legend.height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((_MARGIN + column * pitch + _TILE_PIXELS / 2, _MARGIN + _HEAD / 2 - 4), title, fill=MUTED, font=font, anchor="mm")
    for number, row in enumerate(rows):
        top = _MARGIN + _HEAD + number * pitch
        picture = _picture(row.image, _TILE_PIXELS)
        sheet.paste(picture, (_MARGIN, top))
        for column, mask in enumerate(row.masks.values(), start=1):
            sheet.paste(_overlaid(picture, mask.cpu().numpy(), colors), (_MARGIN + column * pitch, top))
    sheet.paste(legend, (_MARGIN, _MARGIN + _HEAD + len(rows) * pitch))
    return _png(sheet)


def _overlaid(picture: Image.Image, mask: np.ndarray, colors: np.ndarray) -> Image.Image:
    painted = np.where((mask == IGNORED)[..., None], 255, colors[np.maximum(mask, 0)]).astype(np.uint8)
    cover = Image.fromarray(painted).resize(picture.size, Image.Resampling.NEAREST)
    return Image.blend(picture.convert("L").convert("RGB"), cover, 0.62)


def _legend(class_names: Sequence[str], colors: np.ndarray, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> Image.Image:
    entries: list[tuple[str, tuple | None]] = [
        (_shortened(name, 20), tuple(color)) for name, color in zip(class_names[:_LEGEND_CLASSES], colors.tolist(), strict=False)
    ]
    if len(class_names) > _LEGEND_CLASSES:
        entries.append((f"and {len(class_names) - _LEGEND_CLASSES} more", None))
    places, x, y = [], 0, 0
    for text, _ in entries:
        step = 34 + int(font.getlength(text))
        if x and x + step > width:
            x, y = 0, y + 20
        places.append((x, y))
        x += step
    legend = Image.new("RGB", (width, y + 20), "white")
    draw = ImageDraw.Draw(legend)
    for (text, color), (x, y) in zip(entries, places, strict=True):
        if color is not None:
            draw.rectangle((x, y + 4, x + 12, y + 16), fill=color)
        draw.text((x + 18, y + 10), text, fill=INK, font=font, anchor="lm")
    return legend


def _class_color(number: int) -> tuple[int, int, int]:
    """Grey for the first class, which often is the background; then hues a golden angle apart."""
    if number == 0:
        return 205, 210, 215
    hue = (0.58 + (number - 1) * 0.381966) % 1
    red, green, blue = colorsys.hls_to_rgb(hue, 0.42 + 0.16 * (number // 8 % 2), 0.72)
    return round(255 * red), round(255 * green), round(255 * blue)


def _picture(view: Tensor, side: int) -> Image.Image:
    pixels = Image.fromarray(view.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())
    return pixels.resize((side, side), Image.Resampling.BICUBIC)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else "..." + text[3 - length :]


def _png(sheet: Image.Image) -> bytes:
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()
