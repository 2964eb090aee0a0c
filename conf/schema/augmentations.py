"""Options of what is done to images."""

from dataclasses import dataclass, field
from enum import Enum


class Engine(Enum):
    reference = "reference"
    fast = "fast"
    device = "device"


class Fill(Enum):
    pixel = "pixel"
    color = "color"
    mean = "mean"


@dataclass
class RandAugment:
    _target_: str = "esvit.augmentations.randaugment.RandAugment"
    layers: int = 0  # operations drawn for a crop; 0 means none, 2 is the published value
    magnitude: float = 9.0  # 0 to 10
    magnitude_std: float = 0.5  # standard deviation of the magnitude of a single operation
    probability: float = 0.5  # that an operation that was drawn is carried out


@dataclass
class RandomErasing:
    _target_: str = "esvit.augmentations.erasing.RandomErasing"
    probability: float = 0.0  # that boxes of a crop are filled; 0 means never, 0.25 is the published value
    scale: list[float] = field(default_factory=lambda: [0.02, 0.3333])  # share of the crop's area, from and to
    ratio: float = 0.3  # smallest height to width of a box; the largest is its inverse
    fill: Fill = Fill.pixel  # pixel (noise), color (one random colour) or mean (ImageNet's mean colour)
    count: int = 1  # boxes in a crop


@dataclass
class MultiCrop:
    _target_: str = "esvit.augmentations.multicrop.MultiCrop"
    engine: Engine = Engine.reference  # reference (Pillow), fast, or device (colours, blur and solarize on the GPU)
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
    randaugment: RandAugment = field(default_factory=RandAugment)
    erasing: RandomErasing = field(default_factory=RandomErasing)


@dataclass
class CropGroup:
    _target_: str = "esvit.augmentations.multicrop.CropGroup"
    count: int = 1  # crops of this kind
    is_global: bool = False  # whether the teacher sees them
    size: int = 96  # side (pixels)
    scale: list[float] = field(default_factory=lambda: [0.05, 0.4])  # share of the image's area, from and to
    flip_probability: float = 0.5
    jitter_probability: float = 0.8  # of changing colours by the five strengths below
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gamma: float = 0.0
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_radius: list[float] = field(default_factory=lambda: [0.1, 2.0])  # standard deviation (pixels), from and to
    solarize_probability: float = 0.0


def _published_groups() -> list[CropGroup]:
    """Those of MultiCrop."""
    return [
        CropGroup(is_global=True, size=224, scale=[0.4, 1.0], blur_probability=1.0),
        CropGroup(is_global=True, size=224, scale=[0.4, 1.0], blur_probability=0.1, solarize_probability=0.2),
        CropGroup(count=8),
    ]


@dataclass
class CustomMultiCrop:
    _target_: str = "esvit.augmentations.multicrop.CustomMultiCrop"
    engine: Engine = Engine.reference  # reference (Pillow), fast, or device (colours, blur and solarize on the GPU)
    crops: list[CropGroup] = field(default_factory=_published_groups)  # groups of crops that are drawn alike
    randaugment: RandAugment = field(default_factory=RandAugment)  # of all crops
    erasing: RandomErasing = field(default_factory=RandomErasing)  # of all crops


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
    randaugment: RandAugment = field(default_factory=RandAugment)
    erasing: RandomErasing = field(default_factory=RandomErasing)


class MixingMode(Enum):
    batch = "batch"
    pair = "pair"
    elem = "elem"


@dataclass
class Mixing:
    _target_: str = "esvit.augmentations.mixing.Mixing"
    mixup_alpha: float = 0.8  # 0 turns mixup off
    cutmix_alpha: float = 1.0  # 0 turns CutMix off
    cutmix_minmax: list[float] | None = None  # sides of CutMix's boxes as shares of the crop's, from and to, in place of cutmix_alpha
    probability: float = 0.0  # that a batch is mixed at all; 0 means no mixing, 1 is the published value
    switch_probability: float = 0.5  # that it is CutMix where both are on
    mode: MixingMode = MixingMode.batch  # one draw per batch, per pair or per image (elem)
    crops: int = 10  # the first so many crops are mixed


SCHEMAS = {("augmentation", "multicrop"): MultiCrop, ("augmentation", "custom_multicrop"): CustomMultiCrop}
