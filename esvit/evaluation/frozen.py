"""The backbone under evaluation: weights that stay as they are, the crop that it sees images in, and its features of whole image sets.

Unusual: features are kept on disk under a hash of all that they depend on, so that a second evaluation of the same weights costs no
forward pass. Images are known by name and label only: replace pixels under the same names, and the kept features are the old ones.

Letters: B images, C channels, D backbone width, n images of a set, F width of a described row.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esvit import distributed
from esvit.augmentations.evaluation import EvaluationCrop, Normalize
from esvit.backbones.base import Backbone
from esvit.data.base import ImageSet
from esvit.data.loading import evaluation_batches
from esvit.errors import OptionError, Stopped
from esvit.evaluation.feature_files import FeatureSet, is_complete, read_rows, write_rows
from esvit.published import load_backbone
from esvit.runtime import Runtime

_HASH_DIGITS = 16


@dataclass(frozen=True)
class Describe:
    """What a row says of an image: `of(backbone, images)` makes (B, F) of normalised images (B, C, h, w); `name` tells it from others."""

    name: str
    of: Callable[[Backbone, Tensor], Tensor]


POOLED = Describe("pooled", lambda backbone, images: backbone(images).pooled)


@dataclass(kw_only=True)
class Frozen:
    """Options.

    backbone          the network that the checkpoint fits
    checkpoint        file with the weights, ours or a published one
    network           whose backbone: "teacher", "student", or "untrained" (as it was made, from the run's seed)
    resize_positions  resize tables of positions in `checkpoint` that were made for other windows or another image size
    normalize         as in training
    resize, crop      short side that images are resized to, and side of their centre crop (pixels)
    cache             folder that keeps features; None keeps none
    """

    backbone: Backbone
    checkpoint: str | None
    network: str
    resize_positions: bool
    normalize: Normalize
    resize: int
    crop: int
    cache: str | None

    def load(self, runtime: Runtime, *, channels: int) -> "FrozenBackbone":
        """The backbone with its weights, on the device. Raises OptionError if they are missing or do not fit, or for an impossible crop.

        channels  of the images that it will see
        """
        step = 0
        self.normalize.check_channels(channels)
        transform = EvaluationCrop(resize=self.resize, crop=self.crop, option="task.frozen.crop")
        if self.network != "untrained":
            if self.checkpoint is None:
                raise OptionError("checkpoint", "has no value", "give the weights, or of=RUN_FOLDER, or frozen.network=untrained")
            saved = load_backbone(self.backbone, self.checkpoint, which=self.network, resize_positions=self.resize_positions)
            step = saved.step or 0
        self._check_crop()
        weights = _hash_of_weights(self.backbone)
        self.backbone.to(runtime.device).eval().requires_grad_(False)
        return FrozenBackbone(options=self, transform=transform, weights=weights, step=step, runtime=runtime)

    def _check_crop(self) -> None:
        channels = len(self.normalize.mean)
        try:
            with torch.no_grad():
                self.backbone.eval()(torch.zeros(1, channels, self.crop, self.crop))
        except RuntimeError as error:
            if "channels" in str(error):
                remedy = f"use backbone.in_channels={channels} (and weights that were trained so), or other images"
                raise OptionError("backbone.in_channels", f"does not fit images of data.channels={channels}", remedy) from None
            found = f"the backbone cannot take {channels} x {self.crop} x {self.crop} pixels ({str(error).splitlines()[0]})"
            raise OptionError("task.frozen.crop", found, "use another size") from None


@dataclass(frozen=True, kw_only=True)
class FrozenBackbone:
    """A loaded backbone in eval mode, without gradients.

    options    what it was made from
    transform  image -> uint8 (C, crop, crop)
    weights    hash of its weights
    step       optimizer step of the checkpoint; 0 if that is unknown
    """

    options: Frozen
    transform: EvaluationCrop
    weights: str
    step: int
    runtime: Runtime

    @property
    def backbone(self) -> Backbone:
        return self.options.backbone

    @property
    def normalize(self) -> Normalize:
        return self.options.normalize

    def describe(self) -> dict[str, Any]:
        """What identifies the weights and how they see images: a part of every protocol."""
        options = self.options
        return {
            "network": options.network,
            "weights": self.weights,
            "step": self.step,
            "precision": self.runtime.precision,
            "resize": options.resize,
            "crop": options.crop,
            "mean": options.normalize.mean,
            "std": options.normalize.std,
        }

    def features(self, images: ImageSet, *, batch_size: int, workers: int, describe: Describe = POOLED) -> FeatureSet:
        """Rows of `describe` for every readable image, computed by all ranks together, or read from the cache.

        Raises Stopped on a signal; the work on this image set is lost then, earlier sets are kept.
        """
        data = hash_of_images(images)
        key = _hash(self.describe() | {"step": 0}, data, describe.name)
        if self.options.cache is None:
            folder = Path(distributed.broadcast_object(tempfile.mkdtemp(prefix="features-") if self.runtime.is_main else None))
        else:
            folder = Path(self.options.cache)
        path = folder / f"{describe.name}_{key}.npy"
        if not distributed.broadcast_object(is_complete(path)):
            write_rows(path, count=len(images), width=self._width(describe), batches=self._rows(images, batch_size, workers, describe))
        rows, places = read_rows(path)
        if self.options.cache is None:  # the open map keeps the rows
            distributed.barrier()
            if self.runtime.is_main:
                shutil.rmtree(folder)
        labels = None if images.labels is None else torch.from_numpy(images.labels)[places]
        return FeatureSet(features=rows, labels=labels, places=places, data=data)

    @torch.no_grad()
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the regions of a crop."""
        options = self.options
        one = torch.zeros(1, len(options.normalize.mean), options.crop, options.crop, device=self.runtime.device)
        return self.backbone(one).grid

    def batches(self, images: ImageSet, *, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's contiguous share of the images: normalised (B, C, crop, crop) on the device, and their places (B,) int64."""
        runtime = self.runtime
        for crops, places in evaluation_batches(
            images=images,
            transform=self.transform,
            batch_size=batch_size,
            workers=workers,
            rank=runtime.rank,
            world_size=runtime.world_size,
        ):
            runtime.beat("evaluating")
            if signal := runtime.stop_signal_here():
                raise Stopped(signal)
            yield self.normalize(crops.to(runtime.device, non_blocking=True)), places

    @torch.no_grad()
    def _rows(self, images: ImageSet, batch_size: int, workers: int, describe: Describe) -> Iterator[tuple[Tensor, Tensor]]:
        for crops, places in self.batches(images, batch_size=batch_size, workers=workers):
            with self.runtime.autocast():
                yield describe.of(self.backbone, crops), places

    @torch.no_grad()
    def _width(self, describe: Describe) -> int:
        options = self.options
        one = torch.zeros(1, len(options.normalize.mean), options.crop, options.crop, device=self.runtime.device)
        return describe.of(self.backbone, one).shape[1]


def hash_of_images(images: ImageSet) -> str:
    """Of names, labels and class names, in order, and of what images are read as, where that is not RGB."""
    digest = hashlib.sha256(f"{len(images)} {images.class_names if images.labels is not None else None}".encode())
    for index in range(len(images)):
        digest.update(images.name(index).encode(errors="surrogateescape") + b"\0")
    if images.labels is not None:
        digest.update(images.labels.tobytes())
    if not images.pixels.is_rgb:
        digest.update(f"{images.pixels.channels} {images.pixels.depth}".encode())
    return digest.hexdigest()[:_HASH_DIGITS]


def _hash_of_weights(network: nn.Module) -> str:
    """Of names, types, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:_HASH_DIGITS]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:_HASH_DIGITS]
