"""Multinomial logistic regression on frozen features: the linear classifier that has no learning rate to tune.

Letters: n images, F feature width, C classes.

Unusual: the whole objective is convex and is minimised over all images at once, so the result depends on features and penalty alone, not
on batches or a schedule. The gradient is written out, and no (n, C) tensor outlives its chunk of images.
"""

import math
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_NUMBERS = 2**24  # of a (rows, C) tensor: 67 MB
_HISTORY = 30  # past steps that L-BFGS keeps
_TRIALS = 25  # step lengths that a line search tries at most
_GRADIENT = 1e-5  # largest entry of the gradient at which a fit has converged
_DECREASE = 1e-9  # of the objective in one step, at which it has converged too


class LogisticRegression:
    """Minimises mean cross-entropy + penalty / 2 * |W|^2 over the weights W (F, C) and biases (C,), from zero.

    features  (n, F) float32, labels (n,) int64 in 0 .. classes - 1, on one device
    penalty   scikit-learn calls it 1 / (n * C)

    Biases are not penalised. By L-BFGS (Nocedal and Wright 2006, algorithm 7.4) rather than torch's, whose import takes seconds. Step
    lengths meet the weak Wolfe conditions and are found by bisection.
    """

    def __init__(self, features: Tensor, labels: Tensor, *, classes: int, penalty: float):
        self._features = features
        self._labels = labels
        self._penalty = penalty
        width = features.shape[1]
        self._point = torch.zeros((width + 1) * classes, device=features.device)
        self.weights, self.biases = self._point[:-classes].view(width, classes), self._point[-classes:]
        self._past: deque[tuple[Tensor, Tensor]] = deque(maxlen=_HISTORY)  # steps, and the changes of the gradient
        self.iterations = 0
        self.loss, self._gradient = self._evaluate()
        self.has_converged = self._is_flat()

    def advance(self, iterations: int) -> None:
        """So many iterations more; fewer if it converges."""
        for _ in range(iterations):
            if self.has_converged:
                return
            self._step()
            self.iterations += 1

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """(m, F) -> logits (m, C)."""
        return features @ self.weights + self.biases

    @torch.no_grad()
    def _step(self) -> None:
        loss, gradient, start = self.loss, self._gradient, self._point.clone()
        direction = self._direction()
        slope = float(gradient @ direction)
        shortest, longest, length = 0.0, math.inf, 1.0
        for _ in range(_TRIALS):
            torch.add(start, direction, alpha=length, out=self._point)
            self.loss, self._gradient = self._evaluate()
            if self.loss > loss + 1e-4 * length * slope:
                longest = length
            elif float(self._gradient @ direction) < 0.9 * slope:
                shortest = length
            else:
                break
            length = 2 * length if longest == math.inf else (shortest + longest) / 2
        if self.loss >= loss:  # rounding hides whatever is left to gain
            self._point.copy_(start)
            self.loss, self._gradient = loss, gradient
        step, change = self._point - start, self._gradient - gradient
        if float(step @ change) > 0:
            self._past.append((step, change))
        self.has_converged = self._is_flat() or loss - self.loss <= _DECREASE

    def _direction(self) -> Tensor:
        """Minus the gradient times the inverse of the curvature, as far as past steps show it."""
        direction = -self._gradient
        if not self._past:
            return direction / max(1.0, float(direction.abs().sum()))
        along: list[Tensor] = []
        for step, change in reversed(self._past):
            along.append((step @ direction) / (step @ change))
            direction.sub_(along[-1] * change)
        step, change = self._past[-1]
        direction.mul_((step @ change) / (change @ change))
        for (step, change), share in zip(self._past, reversed(along), strict=True):
            direction.add_((share - (change @ direction) / (step @ change)) * step)
        return direction

    def _is_flat(self) -> bool:
        return float(self._gradient.abs().max()) <= _GRADIENT

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, Tensor]:
        """The objective, summed in float64 so that small changes of it show, and its gradient (of the weights, then of the biases)."""
        images, classes = len(self._features), len(self.biases)
        rows = max(1, _CHUNK_NUMBERS // classes)
        loss = torch.zeros((), dtype=_sum_type(self._point.device), device=self._point.device)
        gradient = self._point * self._penalty
        of_weights, of_biases = gradient[:-classes].view_as(self.weights), gradient[-classes:].zero_()
        for features, labels in zip(self._features.split(rows), self._labels.split(rows), strict=True):
            log_shares = self.scores(features).log_softmax(dim=1)
            loss -= log_shares.gather(1, labels[:, None]).sum(dtype=loss.dtype)
            excess = log_shares.exp_()
            excess[torch.arange(len(labels), device=labels.device), labels] -= 1
            of_weights.addmm_(features.T, excess, alpha=1 / images)
            of_biases.add_(excess.sum(dim=0), alpha=1 / images)
        return float(loss / images + self._penalty / 2 * self.weights.square().sum(dtype=loss.dtype)), gradient


@dataclass(frozen=True)
class Accuracy:
    """Share of images, in percent, whose class is the first (top1) or among the first five (top5) predictions."""

    top1: float
    top5: float


def accuracy(model: LogisticRegression, features: Tensor, labels: Tensor) -> Accuracy:
    """On images with features (m, F) and labels (m,), m at least 1."""
    classes = len(model.biases)
    rows = max(1, _CHUNK_NUMBERS // classes)
    hits = torch.zeros(2, dtype=torch.int64, device=features.device)
    for some, theirs in zip(features.split(rows), labels.split(rows), strict=True):
        correct = model.scores(some).topk(min(5, classes), dim=1).indices == theirs[:, None]
        hits += torch.stack([correct[:, 0].sum(), correct.any(dim=1).sum()])
    top1, top5 = (hits.double().cpu() * 100 / len(labels)).tolist()
    return Accuracy(top1=top1, top5=top5)


class Scaling:
    """Brings features to the scale that one penalty for all of them supposes.

    how       "standardize": each of the F features to mean 0 and deviation 1 over `features`; "unit_length": each row to length 1
    features  (n, F) of the training images
    """

    def __init__(self, how: str, features: Tensor):
        self._how = how
        if how == "standardize":
            deviation, self._mean = torch.std_mean(features, dim=0, correction=0)
            self._deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))

    def __call__(self, features: Tensor) -> Tensor:
        """(m, F) -> (m, F), in place."""
        if self._how == "standardize":
            return features.sub_(self._mean).div_(self._deviation)
        return F.normalize(features, dim=1, out=features)


def _sum_type(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
