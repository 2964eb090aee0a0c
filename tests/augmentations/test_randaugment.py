"""RandAugment's operations are those of timm, and its draws are keyed and as often as they should be; so is random erasing."""

import collections
import random

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from esvit.augmentations.erasing import RandomErasing, erase
from esvit.augmentations.parameters import ErasedBox
from esvit.augmentations.randaugment import FILL, NAMES, RandAugment, carry_out, operation
from esvit.data.patches import PACKAGED_PHOTOS
from esvit.errors import OptionError

PUBLISHED = RandAugment(layers=2, magnitude=9.0, magnitude_std=0.5, probability=0.5)
ERASING = RandomErasing(probability=0.25, scale=[0.02, 1 / 3], ratio=0.3, fill="pixel", count=1)
TIMM = dict(zip(NAMES, auto_augment._RAND_INCREASING_TRANSFORMS, strict=True))  # in the same order
TWO_WAYS = {"rotate", "color", "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(PACKAGED_PHOTOS / "coffee.jpg").convert("RGB").resize((80, 80))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [0.0, 4.3, 9.0, 10.0])
def test_every_operation_is_that_of_timm(photo, name, magnitude):
    """timm draws the direction from Python's global generator, so both of its results have to be met."""
    if (name, magnitude) == ("posterize", 10.0):  # newer Pillow and so timm fail at no bits
        assert carry_out(photo, (operation(name, magnitude, 1),)).getextrema() == ((0, 0),) * 3
        return
    options = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    theirs = auto_augment.AugmentOp(TIMM[name], prob=1.0, magnitude=magnitude, hparams=options)
    state, results = random.getstate(), set()
    for _ in range(24 if name in TWO_WAYS else 1):
        results.add(theirs(photo).tobytes())
    random.setstate(state)
    assert {carry_out(photo, (operation(name, magnitude, sign),)).tobytes() for sign in (-1, 1)} == results


def test_draws_are_as_often_as_they_should_be_and_of_the_right_strength():
    rng, draws = np.random.default_rng(0), 4000
    drawn = [PUBLISHED.draw(rng) for _ in range(draws)]
    assert abs(np.mean([len(each) for each in drawn]) - 1.0) < 0.05  # two layers, each with one half
    names = collections.Counter(each.name for operations in drawn for each in operations)
    assert names.keys() == set(NAMES)
    assert max(names.values()) < 1.4 * draws / len(NAMES) and min(names.values()) > 0.6 * draws / len(NAMES)
    angles = np.array([each.argument for operations in drawn for each in operations if each.name == "rotate"])
    assert abs(np.abs(angles).mean() - 27) < 0.5 and abs(np.mean(angles > 0) - 0.5) < 0.15 and np.abs(angles).max() <= 30
    assert PUBLISHED.draw(np.random.default_rng(3)) == PUBLISHED.draw(np.random.default_rng(3))


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"layers": -1}, "layers"),
        ({"magnitude": 11.0}, "magnitude"),
        ({"magnitude_std": -1.0}, "magnitude_std"),
        ({"probability": 2.0}, "probability"),
    ],
)
def test_an_impossible_randaugment_is_refused_by_name(changed, option):
    with pytest.raises(OptionError, match=rf"^augmentation\.randaugment\.{option}: [^\n]+; [^\n]+$"):
        RandAugment(**{**vars(PUBLISHED), **changed}).check("augmentation.randaugment")


# ---------------------------------------------------------------------------------------------------- random erasing


def test_boxes_lie_inside_with_area_and_ratio_in_their_limits():
    rng, size, draws = np.random.default_rng(0), 96, 3000
    drawn = [ERASING.draw(size, rng) for _ in range(draws)]
    assert abs(np.mean([len(boxes) for boxes in drawn]) - 0.25) < 0.03
    areas = []
    for (left, top, right, bottom), fill, _ in (boxes[0] for boxes in drawn if boxes):
        assert 0 <= left < right <= size and 0 <= top < bottom <= size and fill == "pixel"
        assert (bottom - top + 0.5) / (right - left - 0.5) >= 0.3 and (bottom - top - 0.5) / (right - left + 0.5) <= 1 / 0.3
        areas.append((right - left) * (bottom - top) / size**2)
    assert min(areas) > 0.015 and max(areas) < 0.34
    assert len(RandomErasing(**{**vars(ERASING), "probability": 1.0, "count": 3}).draw(size, rng)) == 3


def test_noise_has_the_mean_and_spread_of_normalised_images_and_depends_on_the_seed_alone():
    view = np.zeros((3, 96, 96), dtype=np.uint8)
    erase(view, (ErasedBox((0, 0, 90, 96), "pixel", 7),))
    filled = view[:, :, :90] / 255
    np.testing.assert_allclose(filled.mean((1, 2)), [0.485, 0.456, 0.406], atol=0.02)
    np.testing.assert_allclose(filled.std((1, 2)), [0.229, 0.224, 0.225], atol=0.02)
    assert not view[:, :, 90:].any()
    again = np.zeros_like(view)
    erase(again, (ErasedBox((0, 0, 90, 96), "pixel", 7),))
    assert (again == view).all()
    erase(view, (ErasedBox((0, 0, 96, 96), "color", 7),))
    assert [len(np.unique(channel)) for channel in view] == [1, 1, 1]


@pytest.mark.parametrize(
    ("option", "value"), [("probability", 1.5), ("scale", [0.0, 0.3]), ("scale", [0.1]), ("ratio", 0.0), ("fill", "stars"), ("count", 0)]
)
def test_an_impossible_erasing_is_refused_by_name(option, value):
    with pytest.raises(OptionError, match=rf"^augmentation\.erasing\.{option}: [^\n]+; [^\n]+$"):
        RandomErasing(**{**vars(ERASING), option: value}).check("augmentation.erasing")
