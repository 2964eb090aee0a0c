"""What view and region losses have in common: how a training step, or a reader of a formula, uses them.

Letters: V student crops, G teacher (global) views, B images, E embedding width, K prototypes.
"""

import itertools
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from esvit import distributed
from esvit.losses import choice
from esvit.losses.chunked import ChunkedAssignments
from esvit.losses.prototypes import Matching, WholeMatching, WithGradients
from esvit.losses.sharded import ShardedMatching
from esvit.records import LossTerms, NetworkOutput, PrototypeWeights


@dataclass(frozen=True)
class PrototypeGradients:
    """Of a loss, for the prototypes (K, E) of both heads; None where there are none, or they are frozen."""

    view: Tensor | None
    region: Tensor | None

    def with_weights(self, prototypes: PrototypeWeights) -> list[tuple[Tensor, Tensor]]:
        """Pairs of prototypes and their gradient."""
        pairs = ((prototypes.view, self.view), (prototypes.region, self.region))
        return [(weights, gradient) for weights, gradient in pairs if weights is not None and gradient is not None]


class LossByGroups(Protocol):
    """The loss of one micro-batch, taken group of crops by group."""

    def terms(self, outputs: list[NetworkOutput], group: slice, mixing: Tensor | None) -> LossTerms:
        """The share of the crops `group` in the loss, by their `outputs`; shares add up. Its gradient reaches the embeddings only.

        mixing  (V, B student, B teacher) of all crops: how much of each teacher image is in each student image; rows need not sum to 1.
                None means the identity.
        """

    def prototype_gradients(self) -> PrototypeGradients:
        """Of the whole loss; to be called once, after all groups."""


class MatchingLoss(nn.Module):
    """Cross-entropy of student crops against the teacher's global views, averaged over pairs; its buffers are the centres (1, K).

    kernel  "auto", "chunked" or "fused"; until `choose_kernel` has been called it is chunked
    """

    student_temperature: float

    def __init__(self, *, kernel: str):
        super().__init__()
        self.kernel = kernel
        self.make_assignments: choice.MakeAssignments = ChunkedAssignments

    def choose_kernel(self, *, device: torch.device, precision: str, width: int) -> None:
        """Follow the option `kernel`, for embeddings of `width`. All ranks call it together.

        Raises OptionError where "fused" cannot be.
        """
        self.make_assignments = choice.choose(self.kernel, device=device, precision=precision, width=width)

    @property
    def is_fused(self) -> bool:
        return self.make_assignments is choice.fused_assignments

    def matching(self, teachers: Tensor, prototypes: Tensor, teacher_prototypes: Tensor, center: Tensor, temperature: float) -> Matching:
        """One head's cross-entropy against teacher rows (S, E); temperature is the teacher's. Prototypes may be in shares over ranks."""
        way = ShardedMatching if distributed.is_sharded(prototypes) else WholeMatching
        return way(
            prototypes=prototypes,
            teachers=teachers,
            teacher_prototypes=teacher_prototypes,
            center=center,
            student_temperature=self.student_temperature,
            teacher_temperature=temperature,
            make_assignments=self.make_assignments,
        )

    @abstractmethod
    def against(
        self,
        teacher_outputs: list[NetworkOutput],
        student_prototypes: PrototypeWeights,
        teacher_prototypes: PrototypeWeights,
        temperature: float,
        *,
        crops: int,
    ) -> LossByGroups:
        """The loss against G teacher views of B images.

        temperature  the teacher's
        crops        V, of all groups together; the first G are the teacher's views
        """

    def forward(
        self,
        student_outputs: list[NetworkOutput],
        teacher_outputs: list[NetworkOutput],
        student_prototypes: PrototypeWeights,
        teacher_prototypes: PrototypeWeights,
        temperature: float,
        mixing: Tensor | None = None,
    ) -> LossTerms:
        """The same for all V crops at once, with gradients for the student's prototypes too.

        The original's mixup targets are indexed [teacher, student] (right only for symmetric ones): transpose `mixing` to compare.
        """
        loss = self.against(teacher_outputs, student_prototypes, teacher_prototypes, temperature, crops=len(student_outputs))
        terms = loss.terms(student_outputs, slice(None), mixing)
        pairs = loss.prototype_gradients().with_weights(student_prototypes)
        return replace(terms, total=WithGradients.apply(terms.total, *itertools.chain(*pairs)))
