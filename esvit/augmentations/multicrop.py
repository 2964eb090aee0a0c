"""Multi-crop augmentation: a few large views of an image for teacher and student, small ones for the student alone.

A view is first drawn, then made: `draw` uses the generator and the image's size, `apply` uses pixels. Every random number comes from the
generator handed in, so equal generators give equal views, whichever engine makes them.
Letters: C channels, h and w the sides of a crop in pixels, V crops.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esvit.augmentations.engines import ENGINES, EngineName, make_engine, size_of
from esvit.augmentations.erasing import RandomErasing
from esvit.augmentations.parameters import Box, ViewParameters
from esvit.augmentations.photometric import draw_color_changes
from esvit.augmentations.randaugment import RandAugment
from esvit.errors import OptionError

ASPECT_RATIOS = (3 / 4, 4 / 3)  # width to height of the area cut out
GLOBAL_COUNT = 2


@dataclass(frozen=True, kw_only=True)
class CropPolicy:
    """How one of the views is drawn.

    size                  side in pixels
    scale                 smallest and largest share of the image's area that is cut out
    strengths             those of `draw_color_changes`
    blur_radius           smallest and largest standard deviation in pixels
    ..._probability       in [0, 1]
    """

    size: int
    scale: tuple[float, float]
    flip_probability: float
    jitter_probability: float
    strengths: dict[str, float]
    grayscale_probability: float
    blur_probability: float
    blur_radius: tuple[float, float]
    solarize_probability: float
    randaugment: RandAugment
    erasing: RandomErasing

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> ViewParameters:
        """Parameters of a view of an image of (width, height). The order of the draws is part of what a seed means: leave it."""
        return ViewParameters(
            size=self.size,
            box=draw_box(size, self.scale, rng),
            flip=rng.random() < self.flip_probability,
            operations=self.randaugment.draw(rng) if self.randaugment.layers else (),
            changes=draw_color_changes(rng, **self.strengths) if rng.random() < self.jitter_probability else (),
            grayscale=rng.random() < self.grayscale_probability,
            blur_radius=rng.uniform(*self.blur_radius) if rng.random() < self.blur_probability else None,
            solarize=rng.random() < self.solarize_probability,
            erased=self.erasing.draw(self.size, rng) if self.erasing.probability else (),
        )


class Augmentation(ABC):
    """Views of an image by one policy each, made by one of the engines.

    policies      global ones first, equal sizes adjacent
    global_count  how many of the views are global, i.e. seen by the teacher
    engine        "reference" (Pillow), "fast", or "device" (what follows crop, resize and flip is left to the device)
    """

    def __init__(self, *, policies: list[CropPolicy], global_count: int, engine: EngineName):
        if engine not in ENGINES:
            raise OptionError("augmentation.engine", f"'{engine}'", f"use one of {', '.join(ENGINES)}")
        if engine == "device" and any(policy.erasing.probability for policy in policies):
            found = "erases boxes, which comes after the changes of colour that the device engine leaves to the device"
            raise OptionError("augmentation.erasing.probability", found, "use augmentation.engine=fast")
        self.policies = policies
        self.global_count = global_count
        self.engine = engine
        self._engine = make_engine(engine, crops={(policy.size, policy.scale[0]) for policy in policies})
        self.decode = self._engine.decode  # what an image set is to make of a file for this engine; None: an RGB image of Pillow

    @property
    def crop_sizes(self) -> list[int]:
        """Side of each view in pixels, global ones first."""
        return [policy.size for policy in self.policies]

    @abstractmethod
    def option_of(self, size: int) -> str:
        """The option that asks for crops of this size, for errors."""

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> list[ViewParameters]:
        """Parameters of all views of an image of (width, height), global ones first."""
        return [policy.draw(size, rng) for policy in self.policies]

    def apply(self, image: Any, parameters: list[ViewParameters]) -> list[Tensor]:
        """The finished views: uint8 (C, h, w) each, uint16 of a 16-bit image.

        image  an RGB image of Pillow, what `decode` makes of a file, or an array (h, w, C)
        """
        return self._engine.finished(image, parameters)

    def __call__(self, image: Any, rng: np.random.Generator) -> list[Tensor]:
        """The views of an image, as `apply` takes it, global ones first: uint8 (C, h, w) each.

        With the device engine, cut and mirrored alone, and followed by one vector for each that tells the device the rest.
        """
        parameters = self.draw(size_of(image), rng)
        return self._engine.views(image, parameters) + self._engine.left_over(image, parameters)


class MultiCrop(Augmentation):
    """Two global crops and `local_crops_number` local ones of an image.

    global_crops_size, local_crops_size    sides in pixels
    global_crops_scale, local_crops_scale  [smallest, largest] share of the image's area
    jitter_probability                     that colours are changed; the strengths are those of `draw_color_changes`
    grayscale_probability, flip_probability
    global_blur_probabilities, global_solarize_probabilities  one for each global crop
    local_blur_probability
    blur_radius                            [smallest, largest] standard deviation in pixels
    randaugment, erasing                   of all crops
    engine                                 what makes the views

    Published values (EsViT `DataAugmentationDINO`): 224, [0.4, 1.0], 8 of 96, [0.05, 0.4]; jitter 0.8 with 0.4, 0.4, 0.2, 0.1 and gamma 0;
    grayscale 0.2, flip 0.5, blur [1.0, 0.1] and 0.5 with radius [0.1, 2.0], solarize [0.0, 0.2].

    Raises OptionError for a value that cannot work.
    """

    def __init__(
        self,
        *,
        engine: EngineName,
        global_crops_size: int,
        global_crops_scale: Sequence[float],
        local_crops_number: int,
        local_crops_size: int,
        local_crops_scale: Sequence[float],
        jitter_probability: float,
        brightness: float,
        contrast: float,
        saturation: float,
        hue: float,
        gamma: float,
        grayscale_probability: float,
        global_blur_probabilities: Sequence[float],
        global_solarize_probabilities: Sequence[float],
        local_blur_probability: float,
        blur_radius: Sequence[float],
        flip_probability: float,
        randaugment: RandAugment,
        erasing: RandomErasing,
    ):
        if local_crops_number < 0:
            raise OptionError("augmentation.local_crops_number", f"{local_crops_number} crops", "use 0 or more")
        shared: dict[str, Any] = {
            "flip_probability": _probability("augmentation.flip_probability", flip_probability),
            "jitter_probability": _probability("augmentation.jitter_probability", jitter_probability),
            "strengths": _strengths("augmentation", brightness, contrast, saturation, hue, gamma),
            "grayscale_probability": _probability("augmentation.grayscale_probability", grayscale_probability),
            "blur_radius": _radius("augmentation.blur_radius", blur_radius),
            "randaugment": randaugment,
            "erasing": erasing,
        }
        randaugment.check("augmentation.randaugment")
        erasing.check("augmentation.erasing")
        global_size = _size("augmentation.global_crops_size", global_crops_size)
        global_scale = _scale("augmentation.global_crops_scale", global_crops_scale)
        blurs = _pair("augmentation.global_blur_probabilities", global_blur_probabilities)
        solarizes = _pair("augmentation.global_solarize_probabilities", global_solarize_probabilities)
        policies = [
            CropPolicy(
                size=global_size,
                scale=global_scale,
                blur_probability=_probability("augmentation.global_blur_probabilities", blur),
                solarize_probability=_probability("augmentation.global_solarize_probabilities", solarize),
                **shared,
            )
            for blur, solarize in zip(blurs, solarizes, strict=True)
        ]
        local = CropPolicy(
            size=_size("augmentation.local_crops_size", local_crops_size),
            scale=_scale("augmentation.local_crops_scale", local_crops_scale),
            blur_probability=_probability("augmentation.local_blur_probability", local_blur_probability),
            solarize_probability=0.0,
            **shared,
        )
        super().__init__(policies=policies + [local] * local_crops_number, global_count=GLOBAL_COUNT, engine=engine)

    def option_of(self, size: int) -> str:
        return f"augmentation.{'global' if size == self.policies[0].size else 'local'}_crops_size"


@dataclass(frozen=True, kw_only=True)
class CropGroup:
    """Some crops that are drawn alike, of `CustomMultiCrop`; the options are those of `MultiCrop`, for this group.

    count      crops
    is_global  whether the teacher sees them
    """

    count: int
    is_global: bool
    size: int
    scale: Sequence[float]
    flip_probability: float
    jitter_probability: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    gamma: float
    grayscale_probability: float
    blur_probability: float
    blur_radius: Sequence[float]
    solarize_probability: float

    def policy(self, option: str, randaugment: RandAugment, erasing: RandomErasing) -> CropPolicy:
        """Raises OptionError, naming what is under `option`, for a value that cannot work."""
        if self.count < 1:
            raise OptionError(f"{option}.count", f"{self.count} crops", "use at least 1, or leave the group out")
        return CropPolicy(
            size=_size(f"{option}.size", self.size),
            scale=_scale(f"{option}.scale", self.scale),
            flip_probability=_probability(f"{option}.flip_probability", self.flip_probability),
            jitter_probability=_probability(f"{option}.jitter_probability", self.jitter_probability),
            strengths=_strengths(option, self.brightness, self.contrast, self.saturation, self.hue, self.gamma),
            grayscale_probability=_probability(f"{option}.grayscale_probability", self.grayscale_probability),
            blur_probability=_probability(f"{option}.blur_probability", self.blur_probability),
            blur_radius=_radius(f"{option}.blur_radius", self.blur_radius),
            solarize_probability=_probability(f"{option}.solarize_probability", self.solarize_probability),
            randaugment=randaugment,
            erasing=erasing,
        )


class CustomMultiCrop(Augmentation):
    """Any number of global and local crops of any sizes, described group by group.

    Views come out global ones first, and equal sizes side by side, whatever the order of the groups. Global crops share one size.

    Raises OptionError for a value that cannot work.
    """

    def __init__(self, *, engine: EngineName, crops: Sequence[CropGroup], randaugment: RandAugment, erasing: RandomErasing):
        randaugment.check("augmentation.randaugment")
        erasing.check("augmentation.erasing")
        policies = [group.policy(f"augmentation.crops[{place}]", randaugment, erasing) for place, group in enumerate(crops)]
        sizes = [group.size for group in sorted(crops, key=lambda group: not group.is_global)]
        order = sorted(range(len(crops)), key=lambda place: (not crops[place].is_global, sizes.index(crops[place].size)))
        global_sizes = {group.size for group in crops if group.is_global}
        if not global_sizes:
            raise OptionError("augmentation.crops", "no group is global, so the teacher sees nothing", "give one of them is_global:true")
        if len(global_sizes) > 1:
            raise OptionError("augmentation.crops", f"global crops of {sorted(global_sizes)} pixels", "give all global crops one size")
        super().__init__(
            policies=[policies[place] for place in order for _ in range(crops[place].count)],
            global_count=sum(group.count for group in crops if group.is_global),
            engine=engine,
        )

    def option_of(self, size: int) -> str:
        return "augmentation.crops"


def draw_box(size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """A random area of an image of (width, height): left, top, right, bottom.

    torchvision's rule for RandomResizedCrop: the share of the area uniform in `scale`, the aspect ratio log-uniform in 3/4 to 4/3;
    after ten boxes that do not fit, the largest central one whose ratio is within the limits.
    """
    width, height = size
    smallest, largest = ASPECT_RATIOS
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w, endpoint=True)), int(rng.integers(0, height - h, endpoint=True))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * largest)))
    h = min(height, max(1, round(width / smallest)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def to_tensor(image: Any) -> Tensor:
    """uint8 (C, h, w) of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _size(option: str, size: int) -> int:
    if size < 1:
        raise OptionError(option, f"{size} pixels", "use at least 1")
    return size


def _strengths(option: str, brightness: float, contrast: float, saturation: float, hue: float, gamma: float) -> dict[str, float]:
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue, "gamma": gamma}
    for name, strength in strengths.items():
        if strength < 0 or (name == "hue" and strength > 0.5):
            raise OptionError(f"{option}.{name}", f"strength {strength}", "use 0 to 0.5" if name == "hue" else "use 0 or more")
    return strengths


def _pair(option: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2:
        raise OptionError(option, f"{len(values)} values", "give two, as in [0.1, 1.0]")
    return float(values[0]), float(values[1])


def _radius(option: str, values: Sequence[float]) -> tuple[float, float]:
    smallest, largest = _pair(option, values)
    if not 0 <= smallest <= largest:
        raise OptionError(option, f"[{smallest:g}, {largest:g}]", "give [smallest, largest] with 0 <= smallest <= largest")
    return smallest, largest


def _scale(option: str, values: Sequence[float]) -> tuple[float, float]:
    smallest, largest = _pair(option, values)
    if not 0 < smallest <= largest <= 1:
        raise OptionError(option, f"[{smallest:g}, {largest:g}]", "give [smallest, largest] with 0 < smallest <= largest <= 1")
    return smallest, largest


def _probability(option: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise OptionError(option, f"probability {value}", "use a number from 0 to 1")
    return value
