"""The view and region losses as the paper writes them: every logit materialised, one loop over pairs.

Never used by the product. Student crop v and teacher view i are two views of the same images; the first crops are the
teacher's views.

Letters: V student crops, B images, N regions, D backbone width, E embedding width, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.records import NetworkOutput


def view_loss(
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
    """Mean over pairs i != v of the mean over images of the cross-entropy; arguments as the product's `view_cross_entropy`."""
    losses = []
    for i, teacher in enumerate(teacher_outputs):
        targets = _targets(teacher.view, teacher_prototypes, center, teacher_temperature)  # (B, K)
        for v, student in enumerate(student_outputs):
            if v == i:
                continue
            log_student = F.log_softmax(student.view @ student_prototypes.T / student_temperature, dim=-1)  # (B, K)
            mixed_targets = targets if mixing is None else mixing[v] @ targets
            losses.append(-(mixed_targets * log_student).sum(-1).mean())
    return torch.stack(losses).mean()


def region_loss(
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
    """Mean over pairs i != v, images and regions of the crop; arguments as the product's `region_cross_entropy`."""
    losses = []
    for i, teacher in enumerate(teacher_outputs):
        assert teacher.region is not None and teacher.features is not None
        targets = _targets(teacher.region, teacher_prototypes, center, teacher_temperature)  # (B, N, K)
        for v, student in enumerate(student_outputs):
            if v == i:
                continue
            assert student.region is not None and student.features is not None
            log_student = F.log_softmax(student.region @ student_prototypes.T / student_temperature, dim=-1)
            images = len(student.view)
            weights = torch.eye(images, dtype=targets.dtype, device=targets.device) if mixing is None else mixing[v]
            for b in range(images):
                for j in range(len(targets)):
                    if weights[b, j] != 0:
                        similarity = F.normalize(student.features[b], dim=-1) @ F.normalize(teacher.features[j], dim=-1).T
                        matched = targets[j, similarity.argmax(dim=-1)]
                        cross_entropy = -(matched * log_student[b]).sum(-1).mean()
                        losses.append(weights[b, j] * cross_entropy / images)
    pairs = len(teacher_outputs) * (len(student_outputs) - 1)
    return torch.stack(losses).sum() / pairs


def center_after(center: Tensor, embeddings: list[Tensor], prototypes: Tensor, *, momentum: float) -> Tensor:
    """The centre (1, K) after one step: moving average of the mean logit over all rows of `embeddings` (..., E)."""
    logits = torch.cat([embedding.flatten(0, -2) @ prototypes.T for embedding in embeddings])
    return center * momentum + logits.mean(dim=0, keepdim=True) * (1 - momentum)


def _targets(embeddings: Tensor, prototypes: Tensor, center: Tensor, temperature: float) -> Tensor:
    return F.softmax((embeddings.detach() @ prototypes.detach().T - center) / temperature, dim=-1)
