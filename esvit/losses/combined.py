"""The EsViT loss: a weighted sum of view-level and region-level matching, with one centre each."""

import torch
from torch import Tensor

from esvit.losses.base import MatchingLoss, PrototypeGradients
from esvit.losses.prototypes import updated_center
from esvit.losses.region import RegionMatching, region_embeddings, region_features, region_rows
from esvit.losses.view import ViewMatching, view_rows
from esvit.records import LossTerms, NetworkOutput, PrototypeWeights


class ViewRegionLoss(MatchingLoss):
    """View and region loss (the original's DDINOLoss, weights 0.5 and 0.5), with the centres `center` and `center_region` (1, K)."""

    needs_regions = True
    center: Tensor
    center_region: Tensor

    def __init__(self, *, student_temperature: float, center_momentum: float, view_weight: float, region_weight: float, kernel: str):
        super().__init__(kernel=kernel)
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.view_weight = view_weight
        self.region_weight = region_weight

    def setup(self, *, prototypes: int) -> None:
        """Allocate the centres on the CPU, once the number K of prototypes (per head) is known and before `.to(device)`."""
        self.register_buffer("center", torch.zeros(1, prototypes))
        self.register_buffer("center_region", torch.zeros(1, prototypes))

    def against(
        self,
        teacher_outputs: list[NetworkOutput],
        student_prototypes: PrototypeWeights,
        teacher_prototypes: PrototypeWeights,
        temperature: float,
        *,
        crops: int,
    ) -> "_ViewAndRegion":
        """As in MatchingLoss. Raises ValueError if outputs or prototypes are without regions."""
        regions, teacher_regions = _region_matrices(student_prototypes, teacher_prototypes)
        view = self.matching(view_rows(teacher_outputs), student_prototypes.view, teacher_prototypes.view, self.center, temperature)
        region = self.matching(region_rows(teacher_outputs), regions, teacher_regions, self.center_region, temperature)
        features = [region_features(output) for output in teacher_outputs]
        return _ViewAndRegion(
            ViewMatching(view, teacher_views=len(teacher_outputs), crops=crops),
            RegionMatching(region, teacher_features=features, crops=crops),
            view_weight=self.view_weight,
            region_weight=self.region_weight,
        )

    def update_center(
        self, teacher_outputs: list[NetworkOutput], teacher_prototypes: PrototypeWeights, finite: Tensor | None = None
    ) -> None:
        """Move both centres by one optimizer step: over all teacher views (and all their regions), micro-batches and ranks.

        teacher_outputs  of every micro-batch of the step, in any order
        finite           0-d tensor; where 0 the centres stay
        """
        views = [output.view for output in teacher_outputs]
        regions = [region_embeddings(output) for output in teacher_outputs]
        matrix, _ = _region_matrices(teacher_prototypes, teacher_prototypes)
        self.center.copy_(updated_center(self.center, views, teacher_prototypes.view, momentum=self.center_momentum, finite=finite))
        self.center_region.copy_(updated_center(self.center_region, regions, matrix, momentum=self.center_momentum, finite=finite))


class _ViewAndRegion:
    def __init__(self, view: ViewMatching, region: RegionMatching, *, view_weight: float, region_weight: float):
        self._view, self._region = view, region
        self._view_weight, self._region_weight = view_weight, region_weight

    def terms(self, outputs: list[NetworkOutput], group: slice, mixing: Tensor | None) -> LossTerms:
        view, region = self._view(outputs, group, mixing), self._region(outputs, group, mixing)
        total = self._view_weight * view + self._region_weight * region
        return LossTerms(total=total, view=view.detach(), region=region.detach())

    def prototype_gradients(self) -> PrototypeGradients:
        view, region = self._view.matching.prototypes_gradient(), self._region.matching.prototypes_gradient()
        return PrototypeGradients(
            view=None if view is None else view.mul_(self._view_weight),
            region=None if region is None else region.mul_(self._region_weight),
        )


def _region_matrices(student: PrototypeWeights, teacher: PrototypeWeights) -> tuple[Tensor, Tensor]:
    if student.region is None or teacher.region is None:
        raise ValueError("this loss matches regions, but the network was built without region prototypes")
    return student.region, teacher.region
