"""Region-level matching (EsViT): every region of a crop is assigned to prototypes as its most similar region of a teacher view.

"Most similar" is by cosine similarity of the backbone's region features, before the head, without gradient.

Letters: V student crops, G teacher (global) views, B images, N regions of one view, T regions of all crops of a group in an image,
D backbone width, E embedding width, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.losses.prototypes import Matching
from esvit.losses.view import pair_weights
from esvit.records import NetworkOutput


def region_embeddings(output: NetworkOutput) -> Tensor:
    """(B, N, E); ValueError if the network has no region head."""
    if output.region is None:
        raise ValueError("this loss matches regions, but the network was built without a region head")
    return output.region


def region_features(output: NetworkOutput) -> Tensor:
    """(B, N, D), without gradient; ValueError if the network has no region head."""
    if output.features is None:
        raise ValueError("this loss matches regions, but the network was built without a region head")
    return output.features.detach()


def nearest_regions(student: Tensor, teacher: Tensor) -> Tensor:
    """(..., T): for each student region (..., T, D) the index of the teacher region (..., N, D) of highest cosine similarity.

    The student's norm does not change which one is nearest, so only the teacher's features are normalised.
    """
    return (student @ F.normalize(teacher, dim=-1).mT).argmax(dim=-1)


def region_rows(outputs: list[NetworkOutput]) -> Tensor:
    """All regions, crop by crop: (rows, E)."""
    return torch.cat([region_embeddings(output).flatten(0, 1) for output in outputs])


class RegionMatching:
    """The region loss of one micro-batch, group of crops by group: cross-entropy averaged over pairs (teacher view i, student crop
    v != i), images and the regions of the crop. The region part of the original's DDINOLoss.

    matching          of the teacher's regions, (G * B * N, E), view by view
    teacher_features  G x (B, N, D)
    crops             V, of all groups together
    """

    def __init__(self, matching: Matching, *, teacher_features: list[Tensor], crops: int):
        self.matching = matching
        self._crops = crops
        self._teacher_features = [features.to(matching.dtype) for features in teacher_features]

    def __call__(self, outputs: list[NetworkOutput], group: slice, mixing: Tensor | None) -> Tensor:
        """The share of the crops `group` in the loss: their `outputs`; mixing (V, B student, B teacher) of all crops, or None.

        With `mixing` a student region is matched inside each teacher image, and the cross-entropies are summed by the images' weights
        (the original ignores mixing here).
        """
        counts = [region_embeddings(output).shape[1] for output in outputs]
        students = torch.cat([region_embeddings(output) for output in outputs], dim=1)  # (B, T, E)
        with torch.autocast(students.device.type, enabled=False):
            students = students.to(self.matching.dtype)
            features = torch.cat([region_features(output) for output in outputs], dim=1).to(students.dtype)
            pairs = pair_weights(len(self._teacher_features), self._crops, students)[:, group] / len(students)
            weights = torch.cat([(pairs[:, [crop]] / count).expand(-1, count) for crop, count in enumerate(counts)], dim=1)  # (G, T)
            if mixing is None:
                mass = weights.sum(0).expand(students.shape[:2])
                pulls = [self._pull(view, features, students, weights[view]) for view in range(len(weights))]
            else:
                shares = [mixing[group][crop, :, None].expand(-1, count, -1) for crop, count in enumerate(counts)]
                mixing = torch.cat(shares, dim=1).to(students.dtype)  # (B student, T, B teacher)
                mass = weights.sum(0) * mixing.sum(2)
                pulls = [self._mixed_pull(view, features, students, weights[view], mixing) for view in range(len(weights))]
        return self.matching(students.flatten(0, 1), mass.flatten(), torch.cat([pull.flatten(0, 1) for pull in pulls]))

    def _pull(self, view: int, features: Tensor, students: Tensor, weights: Tensor) -> Tensor:
        """(B, N, E): what pulls at each region of a teacher view; features (B, T, D), students (B, T, E), weights (T,)."""
        teacher = self._teacher_features[view]
        assigned = _one_hot(nearest_regions(features, teacher), teacher, weights)
        return assigned.mT @ students

    def _mixed_pull(self, view: int, features: Tensor, students: Tensor, weights: Tensor, mixing: Tensor) -> Tensor:
        """The same where student images are made of several teacher images: mixing (B student, T, B teacher).

        Which weights are zero is known on the device only: to ask would stop the host, so all images are matched.
        """
        images = []
        for image, teacher in enumerate(self._teacher_features[view]):
            assigned = _one_hot(nearest_regions(features, teacher), teacher, weights * mixing[:, :, image])
            images.append(assigned.flatten(0, 1).mT @ students.flatten(0, 1))
        return torch.stack(images)


def _one_hot(nearest: Tensor, teacher_features: Tensor, weights: Tensor) -> Tensor:
    """(B, T, N): `weights` (T,) or (B, T) at the index in `nearest` (B, T), else 0.

    A matrix, because a product with it is deterministic and fast on every device, which adding rows by index is not.
    """
    regions = torch.arange(teacher_features.shape[-2], device=nearest.device)
    return (nearest[..., None] == regions) * weights[..., None]
