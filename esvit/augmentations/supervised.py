"""The crop of labelled training images, for a linear probe and for fine-tuning: one view per image.

Every random number comes from the generator handed in with the image, so equal generators give equal crops.
Letters: C channels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from esvit.augmentations import arrays, photometric, reference
from esvit.augmentations.engines import size_of
from esvit.augmentations.erasing import RandomErasing
from esvit.augmentations.multicrop import draw_box
from esvit.augmentations.parameters import ViewParameters
from esvit.augmentations.randaugment import RandAugment
from esvit.errors import OptionError

OPTION = "task.training_crop"
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class RandomResizedCropFlip:
    """A random area of the image, resized to a square, mirrored now and then, and its colours changed where that is asked for.

    size              side of the crop in pixels
    scale             [smallest, largest] share of the image's area that is cut out
    interpolation     "bilinear" or "bicubic"
    flip_probability  in [0, 1]
    color_jitter      strength of changes of brightness, contrast and saturation, in random order; 0 leaves colours alone
    randaugment       operations before that
    erasing           boxes that are filled after that

    Published: 224, [0.08, 1.0] and a flip in half the cases; bilinear for the linear probe of DINO and EsViT, bicubic with a jitter
    of 0 to 0.4 for the fine-tuning of DeiT and Swin, which in place of the jitter take RandAugment of two operations, and erase a box in a
    quarter of the crops.

    Raises OptionError for a value that cannot work.
    """

    global_count = 1
    decode = None

    def __init__(
        self,
        *,
        size: int,
        scale: Sequence[float],
        interpolation: Literal["bilinear", "bicubic"],
        flip_probability: float,
        color_jitter: float,
        randaugment: RandAugment,
        erasing: RandomErasing,
    ):
        if size < 1:
            raise OptionError(f"{OPTION}.size", f"{size} pixels", "use at least 1")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise OptionError(f"{OPTION}.scale", f"{list(scale)}", "give [smallest, largest] with 0 < smallest <= largest <= 1")
        if interpolation not in FILTERS:
            raise OptionError(f"{OPTION}.interpolation", f"'{interpolation}'", f"use {' or '.join(FILTERS)}")
        if not 0 <= flip_probability <= 1:
            raise OptionError(f"{OPTION}.flip_probability", f"probability {flip_probability}", "use a number from 0 to 1")
        if color_jitter < 0:
            raise OptionError(f"{OPTION}.color_jitter", f"strength {color_jitter}", "use 0 (off) or more")
        self.size = size
        self.scale = (float(scale[0]), float(scale[1]))
        self.interpolation = interpolation
        self.flip_probability = flip_probability
        self.color_jitter = color_jitter
        self._strengths = {"brightness": color_jitter, "contrast": color_jitter, "saturation": color_jitter, "hue": 0.0, "gamma": 0.0}
        randaugment.check(f"{OPTION}.randaugment")
        erasing.check(f"{OPTION}.erasing")
        self.randaugment = randaugment
        self.erasing = erasing

    def __call__(self, image: Any, rng: np.random.Generator) -> list[Tensor]:
        """The one crop of an RGB image, [uint8 (C, size, size)]; or of an array (h, w, C), in its own depth, see arrays.py."""
        drawn = ViewParameters(
            size=self.size,
            box=draw_box(size_of(image), self.scale, rng),
            flip=rng.random() < self.flip_probability,
            operations=self.randaugment.draw(rng) if self.randaugment.layers else (),
            changes=photometric.draw_color_changes(rng, **self._strengths) if self.color_jitter else (),
            erased=self.erasing.draw(self.size, rng) if self.erasing.probability else (),
        )
        if isinstance(image, np.ndarray):
            return [arrays.view(image, drawn, filter=self.interpolation)]
        return [reference.view(image, drawn, filter=FILTERS[self.interpolation])]

    def describe(self) -> dict:
        """What a protocol has to say of it; of what is off, nothing."""
        described = {
            "size": self.size,
            "scale": list(self.scale),
            "interpolation": self.interpolation,
            "flip_probability": self.flip_probability,
            "color_jitter": self.color_jitter,
        }
        if self.randaugment.layers:
            described["randaugment"] = dataclasses.asdict(self.randaugment)
        if self.erasing.probability:
            described["erasing"] = dataclasses.asdict(self.erasing) | {"scale": list(self.erasing.scale)}
        return described
