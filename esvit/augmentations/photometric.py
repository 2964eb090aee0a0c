"""Changes of an image's colours and sharpness, on PIL images: what the other engines are measured against.

Pillow's rounding and blur are what the published models were trained with, so Pillow does the work; a test holds every change to
torchvision's, which itself would take seconds to import. Random numbers are drawn apart from the work, see parameters.py.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from esvit.augmentations.parameters import ColorChange

SOLARIZE_THRESHOLD = 128  # values from here on are inverted, as published


def draw_color_changes(
    rng: np.random.Generator, *, brightness: float, contrast: float, saturation: float, hue: float, gamma: float
) -> tuple[ColorChange, ...]:
    """Each change of non-zero strength once, in random order, as torchvision's ColorJitter.

    brightness, contrast, saturation  strength s: the factor is uniform in [max(0, 1 - s), 1 + s]
    hue                               strength s <= 0.5: the shift is uniform in [-s, s] of the colour circle
    gamma                             strength s: the exponent is log-uniform in [1 / (1 + s), 1 + s]; not in the published policy
    """
    changes = []
    for name, strength in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
        if strength:
            changes.append(ColorChange(name, rng.uniform(max(0.0, 1 - strength), 1 + strength)))
    if hue:
        changes.append(ColorChange("hue", rng.uniform(-hue, hue)))
    if gamma:
        changes.append(ColorChange("gamma", math.exp(rng.uniform(-1, 1) * math.log1p(gamma))))
    return tuple(changes[place] for place in rng.permutation(len(changes)))


def color_jitter(image: Image.Image, rng: np.random.Generator, **strengths: float) -> Image.Image:
    """The image after changes that are drawn by `draw_color_changes`."""
    for change in draw_color_changes(rng, **strengths):
        image = change_color(image, change)
    return image


def change_color(image: Image.Image, change: ColorChange) -> Image.Image:
    return CHANGES[change.name](image, change.factor)


def change_brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def change_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blended with its mean luma, a whole number."""
    return ImageEnhance.Contrast(image).enhance(factor)


def change_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blended with its luma."""
    return ImageEnhance.Color(image).enhance(factor)


def shift_hue(image: Image.Image, shift: float) -> Image.Image:
    """Every hue moved by `shift` of the colour circle, in steps of 1 / 255."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.array(int(shift * 255)).astype(np.uint8)  # wraps around
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def adjust_gamma(image: Image.Image, exponent: float) -> Image.Image:
    """Values, as shares of white, to the power of `exponent`."""
    return image.point(gamma_table(exponent) * 3)


def gamma_table(exponent: float) -> list[int]:
    return [int((256 - 1e-3) * (level / 255) ** exponent) for level in range(256)]


def grayscale(image: Image.Image) -> Image.Image:
    """Luma in all three channels."""
    return image.convert("L").convert("RGB")


def gaussian_blur(image: Image.Image, radius: float) -> Image.Image:
    """Pillow's blur with a standard deviation of `radius` pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def solarize(image: Image.Image) -> Image.Image:
    return ImageOps.solarize(image, SOLARIZE_THRESHOLD)


def horizontal_flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


CHANGES: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": change_brightness,
    "contrast": change_contrast,
    "saturation": change_saturation,
    "hue": shift_hue,
    "gamma": adjust_gamma,
}
