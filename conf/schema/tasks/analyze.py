"""Options of the analysis: pictures and a report of what a backbone has learned."""

from dataclasses import dataclass, field
from typing import Any

from conf.schema.tasks.frozen import Frozen


@dataclass
class AttentionMaps:
    _target_: str = "esvit.tasks.analyze_parts.AttentionMaps"
    query: list[float] | None = None  # [row, column] that is asked where it looks, as shares of the image; null asks the pooled feature
    threshold: float = 0.6  # share of the attention that the lit cells of a mask hold


@dataclass
class RegionColors:
    _target_: str = "esvit.tasks.analyze_parts.RegionColors"
    sizes: list[int] | None = None  # sides of the images (pixels), larger ones give finer maps; null means frozen.crop and twice that
    foreground: bool = False  # colour the foreground only, told from the background by the first principal component


@dataclass
class RegionMatches:
    _target_: str = "esvit.tasks.analyze_parts.RegionMatches"
    pairs: int = 10  # most similar pairs of regions that are drawn for each photo
    photos: list[str] | None = None  # two photos whose regions are matched with each other too, [one.jpg,two.jpg]
    scale: list[float] = field(default_factory=lambda: [0.4, 1.0])  # share of the photo's area that a view shows, from and to
    photometric: bool = True  # jitter the colours of the second view and make it grey
    saved: str | None = None  # folder with the views of an earlier analysis (its views/), taken instead of new ones


@dataclass
class Analyze:
    _target_: str = "esvit.tasks.analyze.Analyze"
    has_run_folder: bool = True
    images: Any = None  # photos for the pictures: a folder, or a list of files; null means the photos that come with the package
    max_photos: int = 6  # at most so many of them are drawn, evenly spaced
    dataset: str | None = (
        None  # folder of images (one sub-folder per class, or unlabelled) for entropy and neighbours; null means the photos
    )
    max_images: int = 2000  # at most so many images of the dataset, evenly spaced, are candidates for neighbours
    entropy_images: int = 64  # at most so many of these, evenly spaced, are measured for attention entropy
    queries: int = 8  # images whose nearest neighbours are shown, evenly spaced in the dataset; 0 leaves neighbours out
    neighbours: int = 8  # shown for each of them
    batch_size: int = 32  # images of the dataset per process in one forward pass
    workers: int = 2  # loading processes per process; 0 loads in the process itself
    frozen: Frozen = field(default_factory=Frozen)
    attention: AttentionMaps = field(default_factory=AttentionMaps)
    colors: RegionColors = field(default_factory=RegionColors)
    matches: RegionMatches = field(default_factory=RegionMatches)
    name: str = "${name}"


SCHEMAS = {
    ("task", "analyze"): Analyze,
}
