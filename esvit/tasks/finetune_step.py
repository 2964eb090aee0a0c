"""One optimizer step of supervised fine-tuning: soft targets, layer-wise learning rates, and the moving average of the weights.

Unusual: as in pre-training, a step whose loss is not finite on any rank masks itself and all later ones on the device, and the host
learns of it with the meter. The average warms up: a run of a few hundred steps would otherwise end as a mean of its beginning.

Letters: B images, C channels, h and w the sides of a crop in pixels, K classes.
"""

import contextlib
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from esvit import distributed
from esvit.augmentations.mixing import Mixing
from esvit.evaluation.classifier import Classifier
from esvit.optimizers import StudentOptimizer
from esvit.records import StepValues
from esvit.runtime import Runtime


def rate_scales(layers: Sequence[Sequence[str]], decay: float) -> dict[str, float]:
    """Factor of the learning rate for each name in `layers`, which go from input to output: 1 for the last, `decay` times less below.

    Layer-wise learning-rate decay (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT).
    """
    return {name: decay ** (len(layers) - 1 - depth) for depth, layer in enumerate(layers) for name in layer}


def smoothed_targets(labels: Tensor, *, classes: int, smoothing: float) -> Tensor:
    """(B,) int64 -> (B, K) float32: 1 - smoothing at the label, and smoothing spread over all classes (Szegedy et al. 2016)."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over images of the cross-entropy (nats) of logits (B, K) with distributions (B, K), in float32."""
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum(dim=1).mean()


class MovingAverage:
    """A copy of a classifier whose parameters follow it slowly (Polyak & Juditsky 1992); always in eval mode.

    momentum  what the average keeps of itself in a step; in step s (from 0) at most (1 + s) / (10 + s)
    """

    def __init__(self, network: Classifier, *, momentum: float):
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self._momentum = momentum

    def momentum_at(self, step: int) -> float:
        return min(self._momentum, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, network: Classifier, *, step: int, finite: Tensor) -> None:
        """After optimizer step `step`; no change of a bit when `finite`, 0-d bool on the device, is False."""
        weight = finite * (1.0 - self.momentum_at(step))
        for average, parameter in zip(self.network.parameters(), network.parameters(), strict=True):
            average.lerp_(parameter, weight)

    @torch.no_grad()
    def take_buffers(self, network: Classifier) -> None:
        """Batch norms' statistics are averages already."""
        for average, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)


@dataclass(frozen=True)
class FineTuneResult:
    """What one step leaves behind, on the device.

    loss           mean over the micro-batches, of this rank
    gradient_norm  of the whole gradient before clipping
    finite         0-d bool: loss (and, but for fp16, gradient) finite on every rank
    finite_here    0-d bool: loss finite on this rank
    """

    loss: Tensor
    gradient_norm: Tensor
    finite: Tensor
    finite_here: Tensor

    def scalars(self) -> dict[str, Tensor]:
        """What the meter averages, by the names of the log."""
        return {"loss/total": self.loss, "gradient_norm": self.gradient_norm}


class FineTuning:
    """Classifier, optimizer and moving average, and the step that joins them.

    network          on the runtime's device; wrapped for several ranks here
    average          of its weights, or None
    accumulation     micro-batches per step
    mixing           mixes images and their targets, or None
    label_smoothing  share of a target that is spread over all classes
    """

    def __init__(
        self,
        *,
        network: Classifier,
        average: MovingAverage | None,
        optimizer: StudentOptimizer,
        runtime: Runtime,
        accumulation: int,
        mixing: Mixing | None,
        label_smoothing: float,
    ):
        self.network = network
        self.average = average
        self.optimizer = optimizer
        self.runtime = runtime
        self.accumulation = accumulation
        self.mixing = mixing
        self.label_smoothing = label_smoothing
        self._over_ranks = distributed.over_ranks(network, device=runtime.device, deterministic=runtime.deterministic)

    def step(
        self, micro_batches: Iterable[tuple[Tensor, Tensor]], now: StepValues, *, step: int, sound: Tensor, rng: np.random.Generator
    ) -> FineTuneResult:
        """Update everything once.

        micro_batches  `accumulation` pairs of normalised crops (B, C, h, w) and labels (B,) int64 on the device
        sound          0-d bool: False masks all updates, because an earlier step was not finite
        rng            of mixing
        """
        self.optimizer.set(now)
        losses = []
        for number, (crops, labels) in enumerate(micro_batches, start=1):
            images, targets = self.targets(crops, labels, rng)
            with self._gradients_over_ranks(is_last=number == self.accumulation):
                with self.runtime.autocast():
                    logits = self._over_ranks(images)
                loss = soft_cross_entropy(logits, targets)
                self.optimizer.backward(loss / self.accumulation)
            losses.append(loss.detach())
        mean_loss = torch.stack(losses).mean()
        finite_here = mean_loss.isfinite()
        finite = sound & distributed.minimum(finite_here.float()).bool()
        gradient_norm = self.optimizer.step(finite)
        if self.runtime.precision != "fp16":  # fp16 overflows now and then, and its scaler deals with it
            finite = finite & gradient_norm.isfinite()
        if self.average is not None:
            self.average.update(self.network, step=step, finite=finite)
        return FineTuneResult(loss=mean_loss, gradient_norm=gradient_norm, finite=finite, finite_here=finite_here)

    def set_progress(self, share: float) -> None:
        """Tell the backbone which share of training, from 0 to below 1, is done before the next step."""
        self.network.backbone.set_progress(share)

    def targets(self, crops: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Images as the network sees them (B, C, h, w), and what it should say of them (B, K), rows that sum to 1."""
        targets = smoothed_targets(labels, classes=self.network.head.out_features, smoothing=self.label_smoothing)
        if self.mixing is None:
            return crops, targets
        mixed, shares = self.mixing([crops], rng)
        return mixed[0], shares[0] @ targets

    def settle_buffers(self) -> None:
        """Before evaluating or saving: every rank, and the average, gets rank 0's batch-norm statistics.

        In training each rank's own are never read, so that nothing but evaluation depends on it.
        """
        buffers = list(self.network.buffers())
        for buffer, of_rank_zero in zip(buffers, distributed.broadcast_object([buffer.cpu() for buffer in buffers]), strict=True):
            buffer.copy_(of_rank_zero)
        if self.average is not None:
            self.average.take_buffers(self.network)

    def _gradients_over_ranks(self, *, is_last: bool) -> contextlib.AbstractContextManager:
        """Gradients are averaged over ranks once a step, in the backward pass of the last micro-batch."""
        if isinstance(self._over_ranks, DistributedDataParallel) and not is_last:
            return self._over_ranks.no_sync()
        return contextlib.nullcontext()
