"""`task=correspondence`: how well regions of frozen features find the same place in another view of the image, without any training.

Unusual: a tally is kept for each image and added up in dataset order, so that any number of processes gives the same numbers.
"""

import csv
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esvit import distributed
from esvit.data.base import Data, ImageSet
from esvit.data.loading import sharded_batches
from esvit.errors import OptionError, Stopped
from esvit.evaluation.correspondence import (
    KINDS,
    Cells,
    CroppedViews,
    FlippedViews,
    Matches,
    Pair,
    PairDraws,
    Pairs,
    Score,
    match,
    most_similar,
    scores,
    tally,
    tally_width,
)
from esvit.evaluation.dense_pictures import KIND_NAMES, DrawnPairs, offsets_figure, pairs_sheet
from esvit.evaluation.features import in_dataset_order
from esvit.evaluation.frozen import Frozen, FrozenBackbone, hash_of_images
from esvit.evaluation.protocol import write_protocol
from esvit.evaluation.splits import require_rgb
from esvit.evaluation.stereo import StereoPhotos, StereoViews
from esvit.runtime import Runtime
from esvit.tasks.tables import aligned
from esvit.tracking.base import EVALUATED_STEP

log = logging.getLogger(__name__)

_REPORTED_OFFSETS = (1, 2)  # cells; offsets.csv has all


@dataclass(kw_only=True)
class Correspondence:
    """One evaluation, of the validation images where there are any, else of the training images; neither needs labels.

    views        "flip", "crops" or "stereo": where the second view comes from. For stereo, the folder is one of pairs, see StereoPhotos
    pairs        so many most similar pairs of an image count as its best ones
    photometric  whether the second view's colours change (flip and crops)
    crops_scale  smallest and largest share of the image's area (crops)
    max_images   at most so many, evenly spaced; None: all
    pictures     so many images have their best pairs drawn
    """

    views: str
    pairs: int
    photometric: bool
    crops_scale: list[float]
    max_images: int | None
    pictures: int
    frozen: Frozen
    data: Data

    def run(self, runtime: Runtime) -> None:
        """Print a table; write `metrics.json`, the protocol, the curves and pictures. Raises OptionError for options that cannot work."""
        self._check()
        require_rgb(self.data, task="task=correspondence")
        images = self._images()
        network = self.frozen.load(runtime, channels=self.data.channels)
        cells = Cells(network.grid(), self.frozen.crop)
        if cells.count < self.pairs:
            found = f"{self.pairs} pairs, but a view of {self.frozen.crop} pixels has {cells.count} regions"
            raise OptionError("task.pairs", found, "use fewer, or a larger task.frozen.crop")
        draws = PairDraws(self._views(images, network, cells, runtime.seed), self._chosen(len(images)), images.name)
        with runtime.recording() as tracker:
            tracker.resume(0)
            tallies = self._tallies(draws, network, cells, runtime)
            by_kind = scores(tallies)
            metrics = self._metrics(by_kind, len(tallies))
            if runtime.is_main:
                tracker.artifact(write_protocol(runtime.folder, self._protocol(images, network, cells, len(tallies))))
                for name, content in self._files(by_kind, draws, network, cells).items():
                    (runtime.folder / name).write_bytes(content)
                    tracker.artifact(runtime.folder / name)
                print("\n".join(self._table(by_kind, cells, len(tallies))), flush=True)
            tracker.log(1, 0, metrics)
            tracker.artifact(runtime.folder / "config.yaml")
            tracker.final(metrics | {EVALUATED_STEP: network.step, "step": 1}, 1)

    def _check(self) -> None:
        if self.pairs < 1:
            raise OptionError("task.pairs", f"{self.pairs}", "use 1 or more; 10 is published")
        if self.max_images is not None and self.max_images < 1:
            raise OptionError("task.max_images", f"{self.max_images}", "use 1 or more, or null for all")
        if self.pictures < 0:
            raise OptionError("task.pictures", f"{self.pictures}", "use 0 or more")
        if len(self.crops_scale) != 2 or not 0 < self.crops_scale[0] <= self.crops_scale[1] <= 1:
            raise OptionError("task.crops_scale", f"{self.crops_scale}", "give [smallest, largest] with 0 < smallest <= largest <= 1")

    def _images(self) -> ImageSet | StereoPhotos:
        if self.views != "stereo":
            return self.data.validation() or self.data.train()
        if self.data.val_root is not None:
            return StereoPhotos(self.data.val_root, option="data.val_root")
        return StereoPhotos(self.data.root, option="data.root")

    def _views(self, images: ImageSet | StereoPhotos, network: FrozenBackbone, cells: Cells, seed: int) -> Callable[[int], Pair]:
        if isinstance(images, StereoPhotos):
            return StereoViews(images, network.transform, cells)
        if self.views == "flip":
            return FlippedViews(images, network.transform, cells, self.photometric, seed)
        return CroppedViews(images, cells, (self.crops_scale[0], self.crops_scale[1]), self.photometric, seed)

    def _chosen(self, count: int) -> np.ndarray:
        """(n,) images to use, evenly spaced."""
        return _spaced(count, count if self.max_images is None else self.max_images)

    def _tallies(self, draws: PairDraws, network: FrozenBackbone, cells: Cells, runtime: Runtime) -> Tensor:
        """(n, 3, 5 + R) of all readable images in dataset order, on every rank. Raises Stopped on a signal."""
        rows, places = [torch.zeros(0, len(KINDS), tally_width(cells), dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
        for pairs in sharded_batches(
            draws,
            count=len(draws),
            batch_size=self.data.batch_size,
            workers=self.data.workers,
            rank=runtime.rank,
            world_size=runtime.world_size,
        ):
            if signal := runtime.stop_signal_here():
                raise Stopped(signal)
            if pairs.bad:
                log.warning("left out %d unreadable images: %s", len(pairs.bad), ", ".join(pairs.bad))
            if len(pairs):
                rows.append(tally(_matches(pairs, network), pairs.points, pairs.scale, cells, pairs=self.pairs))
                places.append(pairs.places)
        tallies, _ = in_dataset_order(distributed.gather_rows(torch.cat(rows)), distributed.gather_rows(torch.cat(places)))
        if len(tallies) == 0:
            raise OptionError("data.root", "none of its images can be read", "check that it is still there and intact")
        return tallies

    def _metrics(self, found: dict[str, Score], images: int) -> dict[str, float]:
        metrics: dict[str, float] = {"correspondence/images": images}
        for kind, score in found.items():
            prefix = "correspondence/" if kind == "top" else f"correspondence/{kind}_"
            metrics |= {f"{prefix}accuracy": score.accuracy, f"{prefix}error_pixels": score.error_pixels}
            metrics |= {f"{prefix}similarity": score.similarity, f"{prefix}pairs": score.pairs}
            metrics |= {f"{prefix}within_{cells}": score.within[cells] for cells in _REPORTED_OFFSETS if cells < len(score.within)}
            if self.views == "stereo":
                metrics[f"{prefix}disparity_error"] = score.disparity_error
                metrics[f"{prefix}disparity_error_of_true_region"] = score.disparity_error_of_true_region
        metrics["correspondence/mutual_share"] = 100 * found["mutual"].pairs / max(1, found["all"].pairs)
        return metrics

    def _protocol(self, images: ImageSet | StereoPhotos, network: FrozenBackbone, cells: Cells, readable: int) -> dict[str, Any]:
        of_views: dict[str, Any] = {"photometric": self.photometric, "seed": network.runtime.seed}
        if self.views == "crops":
            of_views["crops_scale"] = self.crops_scale
        return {
            "task": "correspondence",
            "views": self.views,
            **({} if self.views == "stereo" else of_views),
            "pairs": self.pairs,
            "regions": list(cells.grid),
            "frozen": network.describe(),
            "data": images.digest() if isinstance(images, StereoPhotos) else hash_of_images(images),
            "images": readable,
        }

    def _files(self, found: dict[str, Score], draws: PairDraws, network: FrozenBackbone, cells: Cells) -> dict[str, bytes]:
        """The curves as a table, and pictures of them and of some pairs: contents by name."""
        files = {"offsets.csv": _offsets_table(found, cells)}
        if not self.pictures:
            return files
        files["offsets.png"] = offsets_figure(found, cell=float(cells.size[0]), pairs=self.pairs)
        drawn = self._drawn(draws, network, cells)
        return files | ({"pairs.png": pairs_sheet(drawn)} if drawn else {})

    def _drawn(self, draws: PairDraws, network: FrozenBackbone, cells: Cells) -> list[DrawnPairs]:
        """Of some images, evenly spaced, drawn once more."""
        pairs = draws.__getitems__(_spaced(len(draws), self.pictures).tolist())
        if isinstance(pairs, OptionError):
            raise pairs
        if not len(pairs):
            return []
        matches = _matches(pairs, network)
        known = cells.inside(pairs.points)
        chosen = most_similar(matches.similarity, known, self.pairs)
        middles = cells.centres()
        drawn = []
        for number, place in enumerate(pairs.places.tolist()):
            best, points = matches.best[number][chosen[number]], pairs.points[number][chosen[number]]
            drawn.append(
                DrawnPairs(
                    name=draws.name(place),
                    one=pairs.one[number],
                    two=pairs.two[number],
                    starts=middles[chosen[number]],
                    ends=middles[best],
                    right=(cells.places(best) == cells.containing(points)).all(dim=1),
                )
            )
        return drawn

    def _table(self, found: dict[str, Score], cells: Cells, images: int) -> list[str]:
        chance = 100 / cells.count
        stereo = self.views == "stereo"
        header = ["", "pairs", "right", *(f"within {offset}" for offset in _REPORTED_OFFSETS), "error (pixels)", "cosine"]
        rows = [[*header, *(["disparity error"] if stereo else [])]]
        for kind, score in found.items():
            within = [f"{score.within[offset]:.1f} %" if offset < len(score.within) else "" for offset in _REPORTED_OFFSETS]
            row = [KIND_NAMES[kind].format(pairs=self.pairs), str(score.pairs), f"{score.accuracy:.1f} %", *within]
            row += [f"{score.error_pixels:.1f}", f"{score.similarity:.3f}"]
            rows.append([*row, *([f"{score.disparity_error:.1f}"] if stereo else [])])
        grid = f"{cells.grid[0]} x {cells.grid[1]} regions of {float(cells.size[0]):g} pixels"
        lines = [f"correspondence, views={self.views}: {images} pairs of views, {grid}, chance {chance:.2g} %", *aligned(rows)]
        if stereo:
            floor = found["all"].disparity_error_of_true_region
            lines.append(f"disparity in pixels of the photos; the right regions have an error of {floor:.1f}, by their size")
        return lines


@torch.no_grad()
def _matches(pairs: Pairs, network: FrozenBackbone) -> Matches:
    """On the CPU."""
    runtime = network.runtime
    views = network.normalize(torch.cat([pairs.one, pairs.two]).to(runtime.device, non_blocking=True))
    with runtime.autocast():
        regions = network.backbone(views).regions
    return match(*regions.chunk(2)).cpu()


def _offsets_table(found: dict[str, Score], cells: Cells) -> bytes:
    """CSV: the error allowed in cells and pixels, and the percent of matches within it for each kind of pairs."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["cells", "pixels", *KINDS])
    for offset, within in enumerate(zip(*(found[kind].within for kind in KINDS), strict=True)):
        table.writerow([offset, f"{offset * float(cells.size[0]):g}", *(f"{share:.4f}" for share in within)])
    return text.getvalue().encode()


def _spaced(count: int, wanted: int) -> np.ndarray:
    """(n,) int64: `wanted` of the numbers below `count`, evenly spaced, or all of them where there are not more."""
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64)
