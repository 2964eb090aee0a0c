"""A linear classifier that learns beside pre-training, from the features that pre-training makes anyway.

Unusual: nothing of pre-training changes by it, bit for bit. No gradient reaches the backbone, since pooled features arrive detached; its
initial weights come from a generator of its own, and it draws nothing else.

Letters: B images of a micro-batch, D backbone width, n images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.data.base import ImageSet
from esvit.errors import OptionError
from esvit.evaluation.linear import MOMENTUM, average_gradients, cosine_share, fresh_classifier, hits
from esvit.runtime import Runtime
from esvit.schedules import scaled_learning_rate
from esvit.tasks.distillation import StepResult

TEACHER, STUDENT, NONE = "teacher", "student", "none"


@dataclass(kw_only=True)
class OnlineLinear:
    """Options.

    network        whose pooled features of the global crops are classified: "teacher" or "student"; "none" turns it off
    learning_rate  of SGD in the first step, for 256 images a step; it falls to 0 by a cosine over the whole training
    """

    network: str
    learning_rate: float

    def open(self, images: ImageSet, *, dim: int, images_per_step: int, mixes_images: bool, runtime: Runtime) -> "OnlineProbe | None":
        """The classifier for features of width `dim` (D), or None if this is switched off.

        Raises OptionError where the training images have no labels, or the student sees mixtures of them.
        """
        if self.network == NONE:
            return None
        if self.network not in (TEACHER, STUDENT):
            raise OptionError("task.online_linear.network", f"'{self.network}'", f"use {NONE}, {TEACHER} or {STUDENT}")
        if self.learning_rate <= 0:
            raise OptionError("task.online_linear.learning_rate", f"{self.learning_rate:g} is not above 0", "use 0.1 for example")
        if images.labels is None:
            remedy = "set it to none, or give folders with one sub-folder per class"
            raise OptionError("task.online_linear.network", "a classifier needs labels, and the images have none", remedy)
        if mixes_images and self.network == STUDENT:
            found = "the student sees mixed images (task.mixing.probability), which have no class of their own"
            raise OptionError("task.online_linear.network", found, f"use {TEACHER}, which sees them clean")
        return OnlineProbe(self, images, dim, scaled_learning_rate(self.learning_rate, images_per_step), runtime)


class OnlineProbe:
    """The classifier, its optimizer, and the labels of the training images."""

    def __init__(self, options: OnlineLinear, images: ImageSet, dim: int, learning_rate: float, runtime: Runtime):
        assert images.labels is not None
        self.network = options.network
        self._learning_rate = learning_rate
        self._device = runtime.device
        self._labels = torch.from_numpy(images.labels)
        self.linear = fresh_classifier(dim, len(images.class_names), runtime.seed).to(runtime.device)
        self._optimizer = torch.optim.SGD(self.linear.parameters(), lr=learning_rate, momentum=MOMENTUM)

    def step(self, result: StepResult, indices: Sequence[Tensor], *, step: int, total_steps: int) -> dict[str, Tensor]:
        """One update with the features of pre-training's step `step`; its loss and top-1 (percent) before it, on the device.

        indices  of each micro-batch: (B,) the images' places in the training set
        """
        pooled = result.teacher_pooled if self.network == TEACHER else result.student_pooled
        crops = len(pooled) // len(indices)
        labels = self._on_device(torch.cat([self._labels[places].repeat(crops) for places in indices]))
        logits = self.linear(torch.cat(pooled).detach().float())
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        average_gradients(self.linear)
        self._optimizer.param_groups[0]["lr"] = self._learning_rate * cosine_share(step, total_steps)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        top1 = hits(logits.detach(), labels)[0] * (100 / len(labels))
        return {"linear/online_loss": loss.detach(), "linear/online_top1": top1}

    @torch.no_grad()
    def judge(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        """Top-1 and top-5 (percent) of features (n, D) of validation images of classes `labels` (n,)."""
        top1, top5 = (hits(self.linear(features.to(self._device)), labels.to(self._device)) * (100 / len(labels))).tolist()
        return {"linear/online_validation_top1": top1, "linear/online_validation_top5": top5}

    def state_dict(self) -> dict[str, Any]:
        return {"linear": self.linear.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.linear.load_state_dict(state["linear"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _on_device(self, labels: Tensor) -> Tensor:
        """Without making the host wait, which a copy from ordinary memory may do."""
        return (labels.pin_memory() if self._device.type == "cuda" else labels).to(self._device, non_blocking=True)
