"""Weighted k-nearest-neighbour classification: how well frozen features separate labelled classes, without any training.

Letters: N training images, M test images, D feature width, k neighbours.
Unlike the original code: any number of classes and test images, and a class that no neighbour voted for is never a prediction
(there, top-5 depended on how equal zero scores were sorted when the neighbours covered fewer than five classes).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.errors import OptionError


@dataclass(frozen=True)
class KnnResult:
    """Share of test images, in percent, whose class is the first (top1) or among the first five (top5) predictions."""

    top1: float
    top5: float


@torch.no_grad()
def weighted_knn(
    *,
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    neighbours: Sequence[int] | int,
    temperature: float,
    classes: int,
    chunk_rows: int = 256,
    option: str = "task.knn_neighbours",
) -> dict[int, KnnResult]:
    """Votes of the k most similar training images, weighted by exp(cosine / temperature); one result per k (Wu et al. 2018).

    train_features  (N, D), train_labels (N,) int64: features need not be normalised
    test_features   (M, D), test_labels (M,) int64
    neighbours      one k or several; several cost hardly more than the largest
    temperature     0.07 in the paper
    classes         labels are 0 .. classes - 1
    chunk_rows      test images at once: bounds the memory to a few tensors of (chunk_rows, N)
    option          the option that `neighbours` comes from, for the error message

    Computes in float32 on the device of `train_features`. Raises OptionError if a k is not in 1 .. N, ValueError without a test image.
    """
    wanted = [neighbours] if isinstance(neighbours, int) else list(neighbours)
    check_neighbours(wanted, train_images=train_features.shape[0], option=option)
    if test_features.shape[0] == 0:
        raise ValueError("k-NN without a test image")

    device = train_features.device
    train = F.normalize(train_features.float(), dim=1)
    train_labels = train_labels.to(device)
    hits = torch.zeros(len(wanted), 2, dtype=torch.int64, device=device)
    for features, labels in zip(test_features.split(chunk_rows), test_labels.split(chunk_rows), strict=True):
        similarity = F.normalize(features.to(device).float(), dim=1) @ train.T
        nearest, places = similarity.topk(max(wanted), dim=1)
        votes = train_labels[places]
        # relative to the nearest neighbour: the same ranking, and no overflow at small temperatures
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        for row, k in enumerate(wanted):
            scores = weights.new_zeros(len(features), classes).scatter_add_(1, votes[:, :k], weights[:, :k])
            best, predicted = scores.topk(min(5, classes), dim=1)
            correct = (predicted == labels.to(device)[:, None]) & (best > 0)
            hits[row, 0] += correct[:, 0].sum()
            hits[row, 1] += correct.any(dim=1).sum()
    percent = (hits.double() * 100 / test_features.shape[0]).tolist()
    return {k: KnnResult(top1=top1, top5=top5) for k, (top1, top5) in zip(wanted, percent, strict=True)}


def check_neighbours(neighbours: Sequence[int], *, train_images: int, option: str) -> None:
    """Raises OptionError, naming `option`, unless every k is in 1 .. `train_images`: to be called before features are computed."""
    if not neighbours:
        raise OptionError(option, "no number of neighbours", "give at least one, such as 20")
    for k in neighbours:
        if not 1 <= k <= train_images:
            raise OptionError(
                option, f"{k} neighbours of {train_images} labelled training images", f"use a number from 1 to {train_images}"
            )
