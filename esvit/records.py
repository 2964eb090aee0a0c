"""The named things that pass between parts: Views -> Features -> NetworkOutput -> LossTerms, and StepValues.

Letters: B images, C channels, V crops, N regions, D backbone width, E embedding width, K prototypes.
Every record that crosses DistributedDataParallel's forward is registered as a pytree node: with
`static_graph=True` DDP silently fails to average gradients through unregistered dataclasses.
"""

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True)
class Views:
    """The crops of B images, global crops first, equal sizes adjacent.

    crops         V tensors (B, C, H_v, W_v): uint8 as they leave the loader, float32 after normalisation
    global_count  how many of the first crops are global, i.e. seen by the teacher
    indices       (B,) int64, the image's place in its image set
    positions     (B,) int64, the image's place in the order of its epoch
    epoch         the epoch that the batch belongs to, from 0
    bad_images    names of images that could not be read and were replaced by a neighbour
    changes       V float32 tensors (B, P), what is still to be done to the crops on the device, see augmentations/device.py;
                  empty where they are finished
    """

    crops: list[Tensor]
    global_count: int
    indices: Tensor
    positions: Tensor
    epoch: int
    bad_images: list[str]
    changes: list[Tensor] = field(default_factory=list)

    @property
    def global_crops(self) -> list[Tensor]:
        return self.crops[: self.global_count]

    def to(self, device: torch.device) -> "Views":
        """The same views with their crops on `device`; the bookkeeping stays on the host."""
        return replace(self, crops=[crop.to(device, non_blocking=True) for crop in self.crops])

    def pin_memory(self) -> "Views":
        return replace(self, crops=[crop.pin_memory() for crop in self.crops])


@dataclass(frozen=True)
class Features:
    """What a backbone makes of B images of one size.

    pooled   (B, D)     one vector per image
    regions  (B, N, D)  one vector per cell of the last map, row by row
    grid     (rows, columns) with rows * columns == N
    """

    pooled: Tensor
    regions: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class NetworkOutput:
    """One network's answer to one crop of B images.

    view      (B, E)     unit embedding of the pooled feature, before the prototypes
    region    (B, N, E)  unit embedding of each region, or None without a region head
    features  (B, N, D)  region features before the head (no gradient): what regions are matched by, across views;
                         None without a region head
    pooled    (B, D)     pooled feature before the head (no gradient), for label-free health signals
    """

    view: Tensor
    region: Tensor | None
    features: Tensor | None
    pooled: Tensor

    def detached(self) -> "NetworkOutput":
        return replace(self, view=self.view.detach(), region=None if self.region is None else self.region.detach())


@dataclass(frozen=True)
class PrototypeWeights:
    """Weight-normed prototype matrices, made once a step: view (K, E), and region (K, E) or None."""

    view: Tensor
    region: Tensor | None


@dataclass(frozen=True)
class LossTerms:
    """Scalars of a batch, or of some of its crops. `total` carries the gradient; `view` and `region` do not."""

    total: Tensor
    view: Tensor
    region: Tensor | None


@dataclass(frozen=True)
class StepValues:
    """What the schedules prescribe for one optimizer step (counted from 0)."""

    epoch: int
    learning_rate: float
    weight_decay: float
    momentum: float
    temperature: float
    last_layer_frozen: bool


def _register(record: type) -> None:
    """Teach torch's pytree to look inside a record, so that DDP sees the tensors in it."""
    names = [each.name for each in fields(record)]
    _pytree.register_dataclass(record, field_names=names)


for _record in (Features, NetworkOutput, PrototypeWeights, LossTerms):
    _register(_record)
