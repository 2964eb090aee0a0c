"""One optimizer step of self-distillation: what the paper's algorithm does between two batches.

Unusual: a step whose loss is not finite on any rank masks itself and all later steps on the device (parameters, moments,
EMA, centre), without the host knowing; the flag is read with the meter. Under accumulation the centre sees the teacher's
embeddings of all micro-batches and the EMA moves once, so that k micro-batches of B images are one step of k * B.
A group of crops passes forward, loss and backward before the next one does: the activations of one group live at a time.

Letters: B images, V crops.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from esvit import distributed
from esvit.augmentations.mixing import Mixing
from esvit.losses.combined import ViewRegionLoss
from esvit.losses.view import ViewLoss
from esvit.networks import MultiCropNetwork
from esvit.optimizers import StudentOptimizer
from esvit.records import LossTerms, NetworkOutput, PrototypeWeights, StepValues
from esvit.runtime import Runtime
from esvit.tasks import sharding
from esvit.teacher import Teacher

Phase = Callable[[str], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class StepResult:
    """What one step leaves behind, on the device.

    terms          means over the micro-batches, of this rank
    gradient_norm  of the whole gradient before clipping
    finite         0-d bool: loss (and, but for fp16, gradient) finite on every rank
    finite_here    0-d bool: loss finite on this rank
    *_outputs      of the last micro-batch, one for each crop
    *_pooled       (B, D) of each global crop of every micro-batch, micro-batch after micro-batch; no gradient
    """

    terms: LossTerms
    gradient_norm: Tensor
    finite: Tensor
    finite_here: Tensor
    student_outputs: list[NetworkOutput]
    teacher_outputs: list[NetworkOutput]
    student_pooled: list[Tensor]
    teacher_pooled: list[Tensor]
    student_prototypes: PrototypeWeights
    teacher_prototypes: PrototypeWeights

    def scalars(self) -> dict[str, Tensor]:
        """What the meter averages, by the names of the log."""
        values = {"loss/total": self.terms.total, "loss/view": self.terms.view, "gradient_norm": self.gradient_norm}
        return values if self.terms.region is None else values | {"loss/region": self.terms.region}


class Distillation:
    """Student, teacher, loss and optimizer, and the step that joins them.

    network        the student, on the runtime's device; wrapped for several ranks here
    global_count   how many of the first crops the teacher sees
    accumulation   micro-batches per step
    parts          in which the crops of one size pass forward, loss and backward, one after the other
    mixing         mixes the student's images, or None; the teacher sees clean ones
    teacher        of the student, both in shares already (sharding.py); None: made here
    phase          context manager around each part of the step, for profilers
    """

    def __init__(
        self,
        *,
        network: MultiCropNetwork,
        loss: ViewLoss | ViewRegionLoss,
        optimizer: StudentOptimizer,
        runtime: Runtime,
        global_count: int,
        accumulation: int,
        parts: int,
        mixing: Mixing | None,
        teacher: Teacher | None = None,
        phase: Phase = record_function,
    ):
        self.network = network
        self.teacher = Teacher(network) if teacher is None else teacher
        self.loss = loss
        self.optimizer = optimizer
        self.runtime = runtime
        self.global_count = global_count
        self.accumulation = accumulation
        self.parts = parts
        self.mixing = mixing
        self.phase = phase
        self._is_sharded = sharding.is_sharded(network)
        self.student: nn.Module = network
        if not self._is_sharded:
            self.student = distributed.over_ranks(network, device=runtime.device, deterministic=runtime.deterministic)

    def step(self, micro_batches: Iterable[list[Tensor]], now: StepValues, *, sound: Tensor, rng: np.random.Generator) -> StepResult:
        """Update everything once.

        micro_batches  `accumulation` lists of V normalised crops (B, C, H_v, W_v) on the device
        sound          0-d bool: False masks all updates, because an earlier step was not finite
        """
        self.optimizer.set(now)
        teacher_prototypes, student_prototypes = self.teacher.prototypes(), self.network.prototypes()
        prototype_gradients: list[tuple[Tensor, Tensor]] = []  # the student's prototypes, and their gradient of all micro-batches
        all_targets: list[NetworkOutput] = []
        all_terms: list[LossTerms] = []
        student_pooled: list[Tensor] = []
        for number, crops in enumerate(micro_batches, start=1):
            with self.runtime.autocast():
                with self.phase("teacher"):
                    targets = self.teacher(crops[: self.global_count])
                with self.phase("loss"):
                    loss = self.loss.against(targets, student_prototypes, teacher_prototypes, now.temperature, crops=len(crops))
                mixed, weights = (crops, None) if self.mixing is None else self.mixing(crops, rng)
                outputs: list[NetworkOutput] = []
                shares: list[LossTerms] = []
                passes = self.network.passes(mixed, parts=self.parts)
                for group in passes:
                    is_last = number == self.accumulation and group is passes[-1]
                    with self._gradients_over_ranks(is_last=is_last):
                        with self.phase("student"):
                            passed = self.student(mixed[group])
                        with self.phase("loss"):
                            share = loss.terms(passed, group, weights)
                        with self.phase("backward"), torch.autocast(self.runtime.device.type, enabled=False):
                            self.optimizer.backward(share.total / self.accumulation)
                    outputs += [output.detached() for output in passed]
                    shares.append(replace(share, total=share.total.detach()))
                    del passed, share  # or their activations would live on through the next group
                with self.phase("loss"):
                    prototype_gradients = _added(prototype_gradients, loss.prototype_gradients().with_weights(student_prototypes))
            all_targets += targets
            student_pooled += [output.pooled for output in outputs[: self.global_count]]
            all_terms.append(_sum(shares))
        with self.phase("backward"):
            self.optimizer.backward_from([(weights, gradient.div_(self.accumulation)) for weights, gradient in prototype_gradients])
            if self._is_sharded:
                sharding.average_whole_gradients(self.network)
        terms = _mean(all_terms)
        finite_here = terms.total.isfinite()
        finite = sound & distributed.minimum(finite_here.float()).bool()
        with self.phase("optimizer"):
            gradient_norm = self.optimizer.step(finite)
        if self.runtime.precision != "fp16":  # fp16 overflows now and then, and its scaler deals with it
            finite = finite & gradient_norm.isfinite()
        with self.phase("centre"):
            self.loss.update_center(all_targets, teacher_prototypes, finite)
        with self.phase("EMA"):
            self.teacher.update(self.network, now.momentum, finite)
        return StepResult(
            terms=terms,
            gradient_norm=gradient_norm,
            finite=finite,
            finite_here=finite_here,
            student_outputs=outputs,
            teacher_outputs=targets,
            student_pooled=student_pooled,
            teacher_pooled=[target.pooled for target in all_targets],
            student_prototypes=student_prototypes,
            teacher_prototypes=teacher_prototypes,
        )

    def set_progress(self, share: float) -> None:
        """Tell both backbones which share of training, from 0 to below 1, is done before the next step."""
        for network in (self.network, self.teacher.network):
            network.backbone.set_progress(share)

    def state_dict(self) -> dict:
        """Plain containers and tensors, in shares where they are so here; `student` and `teacher` are state dicts of `MultiCropNetwork`."""
        return {
            "student": self.network.state_dict(),
            "teacher": self.teacher.network.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _gradients_over_ranks(self, *, is_last: bool) -> contextlib.AbstractContextManager:
        """Gradients are averaged over ranks once a step, in the backward pass of the last micro-batch."""
        if isinstance(self.student, DistributedDataParallel) and not is_last:
            return self.student.no_sync()
        if self._is_sharded:
            sharding.send_gradients(self.network, now=is_last)
        return contextlib.nullcontext()


def _added(sums: list[tuple[Tensor, Tensor]], more: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Gradients of the same tensors, added up in the first."""
    return [(weights, total.add_(gradient)) for (weights, total), (_, gradient) in zip(sums, more, strict=True)] if sums else more


def _sum(terms: list[LossTerms]) -> LossTerms:
    """Of detached scalars."""
    regions = [each.region for each in terms if each.region is not None]
    return LossTerms(
        total=torch.stack([each.total for each in terms]).sum(),
        view=torch.stack([each.view for each in terms]).sum(),
        region=torch.stack(regions).sum() if regions else None,
    )


def _mean(terms: list[LossTerms]) -> LossTerms:
    total = _sum(terms)
    return LossTerms(
        total=total.total / len(terms), view=total.view / len(terms), region=None if total.region is None else total.region / len(terms)
    )
