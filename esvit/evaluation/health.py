"""Label-free signs of how a pre-training run is doing, from one batch, and the rules that read collapse from them.

Letters: B images, V student crops, G global crops (the teacher's views), R = G * B teacher rows, E embedding width, K prototypes,
D backbone width.
All signs are of the view level, and of this rank's batch. No tensor of (rows, K) outlives its chunk.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.records import NetworkOutput, PrototypeWeights


@dataclass(frozen=True)
class HealthSigns:
    """0-d float32 tensors on the batch's device.

    With q_ib the teacher's distribution over prototypes of global crop i of image b, and p_vb the student's of crop v:

    teacher_entropy        mean over i, b of H(q_ib), nats; 0 = one-hot
    teacher_entropy_share  the same divided by log K; 1 = uniform
    student_entropy        mean over v, b of H(p_vb), nats
    student_entropy_share  the same divided by log K
    kl                     mean over b and all pairs of a global crop i and another crop v != i of KL(q_ib || p_vb), nats: the view loss
                           without the teacher's entropy; NaN without a pair
    center_norm            Euclidean norm of the centre of the view loss
    prototypes_used        distinct prototypes that are the most probable one of some q_ib, divided by the most there could be, min(K, R)
    feature_std            standard deviation over the R L2-normalised pooled teacher features, root mean square over the D dimensions,
                           times sqrt(D): 0 = all equal, 1 = spread evenly around the origin
    rank_me                RankMe (Garrido et al., 2023) of the R pooled teacher features: exp of the entropy of their normalised singular
                           values; 1 = all on one line, at most min(R, D)
    """

    teacher_entropy: Tensor
    teacher_entropy_share: Tensor
    student_entropy: Tensor
    student_entropy_share: Tensor
    kl: Tensor
    center_norm: Tensor
    prototypes_used: Tensor
    feature_std: Tensor
    rank_me: Tensor

    def as_metrics(self) -> dict[str, Tensor]:
        """{"health/teacher_entropy": 0-d tensor, ...}: nothing is read from the device."""
        return {f"health/{field.name}": getattr(self, field.name) for field in fields(self)}


@torch.no_grad()
def health_signs(
    *,
    student_outputs: list[NetworkOutput],
    teacher_outputs: list[NetworkOutput],
    student_prototypes: PrototypeWeights,
    teacher_prototypes: PrototypeWeights,
    center: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    chunk_rows: int = 128,
) -> HealthSigns:
    """The signs of one batch, in float32 also under autocast.

    student_outputs  V outputs of B images, the global crops first, in the teacher's order
    teacher_outputs  G outputs of the same images, G <= V
    center           (1, K), the view loss's `center`
    chunk_rows       crops whose K logits are held at once

    Everything stays on the device, but RankMe's singular values synchronise with it on CUDA: call at an interval.
    """
    count = teacher_prototypes.view.shape[0]
    with torch.autocast(center.device.type, enabled=False):
        student_matrix, teacher_matrix = student_prototypes.view.float(), teacher_prototypes.view.float()
        teacher_rows = torch.stack([output.view.float() for output in teacher_outputs])  # (G, B, E)
        student_rows = torch.stack([output.view.float() for output in student_outputs])  # (V, B, E)

        used = torch.zeros(count, device=center.device)
        teacher_entropies, targets = [], []
        for rows in teacher_rows.flatten(0, 1).split(chunk_rows):
            log_q = F.log_softmax((rows @ teacher_matrix.T - center) / teacher_temperature, dim=1)
            q = log_q.exp()
            teacher_entropies.append(-(q * log_q).sum(dim=1))
            targets.append(q @ student_matrix)
            used.scatter_(0, q.argmax(dim=1), 1.0)
        teacher_entropy = torch.cat(teacher_entropies).view(teacher_rows.shape[:2])  # (G, B)
        target = torch.cat(targets).view_as(teacher_rows)  # (G, B, E): the student prototypes weighted by q

        student_entropies, normalisers = [], []
        for rows in student_rows.flatten(0, 1).split(chunk_rows):
            logits = rows @ student_matrix.T / student_temperature
            normaliser = logits.logsumexp(dim=1)
            student_entropies.append(normaliser - (logits.softmax(dim=1) * logits).sum(dim=1))
            normalisers.append(normaliser)
        student_entropy = torch.cat(student_entropies)
        normaliser = torch.cat(normalisers).view(student_rows.shape[:2])  # (V, B)

        # cross_entropy(q, p) = logsumexp(h W / t) - h . (W^T q) / t, as in the loss
        agreement = torch.einsum("gbe,vbe->gvb", target, student_rows) / student_temperature
        divergence = normaliser - agreement - teacher_entropy[:, None]  # (G, V, B)
        pairs = ~torch.eye(len(teacher_rows), len(student_rows), dtype=torch.bool, device=center.device)
        kl = (divergence.mean(dim=2) * pairs).sum() / pairs.sum()

        pooled = torch.cat([output.pooled.float() for output in teacher_outputs])  # (R, D)
        return HealthSigns(
            teacher_entropy=teacher_entropy.mean(),
            teacher_entropy_share=teacher_entropy.mean() / math.log(count),
            student_entropy=student_entropy.mean(),
            student_entropy_share=student_entropy.mean() / math.log(count),
            kl=kl,
            center_norm=center.float().norm(),
            prototypes_used=used.sum() / min(count, len(pooled)),
            feature_std=feature_std(pooled),
            rank_me=rank_me(pooled),
        )


def feature_std(features: Tensor) -> Tensor:
    """() spread of the directions of `features` (R, D): see HealthSigns."""
    return F.normalize(features, dim=1).var(dim=0, correction=0).sum().sqrt()  # sqrt(D) * sqrt(mean over D) = sqrt(sum)


def rank_me(features: Tensor) -> Tensor:
    """() effective rank of `features` (R, D): exp of the entropy of the singular values divided by their sum (RankMe, eq. 1 and 2)."""
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum().exp()


def diagnose(signs: dict[str, float], *, step: int, grace_steps: int, prototypes: int, rows: int, least_rows: int = 8) -> list[str]:
    """One line for every alarm: what was seen, and what to try. Empty when all is well, or when it is too early to tell.

    signs        HealthSigns.as_metrics(), read from the device
    step         optimizer steps done; nothing but a non-finite sign is an alarm before `grace_steps`, because a fresh network
                 maps all images to nearly one point
    prototypes   K
    rows         R, teacher rows that the signs come from; with fewer than `least_rows` there is no telling

    The limits are far outside of what healthy runs show, so that an alarm means something: a feature_std of 0.01 is a mean cosine of
    0.9999 between images, and in uniform collapse the student has nothing left to learn although the teacher says nothing.
    """
    broken = [name for name, value in signs.items() if name.startswith("health/") and not math.isfinite(value)]
    if broken:
        return [
            f"{', '.join(broken)} not finite at step {step}: the network's outputs overflowed; try a lower optimizer.learning_rate, "
            "a longer schedule.warmup_epochs, or precision=bf16 instead of fp16"
        ]
    if step < grace_steps or rows < least_rows:
        return []

    alarms = []
    if signs["health/feature_std"] < 0.01 or signs["health/rank_me"] < 1.1:
        alarms.append(
            f"features collapsed to one point at step {step}: standard deviation {signs['health/feature_std']:.2g} (healthy: above 0.1), "
            f"RankMe {signs['health/rank_me']:.2f} of at most {rows}; try head.batch_norm=true, a lower optimizer.learning_rate, "
            "or a longer schedule.warmup_epochs"
        )
    used = round(signs["health/prototypes_used"] * min(prototypes, rows))
    # near uniform, the most probable prototype is chance and says nothing
    if used <= 1 and signs["health/teacher_entropy_share"] < 0.9:
        alarms.append(
            f"the teacher puts all {rows} views on one of {prototypes} prototypes at step {step} (teacher entropy "
            f"{signs['health/teacher_entropy']:.2f} nats): the centre does not keep up; try a lower loss.center_momentum, "
            "a higher schedule.teacher_temperature_start and _end, or a lower optimizer.learning_rate"
        )
    if signs["health/teacher_entropy_share"] > 0.99 and signs["health/kl"] < 0.05:
        alarms.append(
            f"teacher and student are uniform over the {prototypes} prototypes at step {step}: teacher entropy is "
            f"{100 * signs['health/teacher_entropy_share']:.1f}% of its maximum, KL {signs['health/kl']:.2g} nats; try a lower "
            "schedule.teacher_temperature_start and _end, head.batch_norm=true, or fewer prototypes"
        )
    return alarms
