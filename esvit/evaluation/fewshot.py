"""Few-shot classification on frozen features: tell a few classes apart that a few images of each were seen of, many times over.

Letters: n images, F feature width, W ways (classes of an episode), S shots (labelled images of each), Q queries of each.

Unusual: an episode is drawn from (seed, its number) alone: no matter which rank computes it, how many shots are asked for or how many
episodes there are. Its queries are the same for every number of shots, and fewer shots are the first of more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.evaluation.logistic import LogisticRegression

_NORMAL_95 = 1.96  # standard errors on either side of a mean
_ITERATIONS = 200  # of L-BFGS, at most


@dataclass(frozen=True)
class Episode:
    """Rows of images: queries (W, Q) and, of the same W classes, all others in the order in which they become shots."""

    queries: Tensor
    others: list[Tensor]

    def shots(self, count: int) -> Tensor:
        """(W, S)"""
        return torch.stack([rows[:count] for rows in self.others])


def draw_episode(rows_by_class: Sequence[np.ndarray], *, ways: int, queries: int, seed: int, number: int) -> Episode:
    """`ways` of the classes and `queries` images of each; every class has to have more than that."""
    rng = np.random.default_rng([seed, number])
    drawn = [torch.from_numpy(rng.permutation(rows_by_class[each])) for each in rng.permutation(len(rows_by_class))[:ways]]
    return Episode(torch.stack([rows[:queries] for rows in drawn]), [rows[queries:] for rows in drawn])


def centered(features: Tensor, center: Tensor) -> Tensor:
    """Features (n, F) less `center` (F,), at unit length: "CL2N" of SimpleShot (Wang et al. 2019)."""
    return F.normalize(features - center, dim=1)


def nearest_mean_accuracy(shots: Tensor, queries: Tensor) -> float:
    """Share of the queries (W, Q, F) whose cosine with the mean of their own class's shots (W, S, F) is the largest."""
    means = F.normalize(shots.mean(dim=1), dim=1)
    return _share_right(F.normalize(queries, dim=2) @ means.T)


def logistic_accuracy(shots: Tensor, queries: Tensor, *, penalty: float) -> float:
    """The same, by logistic regression on the shots; `penalty` is scikit-learn's 1 / C."""
    ways, count, _ = shots.shape
    labels = torch.arange(ways, device=shots.device).repeat_interleave(count)
    model = LogisticRegression(shots.flatten(0, 1), labels, classes=ways, penalty=penalty / len(labels))
    model.advance(_ITERATIONS)
    return _share_right(model.scores(queries))


def _share_right(scores: Tensor) -> float:
    """Of scores (W, Q, W) of W classes."""
    right = scores.argmax(dim=2) == torch.arange(len(scores), device=scores.device)[:, None]
    return right.double().mean().item()


@dataclass(frozen=True)
class MeanAccuracy:
    """Mean over episodes and half the width of its 95% interval, in percent: how far other episodes of these images could lie."""

    mean: float
    interval: float


def mean_accuracy(accuracies: Tensor) -> MeanAccuracy:
    """Of shares (episodes,), at least two."""
    error = accuracies.std(correction=1) / len(accuracies) ** 0.5
    return MeanAccuracy(mean=100 * accuracies.mean().item(), interval=100 * _NORMAL_95 * error.item())
