"""Folders of images: order, labels, and what is told when there is nothing to read."""

import pytest

from esvit.data.base import BadImage
from esvit.data.folder import FolderData
from esvit.errors import OptionError
from tests.data.pictures import data_options, picture, write_classes


def folder_data(root, val_root=None):
    return FolderData(**data_options(root=None if root is None else str(root), val_root=None if val_root is None else str(val_root)))


def test_classes_and_files_come_in_sorted_order_with_their_labels(tmp_path):
    write_classes(tmp_path, {"dog": 2, "cat": 3})
    (tmp_path / "cat" / "deep" / "er").mkdir(parents=True)
    picture(9).save(tmp_path / "cat" / "deep" / "er" / "X.JPEG", "JPEG")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    images = folder_data(tmp_path).train()
    assert [images.name(index) for index in range(len(images))] == [
        "cat/000.png", "cat/001.png", "cat/002.png", "cat/deep/er/X.JPEG", "dog/000.png", "dog/001.png",
    ]  # fmt: skip
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert images.labels.dtype == "int64"
    assert images.class_names == ["cat", "dog"]


def test_pixels_are_those_of_the_file_in_rgb(tmp_path):
    write_classes(tmp_path, {"a": 2})
    picture(5).convert("L").save(tmp_path / "a" / "zz.png")
    images = folder_data(tmp_path).train()
    assert images.read(1).tobytes() == picture(2).tobytes()
    assert images.read(2).mode == "RGB"


@pytest.mark.parametrize("nested", [False, True])
def test_images_directly_in_the_root_make_an_unlabelled_set(tmp_path, nested):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    if nested:
        write_classes(tmp_path / "more", {"inner": 2})
    images = folder_data(tmp_path).train()
    assert images.labels is None
    assert images.class_names == []
    assert len(images) == (5 if nested else 3)


def test_validation_labels_follow_the_training_classes_by_name(tmp_path):
    write_classes(tmp_path / "train", {"a": 1, "b": 1, "c": 1})
    write_classes(tmp_path / "val", {"a": 1, "c": 2})
    validation = folder_data(tmp_path / "train", tmp_path / "val").validation()
    assert validation.labels.tolist() == [0, 2, 2]
    assert validation.class_names == ["a", "b", "c"]


def test_an_unknown_validation_class_names_its_option(tmp_path):
    write_classes(tmp_path / "train", {"a": 1})
    write_classes(tmp_path / "val", {"a": 1, "b": 1})
    with pytest.raises(OptionError, match=r"^data\.val_root: class folder 'b' is not among the 1 classes"):
        folder_data(tmp_path / "train", tmp_path / "val").validation()


def test_without_val_root_there_is_no_validation_set(tmp_path):
    write_classes(tmp_path, {"a": 1})
    assert folder_data(tmp_path).validation() is None


def test_a_root_of_splits_suggests_the_split_folders(tmp_path):
    write_classes(tmp_path / "train", {"a": 1})
    write_classes(tmp_path / "val", {"a": 1})
    with pytest.raises(OptionError) as caught:
        folder_data(tmp_path).train()
    assert f"data.root={tmp_path}/train data.val_root={tmp_path}/val" in str(caught.value)


def test_missing_file_empty_and_imageless_roots_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    for root, found in [(None, "no folder"), (tmp_path / "nowhere", "does not exist"), (tmp_path / "file", "is a file"),
                        (tmp_path / "empty", "holds no images")]:  # fmt: skip
        with pytest.raises(OptionError, match=rf"^data\.root: [^\n]*{found}[^\n]*$"):
            folder_data(root).train()


def test_a_missing_validation_folder_names_its_own_option(tmp_path):
    write_classes(tmp_path, {"a": 1})
    with pytest.raises(OptionError, match=r"^data\.val_root: folder [^\n]* does not exist"):
        folder_data(tmp_path, tmp_path / "nowhere").validation()


@pytest.mark.parametrize("content", [b"", b"this is no image", "truncated", "vanished"])
def test_an_unreadable_file_is_a_bad_image(tmp_path, content):
    (file,) = write_classes(tmp_path, {"a": 1})
    images = folder_data(tmp_path).train()
    if content == "vanished":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:200] if content == "truncated" else content)
    with pytest.raises(BadImage):
        images.read(0)
