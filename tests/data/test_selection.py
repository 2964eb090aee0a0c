"""Some of the classes, and a share of each, of any labelled set; channels and depth as options of a set."""

import numpy as np
import pytest
from PIL import Image

from esvit.data.base import BadImage
from esvit.data.folder import FolderData
from esvit.errors import OptionError
from tests.data.pictures import data_options, write_classes


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 8), ("val", 2)):
        write_classes(tmp_path / split, {"ant": count, "bee": count, "cat": count, "dog": count})
    return tmp_path


def folder_data(root, **changed) -> FolderData:
    return FolderData(**data_options(root=str(root / "train"), val_root=str(root / "val")) | changed)


def test_chosen_classes_get_new_numbers_in_the_order_of_the_full_list(root):
    data = folder_data(root, classes=["dog", "bee"])
    for images, count in ((data.train(), 8), (data.validation(), 2)):
        assert images.class_names == ["bee", "dog"]
        assert images.labels.tolist() == [0] * count + [1] * count
        assert images.name(count) == "dog/000.png"


def test_classes_may_come_from_a_text_file(root):
    (root / "some.txt").write_text("dog\n\n bee\n")
    assert folder_data(root, classes=str(root / "some.txt")).train().class_names == ["bee", "dog"]
    with pytest.raises(OptionError, match=r"^data\.classes: there is no file 'dog'; give names as in data\.classes=\[cat,dog\]"):
        folder_data(root, classes="dog").train()


@pytest.mark.parametrize(
    ("classes", "found"), [(["fly"], "'fly' is none of the 4 classes \\('ant' to 'dog'\\)"), ([], "no class is named")]
)
def test_unknown_classes_and_none_at_all_are_refused(root, classes, found):
    with pytest.raises(OptionError, match=rf"^data\.classes: {found}"):
        folder_data(root, classes=classes).train()


def test_a_share_of_the_labels_is_a_share_of_every_training_class_and_of_no_validation_class(root):
    data = folder_data(root, label_fraction=0.25)
    assert np.bincount(data.train().labels).tolist() == [2, 2, 2, 2]
    assert len(data.validation()) == 8
    assert len(folder_data(root, label_fraction=0.001).train()) == 4  # at least one of each


def test_fewer_classes_have_the_images_that_they_have_among_all(root):
    def names(**changed):
        images = folder_data(root, label_fraction=0.25, **changed).train()
        return [images.name(index) for index in range(len(images))]

    assert names(classes=["cat"]) == [name for name in names() if name.startswith("cat")]


def test_images_of_other_channels_and_depths_are_arrays_in_subsets_too(root):
    deep = np.full((5, 7), 51400, dtype=np.uint16)
    Image.fromarray(deep).save(root / "train" / "ant" / "000.png")
    images = folder_data(root, channels=1, depth=16, classes=["ant"]).train()
    assert images.pixels.channels == 1 and images.pixels.depth == 16
    assert images.read(0).dtype == np.uint16 and images.read(0).shape == (5, 7, 1)
    assert images.read(0).max() == 51400
    assert images.read(1).shape == (16, 20, 1)
    assert folder_data(root, classes=["ant"]).train().read(0).getpixel((0, 0)) == (200, 200, 200)


def test_images_above_the_limit_are_bad_ones(root):
    with pytest.raises(BadImage, match="20 x 16 pixels are more than data.max_pixels=319"):
        folder_data(root, max_pixels=319).train().read(0)
    with pytest.raises(BadImage, match="more than data.max_pixels=319"):
        folder_data(root, max_pixels=319).validation().read(0, len)
    folder_data(root, max_pixels=320).train().read(0)


def test_arrays_in_npy_files_are_images_only_where_images_are_arrays(root):
    np.save(root / "train" / "ant" / "six.npy", np.zeros((4, 4, 6), np.uint8))
    assert len(folder_data(root).train()) == 32
    six = folder_data(root, channels=6).train()
    assert len(six) == 33
    assert six.read(8).shape == (4, 4, 6)
