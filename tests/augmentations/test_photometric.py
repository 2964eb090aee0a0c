"""Every change of colours equals torchvision's on Pillow images, which the published models were trained with."""

import math

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional

from esvit.augmentations.photometric import color_jitter
from esvit.data.patches import PACKAGED_PHOTOS

STRENGTHS = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "gamma": 0.0}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(PACKAGED_PHOTOS / "coffee.jpg").convert("RGB").resize((90, 60))


@pytest.mark.parametrize(
    ("option", "strength", "draw", "reference"),
    [
        ("brightness", 0.4, lambda rng: rng.uniform(0.6, 1.4), functional.adjust_brightness),
        ("contrast", 0.4, lambda rng: rng.uniform(0.6, 1.4), functional.adjust_contrast),
        ("saturation", 0.2, lambda rng: rng.uniform(0.8, 1.2), functional.adjust_saturation),
        ("hue", 0.5, lambda rng: rng.uniform(-0.5, 0.5), functional.adjust_hue),
        ("gamma", 0.4, lambda rng: math.exp(rng.uniform(-1, 1) * math.log1p(0.4)), functional.adjust_gamma),
    ],
)
def test_each_change_is_that_of_torchvision(photo, option, strength, draw, reference) -> None:
    for seed in range(6):
        changed = color_jitter(photo, np.random.default_rng(seed), **STRENGTHS | {option: strength})
        expected = reference(photo, draw(np.random.default_rng(seed)))
        np.testing.assert_array_equal(np.asarray(changed), np.asarray(expected))
