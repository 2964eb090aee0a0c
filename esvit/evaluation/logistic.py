"""Multinomial logistic regression on frozen features: the linear classifier that has no learning rate to tune.

Letters: n images, F feature width, C classes.

Unusual: the whole objective is convex and is minimised over all images at once, so the result depends on features and penalty alone, not
on batches or a schedule. The gradient is written out, and no (n, C) tensor outlives its chunk of images.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_NUMBERS = 2**24  # of a (rows, C) tensor: 67 MB
_HISTORY = 30  # past steps that L-BFGS keeps
_SPARE_EVALUATIONS = 25  # beyond one for each iteration: where a line search needs more, it ends after about so many
_GRADIENT = 1e-5  # largest entry of the gradient at which a fit has converged
_CHANGE = 1e-9  # of the loss, or of the most changed weight, below which it has converged too


class LogisticRegression:
    """Minimises mean cross-entropy + penalty / 2 * |W|^2 over the weights W (F, C) and biases (C,), from zero, by L-BFGS.

    features  (n, F) float32, labels (n,) int64 in 0 .. classes - 1, on one device
    penalty   scikit-learn calls it 1 / (n * C)

    Biases are not penalised. Line searches meet the strong Wolfe conditions (Nocedal and Wright 2006, algorithms 7.4 and 3.5).
    """

    def __init__(self, features: Tensor, labels: Tensor, *, classes: int, penalty: float):
        self._features = features
        self._labels = labels
        self._penalty = penalty
        self.weights = torch.zeros(features.shape[1], classes, device=features.device)
        self.biases = torch.zeros(classes, device=features.device)
        self._optimizer = torch.optim.LBFGS(
            [self.weights, self.biases],
            history_size=_HISTORY,
            tolerance_grad=_GRADIENT,
            tolerance_change=_CHANGE,
            line_search_fn="strong_wolfe",
        )
        self.iterations = 0
        self.has_converged = False

    def advance(self, iterations: int) -> None:
        """Up to so many iterations more; fewer if it converges, or line searches take all of the evaluations."""
        evaluations = iterations + _SPARE_EVALUATIONS
        self._optimizer.param_groups[0].update(max_iter=iterations, max_eval=evaluations)
        state = self._optimizer.state[self.weights]
        done = state.get("n_iter", 0), state.get("func_evals", 0)
        self._optimizer.step(self._evaluate)
        self.iterations = state["n_iter"]
        self.has_converged = self.iterations - done[0] < iterations and state["func_evals"] - done[1] < evaluations

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """(m, F) -> logits (m, C)."""
        return features @ self.weights + self.biases

    @torch.no_grad()
    def _evaluate(self) -> Tensor:
        """The objective (0-d, float64, so that small changes of it show); leaves the gradient in `grad` of weights and biases."""
        images, classes = len(self._features), len(self.biases)
        rows = max(1, _CHUNK_NUMBERS // classes)
        loss = torch.zeros((), dtype=_sum_type(self.weights.device), device=self.weights.device)
        self.weights.grad = self.weights * self._penalty
        self.biases.grad = torch.zeros_like(self.biases)
        for features, labels in zip(self._features.split(rows), self._labels.split(rows), strict=True):
            log_shares = self.scores(features).log_softmax(dim=1)
            loss -= log_shares.gather(1, labels[:, None]).sum(dtype=loss.dtype)
            excess = log_shares.exp_()
            excess[torch.arange(len(labels), device=labels.device), labels] -= 1
            self.weights.grad.addmm_(features.T, excess, alpha=1 / images)
            self.biases.grad.add_(excess.sum(dim=0), alpha=1 / images)
        return loss / images + self._penalty / 2 * self.weights.square().sum(dtype=loss.dtype)


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
