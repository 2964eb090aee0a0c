"""k-NN on planted features with known answers."""

import math
from typing import Any

import pytest
import torch

from esvit.errors import OptionError
from esvit.evaluation.knn import KnnResult, check_neighbours, weighted_knn


def classify(neighbours: list[int] | int, **changes) -> dict[int, KnnResult]:
    """Ten images of seven classes on a circle; the test images sit just beside training images 0 and 4."""
    angles = torch.tensor([0, 2, 4, 40, 60, 61, 62, 180, 200, 220]) * math.pi / 180
    tests = torch.tensor([1, 60.2]) * math.pi / 180
    arguments: dict[str, Any] = dict(
        train_features=torch.stack([angles.cos(), angles.sin()], dim=1),
        train_labels=torch.tensor([0, 0, 1, 2, 3, 4, 4, 5, 6, 6]),
        test_features=torch.stack([tests.cos(), tests.sin()], dim=1),
        test_labels=torch.tensor([0, 3]),
        neighbours=neighbours,
        temperature=0.07,
        classes=7,
    )
    return weighted_knn(**(arguments | changes))


def test_the_nearest_image_decides_with_one_neighbour() -> None:
    assert classify(1, test_labels=torch.tensor([0, 3]))[1] == KnnResult(top1=100, top5=100)
    assert classify(1, test_labels=torch.tensor([1, 6]))[1] == KnnResult(top1=0, top5=0)


def test_two_votes_of_one_class_outweigh_one_slightly_nearer_vote() -> None:
    results = classify(3, test_labels=torch.tensor([0, 4]))  # around 60.2 degrees: one vote for class 3, two for class 4
    assert results[3] == KnnResult(top1=100, top5=100)


def test_votes_weigh_by_similarity() -> None:
    """Two far votes against a near one: with a low temperature the near one wins, with a high one the majority."""
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    arguments: dict[str, Any] = dict(
        train_features=features,
        train_labels=torch.tensor([0, 1, 1]),
        test_features=features[:1],
        test_labels=torch.tensor([0]),
        neighbours=3,
        classes=2,
    )
    assert weighted_knn(**arguments, temperature=0.07)[3].top1 == 100
    assert weighted_knn(**arguments, temperature=10.0)[3].top1 == 0


def test_a_class_without_a_vote_is_never_a_prediction() -> None:
    results = classify(3, test_labels=torch.tensor([2, 6]))
    assert results[3].top5 == 0


def test_scale_of_the_features_does_not_matter() -> None:
    scale = torch.tensor([0.01, 3, 70, 1, 1, 900, 2, 5, 0.4, 1])[:, None]
    train = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    test = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    scaled = classify([1, 5], train_features=train * scale, test_features=test * 50)
    assert scaled == classify([1, 5], train_features=train, test_features=test)


def test_small_temperatures_do_not_overflow() -> None:
    results = classify(10, temperature=1e-5, test_labels=torch.tensor([0, 3]))  # exp(1 / 1e-5) is infinite
    assert results[10].top1 == 100


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 1000])
def test_chunks_do_not_change_the_result(chunk_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 12, (300,), generator=generator)
    features = torch.randn(12, 16, generator=generator)[labels] + torch.randn(300, 16, generator=generator)
    arguments: dict[str, Any] = dict(
        train_features=features[:210],
        train_labels=labels[:210],
        test_features=features[210:],
        test_labels=labels[210:],
        neighbours=[1, 20, 210],
        temperature=0.07,
        classes=12,
    )
    assert weighted_knn(**arguments, chunk_rows=chunk_rows) == weighted_knn(**arguments, chunk_rows=90)


def test_equals_a_plain_loop_over_test_images() -> None:
    generator = torch.Generator().manual_seed(3)
    train, test = torch.randn(60, 8, generator=generator), torch.randn(25, 8, generator=generator)
    train_labels, test_labels = torch.arange(60) % 9, torch.arange(25) % 9
    first = five = 0
    for feature, label in zip(test, test_labels.tolist(), strict=True):
        similarity = [float(torch.cosine_similarity(feature, other, dim=0)) for other in train]
        votes: dict[int, float] = {}
        for place in sorted(range(60), key=lambda place: -similarity[place])[:15]:
            votes[int(train_labels[place])] = votes.get(int(train_labels[place]), 0) + math.exp(similarity[place] / 0.07)
        ranking = sorted(votes, key=lambda name: -votes[name])
        first += label == ranking[0]
        five += label in ranking[:5]
    results = weighted_knn(
        train_features=train,
        train_labels=train_labels,
        test_features=test,
        test_labels=test_labels,
        neighbours=15,
        temperature=0.07,
        classes=9,
    )
    assert (results[15].top1, results[15].top5) == (pytest.approx(4 * first), pytest.approx(4 * five))


def test_more_neighbours_than_training_images_names_the_option() -> None:
    with pytest.raises(OptionError, match=r"^task\.knn_neighbours: 20 neighbours of 10 .*use a number from 1 to 10"):
        classify([5, 20])
    with pytest.raises(OptionError, match=r"^task\.online_knn\.neighbours: 20"):
        classify(20, option="task.online_knn.neighbours")


@pytest.mark.parametrize("neighbours", [[], [0], [-3]])
def test_neighbours_that_cannot_be_are_refused_before_any_features_exist(neighbours: list[int]) -> None:
    with pytest.raises(OptionError, match="task.knn_neighbours"):
        check_neighbours(neighbours, train_images=10, option="task.knn_neighbours")
