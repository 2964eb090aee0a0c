"""A backbone that names classes: the network of fine-tuning, how well it does on labelled images, and the file that it is kept in.

Unusual: the file has the layout of a checkpoint (`student`, `teacher`: a backbone's weights each), so that whatever reads checkpoints
reads it; the classifiers lie beside the backbones. The student holds the trained weights, the teacher their moving average.

Letters: B images, C channels, h and w the sides of a crop in pixels, D backbone width, K classes.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from esvit import distributed
from esvit.backbones.base import Backbone
from esvit.checkpoints import load_checkpoint_file, strict_load
from esvit.data.base import ImageSet
from esvit.data.loading import evaluation_batches
from esvit.errors import OptionError
from esvit.published import load_backbone
from esvit.runtime import Runtime


class Classifier(nn.Module):
    """A linear layer on the pooled features of `backbone`, small random weights at the start."""

    def __init__(self, backbone: Backbone, *, classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h, w) -> logits (B, K)."""
        return self.head(self.backbone(images).pooled)

    def parameters_by_depth(self) -> list[list[str]]:
        """As of the backbone; the head stands with the final norm."""
        layers = [[f"backbone.{name}" for name in layer] for layer in self.backbone.parameters_by_depth()]
        layers[-1] += [f"head.{name}" for name, _ in self.head.named_parameters()]
        return layers


@dataclass(frozen=True)
class Accuracy:
    """top1, top5  percent; of fewer than five classes, top5 is among all of them
    loss        mean cross-entropy (nats)
    images      how many could be read
    """

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def accuracies(
    networks: Mapping[str, nn.Module],
    *,
    images: ImageSet,
    transform: Callable[[Image.Image], Tensor],
    normalize: Callable[[Tensor], Tensor],
    batch_size: int,
    workers: int,
    runtime: Runtime,
) -> dict[str, Accuracy]:
    """How well each network, in eval mode, names the labelled `images`; each image is read once, by one of the ranks.

    Raises OptionError if no image can be read.
    """
    assert images.labels is not None
    labels = torch.from_numpy(images.labels)
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in networks}  # right, right among five, loss, images
    for crops, places in evaluation_batches(
        images=images,
        transform=transform,
        batch_size=batch_size,
        workers=workers,
        rank=runtime.rank,
        world_size=runtime.world_size,
    ):
        batch = normalize(crops.to(runtime.device, non_blocking=True))
        truth = labels[places].to(runtime.device)
        for name, network in networks.items():
            with runtime.autocast():
                logits = network(batch)
            sums[name] += _counts(logits.float(), truth).cpu()
    totals = {name: torch.stack(distributed.gather_objects(sums[name])).sum(dim=0).tolist() for name in networks}
    if any(count == 0 for *_, count in totals.values()):
        raise OptionError("data.val_root", "not one of its images can be read", "check that the folder is still there and intact")
    return {
        name: Accuracy(top1=100 * right / count, top5=100 * near / count, loss=loss / count, images=int(count))
        for name, (right, near, loss, count) in totals.items()
    }


def _counts(logits: Tensor, truth: Tensor) -> Tensor:
    """(B, K) and (B,) -> (4,) float32: right, right among the first five, summed loss, images."""
    ranked = logits.topk(min(5, logits.shape[1])).indices
    hits = ranked == truth[:, None]
    loss = F.cross_entropy(logits, truth, reduction="sum")
    count = torch.tensor(len(truth), device=logits.device)
    return torch.stack([value.float() for value in (hits[:, 0].sum(), hits.sum(), loss, count)])


def classifier_state(*, student: Classifier, average: Classifier | None, class_names: list[str]) -> dict[str, Any]:
    """What a file needs to hold, plain containers and tensors."""
    networks = {"student": student} if average is None else {"student": student, "teacher": average}
    state: dict[str, Any] = {name: network.backbone.state_dict() for name, network in networks.items()}
    state["classifier"] = {name: network.head.state_dict() for name, network in networks.items()}
    state["class_names"] = list(class_names)
    return state


def load_classifier_state(state: dict[str, Any], *, student: Classifier, average: Classifier | None, option: str) -> None:
    """The inverse of `classifier_state`. Raises OptionError naming `option` if the weights do not fit, or the average is missing."""
    for name, network in (("student", student), ("teacher", average)):
        if network is not None:
            if name not in state:
                raise OptionError(option, "holds no moving average of the weights", "use task.ema_momentum=0")
            strict_load(network.backbone, state[name], option=option, what=f"{name}'s backbone")
            strict_load(network.head, state["classifier"][name], option=option, what=f"{name}'s classifier")


def write_classifier(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def read_classifier(path: Path | str, backbone: Backbone, *, network: str) -> tuple[Classifier, list[str]]:
    """The classifier in a file of fine-tuning, in eval mode, and the names of its classes.

    backbone  the one that was fine-tuned, with any weights
    network   "teacher" (the moving average of the weights, if there is one) or "student" (the weights themselves)

    Raises OptionError for a file without a classifier, or of another backbone.
    """
    content = load_checkpoint_file(Path(path))
    if "classifier" not in content or "class_names" not in content:
        raise OptionError("checkpoint", f"'{path}' holds no classifier", "give the finetuned.pt of a run of task=finetune")
    load_backbone(backbone, path, which=network, resize_positions=False)
    classifier = Classifier(backbone, classes=len(content["class_names"]))
    heads = content["classifier"]
    strict_load(classifier.head, heads.get(network, heads["student"]), option="checkpoint", what="classifier")
    return classifier.eval(), content["class_names"]
