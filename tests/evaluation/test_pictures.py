"""Pictures, by their pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from esvit.evaluation.pictures import (
    Marker,
    RegionPair,
    Sheet,
    Tile,
    entropy_figure,
    heat_legend,
    heat_over,
    lettering,
    mark,
    matches_picture,
    paint,
    spotlight,
)

PHOTO = Image.new("RGB", (40, 40), (120, 60, 200))


def brightness(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"), dtype=np.float64)


def test_attention_glows_where_it_is_and_nowhere_else() -> None:
    glow = brightness(heat_over(PHOTO, np.array([[0.0, 0.0], [0.0, 1.0]])))
    assert (glow[20:, 20:] > 150).all()
    assert (glow[:20] < 70).all() and (glow[20:, :20] < 70).all()


def test_an_even_spread_does_not_glow() -> None:
    even = brightness(heat_over(PHOTO, np.full((2, 2), 0.25)))
    assert even.std() == 0 and even.max() < 120


def test_a_spotlight_keeps_the_photo_inside_and_darkens_it_outside() -> None:
    lit = np.asarray(spotlight(PHOTO, np.array([[True, False]])))
    assert (lit[:, :20] == PHOTO.getpixel((0, 0))).all()
    assert (lit[:, 20:] < 40).all() and (lit[:, 20:, 0] == lit[:, 20:, 1]).all()


def test_a_mark_rings_its_place_and_leaves_the_photo_alone() -> None:
    before = np.asarray(PHOTO).copy()
    changed = (np.asarray(mark(PHOTO, (0.75, 0.25))) != before).any(axis=2)
    rows, columns = changed.nonzero()
    assert (rows.mean(), columns.mean()) == (pytest.approx(30, abs=0.6), pytest.approx(10, abs=0.6))
    assert not changed[30, 10] and (np.asarray(PHOTO) == before).all()


def test_region_colours_fill_their_cells_and_the_background_is_dark() -> None:
    colors = np.array([[[1.0, 0, 0], [np.nan] * 3]])
    painted = np.asarray(paint(colors, (40, 20)))
    assert (painted[:, :20] == (255, 0, 0)).all() and (painted[:, 20:] < 30).all()


def test_a_sheet_holds_its_tiles_unchanged_and_in_order() -> None:
    red, blue = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (30, 20), "blue")
    sheet = Sheet(rows=[[Tile(red), None], [Tile(blue), Tile(red, "x" * 100, frame="#00ff00")]], gap=10, margin=8, font_size=10)
    pixels = np.asarray(sheet.draw())
    assert pixels.shape == (8 + 20 + 10 + 20 + 15 + 8, 8 + 30 + 10 + 30 + 8, 3)
    assert (pixels[8:28, 8:38] == (255, 0, 0)).all() and (pixels[38:58, 8:38] == (0, 0, 255)).all()
    assert (pixels[38:58, 48:78] == (255, 0, 0)).all() and (pixels[35, 44:82] == (0, 255, 0)).all()
    assert (pixels[8:28, 48:78] == 255).all()


def test_a_legend_is_not_cut_off() -> None:
    legend = heat_legend("a legend that is much longer than the only tile is wide")
    sheet = Sheet(rows=[[Tile(PHOTO)]], row_titles=["a title"], legend=legend).draw()
    assert sheet.width > legend.width and (np.asarray(sheet)[:, -8:] == 255).all()


def test_the_lettering_has_the_signs_that_captions_need() -> None:
    missing = lettering(20).getmask("\uffff").getbbox(), bytes(lettering(20).getmask("\uffff"))
    for sign in "×…·“”é":
        assert (lettering(20).getmask(sign).getbbox(), bytes(lettering(20).getmask(sign))) != missing


def test_matches_are_drawn_from_region_to_region() -> None:
    """The one pair joins the last region of the left view with the first of the right one: nothing lies in the other corners."""
    white = Image.new("RGB", (8, 8), "white")
    png = matches_picture(
        (white, white),
        titles=("", ""),
        grids=((2, 2), (2, 2)),
        pairs=[RegionPair((1, 1), (0, 0), True)],
        markers=[Marker(1, (1, 1), "^", "#e03131", "here")],
    )
    drawn = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    colored = (drawn.max(axis=2) - drawn.min(axis=2) > 60)[: int(drawn.shape[0] * 0.7)]
    rows, columns = colored.nonzero()
    height, width = colored.shape
    left, right = columns < width / 2, columns > width / 2
    assert rows[left].mean() > rows[right & (columns < 0.7 * width)].mean()  # it rises from left to right
    assert (columns[left] > 0.25 * width).all() and rows[columns > 0.8 * width].min() > height / 2  # the marker


def test_entropy_curves_are_a_picture_of_one_block_and_of_many() -> None:
    for stages in ([(2, 2)], [(4, 4), (4, 4), (2, 2)]):
        heads = [np.linspace(1, 2, count) for count in range(1, len(stages) + 1)]
        png = entropy_figure(bits=heads, spreads=heads, shares=[each / 2 for each in heads], stages=stages)
        Image.open(io.BytesIO(png)).verify()
