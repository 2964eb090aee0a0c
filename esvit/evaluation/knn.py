"""Weighted k-nearest-neighbour classification: how well frozen features separate labelled classes, without any training.

Letters: N training images, M test images, D feature width, k neighbours.
Unlike the original code: any number of classes and test images, and a class that no neighbour voted for is never a prediction
(there, top-5 depended on how equal zero scores were sorted when the neighbours covered fewer than five classes).

Unusual: similarities exist for one tile of test and training images at a time, and the nearest so far are carried from tile to tile.
So memory does not grow with N or M, and memory-mapped features of any size will do. Ranks share the test images in whole tiles: every
number of ranks multiplies the same matrices, and gets the same hits to the last one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.errors import OptionError

TEST_ROWS = 2048  # of a tile; more test rows mean fewer passes over the training features
TRAIN_ROWS = 16384  # of a tile, which then takes 134 MB


@dataclass(frozen=True)
class KnnResult:
    """Share of test images, in percent, whose class is the first (top1) or among the first five (top5) predictions."""

    top1: float
    top5: float


@dataclass(frozen=True, kw_only=True)
class WeightedKnn:
    """Votes of the k most similar training images, weighted by exp(cosine / temperature) (Wu et al. 2018).

    train_features  (N, D), train_labels (N,) int64: features need not be normalised
    neighbours      one or more k; several cost hardly more than the largest
    temperature     0.07 in the paper
    classes         labels are 0 .. classes - 1
    device          where to compute, in float32; the features may lie elsewhere
    train_rows      training images at once
    """

    train_features: Tensor
    train_labels: Tensor
    neighbours: list[int]
    temperature: float
    classes: int
    device: torch.device
    train_rows: int = TRAIN_ROWS

    @torch.no_grad()
    def hits(self, features: Tensor, labels: Tensor) -> Tensor:
        """How many of some test images, features (m, D) and labels (m,), are right at top-1 and top-5, for each k: (ks, 2) int64."""
        labels = labels.to(self.device)[:, None]
        similarity, places = self._nearest(F.normalize(features.to(self.device).float(), dim=1))
        votes = self.train_labels.to(self.device)[places]
        # relative to the nearest neighbour: the same ranking, and no overflow at small temperatures
        weights = ((similarity - similarity[:, :1]) / self.temperature).exp()
        hits = []
        for k in self.neighbours:
            scores = weights.new_zeros(len(features), self.classes).scatter_add_(1, votes[:, :k], weights[:, :k])
            best, predicted = scores.topk(min(5, self.classes), dim=1)
            correct = (predicted == labels) & (best > 0)
            hits.append(torch.stack([correct[:, 0].sum(), correct.any(dim=1).sum()]))
        return torch.stack(hits)

    def _nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines, falling, of the nearest training images of unit queries (m, D), and their places: (m, largest k) each."""
        most = max(self.neighbours)
        cosines = queries.new_empty(len(queries), 0)
        places = torch.empty(len(queries), 0, dtype=torch.int64, device=self.device)
        for first in range(0, len(self.train_features), self.train_rows):
            train = F.normalize(self.train_features[first : first + self.train_rows].to(self.device).float(), dim=1)
            tile_cosines, tile_places = (queries @ train.T).topk(min(most, len(train)), dim=1)
            cosines, among = torch.cat([cosines, tile_cosines], dim=1).topk(min(most, cosines.shape[1] + tile_cosines.shape[1]), dim=1)
            places = torch.cat([places, tile_places + first], dim=1).gather(1, among)
        return cosines, places


def weighted_knn(
    *,
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    neighbours: Sequence[int] | int,
    temperature: float,
    classes: int,
    chunk_rows: int = TEST_ROWS,
    train_chunk_rows: int = TRAIN_ROWS,
    option: str = "task.neighbours",
) -> dict[int, KnnResult]:
    """One result per k, of all test images in this process, on the device of `train_features`; see `WeightedKnn`.

    test_features  (M, D), test_labels (M,) int64
    chunk_rows, train_chunk_rows  test and training images at once: bound the memory
    option         the option that `neighbours` comes from, for the error message

    Raises OptionError if a k is not in 1 .. N, ValueError without a test image.
    """
    wanted = [neighbours] if isinstance(neighbours, int) else list(neighbours)
    check_neighbours(wanted, train_images=len(train_features), option=option)
    if len(test_features) == 0:
        raise ValueError("k-NN without a test image")
    knn = WeightedKnn(
        train_features=train_features,
        train_labels=train_labels,
        neighbours=wanted,
        temperature=temperature,
        classes=classes,
        device=train_features.device,
        train_rows=train_chunk_rows,
    )
    tiles = tiles_of_rank(len(test_features), rows=chunk_rows, rank=0, world_size=1)
    hits = sum(knn.hits(test_features[tile], test_labels[tile]) for tile in tiles)
    assert isinstance(hits, Tensor)
    return in_percent(hits, neighbours=wanted, images=len(test_features))


def tiles_of_rank(images: int, *, rows: int, rank: int, world_size: int) -> Iterator[slice]:
    """This rank's contiguous share of the tiles of `rows` that `images` test images are cut into."""
    tiles = -(-images // rows)
    for tile in range(tiles * rank // world_size, tiles * (rank + 1) // world_size):
        yield slice(tile * rows, min((tile + 1) * rows, images))


def in_percent(hits: Tensor, *, neighbours: Sequence[int], images: int) -> dict[int, KnnResult]:
    """One result per k, of hits (ks, 2) among `images` test images."""
    shares = (hits.double() * 100 / images).tolist()
    return {k: KnnResult(top1=top1, top5=top5) for k, (top1, top5) in zip(neighbours, shares, strict=True)}


def check_neighbours(neighbours: Sequence[int], *, train_images: int, option: str) -> None:
    """Raises OptionError, naming `option`, unless every k is in 1 .. `train_images`: to be called before features are computed."""
    if not neighbours:
        raise OptionError(option, "no number of neighbours", "give at least one, such as 20")
    for k in neighbours:
        if not 1 <= k <= train_images:
            raise OptionError(
                option, f"{k} neighbours of {train_images} labelled training images", f"use a number from 1 to {train_images}"
            )
