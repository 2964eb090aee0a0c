"""k-NN on planted features with known answers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esvit.errors import OptionError
from esvit.evaluation.knn import KnnResult, WeightedKnn, check_neighbours, in_percent, tiles_of_rank, weighted_knn


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


def planted() -> dict[str, Any]:
    """210 training and 90 test images of twelve classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 12, (300,), generator=generator)
    features = torch.randn(12, 16, generator=generator)[labels] + torch.randn(300, 16, generator=generator)
    return dict(
        train_features=features[:210],
        train_labels=labels[:210],
        test_features=features[210:],
        test_labels=labels[210:],
        neighbours=[1, 20, 210],
        temperature=0.07,
        classes=12,
    )


@pytest.mark.parametrize(("chunk_rows", "train_chunk_rows"), [(1, 1000), (7, 64), (1000, 1), (64, 7), (1000, 209)])
def test_chunks_of_test_and_training_images_do_not_change_the_result(chunk_rows: int, train_chunk_rows: int) -> None:
    whole = weighted_knn(**planted(), chunk_rows=90, train_chunk_rows=210)
    assert weighted_knn(**planted(), chunk_rows=chunk_rows, train_chunk_rows=train_chunk_rows) == whole


def test_neighbours_are_found_in_whatever_chunk_of_training_images_they_are() -> None:
    """The same images in another order, so that the nearest lie in other chunks."""
    options = planted()
    order = torch.randperm(210, generator=torch.Generator().manual_seed(1))
    shuffled = options | {"train_features": options["train_features"][order], "train_labels": options["train_labels"][order]}
    assert weighted_knn(**shuffled, train_chunk_rows=16) == weighted_knn(**options, train_chunk_rows=210)


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_the_hits_of_all_ranks_are_those_of_one_process(world_size: int) -> None:
    options = planted()
    test_features, test_labels = options.pop("test_features"), options.pop("test_labels")
    knn = WeightedKnn(**options, device=torch.device("cpu"), train_rows=50)
    hits = torch.zeros(3, 2, dtype=torch.int64)
    for rank in range(world_size):
        for tile in tiles_of_rank(90, rows=16, rank=rank, world_size=world_size):
            hits += knn.hits(test_features[tile], test_labels[tile])
    assert in_percent(hits, neighbours=[1, 20, 210], images=90) == weighted_knn(**planted(), chunk_rows=16, train_chunk_rows=50)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_test_image_is_in_the_tiles_of_one_rank_and_tiles_do_not_depend_on_the_ranks(world_size: int) -> None:
    shares = [list(tiles_of_rank(100, rows=16, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sum(shares, []) == [slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 64), slice(64, 80), slice(80, 96), slice(96, 100)]


def test_features_in_a_memory_mapped_file_are_as_good_as_any(tmp_path: Path) -> None:
    options = planted()
    np.save(tmp_path / "rows.npy", options["train_features"].numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="c"))
    assert weighted_knn(**(options | {"train_features": mapped}), train_chunk_rows=32) == weighted_knn(**options)


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
    with pytest.raises(OptionError, match=r"^task\.neighbours: 20 neighbours of 10 .*use a number from 1 to 10"):
        classify([5, 20])
    with pytest.raises(OptionError, match=r"^task\.online_knn\.neighbours: 20"):
        classify(20, option="task.online_knn.neighbours")


@pytest.mark.parametrize("neighbours", [[], [0], [-3]])
def test_neighbours_that_cannot_be_are_refused_before_any_features_exist(neighbours: list[int]) -> None:
    with pytest.raises(OptionError, match="task.neighbours"):
        check_neighbours(neighbours, train_images=10, option="task.neighbours")
