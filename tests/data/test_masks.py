"""Masks of images: found by the images' names, read as classes, and every mistake in them told with the file's name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit.data.folder import FolderImages
from esvit.data.masks import IGNORED, MaskClasses, Masks
from esvit.errors import OptionError
from tests.data.pictures import write_classes

BINARY = MaskClasses(values=[0, 255], ignored=None)
SIZE = (20, 16)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two images and their masks: background but for the left column."""
    write_classes(tmp_path / "images", {"cat": 1, "dog": 1})
    mask = np.zeros(SIZE[::-1], dtype=np.uint8)
    mask[:, 0] = 255
    for name in ("cat", "dog"):
        (tmp_path / "masks" / name).mkdir(parents=True)
        Image.fromarray(mask).save(tmp_path / "masks" / name / "000.png")
    return tmp_path


def masks(folder: Path, classes: MaskClasses = BINARY) -> Masks:
    images = FolderImages(str(folder / "images"), option="data.root", class_names=None)
    return Masks(str(folder / "masks"), images=images, classes=classes, option="task.masks")


def rewrite(folder: Path, mask: np.ndarray | Image.Image) -> None:
    picture = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    picture.save(folder / "masks" / "cat" / "000.png")


def test_a_mask_has_its_images_name_and_says_a_class_for_every_pixel(folder):
    masks(folder).require_all()
    classes = masks(folder).read(1, SIZE)
    assert classes.shape == (16, 20)
    assert classes[:, 0].tolist() == [1] * 16
    assert not classes[:, 1:].any()


def test_numbers_are_classes_in_the_order_they_are_given_in(folder):
    assert masks(folder, MaskClasses(values=[255, 0], ignored=None)).read(0, SIZE)[0, :2].tolist() == [0, 1]
    assert masks(folder, MaskClasses(values=[0], ignored=255)).read(0, SIZE)[0, :2].tolist() == [IGNORED, 0]


def test_palettes_bits_and_16_bit_numbers_are_read_as_numbers(folder):
    indices = np.zeros(SIZE[::-1], dtype=np.uint8)
    indices[0, 0] = 1
    palette = Image.fromarray(indices, mode="P")
    palette.putpalette([255, 255, 255, 9, 9, 9])
    rewrite(folder, palette)
    assert masks(folder, MaskClasses(values=[0, 1], ignored=None)).read(0, SIZE)[0, :2].tolist() == [1, 0]
    rewrite(folder, Image.fromarray(indices * 255).convert("1"))
    assert masks(folder).read(0, SIZE)[0, :2].tolist() == [1, 0]
    rewrite(folder, indices.astype(np.uint16) * 1000)
    assert masks(folder, MaskClasses(values=[0, 1000], ignored=None)).read(0, SIZE)[0, :2].tolist() == [1, 0]


def test_a_missing_mask_is_named(folder):
    (folder / "masks" / "dog" / "000.png").unlink()
    with pytest.raises(OptionError, match=r"^task\.masks: 1 of 2 images have no mask, '.*masks/dog/000\.png' is missing"):
        masks(folder).require_all()


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (np.zeros((16, 21), dtype=np.uint8), "has 21 x 16 pixels, its image has 20 x 16"),
        (np.full((16, 20), 7, dtype=np.uint8), "holds 7, which is no class; .*task.ignore=7"),
        (np.zeros((16, 20, 3), dtype=np.uint8), "has 3 channels"),
    ],
)
def test_a_mask_that_cannot_be_right_is_named(folder, mask, problem):
    rewrite(folder, mask)
    with pytest.raises(OptionError, match=rf"^task\.masks: mask '.*masks/cat/000\.png' {problem}"):
        masks(folder).read(0, SIZE)


def test_a_damaged_mask_is_named(folder):
    (folder / "masks" / "cat" / "000.png").write_bytes(b"damaged")
    with pytest.raises(OptionError, match=r"^task\.masks: mask '.*masks/cat/000\.png' cannot be read"):
        masks(folder).read(0, SIZE)
