"""Cross-entropy between prototype assignments of teacher and student, and their centre, without ever keeping K-wide logits.

With student embeddings h_i, matched teacher rows j of weight A_ij, prototypes W (student) and W' (teacher), centre c,
temperatures s (student) and t (teacher):

    q_j   = softmax((W' h'_j - c) / t)                              the target, no gradient
    total = sum_ij A_ij * cross_entropy(q_j, softmax(W h_i / s))
          = sum_i mass_i * logsumexp(W h_i / s)  -  1/s * sum_j pull_j . (q_j W)
    mass_i = sum_j A_ij        pull_j = sum_i A_ij h_i

so the pairs (i, j) meet in E dimensions (`pull`, built by the caller) and each row meets the K prototypes once. Rows are taken
in blocks (assignments.py); because the weight of each row in the total is known beforehand, the block that has the softmax at
hand also writes the gradients, all of them (rows, E) or (K, E), and `backward` only scales them.

The total is a sum over student rows, so these may come in groups, each of which can pass its backward before the next one is
made: only one group's activations live at a time. The prototypes' gradient is added up beside autograd. Its teacher part needs
the pulls of all groups and comes last, which makes the targets a second time: the one thing that is computed twice.

Letters: R student rows of a group, S teacher rows, E embedding width, K prototypes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esvit import distributed
from esvit.losses.assignments import Assignment
from esvit.losses.choice import MakeAssignments


class Matching(ABC):
    """The `total` of the module's formula, for the teacher rows of one micro-batch and group after group of student rows.

    prototypes (K, E), teachers (S, E), teacher_prototypes (K, E), center (1, K); nothing of the teacher's gets a gradient.
    make_assignments says in which way softmaxes are computed. Embeddings need not be unit vectors. Under autocast the matrix products
    run in its dtype, everything else in float32 (or float64).
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
        dtype = torch.promote_types(torch.promote_types(prototypes.dtype, teachers.dtype), torch.float32)
        product_dtype = dtype
        if torch.is_autocast_enabled(device) and dtype == torch.float32:
            product_dtype = torch.get_autocast_dtype(device)
        self.dtype = dtype
        self.student_temperature = student_temperature
        self._is_trained = prototypes.requires_grad and torch.is_grad_enabled()
        self._prototypes = prototypes.detach()
        with torch.no_grad(), torch.autocast(device, enabled=False):
            own = distributed.shares([prototypes.detach(), teacher_prototypes.detach()])
            self._matrix, self._teacher_matrix = (share.to(product_dtype) for share in own)
            self._shift = self._own_center(center).to(dtype) / teacher_temperature
            self._teachers = self._gathered(teachers.to(dtype) / teacher_temperature)
            self._assignments = make_assignments(self._matrix, dtype)
            self._kept: list[tuple[slice, Assignment]] = []
            self._pulls = torch.zeros_like(teachers, dtype=dtype)
            self._expected = self._expectations() / -student_temperature  # q_j W / -s: a pull's gradient

    def __call__(self, students: Tensor, mass: Tensor, pulls: Tensor) -> Tensor:
        """The part of the total of a group: students (R, E), mass (R,), pulls (S, E). A scalar with gradients for students and pulls."""
        with torch.autocast(students.device.type, enabled=False):
            pulls = pulls.to(self.dtype)
            self._pulls += pulls.detach()
            rows = _StudentRows.apply(students.to(self.dtype), mass.detach().to(self.dtype), self, torch.is_grad_enabled())
            return rows + (pulls * self._expected).sum()

    @torch.no_grad()
    def prototypes_gradient(self) -> Tensor | None:
        """(K, E): the total's gradient for the prototypes, once all groups have been called; None where they are frozen."""
        if not self._is_trained:
            return None
        with torch.autocast(self._matrix.device.type, enabled=False):
            values = self._values(self._pulls / -self.student_temperature)
            for rows, targets in self._kept or self._targets():
                targets.add_outer(values[rows])
            return self._whole(self._assignments.outer_sum())

    @abstractmethod
    def rows_and_gradient(self, students: Tensor, mass: Tensor, *, grad_enabled: bool) -> tuple[Tensor, Tensor | None]:
        """sum_i mass_i * logsumexp(W h_i / s) over students (R, E), and its gradient (R, E) for them if `grad_enabled`.

        The prototypes' gradient is then added up here, for a total of weight one.
        """

    @abstractmethod
    def _own_center(self, center: Tensor) -> Tensor:
        """(1, K) -> its part for the prototypes of this rank."""

    @abstractmethod
    def _gathered(self, rows: Tensor) -> Tensor:
        """(rows, E) -> all rows that meet the prototypes of this rank."""

    @abstractmethod
    def _expectations(self) -> Tensor:
        """(S, E): q_j W of each teacher row, the mean prototype under its target."""

    @abstractmethod
    def _values(self, pulls: Tensor) -> Tensor:
        """(S, E) -> what the outer sum takes with each target."""

    @abstractmethod
    def _whole(self, outer_sum: Tensor) -> Tensor:
        """The prototypes' gradient, of what this rank has added up."""

    def _targets(self) -> Iterator[tuple[slice, Assignment]]:
        return self._assignments.blocks(self._teachers, self._teacher_matrix, self._shift)

    def _first_targets(self) -> Iterator[tuple[slice, Assignment]]:
        """The same, and few of them are kept for the second time."""
        can_keep = self._assignments.can_keep(len(self._teachers))
        for rows, targets in self._targets():
            yield rows, targets
            if can_keep:
                self._kept.append((rows, targets))


class WholeMatching(Matching):
    """Where every rank has all prototypes."""

    def rows_and_gradient(self, students: Tensor, mass: Tensor, *, grad_enabled: bool) -> tuple[Tensor, Tensor | None]:
        gradient = torch.empty_like(students) if grad_enabled else None
        total = students.new_zeros(())
        for rows, softmax in self._assignments.blocks(students / self.student_temperature, self._matrix):
            total += mass[rows].dot(softmax.logsumexp)
            weight = mass[rows, None] / self.student_temperature
            if gradient is not None:
                gradient[rows] = softmax.mean() * weight
                if self._is_trained:
                    softmax.add_outer(students[rows] * weight)
        return total, gradient

    def _own_center(self, center: Tensor) -> Tensor:
        return center

    def _gathered(self, rows: Tensor) -> Tensor:
        return rows

    def _expectations(self) -> Tensor:
        means = torch.empty_like(self._teachers)
        for rows, targets in self._first_targets():
            means[rows] = targets.mean()
        return means

    def _values(self, pulls: Tensor) -> Tensor:
        return pulls

    def _whole(self, outer_sum: Tensor) -> Tensor:
        return outer_sum


class _StudentRows(torch.autograd.Function):
    """`Matching.rows_and_gradient` for autograd."""

    @staticmethod
    def forward(ctx, students: Tensor, mass: Tensor, matching: Matching, grad_enabled: bool) -> Tensor:
        total, gradient = matching.rows_and_gradient(students, mass, grad_enabled=grad_enabled)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None, None


class WithGradients(torch.autograd.Function):
    """A scalar whose gradients for some tensors are known already: `apply(total, tensors and their gradients, in turn)`."""

    @staticmethod
    def forward(ctx, total: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs[1::2])
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        gradients: list[Tensor | None] = [scale]
        for gradient in ctx.saved_tensors:
            gradients += [gradient * scale, None]
        return tuple(gradients)


@torch.no_grad()
def updated_center(
    center: Tensor, embeddings: list[Tensor], prototypes: Tensor, *, momentum: float, finite: Tensor | None = None
) -> Tensor:
    """The centre's moving average over the teacher's logits of one step and of all ranks: W' applied to the mean embedding.

    center (1, K); embeddings: tensors (..., E), whose rows count alike; prototypes (K, E), the teacher's, perhaps in shares. Where
    the 0-d tensor `finite` is 0 the centre stays as it is, whatever the embeddings hold; the decision stays on the device.
    """
    with torch.autocast(center.device.type, enabled=False):
        rows = torch.cat([embedding.flatten(0, -2).to(prototypes.dtype) for embedding in embeddings])
        (matrix,) = distributed.shares([prototypes])
        batch_center = distributed.mean(rows.mean(dim=0)) @ matrix.T
        if distributed.is_sharded(prototypes):
            batch_center = distributed.joined(batch_center)
        center_now = center * momentum + batch_center.to(center.dtype) * (1 - momentum)
        return center_now if finite is None else torch.where(finite.bool(), center_now, center)
