"""Random changes of an image's colours and sharpness, on PIL images, drawn from the generator that is handed in.

Pillow's rounding and blur are what the published models were trained with, so Pillow does the work; a test holds every change to
torchvision's, which itself would take seconds to import. Each operation draws its random numbers only when it is applied.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

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
        changes.append(lambda picture: ImageEnhance.Brightness(picture).enhance(factor_b))
    if contrast:
        factor_c = rng.uniform(max(0.0, 1 - contrast), 1 + contrast)
        changes.append(lambda picture: ImageEnhance.Contrast(picture).enhance(factor_c))
    if saturation:
        factor_s = rng.uniform(max(0.0, 1 - saturation), 1 + saturation)
        changes.append(lambda picture: ImageEnhance.Color(picture).enhance(factor_s))
    if hue:
        shift = rng.uniform(-hue, hue)
        changes.append(lambda picture: shift_hue(picture, shift))
    if gamma:
        exponent = math.exp(rng.uniform(-1, 1) * math.log1p(gamma))
        changes.append(lambda picture: adjust_gamma(picture, exponent))
    for change in rng.permutation(len(changes)):
        image = changes[change](image)
    return image


def shift_hue(image: Image.Image, shift: float) -> Image.Image:
    """Every hue moved by `shift` of the colour circle, in steps of 1 / 255."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.array(int(shift * 255)).astype(np.uint8)  # wraps around
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def adjust_gamma(image: Image.Image, exponent: float) -> Image.Image:
    """Values, as shares of white, to the power of `exponent`."""
    table = [int((256 - 1e-3) * (level / 255) ** exponent) for level in range(256)]
    return image.point(table * 3)


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
