"""Ticks are round and inside, places follow values, and labels find room."""

import itertools

import pytest

from esvit.comparison.drawing import Box, Scale, colors, fitted, placed_labels, tick_text


def test_a_scale_puts_its_ends_at_its_ends_and_the_middle_between():
    assert [Scale(0, 10, 100, 0)(value) for value in (0, 5, 10, 20)] == [100, 50, 0, 0]
    assert Scale(1, 100, 0, 10, is_log=True)(10) == pytest.approx(5)


def test_a_scale_of_one_value_puts_it_in_the_middle():
    assert fitted([3.0], 0, 10)(3.0) == pytest.approx(5)


def test_ticks_are_round():
    assert Scale(0.3, 9.7, 0, 1).ticks(5) == [2, 4, 6, 8]
    assert Scale(57.1, 73.2, 0, 1).ticks(4) == [60, 65, 70]
    assert Scale(0.001, 0.3, 0, 1, is_log=True).ticks(4) == pytest.approx([0.001, 0.003, 0.01, 0.03, 0.1, 0.3])


def test_numbers_are_written_short():
    assert [tick_text(value) for value in (0, 0.25, 1500.0, 25000.0, 1e-5, 28e6)] == ["0", "0.25", "1500", "25k", "1e-5", "28M"]


def test_few_groups_have_colours_of_their_own_and_many_a_row_of_shades():
    assert len(set(colors(8))) == 8
    shades = colors(100)
    assert len(shades) == 100
    assert shades[0] != shades[-1]


def test_labels_cover_neither_marks_nor_each_other_where_there_is_room():
    marks = [Box(100 + 30 * (place % 3), 100 + 25 * (place // 3), 10, 10) for place in range(9)]
    labels = placed_labels(marks, [(40, 10)] * 9, within=Box(0, 0, 400, 400))
    assert not any(one.overlap(other) for one, other in itertools.combinations([*marks, *labels], 2))


def test_labels_stay_within():
    (label,) = placed_labels([Box(90, 50, 10, 10)], [(60, 10)], within=Box(0, 0, 100, 100))
    assert label.x >= 0 and label.x + label.width <= 100
