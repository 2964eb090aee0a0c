"""The cross-entropy of prototypes.py where each of n ranks has K / n of the prototypes only, for more of them than one GPU should keep.

The embeddings of all ranks meet the prototypes of each. With the softmax p and the logsumexp z of a row over a rank's own prototypes,
and Z the logsumexp of the z of all ranks, the softmax over all K is exp(z - Z) p: a rank's share of a row is one number, and everything
that prototypes.py does with a softmax is done with p and scaled by it.

What goes over the ranks, in the dtype of the matrix products but for sums and logsumexps: embeddings of teacher and student, and pulls, to
all of them; mean prototypes (teacher) and gradients (student) back to whoever had the row, summed; one z of each row. Nothing is K wide.
A rank's total is that of its own rows. The gradient of its prototypes comes from the rows of all, and is that of the mean of all totals.

Every rank must have equally many rows, and call all of this together. Nothing here waits for autograd: sending is done in forward passes.

Letters: n ranks, R student rows of a group on each rank, S teacher rows on each rank, E embedding width, K prototypes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esvit import distributed
from esvit.losses.assignments import Assignment
from esvit.losses.choice import MakeAssignments
from esvit.losses.prototypes import dtypes


class ShardedMatching:
    """As Matching, of which it has the interface: teachers (S, E), center (1, K), and students, mass and pulls are this rank's.

    prototypes, teacher_prototypes  (K, E), in shares of K / n rows
    """

    def __init__(
        self,
        *,
        prototypes: Tensor,
        teachers: Tensor,
        teacher_prototypes: Tensor,
        center: Tensor,
        student_temperature: float,
        teacher_temperature: float,
        make_assignments: MakeAssignments,
    ):
        device = prototypes.device.type
        dtype, product_dtype = dtypes(prototypes, teachers)
        self.dtype = dtype
        self.student_temperature = student_temperature
        self.is_trained = prototypes.requires_grad and torch.is_grad_enabled()
        self._prototypes = prototypes.detach()
        with torch.no_grad(), torch.autocast(device, enabled=False):
            self._matrix, self._teacher_matrix = (
                share.detach().to(product_dtype) for share in distributed.shares([prototypes, teacher_prototypes])
            )
            self._shift = distributed.own_part(center, dim=1).to(dtype) / teacher_temperature
            self._pulls = torch.zeros_like(teachers, dtype=dtype)
            self._teachers = self._of_all_ranks(teachers.to(dtype) / teacher_temperature)  # (n S, E)
            self._assignments = make_assignments(self._matrix, dtype)
            self._kept: list[tuple[slice, Assignment]] = []
            means = torch.empty_like(self._teachers)
            logsumexp = means.new_empty(len(means))
            for rows, targets in self._targets():
                means[rows], logsumexp[rows] = targets.mean(), targets.logsumexp
                if self._assignments.can_keep(len(means)):
                    self._kept.append((rows, targets))
            self._shares = _shares(logsumexp, _over_all(logsumexp))[:, None]  # (n S, 1), of each target
            self._expected = distributed.sum_of_rows(means * self._shares) / -student_temperature  # q_j W / -s: a pull's gradient

    def __call__(self, students: Tensor, mass: Tensor, pulls: Tensor) -> Tensor:
        """The part of this rank's total of a group: students (R, E), mass (R,), pulls (S, E). A scalar with gradients for students and
        pulls."""
        with torch.autocast(students.device.type, enabled=False):
            pulls = pulls.to(self.dtype)
            self._pulls += pulls.detach()
            rows = _StudentRows.apply(students.to(self.dtype), mass.detach().to(self.dtype), self, torch.is_grad_enabled())
            return rows + (pulls * self._expected).sum()

    @torch.no_grad()
    def prototypes_gradient(self) -> Tensor | None:
        """(K, E) in shares: the gradient of the mean of all ranks' totals, once all groups have been called; None where they are frozen."""
        if not self.is_trained:
            return None
        with torch.autocast(self._matrix.device.type, enabled=False):
            values = self._of_all_ranks(self._pulls / -self.student_temperature) * self._shares
            for rows, targets in self._kept or self._targets():
                targets.add_outer(values[rows])
            return distributed.from_share(self._assignments.outer_sum() / distributed.world_size(), like=self._prototypes)

    def rows_and_gradient(self, students: Tensor, mass: Tensor, *, grad_enabled: bool) -> tuple[Tensor, Tensor]:
        """sum_i mass_i * logsumexp(W h_i / s) over this rank's students (R, E), and its gradient (R, E) for them.

        The prototypes' is added up here, if `grad_enabled`.
        """
        embeddings = self._of_all_ranks(students / self.student_temperature)  # (n R, E)
        everyones_mass = distributed.joined(mass)
        gradient = torch.empty_like(embeddings)
        logsumexp = torch.empty_like(everyones_mass)
        for rows, softmax in self._assignments.blocks(embeddings, self._matrix):
            logsumexp[rows] = _over_all(softmax.logsumexp)
            weights = (everyones_mass[rows] * _shares(softmax.logsumexp, logsumexp[rows]))[:, None]
            gradient[rows] = softmax.mean() * weights
            if grad_enabled and self.is_trained:
                softmax.add_outer(embeddings[rows] * weights)
        return mass.dot(distributed.own_part(logsumexp, dim=0)), distributed.sum_of_rows(gradient) / self.student_temperature

    def _targets(self) -> Iterator[tuple[slice, Assignment]]:
        return self._assignments.blocks(self._teachers, self._teacher_matrix, self._shift)

    def _of_all_ranks(self, rows: Tensor) -> Tensor:
        """(n rows, E) of rows (rows, E), which the matrix products would round to their dtype anyway."""
        return distributed.joined(rows.to(self._matrix.dtype)).to(self.dtype)


class _StudentRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, students: Tensor, mass: Tensor, matching: ShardedMatching, grad_enabled: bool) -> Tensor:
        total, gradient = matching.rows_and_gradient(students, mass, grad_enabled=grad_enabled)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None, None


def _over_all(logsumexp: Tensor) -> Tensor:
    """(rows,) over the prototypes of all ranks, of that over this rank's."""
    return distributed.joined(logsumexp[None]).logsumexp(dim=0)


def _shares(logsumexp: Tensor, over_all: Tensor) -> Tensor:
    """(rows,): the probability of all of this rank's prototypes together."""
    return (logsumexp - over_all).exp()
