"""The k-NN accuracies of the original code on planted features."""

import pytest
import torch
import torch.nn.functional as F

from esvit.evaluation.knn import KnnResult, weighted_knn
from tests.golden.cases import Goldens


@pytest.fixture(scope="module")
def results(goldens: Goldens) -> dict[int, KnnResult]:
    centroids = goldens.input("knn_centroids", (10, 32))
    train_labels = torch.arange(1000) % 10
    test_labels = (7 * torch.arange(300)) % 10
    return weighted_knn(
        train_features=F.normalize(0.35 * centroids[train_labels] + goldens.input("knn_train", (1000, 32)), dim=1),
        train_labels=train_labels,
        test_features=F.normalize(0.35 * centroids[test_labels] + goldens.input("knn_test", (300, 32)), dim=1),
        test_labels=test_labels,
        neighbours=[5, 10, 20, 100, 200],
        temperature=0.07,
        classes=10,
        chunk_rows=128,
    )


@pytest.mark.parametrize("k", [5, 10, 20, 100, 200])
def test_top1_equals_the_original(goldens: Goldens, results: dict[int, KnnResult], k: int) -> None:
    golden_top1, _ = goldens.case("knn")[f"k{k}_top1_top5"]
    assert round(results[k].top1 * 3) == round(golden_top1 * 3)  # 300 test images: a third of a percent each


@pytest.mark.parametrize("k", [5, 10, 20, 100, 200])
def test_top5_differs_only_by_queries_whose_neighbours_cover_fewer_than_five_classes(
    goldens: Goldens, results: dict[int, KnnResult], k: int
) -> None:
    """There the original counts arbitrary classes with no vote at all; with k >= 100 there is no such query."""
    arrays = goldens.case("knn")
    _, golden_top5 = arrays[f"k{k}_top1_top5"]
    undecided = int(arrays[f"k{k}_n_queries_with_fewer_than_5_voted_classes"])
    difference = round(golden_top5 * 3) - round(results[k].top5 * 3)
    assert 0 <= difference <= undecided
