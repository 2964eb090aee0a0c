"""Options of the evaluations of region features: correspondence between views, and segmentation."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.schema.tasks.frozen import Frozen


class Views(Enum):
    flip = "flip"
    crops = "crops"
    stereo = "stereo"


@dataclass
class Correspondence:
    _target_: str = "esvit.tasks.correspondence.Correspondence"
    has_run_folder: bool = True
    views: Views = Views.flip  # flip (published: an image and its mirror image), crops (two areas of it) or stereo (photos with disparity)
    pairs: int = 10  # so many most similar pairs of an image count as its best ones
    photometric: bool = True  # flip and crops: jitter the second view's colours and make it grey, as published
    crops_scale: list[float] = field(default_factory=lambda: [0.4, 1.0])  # crops: share of the image's area, from and to
    max_images: int | None = None  # at most so many images, evenly spaced; null means all
    pictures: int = 6  # images whose best pairs are drawn; 0 draws nothing
    frozen: Frozen = field(default_factory=Frozen)
    data: Any = "${data}"


@dataclass
class Segmentation:
    _target_: str = "esvit.tasks.segmentation.Segmentation"
    has_run_folder: bool = True
    masks: str | None = None  # folder of the training images' masks (PNG), or of two such folders, train and val
    val_masks: str | None = None  # folder of the validation images' masks; null means that `masks` has train and val
    classes: int | None = None  # how many classes there are; null means as many as mask_values or class_names
    class_names: list[str] | None = None  # what to call them; null means 0, 1, ...
    mask_values: list[int] | None = None  # number that stands for each class in a mask, e.g. [0,255]; null means 0, 1, ...
    ignore: int | None = None  # number of the pixels that count nowhere, often 255; null means that all pixels count
    train_regions: int = 50000  # at most so many regions of training images are learned from, drawn by the seed
    neighbours: int = 20  # k of the k-NN classifier
    temperature: float = 0.07  # of the neighbours' votes
    penalty: float = 1e-4  # of the linear classifier's squared weights
    iterations: int = 1000  # at most so many steps of L-BFGS; fewer if it converges
    pictures: int = 8  # validation images whose masks are drawn; 0 draws nothing
    frozen: Frozen = field(default_factory=Frozen)
    data: Any = "${data}"


SCHEMAS = {
    ("task", "correspondence"): Correspondence,
    ("task", "segmentation"): Segmentation,
}
