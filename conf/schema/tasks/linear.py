"""Options of the linear evaluation."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.schema.augmentations import TrainingCrop
from conf.schema.tasks.frozen import Frozen


class LinearFeatures(Enum):
    augmented = "augmented"
    cached = "cached"


class Pooling(Enum):
    pooled = "pooled"
    pooled_and_regions = "pooled_and_regions"


def _crop_as_evaluated() -> TrainingCrop:
    return TrainingCrop(size="${task.frozen.crop}")  # type: ignore[arg-type]


@dataclass
class Linear:
    _target_: str = "esvit.tasks.linear.Linear"
    has_run_folder: bool = True
    features: LinearFeatures = LinearFeatures.augmented  # augmented (random crops through the backbone in every epoch) or cached (once)
    learning_rates: list[float] = field(  # for 256 images a step, at the first epoch; several are trained side by side
        default_factory=lambda: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    )
    blocks: list[int] = field(default_factory=lambda: [1, 4])  # how many of the last blocks a probe reads; several: side by side
    pooling: list[Pooling] = field(default_factory=lambda: [Pooling.pooled])  # pooled, or pooled_and_regions (their mean besides)
    held_out: float = 0.1  # share of each class's training images that the best of several probes is chosen on
    label_fraction: float = 1.0  # share of each class's training images that are used at all
    training_crop: TrainingCrop = field(default_factory=_crop_as_evaluated)
    frozen: Frozen = field(default_factory=Frozen)
    data: Any = "${data}"
    epochs: int = "${epochs}"  # type: ignore[assignment]


SCHEMAS = {
    ("task", "linear"): Linear,
}
