"""Patches of photos: no overlap of training and validation, the same places in every run."""

import pickle

import numpy as np
import pytest
from PIL import Image

from esvit.data.patches import PhotoPatches
from esvit.errors import OptionError
from tests.data.pictures import data_options, picture


def photo_patches(**changed):
    sizes = {"patch_size": 40, "train_patches_per_photo": 400, "val_patches_per_photo": 60}
    return PhotoPatches(**data_options(**{**sizes, **changed}))


def write_rulers(folder, width=200, height=60):
    """Two photos whose red value is the pixel's column and whose green value is its row; blue tells the photo."""
    for number, name in enumerate(["one.png", "two.png"]):
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[..., 0], pixels[..., 1], pixels[..., 2] = np.arange(width), np.arange(height)[:, None], number
        Image.fromarray(pixels).save(folder / name)


def test_the_packaged_photos_give_8400_training_and_1260_validation_patches():
    data = photo_patches()
    train, validation = data.train(), data.validation()
    assert (len(train), len(validation)) == (8400, 1260)
    assert train.class_names == validation.class_names
    assert len(train.class_names) == 21
    assert np.bincount(train.labels).tolist() == [400] * 21
    assert train.read(8399).size == (40, 40)


def test_training_and_validation_patches_share_no_pixel_column(tmp_path):
    write_rulers(tmp_path)
    data = photo_patches(root=str(tmp_path), train_patches_per_photo=300, val_patches_per_photo=300)
    seen = []
    for images in (data.train(), data.validation()):
        patches = np.stack([np.array(images.read(index)) for index in range(len(images))])
        assert (patches[..., 2] == images.labels[:, None, None]).all()
        assert (patches[:, :, 1:, 0] - patches[:, :, :-1, 0] == 1).all()  # unscaled
        seen.append((int(patches[..., 0].min()), int(patches[..., 0].max())))
        assert (patches[..., 1].min(), patches[..., 1].max()) == (0, 59)
    assert seen == [(0, 115), (132, 199)]  # 58% of 200 columns from the left, 34% from the right


def test_places_are_the_same_in_every_run_and_for_a_photo_in_other_company(tmp_path):
    write_rulers(tmp_path)
    first = photo_patches(root=str(tmp_path)).train()
    names = [first.name(index) for index in range(len(first))]
    again = pickle.loads(pickle.dumps(photo_patches(root=str(tmp_path)).train()))
    assert [again.name(index) for index in range(len(again))] == names
    (tmp_path / "one.png").unlink()
    alone = photo_patches(root=str(tmp_path)).train()
    assert [alone.name(index) for index in range(400)] == names[400:]


def test_a_photo_too_small_for_a_patch_names_the_patch_size(tmp_path):
    picture(0, (80, 60)).save(tmp_path / "small.png")
    data = photo_patches(root=str(tmp_path))
    data.train()
    with pytest.raises(OptionError, match=r"^data\.patch_size: photo 'small\.png' leaves 27 x 60 pixels [^\n]*; use data\.patch_size=27"):
        data.validation()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(OptionError, match=r"^data\.root: [^\n]*holds no photos"):
        photo_patches(root=str(tmp_path)).train()
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(OptionError, match=r"^data\.root: photo [^\n]*broken\.jpg' cannot be read"):
        photo_patches(root=str(tmp_path)).train()
    with pytest.raises(OptionError, match=r"^data\.val_root"):
        photo_patches(val_root=str(tmp_path))
    with pytest.raises(OptionError, match=r"^data\.patch_size"):
        photo_patches(patch_size=0)
