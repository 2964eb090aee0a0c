"""`task=knn`: classifies labelled validation images by their nearest training images, with the pooled features of a frozen backbone.

Unusual: the best k is chosen on the very images that it is judged on, as published tables have it. Raw pixels are those of the crop shrunk
to 32 pixels, so that their rows stay within a few times the length of a feature's.
"""

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit import distributed
from esvit.data.base import Data, ImageSet
from esvit.data.loading import evaluation_batches
from esvit.errors import OptionError, Stopped
from esvit.evaluation.baselines import color_histogram, raw_pixels
from esvit.evaluation.feature_files import FeatureSet, read_rows, write_rows
from esvit.evaluation.frozen import Frozen, FrozenBackbone
from esvit.evaluation.knn import TEST_ROWS, KnnResult, WeightedKnn, check_neighbours, in_percent, tiles_of_rank
from esvit.evaluation.protocol import write_protocol
from esvit.evaluation.splits import Splits, labelled_splits
from esvit.runtime import Runtime
from esvit.tasks.tables import aligned
from esvit.tracking.base import EVALUATED_STEP

_PIXELS = 32  # side that crops are shrunk to before their pixels are compared


@dataclass(kw_only=True)
class Knn:
    """One evaluation.

    neighbours   every k to report
    temperature  of the neighbours' votes
    baselines    also of raw pixels, of colour histograms and of the backbone as it was made
    """

    neighbours: list[int]
    temperature: float
    baselines: bool
    frozen: Frozen
    data: Data

    def run(self, runtime: Runtime) -> None:
        """Print a table, write `metrics.json` and the protocol. Raises OptionError for options that cannot work."""
        splits = labelled_splits(self.data)
        self._check(len(splits.train))
        untrained = self._untrained()
        network = self.frozen.load(runtime, channels=self.data.channels)
        with runtime.recording() as tracker:
            tracker.resume(0)
            train, validation = (self._pooled(network, images) for images in (splits.train, splits.validation))
            results = {"": self._classify(train, validation, splits, runtime)}
            if self.baselines:
                for name, describe in (("raw_pixels", _raw_pixels), ("color_histogram", color_histogram)):
                    rows, queries = (self._trivial(describe, images, network, runtime) for images in (splits.train, splits.validation))
                    results[f"{name}_"] = self._classify(rows, queries, splits, runtime)
            if untrained is not None:
                network_before = untrained.load(runtime, channels=self.data.channels)
                rows, queries = (self._pooled(network_before, images) for images in (splits.train, splits.validation))
                results["untrained_"] = self._classify(rows, queries, splits, runtime)
            metrics = self._metrics(results)
            if runtime.is_main:
                tracker.artifact(write_protocol(runtime.folder, self._protocol(network, train, validation)))
                print("\n".join([*self._table(results, train, validation), f"results in {runtime.folder}"]), flush=True)
            tracker.log(1, 0, metrics)
            tracker.artifact(runtime.folder / "config.yaml")
            tracker.final(metrics | {EVALUATED_STEP: network.step, "step": 1}, 1)

    def _check(self, train_images: int) -> None:
        if self.temperature <= 0:
            raise OptionError("task.temperature", f"{self.temperature}", "use a number above 0, such as 0.07")
        if self.baselines and not self.data.pixels.is_rgb:
            raise OptionError("task.baselines", "colour histograms are of RGB images of 8 bits", "set it to false")
        check_neighbours(self.neighbours, train_images=train_images, option="task.neighbours")

    def _untrained(self) -> Frozen | None:
        """The backbone before any weights are loaded into it, where its k-NN is asked for beside that of another."""
        if not self.baselines or self.frozen.network == "untrained":
            return None
        return replace(self.frozen, network="untrained", backbone=copy.deepcopy(self.frozen.backbone))

    def _pooled(self, network: FrozenBackbone, images: ImageSet) -> FeatureSet:
        return network.features(images, batch_size=self.data.batch_size, workers=self.data.workers)

    def _trivial(self, describe: Callable[[Tensor], Tensor], images: ImageSet, network: FrozenBackbone, runtime: Runtime) -> FeatureSet:
        """Rows that `describe` makes of uint8 crops, computed by all ranks together in a file that is gone afterwards."""
        folder = runtime.folder / "baseline"
        path = folder / "rows.npy"
        width = describe(torch.zeros(1, 3, self.frozen.crop, self.frozen.crop, dtype=torch.uint8)).shape[1]
        write_rows(path, count=len(images), width=width, batches=self._described(describe, images, network, runtime))
        rows, places = read_rows(path)
        distributed.barrier()
        if runtime.is_main:
            shutil.rmtree(folder)  # the open map keeps the rows
        distributed.barrier()
        assert images.labels is not None
        return FeatureSet(features=rows, labels=torch.from_numpy(images.labels)[places], places=places, data="")

    def _described(
        self, describe: Callable[[Tensor], Tensor], images: ImageSet, network: FrozenBackbone, runtime: Runtime
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for crops, places in evaluation_batches(
            images=images,
            transform=network.transform,
            batch_size=self.data.batch_size,
            workers=self.data.workers,
            rank=runtime.rank,
            world_size=runtime.world_size,
        ):
            if signal := runtime.stop_signal_here():
                raise Stopped(signal)
            runtime.beat(f"baseline of image {places[-1]}")
            yield describe(crops), places

    def _classify(self, train: FeatureSet, validation: FeatureSet, splits: Splits, runtime: Runtime) -> dict[int, KnnResult]:
        """One result per k, of all ranks together."""
        assert train.labels is not None and validation.labels is not None
        check_neighbours(self.neighbours, train_images=len(train.labels), option="task.neighbours")  # again: some may be unreadable
        if len(validation.labels) == 0:
            raise OptionError("data.val_root", "none of its images can be read", "check that it is still there and intact")
        knn = WeightedKnn(
            train_features=train.features,
            train_labels=train.labels,
            neighbours=self.neighbours,
            temperature=self.temperature,
            classes=len(splits.class_names),
            device=runtime.device,
        )
        hits = torch.zeros(len(self.neighbours), 2, dtype=torch.int64)
        for tile in tiles_of_rank(len(validation.labels), rows=TEST_ROWS, rank=runtime.rank, world_size=runtime.world_size):
            if signal := runtime.stop_signal_here():
                raise Stopped(signal)
            runtime.beat(f"k-NN of images {tile.start} to {tile.stop}")
            hits += knn.hits(validation.features[tile], validation.labels[tile]).cpu()
        total = torch.stack(distributed.gather_objects(hits)).sum(dim=0)
        return in_percent(total, neighbours=self.neighbours, images=len(validation.labels))

    def _metrics(self, results: dict[str, dict[int, KnnResult]]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, by_k in results.items():
            for k, result in by_k.items():
                metrics |= {f"knn/{name}top1_k{k}": result.top1, f"knn/{name}top5_k{k}": result.top5}
        best = _best(results[""])
        return metrics | {"knn/best_k": best, "knn/best_top1": results[""][best].top1, "knn/best_top5": results[""][best].top5}

    def _protocol(self, network: FrozenBackbone, train: FeatureSet, validation: FeatureSet) -> dict[str, Any]:
        return {
            "task": "knn",
            "neighbours": self.neighbours,
            "temperature": self.temperature,
            "frozen": network.describe(),
            "data": {"train": train.data, "validation": validation.data},
            "images": {"train": len(train.places), "validation": len(validation.places)},
        }

    def _table(self, results: dict[str, dict[int, KnnResult]], train: FeatureSet, validation: FeatureSet) -> list[str]:
        names = {"": self.frozen.network, "raw_pixels_": "raw pixels", "color_histogram_": "colour histogram", "untrained_": "untrained"}
        rows = [[names[name], *(f"{result.top1:.2f} / {result.top5:.2f}" for result in by_k.values())] for name, by_k in results.items()]
        best = _best(results[""])
        return [
            f"k-NN of {len(validation.places)} validation images among {len(train.places)} training images, top-1 / top-5 in percent",
            *aligned([["", *(f"k={k}" for k in results[""])], *rows]),
            f"best k: {best}",
        ]


def _best(by_k: dict[int, KnnResult]) -> int:
    """The k with the highest top-1; the first of equals."""
    return max(by_k, key=lambda k: by_k[k].top1)


def _raw_pixels(crops: Tensor) -> Tensor:
    """Of the crop, shrunk if it is larger than _PIXELS."""
    if crops.shape[-1] > _PIXELS:
        crops = F.interpolate(crops.float(), size=(_PIXELS, _PIXELS), mode="area").round().to(torch.uint8)
    return raw_pixels(crops)
