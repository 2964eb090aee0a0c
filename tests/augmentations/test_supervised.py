"""The crop of labelled training images: sizes, keyed draws, flips, colours, and refused values."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from esvit.augmentations.erasing import RandomErasing
from esvit.augmentations.randaugment import RandAugment
from esvit.augmentations.supervised import RandomResizedCropFlip
from esvit.errors import OptionError

PUBLISHED: dict[str, Any] = {
    "size": 32, "scale": [0.08, 1.0], "interpolation": "bilinear", "flip_probability": 0.5, "color_jitter": 0.0,
    "randaugment": RandAugment(layers=0, magnitude=9.0, magnitude_std=0.5, probability=0.5),
    "erasing": RandomErasing(probability=0.0, scale=[0.02, 1 / 3], ratio=0.3, fill="pixel", count=1),
}  # fmt: skip
WHOLE = PUBLISHED | {"size": 8, "scale": [1.0, 1.0], "flip_probability": 0.0}


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def crop(image: Image.Image, *, seed: int = 0, **options: Any) -> torch.Tensor:
    (view,) = RandomResizedCropFlip(**options)(image, np.random.default_rng(seed))
    return view


def test_a_crop_is_one_square_of_bytes():
    view = crop(noise(), **PUBLISHED)
    assert view.shape == (3, 32, 32) and view.dtype == torch.uint8


def test_equal_generators_give_equal_crops_and_others_do_not():
    one, same, other = (crop(noise(), seed=seed, **PUBLISHED | {"color_jitter": 0.4}) for seed in (1, 1, 2))
    assert one.equal(same) and not one.equal(other)


def test_the_whole_square_image_stays_as_it_is_and_a_certain_flip_mirrors_it():
    """A scale of 1 leaves ten boxes that do not fit but for a ratio of 1, then the whole image."""
    image = noise(8, 8)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert crop(image, **WHOLE).equal(pixels)
    assert crop(image, **WHOLE | {"flip_probability": 1.0}).equal(pixels.flip(2))


def test_jitter_changes_colours_and_nothing_else():
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    changed = crop(grey, **WHOLE | {"color_jitter": 0.4})
    assert len(changed.flatten().unique()) == 1 and changed[0, 0, 0] != 100
    assert crop(grey, **WHOLE).unique().tolist() == [100]


def test_interpolation_is_a_choice():
    assert not crop(noise(), **PUBLISHED).equal(crop(noise(), **PUBLISHED | {"interpolation": "bicubic"}))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", 0),
        ("scale", [0.5]),
        ("scale", [0.0, 1.0]),
        ("scale", [0.6, 0.5]),
        ("interpolation", "nearest"),
        ("flip_probability", 1.5),
        ("color_jitter", -0.1),
    ],
)
def test_impossible_values_are_refused_by_name(option, value):
    with pytest.raises(OptionError, match=rf"^task\.training_crop\.{option}: "):
        RandomResizedCropFlip(**PUBLISHED | {option: value})


def test_randaugment_and_erasing_are_choices_told_in_the_protocol():
    image = noise()
    strong = PUBLISHED | {
        "randaugment": RandAugment(layers=2, magnitude=9.0, magnitude_std=0.5, probability=1.0),
        "erasing": RandomErasing(probability=1.0, scale=[0.2, 0.3], ratio=0.3, fill="mean", count=1),
    }
    changed = crop(image, **strong)
    assert changed.equal(crop(image, **strong)) and not changed.equal(crop(image, **PUBLISHED))
    mean = (changed == torch.tensor([124, 116, 104]).view(3, 1, 1)).all(0).float().mean()
    assert 0.15 < mean < 0.35
    assert RandomResizedCropFlip(**strong).describe().keys() - RandomResizedCropFlip(**PUBLISHED).describe().keys() == {
        "randaugment",
        "erasing",
    }


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_arrays_of_other_channels_are_cropped_too(interpolation):
    image = np.random.default_rng(0).integers(0, 65535, (30, 40, 5)).astype(np.uint16)
    (view,) = RandomResizedCropFlip(**PUBLISHED | {"interpolation": interpolation, "color_jitter": 0.4})(image, np.random.default_rng(0))
    assert view.shape == (5, 32, 32) and view.dtype == torch.uint16
