"""Random changes of an image's colours and sharpness, on PIL images, drawn from the generator that is handed in.

Pillow's rounding and blur are what the published models were trained with, so Pillow does the work. Each operation draws its random
numbers only when it is applied.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional

SOLARIZE_THRESHOLD = 128  # values from here on are inverted, as published


def color_jitter(
    image: Image.Image, rng: np.random.Generator, *, brightness: float, contrast: float, saturation: float, hue: float, gamma: float
) -> Image.Image:
    """Each change of non-zero strength once, in random order, as torchvision's ColorJitter.

    brightness, contrast, saturation  strength s: the factor is uniform in [max(0, 1 - s), 1 + s]
    hue                               strength s <= 0.5: the shift is uniform in [-s, s] of the colour circle
    gamma                             strength s: the exponent is log-uniform in [1 / (1 + s), 1 + s]; not in the published policy
    """
    changes: list[Callable[[Image.Image], Image.Image]] = []
    if brightness:
        factor_b = rng.uniform(max(0.0, 1 - brightness), 1 + brightness)
        changes.append(lambda picture: functional.adjust_brightness(picture, factor_b))
    if contrast:
        factor_c = rng.uniform(max(0.0, 1 - contrast), 1 + contrast)
        changes.append(lambda picture: functional.adjust_contrast(picture, factor_c))
    if saturation:
        factor_s = rng.uniform(max(0.0, 1 - saturation), 1 + saturation)
        changes.append(lambda picture: functional.adjust_saturation(picture, factor_s))
    if hue:
        shift = rng.uniform(-hue, hue)
        changes.append(lambda picture: functional.adjust_hue(picture, shift))
    if gamma:
        exponent = math.exp(rng.uniform(-1, 1) * math.log1p(gamma))
        changes.append(lambda picture: functional.adjust_gamma(picture, exponent))
    for change in rng.permutation(len(changes)):
        image = changes[change](image)
    return image


def grayscale(image: Image.Image) -> Image.Image:
    """Luma in all three channels."""
    return image.convert("L").convert("RGB")


def gaussian_blur(image: Image.Image, rng: np.random.Generator, *, radius: tuple[float, float]) -> Image.Image:
    """Pillow's blur with a standard deviation uniform in `radius`, in pixels."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(*radius)))


def solarize(image: Image.Image) -> Image.Image:
    return ImageOps.solarize(image, SOLARIZE_THRESHOLD)


def horizontal_flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
