"""Linear classifiers on frozen features, trained side by side: each has its own learning rate, number of blocks and pooling.

The protocol is that of DINO (Caron et al. 2021), which EsViT follows: one linear layer, weights from N(0, 0.01), bias 0, on the pooled
tokens of the last blocks; SGD with momentum 0.9 and no weight decay; a learning rate for 256 images a step that falls to 0 by a cosine
over the epochs; cross-entropy.

Unusual: a probe has the same numbers, bit for bit, whichever others are trained beside it. Equal shapes begin with equal weights, and
one that diverges disturbs no other.

Letters: B images of a batch, n images in all, D backbone width, F width of a row of features, K classes, P probes.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esvit import distributed
from esvit.augmentations.supervised import RandomResizedCropFlip
from esvit.backbones.base import Backbone
from esvit.data.base import Data, ImageSet
from esvit.data.loading import TrainLoader
from esvit.errors import OptionError
from esvit.evaluation.frozen import Describe, FrozenBackbone
from esvit.runtime import Runtime
from esvit.schedules import scaled_learning_rate

MOMENTUM = 0.9
INITIAL_STD = 0.01
POOLED, WITH_REGIONS = "pooled", "pooled_and_regions"
POOLINGS = (POOLED, WITH_REGIONS)
_CHUNK = 1024  # rows whose accuracy is measured at once


@dataclass(frozen=True)
class Choice:
    """What one probe is.

    learning_rate  at the first epoch, for 256 images a step
    blocks         how many of the last blocks it reads
    pooling        "pooled": of each block its class token, or the mean of its tokens; "pooled_and_regions": the mean of the last stage's
                   regions besides (DINO's `avgpool_patchtokens`)
    """

    learning_rate: float
    blocks: int
    pooling: str

    @property
    def name(self) -> str:
        """For metrics: "lr0.01_blocks4_pooled"."""
        return f"lr{self.learning_rate:g}_blocks{self.blocks}_{self.pooling}"


@dataclass(frozen=True)
class RowLayout:
    """What a row of features holds: the pooled tokens of the last blocks, first to last, then the mean of the last stage's regions.

    widths   of these blocks
    regions  width of that mean, or 0 where no probe wants it
    """

    widths: list[int]
    regions: int

    @staticmethod
    def of(backbone: Backbone, choices: Sequence[Choice]) -> "RowLayout":
        """The narrowest that serves all `choices`."""
        wants_regions = any(choice.pooling == WITH_REGIONS for choice in choices)
        deepest = max(choice.blocks for choice in choices)
        return RowLayout(widths=backbone.block_dims[-deepest:], regions=backbone.dim if wants_regions else 0)

    @property
    def width(self) -> int:
        return sum(self.widths) + self.regions

    def columns(self, choice: Choice) -> slice:
        """Where in a row the input of a probe is; its blocks and the mean of the regions are neighbours."""
        blocks = sum(self.widths)
        return slice(blocks - sum(self.widths[-choice.blocks :]), self.width if choice.pooling == WITH_REGIONS else blocks)

    def describe(self) -> Describe:
        """How a backbone makes such rows, in one pass."""
        count = len(self.widths)

        def rows(backbone: Backbone, images: Tensor) -> Tensor:
            blocks, regions = backbone.last_blocks_and_regions(images, count)
            return torch.cat([*blocks, regions] if self.regions else blocks, dim=1)

        return Describe(f"last_{count}_blocks{'_and_regions' if self.regions else ''}", rows)


@dataclass(frozen=True)
class Accuracy:
    """Share of images, in percent, whose class is the first (top1) or among the first five (top5) predictions."""

    top1: float
    top5: float


@dataclass(frozen=True)
class LabelledRows:
    """Some rows of a larger table.

    features  (n, F), as it lies on the disk
    labels    (n,) int64
    numbers   (m,) int64, which rows count
    """

    features: Tensor
    labels: Tensor
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, places: np.ndarray | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows (B, F) float32 and labels (B,) of the images at `places` (B,) of `numbers`."""
        rows = torch.from_numpy(self.numbers[places])
        return self.features[rows].to(device, non_blocking=True), self.labels[rows].to(device, non_blocking=True)


class Probes:
    """The linear layers and their optimizer.

    images_per_step  of all ranks together, which the learning rates are scaled by
    seed             of the initial weights
    """

    def __init__(
        self, *, choices: Sequence[Choice], layout: RowLayout, classes: int, images_per_step: int, seed: int, device: torch.device
    ):
        self.choices = list(choices)
        self.classes = classes
        self.device = device
        self._columns = [layout.columns(choice) for choice in choices]
        widths = [len(range(layout.width)[columns]) for columns in self._columns]
        self.linears = nn.ModuleList(fresh_classifier(width, classes, seed) for width in widths).to(device)
        self._rates = [scaled_learning_rate(choice.learning_rate, images_per_step) for choice in choices]
        groups = [{"params": list(linear.parameters()), "lr": rate} for linear, rate in zip(self.linears, self._rates, strict=True)]
        self._optimizer = torch.optim.SGD(groups, momentum=MOMENTUM)

    def __len__(self) -> int:
        return len(self.choices)

    def logits(self, probe: int, rows: Tensor) -> Tensor:
        """(B, F) -> (B, K)."""
        return self.linears[probe](rows[:, self._columns[probe]])

    def step(self, rows: Tensor, labels: Tensor, *, rate_share: float) -> Tensor:
        """One update of every probe on rows (B, F) of images of classes `labels` (B,); the loss of each, (P,), of this rank.

        rate_share  what is left of the learning rates, see `cosine_share`
        """
        losses = torch.stack([F.cross_entropy(self.logits(probe, rows), labels) for probe in range(len(self))])
        losses.sum().backward()
        average_gradients(self.linears)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_share
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return losses.detach()

    @torch.no_grad()
    def accuracies(self, images: LabelledRows, probes: Sequence[int]) -> list[Accuracy]:
        """Of each of `probes`; the ranks share the work. A prediction that is no number is a wrong one."""
        total = torch.zeros(len(probes), 2, dtype=torch.int64, device=self.device)
        share = np.arange(distributed.rank(), len(images), distributed.world_size())
        for begin in range(0, len(share), _CHUNK):
            rows, labels = images.take(share[begin : begin + _CHUNK], self.device)
            for place, probe in enumerate(probes):
                total[place] += hits(self.logits(probe, rows), labels)
        total = torch.stack(distributed.gather_objects(total.cpu())).sum(dim=0)
        return [Accuracy(*(100 * count / len(images) for count in each)) for each in total.tolist()]

    def state_dict(self) -> dict[str, Any]:
        return {"linears": self.linears.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.linears.load_state_dict(state["linears"])
        self._optimizer.load_state_dict(state["optimizer"])


class AugmentedRows:
    """Rows of random crops of `images`, which every epoch sends through the backbone anew.

    crop   makes one crop of an image
    data   gives the batch size of a rank and the loading processes
    """

    def __init__(
        self, *, images: ImageSet, crop: RandomResizedCropFlip, frozen: FrozenBackbone, layout: RowLayout, data: Data, runtime: Runtime
    ):
        assert images.labels is not None
        self._labels = torch.from_numpy(images.labels)
        self._frozen = frozen
        self._describe = layout.describe()
        self._runtime = runtime
        self._loader = TrainLoader(
            images=images,
            transform=crop,
            batch_size=data.batch_size,
            workers=data.workers,
            seed=runtime.seed,
            rank=runtime.rank,
            world_size=runtime.world_size,
            accumulation=1,
            max_bad_fraction=data.max_bad_fraction,
        )
        self.images_per_step = self._loader.images_per_step
        self.steps_per_epoch = self._loader.steps_per_epoch
        self.image_count = len(images)
        self.bad_images: list[str] = []  # names met here; whoever reads them empties the list

    def from_step(self, start: int) -> Generator[tuple[Tensor, Tensor]]:
        """Rows (B, F) and labels (B,) of this rank, without end, from step `start` on."""
        for views in self._loader.from_step(start):
            self.bad_images += views.bad_images
            (crops,) = views.to(self._runtime.device).crops
            with torch.no_grad(), self._runtime.autocast():
                rows = self._describe.of(self._frozen.backbone, self._frozen.normalize(crops))
            yield rows.float(), self._labels[views.indices].to(self._runtime.device, non_blocking=True)


class CachedRows:
    """Rows that were made once, of the evaluation's crops: the backbone does not run again.

    An epoch's order depends on seed and epoch, and is the same for any number of ranks.
    """

    def __init__(self, *, images: LabelledRows, batch_size: int, runtime: Runtime):
        self.images_per_step = batch_size * runtime.world_size
        self.steps_per_epoch = cached_steps(len(images), batch_size=batch_size, world_size=runtime.world_size)
        self.image_count = len(images)
        self.bad_images: list[str] = []  # none: the extraction has logged and left them out
        self._images = images
        self._batch_size = batch_size
        self._runtime = runtime

    def from_step(self, start: int) -> Generator[tuple[Tensor, Tensor]]:
        """Rows (B, F) and labels (B,) of this rank, without end, from step `start` on."""
        epoch, first = divmod(start, self.steps_per_epoch)
        while True:
            order = np.random.default_rng([self._runtime.seed, epoch]).permutation(len(self._images))
            for step in range(first, self.steps_per_epoch):
                begin = step * self.images_per_step + self._runtime.rank * self._batch_size
                yield self._images.take(order[begin : begin + self._batch_size], self._runtime.device)
            epoch, first = epoch + 1, 0


def cached_steps(images: int, *, batch_size: int, world_size: int) -> int:
    """Steps of an epoch; what is left over waits for another epoch's order. Raises OptionError if there is none."""
    steps = images // (batch_size * world_size)
    if steps == 0:
        found = (
            f"one step takes {batch_size * world_size} images ({batch_size} per process x {world_size} processes) but there are {images}"
        )
        largest = images // world_size
        raise OptionError("data.batch_size", found, f"use at most data.batch_size={largest}" if largest else "use fewer processes")
    return steps


def fresh_classifier(width: int, classes: int, seed: int) -> nn.Linear:
    """Weights from N(0, 0.01) and bias 0, from a generator of its own."""
    linear = nn.utils.skip_init(nn.Linear, width, classes)
    nn.init.normal_(linear.weight, std=INITIAL_STD, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return linear


def cosine_share(epoch: int, epochs: int) -> float:
    """Of the first epoch's learning rate: half a cosine wave, constant within an epoch."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def average_gradients(network: nn.Module) -> None:
    """Every parameter's gradient becomes the mean over ranks."""
    for parameter in network.parameters():
        assert parameter.grad is not None
        parameter.grad = distributed.mean(parameter.grad)


def best_of(accuracies: Sequence[Accuracy]) -> int:
    """Number of the one with the highest top-1, of equal ones the first."""
    return max(range(len(accuracies)), key=lambda number: accuracies[number].top1)


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """(2,) how many labels (B,) are the first, and among the first five, of the logits (B, K)."""
    values, predicted = logits.topk(min(5, logits.shape[1]), dim=1)
    correct = (predicted == labels[:, None]) & values.isfinite()
    return torch.stack([correct[:, 0].sum(), correct.any(dim=1).sum()])
