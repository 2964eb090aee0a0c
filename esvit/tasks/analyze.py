"""Draws what a backbone has learned: attention, region maps, matched regions and nearest neighbours, and one page that explains them.

All ranks together compute what is measured over a whole set of images; the pictures are drawn by rank 0.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from esvit.backbones.base import NoAttention
from esvit.data.base import ImageSet
from esvit.data.folder import FolderImages
from esvit.data.subsets import Subset
from esvit.errors import OptionError
from esvit.evaluation.analysis_report import Analysis, write_analysis_report
from esvit.evaluation.feature_files import FeatureSet
from esvit.evaluation.frozen import Frozen, FrozenBackbone, hash_of_images
from esvit.evaluation.photos import Photo, evenly_spaced, open_photos, read_photos
from esvit.evaluation.protocol import write_protocol
from esvit.run_folder import RunFolder
from esvit.runtime import Runtime
from esvit.tasks.analyze_parts import AttentionMaps, MatchedPhoto, RegionColors, RegionMatches, go_on
from esvit.tasks.analyze_sets import Entropy, draw_neighbours, measure_entropy
from esvit.tracking.base import EVALUATED_STEP, Tracker
from esvit.tracking.environment import source_state

LEAST = {"max_photos": 1, "max_images": 2, "entropy_images": 1, "queries": 0, "neighbours": 1, "batch_size": 1, "workers": 0}


@dataclass(frozen=True)
class _Measured:
    """What all ranks computed together.

    photos        those that are drawn; all_photos: where they are from
    images        the part of the dataset that has the features `pooled`, which are None if no neighbours are asked for
    no_attention  what a backbone without attention says of itself; then there is no entropy
    """

    photos: Sequence[Photo]
    all_photos: ImageSet
    images: ImageSet
    pooled: FeatureSet | None
    entropy: Entropy | None
    no_attention: str | None


@dataclass(kw_only=True)
class Analyze:
    """One analysis.

    images          photos for the pictures: a folder, a file, a list of files, or None for those that come with the package
    max_photos      at most so many of them are drawn
    dataset         folder of images for entropy and neighbours; None means the photos
    max_images      at most so many of these are candidates for neighbours
    entropy_images  at most so many of them are measured for attention entropy
    queries         images whose neighbours are shown; 0 leaves neighbours out
    neighbours      shown for each of them
    batch_size, workers  for the images of the dataset
    frozen          the backbone
    attention, colors, matches  options of these pictures
    name            of the run
    """

    images: str | list[str] | None
    max_photos: int
    dataset: str | None
    max_images: int
    entropy_images: int
    queries: int
    neighbours: int
    batch_size: int
    workers: int
    frozen: Frozen
    attention: AttentionMaps
    colors: RegionColors
    matches: RegionMatches
    name: str

    def run(self, runtime: Runtime) -> None:
        """Write the pictures, `report.html`, `metrics.json` and the protocol. Raises OptionError for options that cannot work."""
        self._check()
        all_photos = open_photos(self.images, option="task.images")
        photos = read_photos(all_photos, evenly_spaced(len(all_photos), self.max_photos).tolist(), option="task.images")
        dataset = all_photos if self.dataset is None else FolderImages(self.dataset, option="task.dataset", class_names=None)
        self.matches.check_saved(photos, self.frozen.crop)
        network = self.frozen.load(runtime, channels=3)
        self.colors.check(network)

        with runtime.recording() as tracker:
            tracker.resume(0)
            measured = self._measure(photos, all_photos, dataset, network)
            metrics: dict[str, float] = {}
            if runtime.is_main:
                metrics = self._draw(measured, network, tracker)
                tracker.artifact(write_protocol(runtime.folder, self._protocol(network, all_photos, dataset)))
                print(f"report  {runtime.folder / 'report.html'}", flush=True)
            tracker.log(1, 0, metrics)
            tracker.artifact(runtime.folder / "config.yaml")
            tracker.final(metrics | {EVALUATED_STEP: network.step, "step": 1}, 1)

    def _check(self) -> None:
        for option, least in LEAST.items():
            if getattr(self, option) < least:
                raise OptionError(f"task.{option}", f"{getattr(self, option)} is too small", f"use {least} or more")
        self.attention.check()
        self.matches.check()

    def _measure(self, photos: Sequence[Photo], all_photos: ImageSet, dataset: ImageSet, network: FrozenBackbone) -> _Measured:
        images = Subset(dataset, evenly_spaced(len(dataset), self.max_images))
        some = Subset(images, evenly_spaced(len(images), self.entropy_images))
        no_attention = _why_no_attention(network)
        entropy = None if no_attention else measure_entropy(some, network, batch_size=self.batch_size, workers=self.workers)
        pooled = network.features(images, batch_size=self.batch_size, workers=self.workers) if self.queries else None
        return _Measured(photos, all_photos, images, pooled, entropy, no_attention)

    def _draw(self, measured: _Measured, network: FrozenBackbone, tracker: Tracker) -> dict[str, float]:
        """All pictures and the page. Returns what they come to in numbers."""
        folder = network.runtime.folder
        attention, matches = [], []
        for photo in measured.photos:
            go_on(network, f"pictures of {photo.name}")
            if measured.no_attention is None:
                attention.append(self.attention.draw(photo, network, folder))
            matches.append(self.matches.draw_views(photo, measured.all_photos, network, folder))
        go_on(network, "region colours")
        colors, color_percent = self.colors.draw(measured.photos, network, folder)
        metrics = {"analyze/color_components_percent": color_percent} | _match_metrics(matches)
        if two := self.matches.two_photos():
            matches.insert(0, self.matches.draw_photos(two, network, folder))
        if measured.entropy is not None:
            metrics |= measured.entropy.metrics()
        sheet = None
        if measured.pooled is not None and len(measured.pooled.features) > 1:
            sheet = draw_neighbours(measured.images, measured.pooled, network, queries=self.queries, count=self.neighbours, folder=folder)
            if sheet.same_class is not None:
                metrics["analyze/neighbours_same_class_percent"] = sheet.same_class

        write_analysis_report(
            folder / "report.html",
            title=self.name,
            facts=_facts(network),
            notes=[f"{measured.no_attention}: maps and entropies of attention are left out."] if measured.no_attention else [],
            config=RunFolder(folder).config(),
            metrics=metrics,
            analysis=Analysis(
                asked=self.attention.asked(network) if attention else "",
                attention=[blocks for blocks, _ in attention],
                heads=[heads for _, heads in attention],
                entropy=None if measured.entropy is None else measured.entropy.draw(folder),
                entropy_lines=[] if measured.entropy is None else measured.entropy.lines(),
                entropy_of="" if measured.entropy is None else self._source(measured.entropy.images),
                colors=colors,
                matches=[match.picture for match in matches],
                neighbours=None if sheet is None else sheet.picture,
                neighbours_of="" if measured.pooled is None else self._source(len(measured.pooled.features)),
            ),
        )
        for path in [*sorted(folder.rglob("*.png")), *folder.glob("attention_entropy.csv"), folder / "report.html"]:
            tracker.artifact(path, "" if path.parent == folder else path.parent.name)
        return metrics

    def _source(self, count: int) -> str:
        return f"{count} photos" if self.dataset is None else f"{count} images of {self.dataset}"

    def _protocol(self, network: FrozenBackbone, photos: ImageSet, dataset: ImageSet) -> dict:
        return {
            "task": "analyze",
            "frozen": network.describe(),
            "photos": {"data": hash_of_images(photos), "most": self.max_photos},
            "dataset": {"data": hash_of_images(dataset), "most": self.max_images, "entropy_images": self.entropy_images},
            "attention": {"query": self.attention.query, "threshold": self.attention.threshold},
            "colors": {"sizes": self.colors.sizes_of(network), "foreground": self.colors.foreground},
            "matches": {
                "pairs": self.matches.pairs,
                "scale": self.matches.scale,
                "photometric": self.matches.photometric,
                "saved": self.matches.saved is not None,
                "seed": network.runtime.seed,
            },
            "neighbours": {"queries": self.queries, "count": self.neighbours},
        }


def _why_no_attention(network: FrozenBackbone) -> str | None:
    """What a backbone without attention says of itself; None for one that has attention."""
    side = network.options.crop
    try:
        with torch.no_grad():
            next(network.backbone.looks(torch.zeros(1, len(network.normalize.mean), side, side, device=network.runtime.device)))
    except NoAttention as reason:
        _, found, _ = reason.args
        return found
    return None


def _match_metrics(matches: Sequence[MatchedPhoto]) -> dict[str, float]:
    """Means over the photos; the percent of right pairs over all pairs whose place is in both views."""
    metrics = {
        "analyze/match_similarity": sum(match.similarity for match in matches) / len(matches),
        "analyze/match_mutual_percent": sum(match.mutual for match in matches) / len(matches),
    }
    if known := sum(match.known for match in matches):
        metrics["analyze/match_right_percent"] = 100 * sum(match.right for match in matches) / known
    return metrics


def _facts(network: FrozenBackbone) -> dict[str, str]:
    described, source = network.describe(), source_state(Path(__file__))
    weights = "untrained" if described["network"] == "untrained" else f"{described['network']} of step {network.step}"
    return {
        "weights": f"{weights} ({network.weights})",
        "images": f"{network.options.crop} × {network.options.crop} pixels",
        "commit": f"{source.commit[:10]}{' and changes' if source.dirty else ''}" if source else "not a git checkout",
        "made": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
    }
