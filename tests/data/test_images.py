"""Every image of a tree, without classes."""

import pytest

from esvit.data.base import BadImage
from esvit.data.images import ImagesData
from esvit.errors import OptionError
from tests.data.pictures import data_options, picture, png, write_classes


def images_data(root, **changed) -> ImagesData:
    return ImagesData(**data_options(root=str(root)) | changed)


def test_flat_and_nested_trees_are_unlabelled_whatever_their_folders_are_called(tmp_path):
    write_classes(tmp_path / "train" / "2024", {"a": 2})
    write_classes(tmp_path / "val", {"b": 1})
    (tmp_path / "loose.png").write_bytes(png(7))
    images = images_data(tmp_path).train()
    assert [images.name(index) for index in range(4)] == ["loose.png", "train/2024/a/000.png", "train/2024/a/001.png", "val/b/000.png"]
    assert images.labels is None and images.class_names == []
    assert images.read(0).tobytes() == picture(7).tobytes()
    assert images_data(tmp_path).validation() is None


def test_a_validation_folder_is_refused_and_an_empty_one_told(tmp_path):
    with pytest.raises(OptionError, match=r"^data\.val_root: [^\n]* is not used: [^\n]*; use data=folder"):
        images_data(tmp_path, val_root="x")
    with pytest.raises(OptionError, match=r"^data\.root: folder [^\n]* holds no images"):
        images_data(tmp_path).train()


def test_damaged_files_are_bad_images(tmp_path):
    for name, content in {"a.png": b"", "b.png": b"text", "c.png": png(1)[:99]}.items():
        (tmp_path / name).write_bytes(content)
    images = images_data(tmp_path).train()
    for index in range(3):
        with pytest.raises(BadImage):
            images.read(index)


def test_a_share_of_unlabelled_images_is_part_of_a_larger_share(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02d}.png").write_bytes(png(number))
    small, large = (images_data(tmp_path, label_fraction=share).train() for share in (0.25, 0.5))
    assert (len(small), len(large)) == (5, 10)
    assert {small.name(index) for index in range(5)} < {large.name(index) for index in range(10)}
    with pytest.raises(OptionError, match=r"^data\.classes: the images have no classes"):
        images_data(tmp_path, classes=["a"]).train()
