"""View-level matching (DINO): every crop of an image is assigned to prototypes as the teacher assigns the other global views.

Letters: V student crops, G teacher (global) views, B images, E embedding width, K prototypes.
"""

import torch
from torch import Tensor, nn

from esvit.losses.prototypes import matching_cross_entropy, updated_center
from esvit.records import LossTerms, NetworkOutput, PrototypeWeights


def pair_weights(teacher_count: int, student_count: int, like: Tensor) -> Tensor:
    """(G, V): the weight of each pair of teacher view and student crop, 0 for a view with itself, summing to 1.

    The teacher's view i is the student's crop i.
    """
    pairs = teacher_count * (student_count - 1)
    return (1 - torch.eye(teacher_count, student_count, dtype=like.dtype, device=like.device)) / pairs


def view_cross_entropy(
    student_outputs: list[NetworkOutput],
    teacher_outputs: list[NetworkOutput],
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    mixing: Tensor | None = None,
) -> Tensor:
    """Cross-entropy averaged over the pairs (teacher view i, student crop v != i) and over the images.

    The original's DINOLoss. `mixing` (V, B student, B teacher): how much of each teacher image is in each student image.
    """
    students = torch.stack([output.view for output in student_outputs])  # (V, B, E)
    teachers = torch.stack([output.view for output in teacher_outputs])  # (G, B, E)
    with torch.autocast(students.device.type, enabled=False):
        students = students.to(torch.promote_types(students.dtype, torch.float32))
        weights = pair_weights(len(teachers), len(students), students) / students.shape[1]
        if mixing is None:
            mass = weights.sum(0)[:, None].expand(students.shape[:2])
            pulls = torch.einsum("gv,vbe->gbe", weights, students)
        else:
            mixing = mixing.to(students.dtype)
            mass = weights.sum(0)[:, None] * mixing.sum(2)
            pulls = torch.einsum("gvbj,vbe->gje", weights[:, :, None, None] * mixing, students)
    return matching_cross_entropy(
        students.flatten(0, 1),
        mass.flatten(),
        pulls.flatten(0, 1),
        student_prototypes,
        teachers.flatten(0, 1),
        teacher_prototypes,
        center,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )


class ViewLoss(nn.Module):
    """The view loss alone, with its centre `center` (1, K)."""

    needs_regions = False
    center: Tensor

    def __init__(self, *, student_temperature: float, center_momentum: float):
        super().__init__()
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum

    def setup(self, *, prototypes: int) -> None:
        """Allocate the centre on the CPU, once the number K of prototypes is known and before `.to(device)`."""
        self.register_buffer("center", torch.zeros(1, prototypes))

    def forward(
        self,
        student_outputs: list[NetworkOutput],
        teacher_outputs: list[NetworkOutput],
        student_prototypes: PrototypeWeights,
        teacher_prototypes: PrototypeWeights,
        temperature: float,
        mixing: Tensor | None = None,
    ) -> LossTerms:
        """Loss of V student crops against G teacher views of the same B images; the first G crops are the teacher's views.

        temperature  the teacher's
        mixing       (V, B student, B teacher) or None for the identity: mixing[v, b, j] is the share of teacher image j in
                     image b of student crop v, rows need not sum to 1. The original's mixup targets are indexed
                     [teacher, student] instead (right only for symmetric ones): transpose them to compare.
        """
        view = view_cross_entropy(
            student_outputs,
            teacher_outputs,
            student_prototypes.view,
            teacher_prototypes.view,
            self.center,
            student_temperature=self.student_temperature,
            teacher_temperature=temperature,
            mixing=mixing,
        )
        return LossTerms(total=view, view=view.detach(), region=None)

    def update_center(
        self, teacher_outputs: list[NetworkOutput], teacher_prototypes: PrototypeWeights, finite: Tensor | None = None
    ) -> None:
        """Move the centre by one optimizer step: over all teacher views, micro-batches and ranks.

        teacher_outputs  of every micro-batch of the step, in any order
        finite           0-d tensor; where 0 the centre stays
        """
        views = [output.view for output in teacher_outputs]
        self.center.copy_(updated_center(self.center, views, teacher_prototypes.view, momentum=self.center_momentum, finite=finite))
