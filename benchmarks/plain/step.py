"""One step of EsViT pre-training in the order of operations of the paper's code, to compare our own step with.

Never used by the product. What differs from it, and why this is slower or larger: all logits of all crops are materialised before
the loss, which then loops over pairs; clipping and the moving average loop over parameters in Python, and clipping reads every
norm; the loss is read in every step; the optimizer is torch's default AdamW; attention is that of `benchmarks.plain.attention`.
The formula for readers, and for tests, is in `benchmarks.plain.losses`; it computes a crop's logits anew for every pair, which
would flatter us here.

Letters: V student crops, G teacher views, B images, N regions, D backbone width, K prototypes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain.attention import use_plain_attention
from esvit.losses.combined import ViewRegionLoss
from esvit.losses.view import ViewLoss
from esvit.networks import MultiCropNetwork
from esvit.optimizers import LAST_LAYER, AdamW, parameter_groups
from esvit.records import NetworkOutput, PrototypeWeights, StepValues
from esvit.tasks.distillation import Phase
from esvit.teacher import Teacher


@dataclass(frozen=True)
class Logits:
    """What the paper's code hands to its loss, crop after crop.

    view      (crops * B, K)
    region    (rows, K), the rows of a crop being its B * N regions; None without a region head
    features  one (B, N, D) per crop, to match regions by
    """

    view: Tensor
    region: Tensor | None
    features: list[Tensor]


def logits_of(outputs: list[NetworkOutput], prototypes: PrototypeWeights) -> Logits:
    view = torch.cat([output.view for output in outputs]) @ prototypes.view.T
    if prototypes.region is None:
        return Logits(view=view, region=None, features=[])
    regions = [output.region.flatten(0, 1) for output in outputs if output.region is not None]
    features = [output.features for output in outputs if output.features is not None]
    return Logits(view=view, region=torch.cat(regions) @ prototypes.region.T, features=features)


class PlainLoss:
    """View loss, or view and region loss, on materialised logits; its centres (1, K).

    options  the product's loss, whose weights and temperatures it takes
    """

    def __init__(self, options: ViewLoss | ViewRegionLoss, *, prototypes: int, device: torch.device):
        self.options = options
        self.view_weight = options.view_weight if isinstance(options, ViewRegionLoss) else 1.0
        self.region_weight = options.region_weight if isinstance(options, ViewRegionLoss) else 0.0
        self.center = torch.zeros(1, prototypes, device=device)
        self.center_region = torch.zeros(1, prototypes, device=device)

    def __call__(self, student: Logits, teacher: Logits, *, crops: int, global_count: int, temperature: float) -> Tensor:
        """Mean over pairs of teacher view i and student crop v != i."""
        view_targets = F.softmax((teacher.view.detach() - self.center) / temperature, dim=-1).chunk(global_count)
        views = (student.view / self.options.student_temperature).chunk(crops)
        region_targets, regions = self._regions(student, teacher, temperature)
        total, pairs = torch.zeros((), device=student.view.device), 0
        for i, target in enumerate(view_targets):
            for v, view in enumerate(views):
                if v == i:
                    continue
                each = self.view_weight * (-target * F.log_softmax(view, dim=-1)).sum(-1)  # (B,)
                if regions:
                    similarity = F.normalize(student.features[v], dim=-1) @ F.normalize(teacher.features[i], dim=-1).mT
                    nearest = similarity.argmax(dim=-1, keepdim=True)  # (B, N of crop v, 1)
                    matched = region_targets[i].gather(1, nearest.expand(-1, -1, region_targets[i].shape[-1]))
                    each = each + self.region_weight * (-matched * F.log_softmax(regions[v], dim=-1)).sum(-1).mean(-1)
                total = total + each.mean()
                pairs += 1
        return total / pairs

    @torch.no_grad()
    def update_center(self, teacher: Logits) -> None:
        momentum = self.options.center_momentum
        self.center = self.center * momentum + teacher.view.mean(0, keepdim=True) * (1 - momentum)
        if teacher.region is not None:
            self.center_region = self.center_region * momentum + teacher.region.mean(0, keepdim=True) * (1 - momentum)

    def _regions(self, student: Logits, teacher: Logits, temperature: float) -> tuple[list[Tensor], list[Tensor]]:
        """Targets of each teacher view (B, N, K), and scaled logits of each student crop (B, N, K)."""
        if student.region is None or teacher.region is None:
            return [], []
        targets = F.softmax((teacher.region.detach() - self.center_region) / temperature, dim=-1)
        scaled = student.region / self.options.student_temperature
        return _by_crop(targets, teacher.features), _by_crop(scaled, student.features)


def _by_crop(rows: Tensor, features: list[Tensor]) -> list[Tensor]:
    parts = rows.split([each.shape[0] * each.shape[1] for each in features])
    return [part.unflatten(0, each.shape[:2]) for part, each in zip(parts, features, strict=True)]


class PlainDistillation:
    """Student, teacher, loss and optimizer; takes the arguments of the product's `Distillation`, which see.

    network    becomes the student; its attention is replaced by the plain one
    precision  "fp32", "bf16", or "fp16" with a scaled loss, as published
    """

    def __init__(
        self,
        *,
        network: MultiCropNetwork,
        loss: ViewLoss | ViewRegionLoss,
        prototypes: int,
        optimizer: AdamW,
        device: torch.device,
        precision: str,
        global_count: int,
        phase: Phase,
    ):
        use_plain_attention(network)
        self.network = network
        self.teacher = Teacher(network)
        self.loss = PlainLoss(loss, prototypes=prototypes, device=device)
        self.groups = parameter_groups(network)
        first, second = optimizer.betas
        self.optimizer = torch.optim.AdamW(
            [{"params": group.parameters} for group in self.groups], betas=(first, second), eps=optimizer.eps
        )
        self.clip_norm = optimizer.clip_norm
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._device, self._precision = device, precision
        self.global_count = global_count
        self.phase = phase

    def step(self, crops: list[Tensor], now: StepValues) -> float:
        """Update everything once on V normalised crops (B, C, H_v, W_v); returns the loss. Raises ArithmeticError if it is not finite."""
        for options, group in zip(self.optimizer.param_groups, self.groups, strict=True):
            options["lr"] = now.learning_rate
            options["weight_decay"] = now.weight_decay if group.decayed else 0.0
        with self.autocast():
            with self.phase("teacher"), torch.no_grad():
                targets = logits_of(self.teacher(crops[: self.global_count]), self.teacher.prototypes())
            with self.phase("student"):
                outputs = logits_of(self.network(crops), self.network.prototypes())
            with self.phase("loss"):
                loss = self.loss(outputs, targets, crops=len(crops), global_count=self.global_count, temperature=now.temperature)
                value = loss.item()
                if not math.isfinite(value):
                    raise ArithmeticError(f"loss is {value}")
        with self.phase("centre"):
            self.loss.update_center(targets)
        with self.phase("backward"):
            self.scaler.scale(loss).backward()
        with self.phase("optimizer"):
            self.scaler.unscale_(self.optimizer)
            self._clip()
            if now.last_layer_frozen:
                self._drop_gradients_of_last_layer()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        with self.phase("EMA"):
            self._update_teacher(now.momentum)
        return value

    def autocast(self) -> torch.autocast:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self._precision)
        return torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None)

    @torch.no_grad()
    def _clip(self) -> None:
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                coefficient = self.clip_norm / (parameter.grad.norm().item() + 1e-6)
                if coefficient < 1:
                    parameter.grad.mul_(coefficient)

    def _drop_gradients_of_last_layer(self) -> None:
        for name, parameter in self.network.named_parameters():
            if LAST_LAYER in name:
                parameter.grad = None

    @torch.no_grad()
    def _update_teacher(self, momentum: float) -> None:
        for ours, theirs in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
            ours.mul_(momentum).add_((1 - momentum) * theirs)
