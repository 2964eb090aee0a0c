"""Nearest neighbours of planted features."""

import torch

from esvit.evaluation.neighbours import nearest, same_class_percent

FEATURES = torch.tensor([[1.0, 0], [5, 0.5], [0, 2], [0.1, 1], [-1, 0]])  # directions: right, right, up, up, left


def test_neighbours_are_ordered_by_cosine_whatever_their_length_and_a_query_is_none_of_its_own() -> None:
    found = nearest(FEATURES, torch.tensor([0, 2]), 3)
    assert found.rows.tolist() == [[1, 3, 2], [3, 1, 0]]
    torch.testing.assert_close(found.similarity[0, 0], torch.tensor(5 / 25.25**0.5))


def test_of_twins_each_finds_the_other() -> None:
    assert nearest(torch.ones(2, 3), torch.tensor([0, 1]), 1).rows.tolist() == [[1], [0]]


def test_percent_of_neighbours_of_the_querys_class() -> None:
    labels = torch.tensor([0, 0, 1, 0, 1])
    queries = torch.tensor([0, 2])
    assert same_class_percent(nearest(FEATURES, queries, 2), queries, labels) == 50  # right: both; up: none
