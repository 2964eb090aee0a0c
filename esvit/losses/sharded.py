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

import torch
from torch import Tensor

from esvit import distributed
from esvit.losses.prototypes import Matching


class ShardedMatching(Matching):
    """Where prototypes and teacher_prototypes (K, E) are in shares of K / n rows; students, mass, pulls and teachers are this rank's.

    The gradient of the prototypes is that of the mean of all ranks' totals, in shares too.
    """

    def rows_and_gradient(self, students: Tensor, mass: Tensor, *, grad_enabled: bool) -> tuple[Tensor, Tensor | None]:
        embeddings = self._gathered(students / self.student_temperature)  # (n R, E)
        everyones_mass = distributed.joined(mass)
        gradient = torch.empty_like(embeddings)
        logsumexp = torch.empty_like(everyones_mass)
        for rows, softmax in self._assignments.blocks(embeddings, self._matrix):
            logsumexp[rows] = _over_all(softmax.logsumexp)
            weights = (everyones_mass[rows] * _shares(softmax.logsumexp, logsumexp[rows]))[:, None]
            gradient[rows] = softmax.mean() * weights
            if grad_enabled and self._is_trained:
                softmax.add_outer(embeddings[rows] * weights)
        total = mass.dot(distributed.own_part(logsumexp, dim=0))
        return total, distributed.sum_of_rows(gradient) / self.student_temperature if grad_enabled else None

    def _own_center(self, center: Tensor) -> Tensor:
        return distributed.own_part(center, dim=1)

    def _gathered(self, rows: Tensor) -> Tensor:
        """(n rows, E) of all ranks; the matrix products would round them to their dtype anyway."""
        return distributed.joined(rows.to(self._matrix.dtype)).to(self.dtype)

    def _expectations(self) -> Tensor:
        means = torch.empty_like(self._teachers)
        logsumexp = means.new_empty(len(means))
        for rows, targets in self._first_targets():
            means[rows], logsumexp[rows] = targets.mean(), targets.logsumexp
        self._target_shares = _shares(logsumexp, _over_all(logsumexp))[:, None]  # (n S, 1)
        return distributed.sum_of_rows(means * self._target_shares)

    def _values(self, pulls: Tensor) -> Tensor:
        return self._gathered(pulls) * self._target_shares

    def _whole(self, outer_sum: Tensor) -> Tensor:
        return distributed.from_share(outer_sum / distributed.world_size(), like=self._prototypes)


def _over_all(logsumexp: Tensor) -> Tensor:
    """(rows,) over the prototypes of all ranks, of that over this rank's."""
    return distributed.joined(logsumexp[None]).logsumexp(dim=0)


def _shares(logsumexp: Tensor, over_all: Tensor) -> Tensor:
    """(rows,): the probability of all of this rank's prototypes together."""
    return (logsumexp - over_all).exp()
