"""Crops and colours: sizes, probabilities over many draws, torchvision as the reference, and refused values."""

import hashlib
from operator import methodcaller
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional

from esvit.augmentations import photometric
from esvit.augmentations.erasing import RandomErasing
from esvit.augmentations.multicrop import CropGroup, CustomMultiCrop, MultiCrop, draw_box, to_tensor
from esvit.augmentations.parameters import ColorChange, ErasedBox, Operation, ViewParameters
from esvit.augmentations.randaugment import RandAugment
from esvit.errors import OptionError

PUBLISHED: dict[str, Any] = {
    "global_crops_size": 224, "global_crops_scale": [0.4, 1.0],
    "local_crops_number": 8, "local_crops_size": 96, "local_crops_scale": [0.05, 0.4],
    "jitter_probability": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "gamma": 0.0,
    "grayscale_probability": 0.2, "flip_probability": 0.5,
    "global_blur_probabilities": [1.0, 0.1], "local_blur_probability": 0.5, "blur_radius": [0.1, 2.0],
    "global_solarize_probabilities": [0.0, 0.2],
    "engine": "reference", "randaugment": RandAugment(layers=0, magnitude=9.0, magnitude_std=0.5, probability=0.5),
    "erasing": RandomErasing(probability=0.0, scale=[0.02, 1 / 3], ratio=0.3, fill="pixel", count=1),
}  # fmt: skip
PLAIN: dict[str, Any] = {
    **PUBLISHED, "global_crops_size": 8, "global_crops_scale": [1.0, 1.0], "local_crops_size": 8, "local_crops_scale": [1.0, 1.0],
    "local_crops_number": 1, "jitter_probability": 0.0, "grayscale_probability": 0.0, "global_blur_probabilities": [0.0, 0.0],
    "global_solarize_probabilities": [0.0, 0.0], "local_blur_probability": 0.0, "flip_probability": 0.0,
}  # fmt: skip


SOME: dict[str, Any] = {"gamma": 0.5, "hue": 0.0, "local_crops_number": 3}
BLUR = methodcaller("filter", ImageFilter.GaussianBlur(2.0))


def noise(width=32, height=24, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def picture(width: int, height: int) -> Image.Image:
    """Colours in stripes and curves, the same whatever a library decodes."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [(rows * 7 + columns * 3) % 256, (rows * columns // 5) % 256, (columns * columns // 11 + rows * 2) % 256]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "changed", "expected"),
    [
        ((500, 375), {}, "090a58ebdad882754b12c0f984fa25dac98b6dc66cac77a8bea7810d251c43b6"),
        ((60, 200), {}, "bdb31594e6ed6294678ac25148bd39cab76cee256983b014d9d1209336b5b7bb"),
        ((500, 375), SOME, "42d82b2704194cf6e6e1d5112a9dbf68977bb0fb16112d45e754ab058622f7e0"),
        ((60, 200), SOME, "bffec9fbf827dc60e1b7063650edbcb158c977d5f144e7459e30a7c19d190c49"),
    ],
)
def test_views_of_the_reference_engine_stay_bit_for_bit_what_they_were(size, changed, expected):
    """Written down before drawing and making views were separated: Pillow 13.0."""
    crops, digest = MultiCrop(**{**PUBLISHED, **changed}), hashlib.sha256()
    for seed in range(6):
        for view in crops(picture(*size), np.random.default_rng(seed)):
            digest.update(view.contiguous().numpy().tobytes())
    assert digest.hexdigest() == expected


def test_published_crops_have_their_sizes_global_first():
    crops = MultiCrop(**PUBLISHED)
    views = crops(noise(500, 375), np.random.default_rng(0))
    assert crops.crop_sizes == [224, 224] + [96] * 8
    assert [tuple(view.shape) for view in views] == [(3, size, size) for size in crops.crop_sizes]
    assert all(view.dtype == torch.uint8 for view in views)


@pytest.mark.parametrize(("number", "size"), [(0, 96), (3, 17), (2, 32)])
def test_any_number_and_size_of_local_crops_works(number, size):
    crops = MultiCrop(**{**PUBLISHED, "global_crops_size": 32, "local_crops_number": number, "local_crops_size": size})
    assert [view.shape[-1] for view in crops(noise(), np.random.default_rng(0))] == [32, 32] + [size] * number


def test_equal_generators_give_equal_views_and_others_do_not():
    crops = MultiCrop(**{**PUBLISHED, "global_crops_size": 32, "local_crops_size": 16})
    one, same, other = (crops(noise(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(view.equal(twin) for view, twin in zip(one, same, strict=True))
    assert not any(view.equal(twin) for view, twin in zip(one, other, strict=True))


def test_published_policies_blur_global_one_always_and_solarize_only_global_two():
    first, second, local = MultiCrop(**PUBLISHED).policies[:3]
    assert (first.blur_probability, second.blur_probability, local.blur_probability) == (1.0, 0.1, 0.5)
    assert (first.solarize_probability, second.solarize_probability, local.solarize_probability) == (0.0, 0.2, 0.0)


@pytest.mark.parametrize(
    ("changed", "view", "operation", "probability"),
    [
        ({"flip_probability": 0.5}, 0, photometric.horizontal_flip, 0.5),
        ({"grayscale_probability": 0.2}, 1, photometric.grayscale, 0.2),
        ({"global_solarize_probabilities": [0.0, 0.2]}, 1, photometric.solarize, 0.2),
        ({"global_solarize_probabilities": [0.0, 0.2]}, 0, photometric.solarize, 0.0),
        ({"global_blur_probabilities": [1.0, 0.1], "blur_radius": [2.0, 2.0]}, 0, BLUR, 1.0),
        ({"global_blur_probabilities": [1.0, 0.1], "blur_radius": [2.0, 2.0]}, 1, BLUR, 0.1),
        ({"local_blur_probability": 0.5, "blur_radius": [2.0, 2.0]}, 2, BLUR, 0.5),
    ],
)
def test_each_operation_is_applied_as_often_as_its_probability_says(changed, view, operation, probability):
    image, rng, draws = noise(8, 8), np.random.default_rng(0), 1000
    crops = MultiCrop(**{**PLAIN, **changed})
    plain, applied = to_tensor(image), to_tensor(operation(image))
    results = [crops(image, rng)[view] for _ in range(draws)]
    share = sum(result.equal(applied) for result in results) / draws
    assert all(result.equal(applied) or result.equal(plain) for result in results)
    assert abs(share - probability) <= 4 * (probability * (1 - probability) / draws) ** 0.5


def test_jitter_is_applied_as_often_as_its_probability_says():
    image, rng, draws = noise(8, 8), np.random.default_rng(0), 1000
    crops = MultiCrop(**{**PLAIN, "local_crops_number": 0, "jitter_probability": 0.8})
    share = sum(not crops(image, rng)[0].equal(to_tensor(image)) for _ in range(draws)) / draws
    assert abs(share - 0.8) <= 4 * (0.8 * 0.2 / draws) ** 0.5


@pytest.mark.parametrize("size", [(500, 375), (60, 200), (33, 33)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_stay_inside_with_area_and_ratio_in_their_limits(size, scale):
    rng, (width, height) = np.random.default_rng(0), size
    for left, top, right, bottom in (draw_box(size, scale, rng) for _ in range(2000)):
        w, h = right - left, bottom - top
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert (w + 0.5) * (h + 0.5) >= scale[0] * width * height or w == width or h == height  # the central fallback may be smaller
        assert (w - 0.5) * (h - 0.5) <= scale[1] * width * height
        assert (w + 0.5) / (h - 0.5) >= 3 / 4
        assert (w - 0.5) / (h + 0.5) <= 4 / 3


def test_shares_of_area_are_uniform_and_places_cover_the_image():
    rng = np.random.default_rng(0)
    boxes = np.array([draw_box((1000, 1000), (0.05, 0.4), rng) for _ in range(4000)])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 1e6
    assert abs(areas.mean() - 0.225) < 4 * (0.35 / 12**0.5) / 4000**0.5
    assert boxes[:, :2].min() <= 2
    assert boxes[:, 2:].max() >= 998


def test_an_image_that_fits_no_box_gives_the_largest_central_one():
    assert draw_box((10, 1000), (0.9, 1.0), np.random.default_rng(0)) == (0, 493, 10, 506)
    assert draw_box((1000, 12), (0.9, 1.0), np.random.default_rng(0)) == (492, 0, 508, 12)
    assert draw_box((1, 1), (0.1, 0.1), np.random.default_rng(0)) == (0, 0, 1, 1)


def test_a_crop_is_resized_as_torchvision_does():
    image = noise(50, 40)
    crops = MultiCrop(**{**PLAIN, "global_crops_scale": [0.3, 0.6], "global_crops_size": 20, "local_crops_number": 0})
    left, top, right, bottom = draw_box(image.size, (0.3, 0.6), np.random.default_rng(4))
    expected = functional.resized_crop(image, top, left, bottom - top, right - left, [20, 20], functional.InterpolationMode.BICUBIC)
    assert crops(image, np.random.default_rng(4))[0].equal(to_tensor(expected))


def test_jitter_without_strength_changes_nothing_and_order_is_random():
    image = noise()
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "gamma": 0.0}
    assert photometric.color_jitter(image, np.random.default_rng(0), **off).tobytes() == image.tobytes()
    # brightness cut to [0, 2] and saturation to [0, 2]: both orders of the same two factors occur
    seen = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        result = photometric.color_jitter(image, rng, **{**off, "brightness": 1.0, "saturation": 1.0}).tobytes()
        replay = np.random.default_rng(seed)
        bright, saturated = replay.uniform(0, 2), replay.uniform(0, 2)
        one = functional.adjust_saturation(functional.adjust_brightness(image, bright), saturated).tobytes()
        two = functional.adjust_brightness(functional.adjust_saturation(image, saturated), bright).tobytes()
        assert result in (one, two)
        if one != two:
            seen.add(result == one)
    assert seen == {True, False}


def test_gamma_brightens_as_often_as_it_darkens():
    image = Image.new("RGB", (2, 2), (100, 100, 100))
    rng = np.random.default_rng(0)
    gamma_only: dict[str, float] = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "gamma": 1}
    values = [int(np.array(photometric.color_jitter(image, rng, **gamma_only))[0, 0, 0]) for _ in range(1000)]
    assert min(values) == int(255 * (100 / 255) ** 2)
    assert max(values) == int((255 + 1 - 1e-3) * (100 / 255) ** 0.5)
    assert abs(np.mean(np.array(values) > 100) - 0.5) < 0.07


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("global_crops_size", 0), ("local_crops_size", -3), ("local_crops_number", -1),
        ("global_crops_scale", [0.0, 1.0]), ("global_crops_scale", [0.5, 0.4]), ("local_crops_scale", [0.1, 1.1]),
        ("local_crops_scale", [0.1]), ("jitter_probability", 1.1), ("grayscale_probability", -0.1), ("flip_probability", 2),
        ("local_blur_probability", 1.5),
        ("global_blur_probabilities", [1.0]), ("global_blur_probabilities", [1.0, 1.5]), ("global_solarize_probabilities", [-1, 0]),
        ("blur_radius", [2.0, 0.1]), ("hue", 0.6), ("brightness", -1), ("gamma", -1),
    ],
)  # fmt: skip
def test_an_impossible_value_is_one_line_that_names_the_option(option, value):
    with pytest.raises(OptionError, match=rf"^augmentation\.{option}: [^\n]+; [^\n]+$"):
        MultiCrop(**{**PUBLISHED, option: value})


def test_two_global_crops_are_what_the_teacher_sees():
    assert MultiCrop(**PUBLISHED).global_count == 2


# ---------------------------------------------------------------------------------------------------- what was drawn


def test_what_was_drawn_is_carried_out_and_told_in_words():
    crops = MultiCrop(**PUBLISHED)
    parameters = crops.draw((500, 375), np.random.default_rng(3))
    image = noise(500, 375)
    assert all(one.equal(two) for one, two in zip(crops(image, np.random.default_rng(3)), crops.apply(image, parameters), strict=True))
    drawn = ViewParameters(
        size=8,
        box=(1, 2, 31, 22),
        flip=True,
        operations=(Operation("invert", None), Operation("rotate", -27.04)),
        changes=(ColorChange("brightness", 1.234), ColorChange("hue", 0.05)),
        grayscale=True,
        blur_radius=0.84,
        solarize=True,
        erased=(ErasedBox((0, 0, 4, 2), "pixel", 1),),
    )
    words = "30 x 20 at (1, 2), mirrored, invert, rotate -27, brightness 1.23, hue +0.05, grey, blur 0.8, solarized, erased 4 x 2"
    assert drawn.describe() == words
    assert ViewParameters(size=8, box=(0, 0, 5, 5)).describe() == "5 x 5 at (0, 0)"


# ---------------------------------------------------------------------------------------------------- groups of crops

GROUP: dict[str, Any] = {
    "count": 1, "is_global": False, "size": 16, "scale": [0.05, 0.4], "flip_probability": 0.5, "jitter_probability": 0.8, "brightness": 0.4,
    "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "gamma": 0.0, "grayscale_probability": 0.2, "blur_probability": 0.5,
    "blur_radius": [0.1, 2.0], "solarize_probability": 0.0,
}  # fmt: skip


def custom(*groups: dict[str, Any]) -> CustomMultiCrop:
    off = {name: PUBLISHED[name] for name in ("randaugment", "erasing")}
    return CustomMultiCrop(engine="reference", crops=[CropGroup(**{**GROUP, **group}) for group in groups], **off)


def test_groups_come_out_global_first_and_equal_sizes_side_by_side():
    crops = custom({"count": 2}, {"size": 8}, {"is_global": True, "size": 32, "count": 3}, {"size": 16}, {"size": 32})
    assert crops.crop_sizes == [32, 32, 32, 32, 16, 16, 16, 8]
    assert crops.global_count == 3
    assert [view.shape[-1] for view in crops(noise(), np.random.default_rng(0))] == crops.crop_sizes


def test_groups_of_the_published_policy_draw_its_views():
    groups = [
        {"is_global": True, "size": 32, "scale": [0.4, 1.0], "blur_probability": 1.0},
        {"is_global": True, "size": 32, "scale": [0.4, 1.0], "blur_probability": 0.1, "solarize_probability": 0.2},
        {"count": 8},
    ]
    published = MultiCrop(**{**PUBLISHED, "global_crops_size": 32, "local_crops_size": 16})
    assert custom(*groups).draw((60, 50), np.random.default_rng(1)) == published.draw((60, 50), np.random.default_rng(1))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{}], "crops: no group is global"),
        ([{"is_global": True}, {"is_global": True, "size": 24}], r"crops: global crops of \[16, 24\] pixels"),
        ([{"is_global": True}, {"count": 0}], r"crops\[1\]\.count: 0 crops"),
        ([{"is_global": True, "size": 0}], r"crops\[0\]\.size: 0 pixels"),
        ([{"is_global": True, "hue": 0.7}], r"crops\[0\]\.hue: strength 0.7"),
        ([{"is_global": True, "scale": [0.4]}], r"crops\[0\]\.scale: 1 values"),
    ],
)
def test_impossible_groups_are_refused_by_name(groups, message):
    with pytest.raises(OptionError, match=rf"^augmentation\.{message}[^\n]*; [^\n]+$"):
        custom(*groups)
