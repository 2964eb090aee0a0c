"""The multi-crop augmentation of DINO and EsViT: two large views of an image for teacher and student, small ones for the student.

Every random number comes from the generator handed in with the image, so equal generators give equal views.
Letters: C channels, h and w the sides of a crop in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from esvit.augmentations import photometric
from esvit.errors import OptionError

ASPECT_RATIOS = (3 / 4, 4 / 3)  # width to height of the area cut out
GLOBAL_COUNT = 2


@dataclass(frozen=True)
class CropPolicy:
    """How one of the views is made.

    size                  side in pixels
    scale                 smallest and largest share of the image's area that is cut out
    blur_probability, solarize_probability  in [0, 1]
    """

    size: int
    scale: tuple[float, float]
    blur_probability: float
    solarize_probability: float


class MultiCrop:
    """Two global crops and `local_crops_number` local ones of an image.

    global_crops_size, local_crops_size    sides in pixels
    global_crops_scale, local_crops_scale  [smallest, largest] share of the image's area
    jitter_probability                     that colours are jittered; the strengths `brightness` ... `gamma` are those of `color_jitter`
    grayscale_probability, flip_probability
    global_blur_probabilities, global_solarize_probabilities  one for each global crop
    local_blur_probability
    blur_radius                            [smallest, largest] standard deviation in pixels

    Published values (EsViT `DataAugmentationDINO`): 224, [0.4, 1.0], 8 of 96, [0.05, 0.4]; jitter 0.8 with 0.4, 0.4, 0.2, 0.1 and gamma 0;
    grayscale 0.2, flip 0.5, blur [1.0, 0.1] and 0.5 with radius [0.1, 2.0], solarize [0.0, 0.2].

    Raises OptionError for a value that cannot work.
    """

    global_count = GLOBAL_COUNT

    def __init__(
        self,
        *,
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
    ):
        for option, size in (("global_crops_size", global_crops_size), ("local_crops_size", local_crops_size)):
            if size < 1:
                raise OptionError(f"augmentation.{option}", f"{size} pixels", "use at least 1")
        if local_crops_number < 0:
            raise OptionError("augmentation.local_crops_number", f"{local_crops_number} crops", "use 0 or more")
        strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue, "gamma": gamma}
        for option, strength in strengths.items():
            if strength < 0 or (option == "hue" and strength > 0.5):
                raise OptionError(f"augmentation.{option}", f"strength {strength}", "use 0 to 0.5" if option == "hue" else "use 0 or more")
        radius = _pair("blur_radius", blur_radius)
        if not 0 <= radius[0] <= radius[1]:
            raise OptionError("augmentation.blur_radius", f"{list(radius)}", "give [smallest, largest] with 0 <= smallest <= largest")

        self._jitter_probability = _probability("jitter_probability", jitter_probability)
        self._grayscale_probability = _probability("grayscale_probability", grayscale_probability)
        self._flip_probability = _probability("flip_probability", flip_probability)
        self._strengths = strengths
        self._blur_radius = radius
        global_scale = _scale("global_crops_scale", global_crops_scale)
        blurs = _pair("global_blur_probabilities", global_blur_probabilities)
        solarizes = _pair("global_solarize_probabilities", global_solarize_probabilities)
        self.policies = [
            CropPolicy(
                size=global_crops_size,
                scale=global_scale,
                blur_probability=_probability("global_blur_probabilities", blur),
                solarize_probability=_probability("global_solarize_probabilities", solarize),
            )
            for blur, solarize in zip(blurs, solarizes, strict=True)
        ]
        local = CropPolicy(
            size=local_crops_size,
            scale=_scale("local_crops_scale", local_crops_scale),
            blur_probability=_probability("local_blur_probability", local_blur_probability),
            solarize_probability=0.0,
        )
        self.policies += [local] * local_crops_number

    @property
    def crop_sizes(self) -> list[int]:
        """Side of each view in pixels, global ones first."""
        return [policy.size for policy in self.policies]

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> list[Tensor]:
        """The views of an RGB image, global ones first: uint8 (C, h, w) each."""
        return [to_tensor(self._view(image, policy, rng)) for policy in self.policies]

    def _view(self, image: Image.Image, policy: CropPolicy, rng: np.random.Generator) -> Image.Image:
        view = image.crop(draw_box(image.size, policy.scale, rng)).resize((policy.size, policy.size), Image.Resampling.BICUBIC)
        if rng.random() < self._flip_probability:
            view = photometric.horizontal_flip(view)
        if rng.random() < self._jitter_probability:
            view = photometric.color_jitter(view, rng, **self._strengths)
        if rng.random() < self._grayscale_probability:
            view = photometric.grayscale(view)
        if rng.random() < policy.blur_probability:
            view = photometric.gaussian_blur(view, rng, radius=self._blur_radius)
        if rng.random() < policy.solarize_probability:
            view = photometric.solarize(view)
        return view


def draw_box(size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int, int]:
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


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 (C, h, w)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _pair(option: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2:
        raise OptionError(f"augmentation.{option}", f"{len(values)} values", "give two, as in [0.1, 1.0]")
    return float(values[0]), float(values[1])


def _scale(option: str, values: Sequence[float]) -> tuple[float, float]:
    smallest, largest = _pair(option, values)
    if not 0 < smallest <= largest <= 1:
        remedy = "give [smallest, largest] with 0 < smallest <= largest <= 1"
        raise OptionError(f"augmentation.{option}", f"[{smallest:g}, {largest:g}]", remedy)
    return smallest, largest


def _probability(option: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise OptionError(f"augmentation.{option}", f"probability {value}", "use a number from 0 to 1")
    return value
