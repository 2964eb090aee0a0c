"""Options of optimizers and schedules."""

from dataclasses import dataclass, field
from enum import Enum

Clip = Enum("Clip", {"parameter": "parameter", "global": "global", "none": "none"})  # `global` is a keyword of Python


@dataclass
class AdamW:
    _target_: str = "esvit.optimizers.AdamW"
    learning_rate: float = 0.0005  # peak at 256 images per step; scaled with the number of images
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of the two moments
    eps: float = 1e-8
    clip: Clip = Clip.parameter  # parameter (each gradient by itself, as in the paper's code), global or none
    clip_norm: float = 3.0  # largest L2 norm


@dataclass
class SGD:
    _target_: str = "esvit.optimizers.SGD"
    learning_rate: float = 0.03  # peak at 256 images per step; scaled with the number of images
    momentum: float = 0.9
    clip: Clip = Clip.parameter  # parameter (each gradient by itself, as in the paper's code), global or none
    clip_norm: float = 3.0  # largest L2 norm


@dataclass
class LARS:
    _target_: str = "esvit.optimizers.LARS"
    learning_rate: float = 0.3  # peak at 256 images per step; scaled with the number of images
    momentum: float = 0.9
    eta: float = 0.001  # trust coefficient
    clip: Clip = Clip.parameter  # parameter (each gradient by itself, as in the paper's code), global or none
    clip_norm: float = 3.0  # largest L2 norm


@dataclass
class Cosine:
    _target_: str = "esvit.schedules.Schedules"
    _partial_: bool = True
    warmup_epochs: int = 10  # of the learning rate, linear
    warmup_learning_rate: float = 0.0  # where the warm-up begins
    final_learning_rate: float = 1e-6  # where the cosine ends; not scaled with the number of images
    weight_decay_start: float = 0.04
    weight_decay_end: float = 0.4
    teacher_momentum_start: float = 0.996  # of the teacher's moving average, cosine
    teacher_momentum_end: float = 1.0
    teacher_temperature_start: float = 0.04  # linear over the temperature's warm-up
    teacher_temperature_end: float = 0.04  # 0.07 in the published recipes
    teacher_temperature_warmup_epochs: int = 0  # 30 in the published recipes
    freeze_last_layer_epochs: int = 1  # epochs in which the prototypes stay as they are


SCHEMAS = {
    ("optimizer", "adamw"): AdamW,
    ("optimizer", "sgd"): SGD,
    ("optimizer", "lars"): LARS,
    ("schedule", "cosine"): Cosine,
}
