"""Options of the backbone under evaluation, the same in every evaluation."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.schema.augmentations import Normalize


class Network(Enum):
    teacher = "teacher"
    student = "student"


class Evaluated(Enum):
    teacher = "teacher"
    student = "student"
    untrained = "untrained"


@dataclass
class Frozen:
    _target_: str = "esvit.evaluation.frozen.Frozen"
    network: Evaluated = Evaluated.teacher  # whose backbone: teacher or student of `checkpoint`; untrained needs no checkpoint
    resize: int = 256  # short side that images are resized to (pixels)
    crop: int = 224  # side of the centre crop (pixels)
    cache: str | None = "outputs/features"  # folder that keeps features, by weights, data and transform; null keeps none
    normalize: Normalize = field(default_factory=Normalize)
    backbone: Any = "${backbone}"
    checkpoint: str | None = "${checkpoint}"
    resize_positions: bool = "${resize_positions}"  # type: ignore[assignment]
