"""Few-shot episodes: what they hold, that they depend on nothing but seed and number, and accuracies that can be counted."""

import numpy as np
import pytest
import torch

from esvit.evaluation.fewshot import (
    Episode,
    MeanAccuracy,
    centered,
    draw_episode,
    logistic_accuracy,
    mean_accuracy,
    nearest_mean_accuracy,
)

ROWS = [np.arange(10 * label, 10 * label + 10) for label in range(6)]


def episode(number: int = 0, seed: int = 0, **changes) -> Episode:
    return draw_episode(ROWS, **({"ways": 3, "queries": 4, "seed": seed, "number": number} | changes))


def test_an_episode_has_queries_and_shots_of_the_same_classes_and_no_image_twice():
    drawn = episode()
    queries, shots = drawn.queries, drawn.shots(6)
    assert (queries.shape, shots.shape) == ((3, 4), (3, 6))
    assert (queries // 10 == queries[:, :1] // 10).all()
    assert (shots // 10 == queries[:, :1] // 10).all()
    assert len(set(queries[:, 0].tolist())) == 3
    assert len(set(queries.flatten().tolist() + shots.flatten().tolist())) == 30


def test_an_episode_depends_on_seed_and_number_alone():
    assert episode(number=7).queries.equal(episode(number=7).queries)
    assert not episode(number=7).queries.equal(episode(number=8).queries)
    assert not episode(number=7).queries.equal(episode(number=7, seed=1).queries)


def test_fewer_shots_are_the_first_of_more():
    assert episode().shots(5)[:, :1].equal(episode().shots(1))


def test_every_class_and_image_is_drawn_about_equally_often():
    counts = np.zeros(60)
    for number in range(600):
        np.add.at(counts, episode(number=number).queries.numpy(), 1)
    assert counts.mean() == 600 * 3 * 4 / 60
    assert abs(counts - 120).max() < 45  # more than four standard deviations


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Two ways along the axes: the mean of the first's shots lies at 0 degrees, that of the second's at 90."""
    shots = torch.tensor([[[1.0, 0.5], [1.0, -0.5]], [[0.5, 1.0], [-0.5, 1.0]]])
    queries = torch.tensor([[[3.0, 0.1], [1.0, 0.9], [0.9, 1.0], [2.0, -1.0]], [[0.1, 0.3], [0.0, 9.0], [1.0, 0.2], [-1.0, 1.0]]])
    return shots, queries


def test_queries_go_to_the_nearest_mean_by_cosine():
    assert nearest_mean_accuracy(*planted()) == 6 / 8  # (0.9, 1.0) and (1.0, 0.2) lie beyond 45 degrees
    shots, queries = planted()
    assert nearest_mean_accuracy(shots, 100 * queries) == 6 / 8


def test_logistic_regression_draws_the_same_line_between_two_clusters_that_mirror_each_other():
    assert logistic_accuracy(*planted(), penalty=1.0) == 6 / 8


def test_centred_features_have_unit_length_and_their_mean_is_where_the_center_was():
    features = centered(torch.tensor([[11.0, 10.0], [10.0, 12.0]]), torch.tensor([10.0, 10.0]))
    assert features.tolist() == [[1, 0], [0, 1]]


def test_the_interval_is_the_standard_error_of_the_mean():
    result = mean_accuracy(torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    assert result == MeanAccuracy(mean=50, interval=pytest.approx(100 * 1.96 * (1 / 3) ** 0.5 / 2))
