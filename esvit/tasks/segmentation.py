"""`task=segmentation`: which class each region shows, by k-NN and linear classifiers of frozen region features, judged pixel by pixel.

Unusual: two results need no features and say how to read the others: that of calling everything the commonest class, and that of the
regions' true classes, which is about the best that regions of this size allow.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esvit import distributed
from esvit.data.base import Data, ImageSet, existing_folder
from esvit.data.loading import sharded_batches
from esvit.data.masks import IGNORED, LARGEST_NUMBER, MaskClasses, Masks
from esvit.errors import OptionError, Stopped
from esvit.evaluation.dense_pictures import DrawnMasks, masks_sheet
from esvit.evaluation.feature_files import FeatureSet
from esvit.evaluation.features import in_dataset_order
from esvit.evaluation.frozen import Describe, Frozen, FrozenBackbone
from esvit.evaluation.protocol import write_protocol
from esvit.evaluation.segmentation import (
    LinearClassifier,
    MaskDraws,
    NeighbourVotes,
    SegmentationScore,
    confusion,
    enlarged,
    of_one_class,
    region_labels,
    sample,
    score,
    unfitted_linear,
)
from esvit.evaluation.splits import require_rgb
from esvit.runtime import Runtime
from esvit.tasks.tables import aligned
from esvit.tracking.base import EVALUATED_STEP

REGIONS = Describe("regions", lambda backbone, images: backbone(images).regions.flatten(1))
_SHOWN_CLASSES = 30  # rows of the printed table; metrics.json has all
_ITERATIONS_AT_ONCE = 10  # of L-BFGS, between looks for a signal
_SCORES = 2**24  # numbers of a (B, K, h, w) tensor at once: 67 MB


@dataclass(frozen=True)
class Learned:
    """Both make scores (Q, K) of regions (Q, D)."""

    knn: NeighbourVotes
    linear: LinearClassifier


@dataclass(kw_only=True)
class Segmentation:
    """One evaluation; images need masks, not labels.

    masks, val_masks    folders of the masks; without val_masks, `masks` has the folders train and val
    classes             how many; None: as many as there are mask_values, or class_names
    class_names         what to call them; None: by number
    mask_values         the number that stands for each class in a mask; None: 0, 1, ...
    ignore              the number of pixels that count nowhere; None: all count
    train_regions       at most so many regions are learned from
    neighbours, temperature  of the k-NN classifier
    penalty, iterations      of the linear classifier, see LogisticRegression
    pictures            so many validation images have their masks drawn
    """

    masks: str | None
    val_masks: str | None
    classes: int | None
    class_names: list[str] | None
    mask_values: list[int] | None
    ignore: int | None
    train_regions: int
    neighbours: int
    temperature: float
    penalty: float
    iterations: int
    pictures: int
    frozen: Frozen
    data: Data

    def run(self, runtime: Runtime) -> None:
        """Print a table; write `metrics.json`, the protocol and a picture. Raises OptionError for options that cannot work."""
        self._check()
        require_rgb(self.data, task="task=segmentation")
        names = self._names()
        train, validation = self.data.train(), self.data.validation()
        if validation is None:
            raise OptionError("data.val_root", "is not set, but the evaluation needs validation images", "give the validation folder")
        train_masks, val_masks = self._masks(train, validation, len(names))
        for masks in (train_masks, val_masks):
            distributed.from_rank_zero(masks.require_all)
        network = self.frozen.load(runtime, channels=self.data.channels)
        grid = network.grid()
        with runtime.recording() as tracker:
            tracker.resume(0)
            labels, places = self._region_labels(MaskDraws(train, train_masks, network.transform), len(train), grid, len(names), runtime)
            train_features = self._features(train, network)
            learned = self._learn(train_features, labels, places, len(names), runtime)
            features = self._features(validation, network)
            judge = Judge(learned, features, grid, len(names), network)
            draws = MaskDraws(validation, val_masks, network.transform)
            scores = judge.scores(self._batches(draws, len(validation), runtime))
            metrics = _metrics(scores, names) | {"segmentation/linear_iterations": learned.linear.regression.iterations}
            if runtime.is_main:
                data = {"train": train_features.data, "validation": features.data}
                images = {"train": len(train_features.places), "validation": len(features.places)}
                truth = {"train": _hash(labels), "validation_pixels": scores["knn"].pixels}
                protocol = self._protocol(network, grid, names, runtime.seed)
                tracker.artifact(write_protocol(runtime.folder, protocol | {"data": data, "images": images, "masks": truth}))
                if self.pictures:
                    (runtime.folder / "segmentation.png").write_bytes(masks_sheet(self._drawn(judge, validation, draws), names))
                    tracker.artifact(runtime.folder / "segmentation.png")
                print("\n".join(self._table(scores, names, grid, images, len(learned.knn.labels))), flush=True)
            tracker.log(1, 0, metrics)
            tracker.artifact(runtime.folder / "config.yaml")
            tracker.final(metrics | {EVALUATED_STEP: network.step, "step": 1}, 1)

    def _check(self) -> None:
        for option in ("train_regions", "neighbours", "iterations"):
            if getattr(self, option) < 1:
                raise OptionError(f"task.{option}", f"{getattr(self, option)}", "use 1 or more")
        if self.temperature <= 0:
            raise OptionError("task.temperature", f"{self.temperature}", "use a number above 0, such as 0.07")
        if self.penalty < 0:
            raise OptionError("task.penalty", f"{self.penalty}", "use 0 or more")
        if self.pictures < 0:
            raise OptionError("task.pictures", f"{self.pictures}", "use 0 or more")
        if self.neighbours > self.train_regions:
            found = f"{self.neighbours} neighbours among at most {self.train_regions} regions"
            raise OptionError("task.neighbours", found, "use fewer, or more task.train_regions")

    def _names(self) -> list[str]:
        """What each class is called; the options that say how many there are agree."""
        lists = {"class_names": self.class_names, "mask_values": self.mask_values}
        counts = {option: len(values) for option, values in lists.items() if values is not None}
        if self.classes is not None:
            counts = {"classes": self.classes} | counts
        if not counts:
            raise OptionError("task.classes", "has no value", "say how many classes there are, e.g. classes=21 or mask_values=[0,255]")
        first, count = next(iter(counts.items()))
        for option, other in counts.items():
            if other != count:
                raise OptionError(f"task.{option}", f"{other} classes, but task.{first} says {count}", "give one for each class")
        if count < 2:
            raise OptionError(f"task.{first}", f"{count} class", "give 2 or more; the background is one")
        names = [str(number) for number in range(count)] if self.class_names is None else self.class_names
        if len(set(names)) < count:
            raise OptionError("task.class_names", f"{names} holds a name twice", "give each class a name of its own")
        return names

    def _mask_classes(self, count: int) -> MaskClasses:
        values = list(range(count)) if self.mask_values is None else self.mask_values
        for option, numbers in (("mask_values", values), ("ignore", [] if self.ignore is None else [self.ignore])):
            if any(not 0 <= number <= LARGEST_NUMBER for number in numbers):
                raise OptionError(f"task.{option}", f"{numbers}", f"use numbers from 0 to {LARGEST_NUMBER}")
        if len(set(values)) < count:
            raise OptionError("task.mask_values", f"{values} holds a number twice", "give each class a number of its own")
        if self.ignore in values:
            raise OptionError("task.ignore", f"{self.ignore} is the number of a class too", "say by task.mask_values which numbers are")
        return MaskClasses(values=values, ignored=self.ignore)

    def _masks(self, train: ImageSet, validation: ImageSet, count: int) -> tuple[Masks, Masks]:
        classes = self._mask_classes(count)
        if self.masks is None:
            raise OptionError("task.masks", "has no value", "give the folder of the masks, with the images' own tree")
        folders = {"task.masks": self.masks, "task.val_masks": self.val_masks}
        if self.val_masks is None:
            root = existing_folder("task.masks", self.masks)
            if not all(os.path.isdir(os.path.join(root, split)) for split in ("train", "val")):
                remedy = "give task.val_masks too, or a folder with both"
                raise OptionError("task.masks", f"'{root}' has no folders train and val", remedy)
            folders = {"task.masks": os.path.join(root, "train"), "task.val_masks": os.path.join(root, "val")}
        one, other = (
            Masks(folder, images=images, classes=classes, option=option)
            for (option, folder), images in zip(folders.items(), (train, validation), strict=True)
        )
        return one, other

    def _batches(self, masks: MaskDraws, count: int, runtime: Runtime) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the masks (B, h, w) and their images (B,). Raises Stopped on a signal."""
        for batch in sharded_batches(
            masks,
            count=count,
            batch_size=self.data.batch_size,
            workers=self.data.workers,
            rank=runtime.rank,
            world_size=runtime.world_size,
        ):
            if signal := runtime.stop_signal_here():
                raise Stopped(signal)
            yield batch

    def _region_labels(self, masks: MaskDraws, count: int, grid: tuple[int, int], classes: int, runtime: Runtime) -> tuple[Tensor, Tensor]:
        """(n, N) classes of the regions of all readable images, and their places (n,)."""
        labels, places = [torch.zeros(0, grid[0] * grid[1], dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        for cropped, images in self._batches(masks, count, runtime):
            labels.append(region_labels(cropped, grid, classes=classes))
            places.append(images)
        return in_dataset_order(distributed.gather_rows(torch.cat(labels)), distributed.gather_rows(torch.cat(places)))

    def _features(self, images: ImageSet, network: FrozenBackbone) -> FeatureSet:
        return network.features(images, batch_size=self.data.batch_size, workers=self.data.workers, describe=REGIONS)

    def _learn(self, train: FeatureSet, labels: Tensor, places: Tensor, classes: int, runtime: Runtime) -> Learned:
        """The same on every rank."""
        regions = labels.shape[1]
        chosen = sample(labels.flatten(), self.train_regions, seed=runtime.seed)
        if len(chosen) < self.neighbours:
            found = f"{self.neighbours} neighbours among {len(chosen)} training regions that show a class"
            raise OptionError("task.neighbours", found, "use fewer, or check the masks")
        rows = torch.searchsorted(train.places, places[chosen // regions])  # one row for each readable image, in both
        features = train.features.view(len(train.features), regions, -1)[rows, chosen % regions].to(runtime.device)
        chosen_labels = labels.flatten()[chosen].to(runtime.device)
        knn = NeighbourVotes(
            features=F.normalize(features, dim=1),
            labels=chosen_labels,
            neighbours=self.neighbours,
            temperature=self.temperature,
            classes=classes,
        )
        linear = unfitted_linear(features, chosen_labels, classes=classes, penalty=self.penalty)
        while linear.regression.iterations < self.iterations and not linear.regression.has_converged:
            if signal := runtime.stop_signal_here():
                raise Stopped(signal)
            linear.regression.advance(min(_ITERATIONS_AT_ONCE, self.iterations - linear.regression.iterations))
        return Learned(knn, linear)

    def _drawn(self, judge: "Judge", images: ImageSet, masks: MaskDraws) -> list[DrawnMasks]:
        """Of some images, evenly spaced over the readable ones."""
        places = judge.features.places
        chosen = places[np.linspace(0, len(places) - 1, min(len(places), self.pictures)).round().astype(np.int64)].tolist()
        batch = masks.__getitems__(chosen)
        if isinstance(batch, OptionError):
            raise batch
        truth, kept = batch
        predicted = judge.predict(truth, kept)
        drawn = []
        for number, place in enumerate(kept.tolist()):
            found = {"truth": truth[number], "k-NN": predicted["knn"][number], "linear": predicted["linear"][number]}
            drawn.append(DrawnMasks(judge.network.transform(images.read(place)), found))
        return drawn

    def _protocol(self, network: FrozenBackbone, grid: tuple[int, int], names: list[str], seed: int) -> dict[str, Any]:
        return {
            "task": "segmentation",
            "class_names": names,
            "mask_values": self.mask_values,
            "ignore": self.ignore,
            "regions": list(grid),
            "train_regions": self.train_regions,
            "seed": seed,
            "neighbours": self.neighbours,
            "temperature": self.temperature,
            "penalty": self.penalty,
            "iterations": self.iterations,
            "frozen": network.describe(),
        }

    def _table(
        self, scores: dict[str, SegmentationScore], names: list[str], grid: tuple[int, int], images: dict[str, int], learned: int
    ) -> list[str]:
        titles = {
            "knn": f"k-NN, k={self.neighbours}",
            "linear": "linear",
            "true_regions": "true classes of the regions",
            "constant": "commonest class everywhere",
        }
        rows = [["", "mIoU", "pixels right", "mIoU of regions"]]
        for name, title in titles.items():
            of_regions = scores.get(f"{name}_region")
            rows.append(
                [title, f"{scores[name].miou:.1f}", f"{scores[name].pixel_accuracy:.1f}", f"{of_regions.miou:.1f}" if of_regions else ""]
            )
        by_class = [["IoU of", "k-NN", "linear", "true regions"]]
        for number, name in enumerate(names[:_SHOWN_CLASSES]):
            by_class.append([name, *(_percent(scores[each].iou[number]) for each in ("knn", "linear", "true_regions"))])
        more = [f"and {len(names) - _SHOWN_CLASSES} classes more, in metrics.json"] if len(names) > _SHOWN_CLASSES else []
        return [
            f"segmentation of {images['validation']} validation images, {grid[0]} x {grid[1]} regions each, "
            f"learned from {learned} regions of {images['train']} training images; percent",
            *aligned(rows),
            *aligned(by_class),
            *more,
        ]


@dataclass(frozen=True)
class Judge:
    """Compares predictions with the truth, pixel by pixel, and region by region.

    features  of the validation images' regions
    """

    learned: Learned
    features: FeatureSet
    grid: tuple[int, int]
    classes: int
    network: FrozenBackbone

    def scores(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, SegmentationScore]:
        """From every rank's share of the masks: "knn", "linear", "true_regions" and "constant"; with "_region" behind, of regions.

        Raises OptionError if there is no pixel to judge by.
        """
        kinds = ("knn", "linear", "true_regions", "knn_region", "linear_region")
        counts = {kind: torch.zeros(self.classes, self.classes, dtype=torch.int64) for kind in kinds}
        for truth, places in batches:
            for few_truths, few_places in zip(truth.split(self._images_at_once), places.split(self._images_at_once), strict=True):
                predicted = self.predict(few_truths, few_places)
                regions = region_labels(few_truths, self.grid, classes=self.classes)
                for kind in kinds:
                    counts[kind] += confusion(predicted[kind], regions if kind.endswith("_region") else few_truths, classes=self.classes)
        totals = {kind: torch.stack(distributed.gather_objects(counts[kind])).sum(dim=0) for kind in kinds}
        if totals["knn"].sum() == 0:
            raise OptionError("task.val_masks", "no pixel of the validation images has a class", "check the masks, and task.ignore")
        totals["constant"] = of_one_class(totals["knn"])
        return {kind: score(total) for kind, total in totals.items()}

    @torch.no_grad()
    def predict(self, truth: Tensor, places: Tensor) -> dict[str, Tensor]:
        """Classes, on the CPU: (B, h, w) by "knn", "linear" and "true_regions", (B, N) by "knn_region" and "linear_region".

        truth   (B, h, w) masks
        places  (B,) of these images
        """
        rows = torch.searchsorted(self.features.places, places)
        device = self.network.runtime.device
        regions = self.features.features[rows].view(len(places) * self.grid[0] * self.grid[1], -1).to(device)
        found = {}
        for kind, classifier in (("knn", self.learned.knn), ("linear", self.learned.linear)):
            maps = classifier(regions).view(len(places), -1, self.classes)
            found[kind] = enlarged(maps, self.grid, truth.shape[-1]).cpu()
            found[f"{kind}_region"] = maps.argmax(dim=2).cpu()
        true = region_labels(truth, self.grid, classes=self.classes)
        one_hot = F.one_hot(true.clamp(min=0), self.classes).float() * (true != IGNORED)[..., None]
        found["true_regions"] = enlarged(one_hot, self.grid, truth.shape[-1])
        return found

    @property
    def _images_at_once(self) -> int:
        return max(1, _SCORES // (self.classes * self.network.transform.crop**2))


def _metrics(scores: dict[str, SegmentationScore], names: list[str]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for kind, found in scores.items():
        metrics[f"segmentation/{kind}_miou"] = found.miou
        if not kind.endswith("_region"):
            metrics[f"segmentation/{kind}_pixel_accuracy"] = found.pixel_accuracy
    for kind in ("knn", "linear"):
        for name, iou in zip(names, scores[kind].iou, strict=True):
            metrics[f"segmentation/{kind}_iou_{name}"] = iou
    return metrics


def _hash(labels: Tensor) -> str:
    """Of the classes of all regions: data sets are told apart by names, which masks share with their images."""
    return hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16]


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1f}"
