"""Random erasing (Zhong et al. 2020) of finished views, with boxes and fillings by the rule of timm, which DeiT and Swin were trained with.

timm fills normalised images with standard normal noise. Views are bytes here until they reach the device, so the noise is made with the
mean and standard deviation of ImageNet and cut to 0..255; of images that are not RGB, with 0.45 and 0.225 of the range in every channel.

Letters: C channels, h and w the sides of a view in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esvit.augmentations.parameters import ErasedBox
from esvit.errors import OptionError

FILLS = ("pixel", "color", "mean")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
OTHER_MEAN, OTHER_STD = 0.45, 0.225  # their means
TRIES = 10  # until a box fits


@dataclass(frozen=True, kw_only=True)
class RandomErasing:
    """Fills boxes of a view.

    probability  that a view is erased at all; 0 turns it off
    scale        [smallest, largest] share of the view's area, for all boxes of a view together
    ratio        smallest height to width; the largest is its inverse
    fill         "pixel" (noise), "color" (one random colour) or "mean" (ImageNet's mean colour)
    count        boxes in a view
    """

    probability: float
    scale: Sequence[float]
    ratio: float
    fill: str
    count: int

    def check(self, option: str) -> None:
        """Raises OptionError, naming what is under `option`, for a value that cannot work."""
        if not 0 <= self.probability <= 1:
            raise OptionError(f"{option}.probability", f"{self.probability:g}", "use a number from 0 to 1")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise OptionError(f"{option}.scale", f"{list(self.scale)}", "give [smallest, largest] with 0 < smallest <= largest <= 1")
        if not 0 < self.ratio <= 1:
            raise OptionError(f"{option}.ratio", f"{self.ratio:g}", "use a number above 0, at most 1")
        if self.fill not in FILLS:
            raise OptionError(f"{option}.fill", f"'{self.fill}'", f"use one of {', '.join(FILLS)}")
        if self.count < 1:
            raise OptionError(f"{option}.count", f"{self.count}", "use at least 1")

    def draw(self, size: int, rng: np.random.Generator) -> tuple[ErasedBox, ...]:
        """Boxes in a view of `size` x `size` pixels; those that do not fit are left out."""
        if rng.random() >= self.probability:
            return ()
        boxes = []
        for _ in range(self.count):
            for _ in range(TRIES):
                area = size * size * rng.uniform(self.scale[0], self.scale[1]) / self.count
                ratio = math.exp(rng.uniform(math.log(self.ratio), -math.log(self.ratio)))
                h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if 0 < h < size and 0 < w < size:
                    top, left = int(rng.integers(size - h, endpoint=True)), int(rng.integers(size - w, endpoint=True))
                    boxes.append(ErasedBox((left, top, left + w, top + h), self.fill, int(rng.integers(2**32))))
                    break
        return tuple(boxes)


def erase(view: np.ndarray, boxes: tuple[ErasedBox, ...]) -> None:
    """Fill the boxes of a view (C, h, w), uint8 or uint16, in place."""
    channels, white = len(view), np.iinfo(view.dtype).max
    mean, std = (MEAN, STD) if channels == 3 else (np.full(channels, OTHER_MEAN), np.full(channels, OTHER_STD))
    for (left, top, right, bottom), fill, seed in boxes:
        shape = {"pixel": (channels, bottom - top, right - left), "color": (channels, 1, 1), "mean": None}[fill]
        noise = 0.0 if shape is None else np.random.default_rng(seed).standard_normal(shape)
        values = mean[:, None, None] + std[:, None, None] * noise
        view[:, top:bottom, left:right] = np.clip(np.rint(values * white), 0, white)
