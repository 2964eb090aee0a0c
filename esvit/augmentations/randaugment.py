"""RandAugment (Cubuk et al. 2020) as timm has it under the name rand-m9-mstd0.5-inc1, which DeiT and Swin were trained with.

Written anew because timm draws from Python's and numpy's global generators, so that no run could be repeated. A test holds every
operation to timm's. Magnitudes go from 0 to 10, and with all but the first three operations more magnitude means more change.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from esvit.augmentations.parameters import Operation
from esvit.errors import OptionError

LARGEST = 10.0  # magnitude
FILL = (124, 116, 104)  # ImageNet's mean colour, where an operation has moved the image away
BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Draws `layers` of the operations, each carried out with `probability`.

    layers         0 turns it off
    magnitude      0 to 10
    magnitude_std  standard deviation of the magnitude of a single operation
    probability    in [0, 1]
    """

    layers: int
    magnitude: float
    magnitude_std: float
    probability: float

    def check(self, option: str) -> None:
        """Raises OptionError, naming what is under `option`, for a value that cannot work."""
        if self.layers < 0:
            raise OptionError(f"{option}.layers", f"{self.layers}", "use 0 (off) or more")
        if not 0 <= self.magnitude <= LARGEST:
            raise OptionError(f"{option}.magnitude", f"{self.magnitude:g}", f"use a number from 0 to {LARGEST:g}")
        if self.magnitude_std < 0:
            raise OptionError(f"{option}.magnitude_std", f"{self.magnitude_std:g}", "use 0 or more")
        if not 0 <= self.probability <= 1:
            raise OptionError(f"{option}.probability", f"{self.probability:g}", "use a number from 0 to 1")

    def draw(self, rng: np.random.Generator) -> tuple[Operation, ...]:
        operations = []
        for number in rng.integers(len(NAMES), size=self.layers):
            if rng.random() < self.probability:
                magnitude = float(np.clip(rng.normal(self.magnitude, self.magnitude_std), 0, LARGEST))
                sign = -1 if rng.random() < 0.5 else 1
                operations.append(operation(NAMES[number], magnitude, sign))
        return tuple(operations)


def operation(name: str, magnitude: float, sign: int) -> Operation:
    """The operation with its argument in its own unit; `sign` is the direction of those that have two."""
    argument, _ = OPERATIONS[name]
    return Operation(name, None if argument is None else argument(magnitude / LARGEST, sign))


def carry_out(image: Image.Image, operations: tuple[Operation, ...]) -> Image.Image:
    """The RGB image after all operations."""
    for name, argument in operations:
        image = OPERATIONS[name][1](image, 0.0 if argument is None else argument)
    return image


def _enhancement(share: float, sign: int) -> float:
    return max(0.1, 1 + sign * 0.9 * share)


def _solarize_add(image: Image.Image, amount: float) -> Image.Image:
    """Brighter by `amount` where it is darker than the middle."""
    return image.point([min(255, level + int(amount)) if level < 128 else level for level in range(256)] * 3)


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    """Of no bits, black: Pillow's own refuses that from 13.0 on, and timm with it."""
    return image.point([level & 256 - 2 ** (8 - int(bits)) for level in range(256)] * 3)


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=FILL)


Argument = Callable[[float, int], float]  # (magnitude as a share of the largest, sign) -> argument

OPERATIONS: dict[str, tuple[Argument | None, Callable[[Image.Image, float], Image.Image]]] = {
    "autocontrast": (None, lambda image, _: ImageOps.autocontrast(image)),
    "equalize": (None, lambda image, _: ImageOps.equalize(image)),
    "invert": (None, lambda image, _: ImageOps.invert(image)),
    "rotate": (lambda share, sign: sign * 30 * share, lambda image, degrees: image.rotate(degrees, resample=BICUBIC, fillcolor=FILL)),
    "posterize": (lambda share, _: 4 - int(4 * share), _posterize),  # bits kept
    "solarize": (lambda share, _: 256 - min(256, int(256 * share)), lambda image, level: ImageOps.solarize(image, int(level))),
    "solarize_add": (lambda share, _: min(128, int(110 * share)), _solarize_add),
    "color": (_enhancement, lambda image, factor: ImageEnhance.Color(image).enhance(factor)),
    "contrast": (_enhancement, lambda image, factor: ImageEnhance.Contrast(image).enhance(factor)),
    "brightness": (_enhancement, lambda image, factor: ImageEnhance.Brightness(image).enhance(factor)),
    "sharpness": (_enhancement, lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor)),
    "shear_x": (lambda share, sign: sign * 0.3 * share, lambda image, slope: _affine(image, (1, slope, 0, 0, 1, 0))),
    "shear_y": (lambda share, sign: sign * 0.3 * share, lambda image, slope: _affine(image, (1, 0, 0, slope, 1, 0))),
    "translate_x": (lambda share, sign: sign * 0.45 * share, lambda image, share: _affine(image, (1, 0, share * image.size[0], 0, 1, 0))),
    "translate_y": (lambda share, sign: sign * 0.45 * share, lambda image, share: _affine(image, (1, 0, 0, 0, 1, share * image.size[1]))),
}
NAMES = list(OPERATIONS)
