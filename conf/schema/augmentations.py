"""Options of what is done to images."""

from dataclasses import dataclass, field
from enum import Enum


@dataclass
class MultiCrop:
    _target_: str = "esvit.augmentations.multicrop.MultiCrop"
    global_crops_size: int = 224  # side (pixels)
    global_crops_scale: list[float] = field(default_factory=lambda: [0.4, 1.0])  # share of the image's area, from and to
    local_crops_number: int = 8
    local_crops_size: int = 96  # side (pixels)
    local_crops_scale: list[float] = field(default_factory=lambda: [0.05, 0.4])  # share of the image's area, from and to
    jitter_probability: float = 0.8  # of changing colours by the five strengths below
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gamma: float = 0.0
    grayscale_probability: float = 0.2
    global_blur_probabilities: list[float] = field(default_factory=lambda: [1.0, 0.1])  # one per global crop
    global_solarize_probabilities: list[float] = field(default_factory=lambda: [0.0, 0.2])  # one per global crop
    local_blur_probability: float = 0.5
    blur_radius: list[float] = field(default_factory=lambda: [0.1, 2.0])  # standard deviation (pixels), from and to
    flip_probability: float = 0.5


@dataclass
class Normalize:
    _target_: str = "esvit.augmentations.evaluation.Normalize"
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # per channel, of values from 0 to 1
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])


class Interpolation(Enum):
    bilinear = "bilinear"
    bicubic = "bicubic"


@dataclass
class TrainingCrop:
    _target_: str = "esvit.augmentations.supervised.RandomResizedCropFlip"
    size: int = 224  # side (pixels)
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # share of the image's area, from and to
    interpolation: Interpolation = Interpolation.bilinear  # bilinear or bicubic
    flip_probability: float = 0.5
    color_jitter: float = 0.0  # strength of changes of brightness, contrast and saturation; 0 means none


class MixingMode(Enum):
    batch = "batch"
    pair = "pair"
    elem = "elem"


@dataclass
class Mixing:
    _target_: str = "esvit.augmentations.mixing.Mixing"
    mixup_alpha: float = 0.8  # 0 turns mixup off
    cutmix_alpha: float = 1.0  # 0 turns CutMix off
    probability: float = 0.0  # that a batch is mixed at all; 0 means no mixing, 1 is the published value
    switch_probability: float = 0.5  # that it is CutMix where both are on
    mode: MixingMode = MixingMode.batch  # one draw per batch, per pair or per image (elem)
    crops: int = 10  # the first so many crops are mixed


SCHEMAS = {("augmentation", "multicrop"): MultiCrop}
