"""View-level matching (DINO): every crop of an image is assigned to prototypes as the teacher assigns the other global views.

Letters: V student crops, G teacher (global) views, B images, E embedding width, K prototypes.
"""

import torch
from torch import Tensor

from esvit.losses.base import MatchingLoss, PrototypeGradients
from esvit.losses.prototypes import Matching, updated_center
from esvit.records import LossTerms, NetworkOutput, PrototypeWeights


def pair_weights(teacher_count: int, student_count: int, like: Tensor) -> Tensor:
    """(G, V): the weight of each pair of teacher view and student crop, 0 for a view with itself, summing to 1.

    The teacher's view i is the student's crop i.
    """
    pairs = teacher_count * (student_count - 1)
    return (1 - torch.eye(teacher_count, student_count, dtype=like.dtype, device=like.device)) / pairs


def view_rows(outputs: list[NetworkOutput]) -> Tensor:
    """(V * B, E), crop by crop."""
    return torch.cat([output.view for output in outputs])


class ViewMatching:
    """The view loss of one micro-batch, group of crops by group: cross-entropy averaged over the pairs (teacher view i, student crop
    v != i) and over the images. The original's DINOLoss.

    matching       of the teacher's views, (G * B, E)
    teacher_views  G
    crops          V, of all groups together
    """

    def __init__(self, matching: Matching, *, teacher_views: int, crops: int):
        self.matching = matching
        self._views, self._crops = teacher_views, crops

    def __call__(self, outputs: list[NetworkOutput], group: slice, mixing: Tensor | None) -> Tensor:
        """The share of the crops `group` in the loss: their `outputs`; mixing (V, B student, B teacher) of all crops, or None."""
        students = torch.stack([output.view for output in outputs])  # (v, B, E), v crops of the group
        with torch.autocast(students.device.type, enabled=False):
            students = students.to(self.matching.dtype)
            weights = pair_weights(self._views, self._crops, students)[:, group] / students.shape[1]
            if mixing is None:
                mass = weights.sum(0)[:, None].expand(students.shape[:2])
                pulls = torch.einsum("gv,vbe->gbe", weights, students)
            else:
                mixing = mixing[group].to(students.dtype)
                mass = weights.sum(0)[:, None] * mixing.sum(2)
                pulls = torch.einsum("gvbj,vbe->gje", weights[:, :, None, None] * mixing, students)
        return self.matching(students.flatten(0, 1), mass.flatten(), pulls.flatten(0, 1))


class ViewLoss(MatchingLoss):
    """The view loss alone, with its centre `center` (1, K)."""

    needs_regions = False
    center: Tensor

    def __init__(self, *, student_temperature: float, center_momentum: float, kernel: str):
        super().__init__(kernel=kernel)
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum

    def setup(self, *, prototypes: int) -> None:
        """Allocate the centre on the CPU, once the number K of prototypes is known and before `.to(device)`."""
        self.register_buffer("center", torch.zeros(1, prototypes))

    def against(
        self,
        teacher_outputs: list[NetworkOutput],
        student_prototypes: PrototypeWeights,
        teacher_prototypes: PrototypeWeights,
        temperature: float,
        *,
        crops: int,
    ) -> "_ViewOnly":
        matching = self.matching(view_rows(teacher_outputs), student_prototypes.view, teacher_prototypes.view, self.center, temperature)
        return _ViewOnly(ViewMatching(matching, teacher_views=len(teacher_outputs), crops=crops))

    def update_center(
        self, teacher_outputs: list[NetworkOutput], teacher_prototypes: PrototypeWeights, finite: Tensor | None = None
    ) -> None:
        """Move the centre by one optimizer step: over all teacher views, micro-batches and ranks.

        teacher_outputs  of every micro-batch of the step, in any order
        finite           0-d tensor; where 0 the centre stays
        """
        views = [output.view for output in teacher_outputs]
        self.center.copy_(updated_center(self.center, views, teacher_prototypes.view, momentum=self.center_momentum, finite=finite))


class _ViewOnly:
    def __init__(self, view: ViewMatching):
        self._view = view

    def terms(self, outputs: list[NetworkOutput], group: slice, mixing: Tensor | None) -> LossTerms:
        total = self._view(outputs, group, mixing)
        return LossTerms(total=total, view=total.detach(), region=None)

    def prototype_gradients(self) -> PrototypeGradients:
        return PrototypeGradients(view=self._view.matching.prototypes_gradient(), region=None)
