"""k-NN of the teacher on a labelled split while it trains, and once the trivial features that it has to beat."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esvit.augmentations.evaluation import EvaluationCrop
from esvit.data.base import Data, ImageSet
from esvit.data.loading import evaluation_batches
from esvit.data.subsets import Subset
from esvit.errors import OptionError
from esvit.evaluation.baselines import color_histogram, raw_pixels
from esvit.evaluation.features import extract_features
from esvit.evaluation.knn import weighted_knn
from esvit.networks import MultiCropNetwork
from esvit.runtime import Runtime


@dataclass(kw_only=True)
class OnlineKnn:
    """Options. every_epochs 0 means never; images are resized to a short side of `resize` and cropped to `crop` pixels;
    at most `max_train_images`, evenly spaced over the training set, are neighbours."""

    every_epochs: int
    neighbours: int
    temperature: float
    resize: int
    crop: int
    max_train_images: int
    baselines: bool

    def open(self, data: Data, train: ImageSet) -> "LabelledSplit | None":
        """The images to evaluate on, or None if this is switched off.

        Raises OptionError where labels or validation images are missing, or there are fewer images than neighbours.
        """
        if self.every_epochs <= 0:
            return None
        validation = data.validation()
        if validation is None:
            raise OptionError(
                "data.val_root", "is not set, but task.online_knn.every_epochs asks for k-NN", "give the validation folder, or set it to 0"
            )
        if train.labels is None or validation.labels is None:
            several = " of one class each" if train.class_names else ""
            raise OptionError(
                "task.online_knn.every_epochs",
                f"k-NN needs labels{several}, and the images have none",
                "set it to 0, or give folders with one sub-folder per class",
            )
        if self.baselines and not data.pixels.is_rgb:
            raise OptionError("task.online_knn.baselines", "colour histograms are of RGB images of 8 bits", "set it to false")
        if validation.class_names != train.class_names:
            raise OptionError("data.val_root", "its classes are not those of data.root", "give both the same class folders")
        count = min(len(train), self.max_train_images)
        if count < self.neighbours:
            raise OptionError(
                "task.online_knn.neighbours", f"{self.neighbours} neighbours among {count} training images", f"use at most {count}"
            )
        return LabelledSplit(self, data, train, validation)


class LabelledSplit:
    """Training images as neighbours, validation images as queries."""

    def __init__(self, options: OnlineKnn, data: Data, train: ImageSet, validation: ImageSet):
        assert train.labels is not None and validation.labels is not None
        self.options = options
        self.workers = data.workers
        self.batch_size = data.batch_size
        count = min(len(train), options.max_train_images)
        self.train = Subset(train, np.linspace(0, len(train) - 1, count).round().astype(np.int64))
        self.validation = Subset(validation, np.arange(len(validation)))
        self.transform = EvaluationCrop(resize=options.resize, crop=options.crop)

    def of_network(self, network: MultiCropNetwork, normalize: Callable[[Tensor], Tensor], runtime: Runtime) -> tuple[float, float]:
        """Top-1 and top-5 accuracy (percent) of the pooled features of `network`'s backbone; all ranks share the work."""
        train, validation = (self.features(images, network, normalize, runtime) for images in (self.train, self.validation))
        return self.accuracy(train, validation)

    def features(
        self, images: Subset, network: MultiCropNetwork, normalize: Callable[[Tensor], Tensor], runtime: Runtime
    ) -> tuple[Tensor, Tensor]:
        """Pooled features (n, D) of the readable ones of `images`, and their places (n,); all ranks share the work."""
        with runtime.autocast():
            return extract_features(
                backbone=network.backbone,
                batches=_beating(self._batches(images, runtime.rank, runtime.world_size), runtime),
                normalize=normalize,
                device=runtime.device,
            )

    def of_trivial_features(self) -> dict[str, float]:
        """Top-1 accuracy (percent) of raw pixels and of colour histograms of the same crops."""

        def features(images: Subset, describe: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            rows, places = zip(*((describe(crops), indices) for crops, indices in self._batches(images, 0, 1)), strict=True)
            return torch.cat(rows), torch.cat(places)

        described = {"knn/raw_pixels": raw_pixels, "knn/color_histogram": color_histogram}
        return {
            name: self.accuracy(features(self.train, describe), features(self.validation, describe))[0]
            for name, describe in described.items()
        }

    def _batches(self, images: "Subset", rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return evaluation_batches(
            images=images,
            transform=self.transform,
            batch_size=max(64, self.batch_size),
            workers=self.workers,
            rank=rank,
            world_size=world_size,
        )

    def accuracy(self, train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """Top-1 and top-5 (percent) of (features, places) pairs; unreadable images are in neither."""
        (train_features, train_places), (test_features, test_places) = train, validation
        result = weighted_knn(
            train_features=train_features,
            train_labels=torch.from_numpy(self.train.labels)[train_places],
            test_features=test_features,
            test_labels=torch.from_numpy(self.validation.labels)[test_places],
            neighbours=self.options.neighbours,
            temperature=self.options.temperature,
            classes=len(self.train.class_names),
            option="task.online_knn.neighbours",
        )[self.options.neighbours]
        return result.top1, result.top5


def _beating(batches: Iterator[tuple[Tensor, Tensor]], runtime: Runtime) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        runtime.beat("k-NN of the teacher")
        yield batch
