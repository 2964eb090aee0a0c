"""What `task=preview` shows: images, where their crops lie, and every view with what was drawn for it; as one picture and as one page.

Letters: n images, V views, C channels, h and w the sides of a view in pixels.
"""

import html
import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from esvit.augmentations.parameters import ViewParameters
from esvit.evaluation.page import data_url, section, write_page

INK, MUTED, LINE = "#1f2933", "#616e7c", "#e4e8ec"
GLOBAL, LOCAL = "#1f6fb2", "#d9772b"  # colours of the boxes that crops come from
ORIGINAL_PIXELS = 400  # longest side of an original on the page
TILE_PIXELS, LOCAL_TILE_PIXELS = 168, 112  # side of a view on the sheet
VIEWS_IN_A_LINE = 6  # of the sheet, at most
_MARGIN, _GAP, _TEXT = 24, 16, 15  # pixels: around the sheet, between tiles, height of a line of text


@dataclass(frozen=True)
class Preview:
    """One image and its views.

    number      from 1
    name        as the image set calls it
    label       the name of its class, or None
    original    the image as it is stored
    size        (width, height) that the boxes refer to
    parameters  V, global ones first
    views       V tensors (C, h, w), uint8 or uint16
    mixed       V tensors (C, h, w) that the student sees instead, or None where nothing is mixed
    shares      V texts: what each mixed view is made of
    """

    number: int
    name: str
    label: str | None
    original: Any
    size: tuple[int, int]
    parameters: Sequence[ViewParameters]
    views: Sequence[Tensor]
    mixed: Sequence[Tensor] | None
    shares: Sequence[str]


def picture(values: Any) -> Image.Image:
    """Anything that an image set reads, as it can be looked at: one channel is grey, of more than three the first three are shown."""
    if isinstance(values, Image.Image):
        return values
    values = values if values.dtype == np.uint8 else (values >> 8).astype(np.uint8)
    return Image.fromarray(values[:, :, :3] if values.shape[2] >= 3 else values[:, :, 0]).convert("RGB")


def view_picture(view: Tensor) -> Image.Image:
    return picture(view.permute(1, 2, 0).numpy())


def view_titles(parameters: Sequence[ViewParameters], global_count: int) -> list[str]:
    kinds = ["global"] * global_count + ["local"] * (len(parameters) - global_count)
    return [f"{kind} {kinds[: place + 1].count(kind)}" for place, kind in enumerate(kinds)]


def with_boxes(preview: Preview, global_count: int, longest: int) -> Image.Image:
    """The original, no larger than `longest` pixels, with a frame around each part that became a view."""
    image = picture(preview.original)
    factor = longest / max(image.size)
    image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), _filter(factor))
    draw = ImageDraw.Draw(image)
    across, down = image.width / preview.size[0], image.height / preview.size[1]
    numbered = list(enumerate(preview.parameters))
    for place, drawn in numbered[global_count:] + numbered[:global_count]:
        left, top, right, bottom = drawn.box
        frame = (left * across, top * down, max(right * across - 1, left * across), max(bottom * down - 1, top * down))
        draw.rectangle(frame, outline=GLOBAL if place < global_count else LOCAL, width=2)
    return image


def _parts(text: str) -> list[str]:
    """What was drawn for a view, one by one; a comma inside brackets separates nothing."""
    return re.split(r", (?![^(]*\))", text)


def _filter(factor: float) -> Image.Resampling:
    return Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS  # much enlarged pixels stay visible as they are


# ---------------------------------------------------------------------- the sheet


def draw_sheet(previews: Sequence[Preview], *, global_count: int) -> Image.Image:
    """One block for each image: the original with its boxes, then the views with their parameters, line by line."""
    blocks = [_block(preview, global_count) for preview in previews]
    width = max(block.width for block in blocks) + 2 * _MARGIN
    height = sum(block.height for block in blocks) + 2 * _MARGIN + 2 * _GAP * (len(blocks) - 1)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for number, block in enumerate(blocks):
        if number:
            draw.line((_MARGIN, top - _GAP, width - _MARGIN, top - _GAP), fill=LINE)
        sheet.paste(block, (_MARGIN, top))
        top += block.height + 2 * _GAP
    return sheet


def _block(preview: Preview, global_count: int) -> Image.Image:
    original = with_boxes(preview, global_count, 2 * TILE_PIXELS)
    named = _captioned(original, _name(preview), "", color=INK, width=2 * TILE_PIXELS)
    titles = view_titles(preview.parameters, global_count)
    tiles = []
    for place, (view, drawn) in enumerate(zip(preview.views, preview.parameters, strict=True)):
        side = TILE_PIXELS if place < global_count else LOCAL_TILE_PIXELS
        color = GLOBAL if place < global_count else LOCAL
        tiles.append(_captioned(_square(view, side), titles[place], drawn.describe(), color=color, width=TILE_PIXELS))
    lines = _in_lines(tiles)
    if preview.mixed is not None:
        lines += _in_lines(
            [
                _captioned(_square(view, LOCAL_TILE_PIXELS), f"mixed: {title}", share, color=MUTED, width=TILE_PIXELS)
                for view, title, share in zip(preview.mixed, titles, preview.shares, strict=True)
            ]
        )
    heights = [max(tile.height for tile in line) for line in lines]
    width = named.width + _GAP + max(len(line) for line in lines) * (TILE_PIXELS + _GAP)
    block = Image.new("RGB", (width, max(named.height, sum(heights) + _GAP * (len(lines) - 1))), "white")
    block.paste(named, (0, 0))
    top = 0
    for line, height in zip(lines, heights, strict=True):
        for column, tile in enumerate(line):
            block.paste(tile, (named.width + _GAP + column * (TILE_PIXELS + _GAP), top))
        top += height + _GAP
    return block


def _in_lines(tiles: list[Image.Image]) -> list[list[Image.Image]]:
    """As few lines as there may be, of about the same length."""
    count = -(-len(tiles) // -(-len(tiles) // VIEWS_IN_A_LINE))
    return [tiles[first : first + count] for first in range(0, len(tiles), count)]


def _square(view: Tensor, side: int) -> Image.Image:
    image = view_picture(view)
    return image.resize((side, side), _filter(side / image.width))


def _captioned(image: Image.Image, title: str, text: str, *, color: str, width: int) -> Image.Image:
    """The image with a title and text below it, in a box of `width` pixels."""
    font, bold = ImageFont.load_default(12), ImageFont.load_default(13)
    letters = int(width / font.getlength("n"))
    heading = textwrap.wrap(title, letters)[:3]
    unbroken = ", ".join(part.replace(" ", "\xa0") for part in _parts(text))
    lines = heading + [line.replace("\xa0", " ") for line in textwrap.wrap(unbroken, letters)]
    box = Image.new("RGB", (width, image.height + 6 + _TEXT * len(lines)), "white")
    box.paste(image, (0, 0))
    draw = ImageDraw.Draw(box)
    draw.rectangle((0, 0, image.width - 1, image.height - 1), outline=LINE)  # white images on white
    for number, line in enumerate(lines):
        is_title = number < len(heading)
        place = (0, image.height + 4 + _TEXT * number)
        draw.text(place, line, fill=color if is_title else MUTED, font=bold if is_title else font)
    return box


def _name(preview: Preview) -> str:
    return f"{preview.number}. {preview.name}" + ("" if preview.label is None else f" ({preview.label})")


# ---------------------------------------------------------------------- the page


def write_preview_page(
    path: Path, *, title: str, facts: dict[str, str], notes: Sequence[str], previews: Sequence[Preview], global_count: int
) -> None:
    sections = [section(_name(preview), _content(preview, global_count)) for preview in previews]
    write_page(path, kind="EsViT preview of views", title=title, facts=facts, notes=notes, sections=[_LEAD, *sections], style=_STYLE)


def _content(preview: Preview, global_count: int) -> str:
    titles = view_titles(preview.parameters, global_count)
    original = _figure(
        with_boxes(preview, global_count, ORIGINAL_PIXELS), "original", "{} x {} pixels".format(*preview.size), "original", "jpeg"
    )
    kinds = ["global"] * global_count + ["local"] * (len(titles) - global_count)
    views = [
        _figure(view_picture(view), title, drawn.describe(), kind)
        for view, title, drawn, kind in zip(preview.views, titles, preview.parameters, kinds, strict=True)
    ]
    first, then = "".join([original, *views[:global_count]]), "".join(views[global_count:])
    content = f'<div class="card"><div class="views">{first}</div><div class="views">{then}</div>'
    if preview.mixed is not None:
        mixed = [
            _figure(view_picture(view), title, share, "mixed")
            for view, title, share in zip(preview.mixed, titles, preview.shares, strict=True)
        ]
        content += f'<h3>What the student sees of it, mixed with others</h3><div class="views">{"".join(mixed)}</div>'
    return f"{content}</div>"


def _figure(image: Image.Image, title: str, text: str, kind: str, encoding: str = "png") -> str:
    out = io.BytesIO()
    image.save(out, encoding, **({"quality": 90} if encoding == "jpeg" else {}))
    width, height = image.size
    parts = ", ".join(html.escape(part) if "(" in part else f'<span class="part">{html.escape(part)}</span>' for part in _parts(text))
    kind += " enlarged" if width <= 64 else ""
    pixels = "" if kind.startswith("original") else f" <span>{width} px</span>"
    shown = f'<img alt="{html.escape(title)}" width="{width}" height="{height}" src="{data_url(out.getvalue(), encoding)}">'
    return f'<figure class="{kind}">{shown}<figcaption><strong>{title}</strong>{pixels}<br>{parts}</figcaption></figure>'


_LEAD = (
    '<p class="lead">Each image as it is stored, and the views that the training would make of it in its first epoch. Frames show where '
    'views come from: <b class="global-word">global</b> ones, which teacher and student see, and <b class="local-word">local</b> ones, '
    "which the student alone sees. Below each view is what was drawn for it: the part that was cut out, then what was done to it.</p>"
    '<p class="look"><strong>What to look for.</strong> Is the subject still to be seen in the global views? Do local views hold enough to '
    "belong to it? Does a change of colour or a blur destroy what tells your classes apart, or a mirror image turn it into another?</p>"
)

_STYLE = """
.page { max-width: 1240px; }
.lead { margin: 28px 0 14px; max-width: 92ch; }
.look { margin: 0; padding: 10px 16px; background: #eaf2f9; border-radius: 10px; font-size: 15px; max-width: 96ch; }
.global-word { color: #1f6fb2; } .local-word { color: #c2641d; }
h2 { font-size: 18px; overflow-wrap: anywhere; }
h3 { margin: 22px 0 10px; color: var(--muted); font-weight: 500; }
.part { white-space: nowrap; }
.views { display: flex; flex-wrap: wrap; gap: 18px 16px; align-items: flex-start; }
.views figure { margin: 0; }
.views img { display: block; border-radius: 4px; border: 1px solid var(--line); }
.views + .views { margin-top: 18px; }
.views .original { width: 400px; max-width: 100%; } .views .original img { max-width: 100%; height: auto; }
.views .global { width: 196px; } .views .global img { width: 196px; height: 196px; border-bottom: 3px solid #1f6fb2; }
.views .local { width: 128px; } .views .local img { width: 128px; height: 128px; border-bottom: 3px solid #d9772b; }
.views .mixed { width: 128px; } .views .mixed img { width: 128px; height: 128px; border-bottom: 3px solid #b6c2ce; }
.views .enlarged img { image-rendering: pixelated; }
.views figcaption { margin: 6px 0 0; font-size: 12.5px; line-height: 1.4; }
.views figcaption strong { color: var(--ink); font-weight: 600; }
"""
