"""Region-level matching (EsViT): every region of a crop is assigned to prototypes as its most similar region of a teacher view.

"Most similar" is by cosine similarity of the backbone's region features, before the head, without gradient.

Letters: V student crops, G teacher (global) views, B images, N regions of one view, T regions of all V crops of an image,
D backbone width, E embedding width, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.losses.prototypes import matching_cross_entropy
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


def region_cross_entropy(
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
    """Cross-entropy averaged over pairs (teacher view i, student crop v != i), images and the regions of the crop.

    The region part of the original's DDINOLoss. With `mixing` (V, B student, B teacher) a student region is matched inside
    each teacher image, and the cross-entropies are summed by the images' weights (the original ignores mixing here).
    """
    counts = [region_embeddings(output).shape[1] for output in student_outputs]
    students = torch.cat([region_embeddings(output) for output in student_outputs], dim=1)  # (B, T, E)
    teachers = [region_embeddings(output) for output in teacher_outputs]
    with torch.autocast(students.device.type, enabled=False):
        students = students.to(torch.promote_types(students.dtype, torch.float32))
        student_features = torch.cat([region_features(output) for output in student_outputs], dim=1).to(students.dtype)
        pair_weight = pair_weights(len(teacher_outputs), len(student_outputs), students) / len(students)
        weights = torch.cat([(pair_weight[:, [crop]] / count).expand(-1, count) for crop, count in enumerate(counts)], dim=1)  # (G, T)
        if mixing is None:
            mass = weights.sum(0).expand(students.shape[:2])
        else:
            mixing = torch.cat([mixing[crop, :, None].expand(-1, count, -1) for crop, count in enumerate(counts)], dim=1).to(
                students.dtype
            )  # (B student, T, B teacher)
            mass = weights.sum(0) * mixing.sum(2)

        pulls = []  # per teacher view (B, N, E)
        for view, output in enumerate(teacher_outputs):
            teacher_features = region_features(output).to(students.dtype)
            if mixing is None:
                assigned = _one_hot(nearest_regions(student_features, teacher_features), teacher_features, weights[view])
                pulls.append(assigned.mT @ students)
                continue
            # Which weights are zero is known on the device only: to ask would stop the host, so all images are matched.
            images = []
            for image, features in enumerate(teacher_features):
                shares = weights[view] * mixing[:, :, image]
                assigned = _one_hot(nearest_regions(student_features, features), features, shares)
                images.append(assigned.flatten(0, 1).mT @ students.flatten(0, 1))
            pulls.append(torch.stack(images))
    return matching_cross_entropy(
        students.flatten(0, 1),
        mass.flatten(),
        torch.cat([pull.flatten(0, 1) for pull in pulls]),
        student_prototypes,
        torch.cat([teacher.flatten(0, 1) for teacher in teachers]),
        teacher_prototypes,
        center,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )


def _one_hot(nearest: Tensor, teacher_features: Tensor, weights: Tensor) -> Tensor:
    """(B, T, N): `weights` (T,) or (B, T) at the index in `nearest` (B, T), else 0.

    A matrix, because a product with it is deterministic and fast on every device, which adding rows by index is not.
    """
    regions = torch.arange(teacher_features.shape[-2], device=nearest.device)
    return (nearest[..., None] == regions) * weights[..., None]
