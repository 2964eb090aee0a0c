"""The page of `task=analyze`: pictures of what a backbone has learned, with what each shows and what to look for, in one file.

Photos are in it as JPEG, to keep it small; the run folder has them as PNG. A section without pictures is left out.
"""

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from esvit.evaluation.page import configuration, data_url, metrics_table, section, write_page

_JPEG_QUALITY = 88

_ATTENTION = (
    "In a transformer's block every region of an image gathers from others; its attention says from which, and how much. Below, each "
    "picture is one block, first to last, averaged over its heads. {asked} Windows and their shifts are undone, so that every map lies on "
    "the photo as it is. The lower picture of each pair keeps the fewest cells that hold the stated share of the attention, and darkens "
    "the rest."
)
_ATTENTION_LOOK = (
    "An even tint and “up to 1.1 ×” are an even spread: the block prefers nothing. Training should make blocks stand out "
    "from that, and the glow of the later ones should follow things or their parts, rather than corners, borders, or a pattern that is the "
    "same for every photo. Single heads are more selective than their mean: unfold them below each photo."
)
_ENTROPY = (
    "Entropy tells in one number how widely a head spreads its attention: 0 bits is a single region, and the logarithm (base 2) of the "
    "number of regions in reach is an even spread. The right panel divides by that most, so that blocks with different windows compare. "
    "Mean over all regions of {measured}."
)
_ENTROPY_LOOK = (
    "Heads of one block that differ have found different things to do. All points near 1 on the right: attention is little more than an "
    "average of the window, as in an untrained network. Points near 0: heads that look at one place, often their own."
)
_COLORS = (
    "Each cell is one region feature, coloured by its first three principal components as red, green and blue. The components are those of "
    "all these photos together: a colour means the same kind of feature in every photo and at every size. A larger input shows the same "
    "photo in more and smaller regions."
)
_COLORS_LOOK = (
    "Things should stand out from their surroundings in a colour of their own, and like things in different photos should share it. "
    "Colours that only follow brightness or hue, or that change from the border inwards, come from features that say little of the content."
)
_MATCHES = (
    "Every region of the left picture is matched with the region of the right one that has the most similar feature; the most similar "
    "pairs are drawn. This is what the region-level loss asks for: that a region find itself again in another view. The markers show which "
    "region speaks for a whole image: closest to the pooled feature of its own view, and closest to that of the other."
)
_MATCHES_LOOK = (
    "A line is right if both its ends lie on the same thing, and the count below each picture says how many are. Lines that all end in one "
    "place are a bad sign. Solid pairs chose each other and are the safer ones. Markers on the subject: the pooled feature is about it."
)
_NEIGHBOURS = (
    "Each row begins with a query; then come the images whose pooled features are most similar to its own, with their cosine. Searched "
    "were {searched}."
)
_NEIGHBOURS_LOOK = (
    "Neighbours should share what is shown, not merely colours, layout or background. One image that turns up in many rows is a sign of "
    "features that collapse."
)


@dataclass(frozen=True)
class Picture:
    """A PNG file of the run folder, its title, and what to say below it."""

    title: str
    file: Path
    text: str = ""


@dataclass(frozen=True)
class EntropyLine:
    """A block's attention entropy: grid as in "7 × 7", heads, mean in bits, mean share of the most possible, lowest and highest head."""

    block: int
    grid: str
    heads: int
    bits: float
    share: float
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What there is to show; what was not drawn is empty or None.

    asked       whose attention the maps show, as a sentence
    attention   one picture per photo: its blocks; heads: every head of these
    entropy     picture of the curves; entropy_lines: its table; entropy_of: what was measured, as in "64 photos"
    colors      picture of the region maps
    matches     one picture per pair of views or photos
    neighbours  picture of the sheet; neighbours_of: what was searched, as in "64 photos"
    """

    asked: str
    attention: Sequence[Picture]
    heads: Sequence[Picture]
    entropy: Picture | None
    entropy_lines: Sequence[EntropyLine]
    entropy_of: str
    colors: Picture
    matches: Sequence[Picture]
    neighbours: Picture | None
    neighbours_of: str


def write_analysis_report(
    path: Path, *, title: str, facts: dict[str, str], notes: Sequence[str], config: dict, metrics: dict[str, float], analysis: Analysis
) -> None:
    """The page at `path`.

    facts    label -> text for the head of the page
    notes    sentences a reader has to know first
    config   the resolved options, nested
    metrics  final metrics, as in metrics.json
    """
    sections = [
        section("Where the network looks", _attention(analysis)),
        section("How widely each head looks", _entropy(analysis)),
        section("Which regions are alike", _colors(analysis.colors)),
        section("Which regions find each other", _matches(analysis.matches)),
        section("Which images are alike", _neighbours(analysis)),
        section("Final metrics", metrics_table(metrics)),
        section("Configuration", configuration(config)),
    ]
    write_page(path, kind="EsViT analysis", title=title, facts=facts, notes=notes, sections=sections, style=_STYLE)


def _attention(analysis: Analysis) -> str:
    if not analysis.attention:
        return ""
    shown = "".join(
        f'<figure class="card wide">{_title(blocks)}{_photo(blocks)}</figure>'
        f'<details class="card wide"><summary>Every head of every block: {html.escape(heads.title)}</summary>{_photo(heads)}</details>'
        for blocks, heads in zip(analysis.attention, analysis.heads, strict=True)
    )
    return _lead(_ATTENTION.format(asked=analysis.asked), _ATTENTION_LOOK) + shown


def _entropy(analysis: Analysis) -> str:
    if analysis.entropy is None:
        return ""
    chart = f'<img alt="{html.escape(analysis.entropy.title)}" src="{data_url(analysis.entropy.file.read_bytes(), "png")}">'
    return (
        _lead(_ENTROPY.format(measured=analysis.entropy_of), _ENTROPY_LOOK)
        + f'<figure class="card wide">{chart}</figure>'
        + f'<details class="card scroll"><summary>Numbers of every block</summary>{_entropy_table(analysis.entropy_lines)}'
        '<p class="caption">Every head is in attention_entropy.csv.</p></details>'
    )


def _entropy_table(lines: Sequence[EntropyLine]) -> str:
    titles = ("Block", "Cells", "Heads", "Mean (bits)", "Share of the most", "Narrowest head", "Widest head")
    head = "".join(f"<th{_align(column)}>{title}</th>" for column, title in enumerate(titles))
    rows = [
        (str(line.block), line.grid, str(line.heads), f"{line.bits:.2f}", f"{line.share:.0%}", f"{line.lowest:.2f}", f"{line.highest:.2f}")
        for line in lines
    ]
    body = "".join("<tr>" + "".join(f"<td{_align(column)}>{cell}</td>" for column, cell in enumerate(row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _align(column: int) -> str:
    return ' class="number"' if column > 1 else ""


def _colors(picture: Picture) -> str:
    return _lead(_COLORS, _COLORS_LOOK) + f'<figure class="card wide">{_photo(picture)}{_caption(picture)}</figure>'


def _matches(pictures: Sequence[Picture]) -> str:
    cards = "".join(f'<figure class="card">{_title(picture)}{_photo(picture)}{_caption(picture)}</figure>' for picture in pictures)
    return _lead(_MATCHES, _MATCHES_LOOK) + f'<div class="grid">{cards}</div>'


def _neighbours(analysis: Analysis) -> str:
    if analysis.neighbours is None:
        return ""
    figure = f'<figure class="card wide">{_photo(analysis.neighbours)}{_caption(analysis.neighbours)}</figure>'
    return _lead(_NEIGHBOURS.format(searched=analysis.neighbours_of), _NEIGHBOURS_LOOK) + figure


def _lead(text: str, look: str) -> str:
    """What the pictures of a section show, and what to look for in them."""
    return (
        f'<p class="lead">{html.escape(text, quote=False)}</p>'
        f'<p class="look"><strong>What to look for.</strong> {html.escape(look, quote=False)}</p>'
    )


def _title(picture: Picture) -> str:
    return f"<h3>{html.escape(picture.title)}</h3>"


def _caption(picture: Picture) -> str:
    return f"<figcaption>{html.escape(picture.text)}</figcaption>" if picture.text else ""


def _photo(picture: Picture) -> str:
    out = io.BytesIO()
    with Image.open(picture.file) as image:
        image.convert("RGB").save(out, "JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    return f'<img alt="{html.escape(picture.title)}" src="{data_url(out.getvalue(), "jpeg")}">'


_STYLE = """
.lead, .look { margin: 0 0 14px; max-width: 92ch; }
.look { padding: 10px 16px; background: #eaf2f9; border-radius: 10px; font-size: 15px; }
.look + * { margin-top: 18px; }
.wide img { display: block; max-width: 100%; height: auto; }
.wide summary + img { margin-top: 14px; }
details + figure.card { margin-top: 30px; }
"""
