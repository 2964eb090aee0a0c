"""OpenImages: rows by a line index that repeats them, and several tags an image."""

import json

import numpy as np
import pytest

from esvit.data.base import BadImage
from esvit.data.openimages import OpenImagesData
from esvit.data.subsets import Subset
from esvit.errors import OptionError
from esvit.evaluation.splits import labelled_splits
from tests.data.pictures import data_options, picture
from tests.data.test_tsv import write_tsv


@pytest.fixture
def root(tmp_path):
    write_tsv(tmp_path / "train.tsv", [("k0", "x", 0), ("k1", "x", 1), ("k2", "x", 2)])
    starts = np.cumsum([0, *map(len, (tmp_path / "train.tsv").read_bytes().splitlines(keepends=True))])
    (tmp_path / "balanced.lineidx").write_text("".join(f"{starts[row]}\n" for row in (2, 0, 2, 1)))
    (tmp_path / "tags.txt").write_text("cat\ndog\n/m/01\nfish\n")
    records = json.dumps([{"class": "fish"}, {"class": "-cat"}, {"class": "unknown"}])
    (tmp_path / "labels.tsv").write_text(f"k2\t{records}\nk1\tdog;-fish;/m/01\n")
    return tmp_path


def openimages(root, **changed) -> OpenImagesData:
    options = {"line_index": "balanced.lineidx", "label_file": "labels.tsv", "label_map": "tags.txt"}
    return OpenImagesData(**data_options(root=str(root)) | options | changed)


def test_rows_come_as_often_as_the_line_index_names_them(root):
    images = openimages(root).train()
    assert [images.name(index) for index in range(4)] == [f"train.tsv@k{row}" for row in (2, 0, 2, 1)]
    assert images.read(2).tobytes() == picture(2).tobytes()
    assert len(openimages(root, line_index=None).train()) == 3
    assert (root / "train.lineidx").exists()


def test_targets_have_one_element_for_each_tag_and_ones_for_the_verified_ones(root):
    images = openimages(root).train()
    assert images.labels is None
    assert images.class_names == ["cat", "dog", "/m/01", "fish"]
    assert [images.targets(index).tolist() for index in range(4)] == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0]]
    assert images.targets(0).dtype == np.float32
    assert Subset(images, np.array([3])).targets(0).tolist() == [0, 1, 1, 0]


def test_without_a_label_file_there_are_no_targets(root):
    (root / "labels.tsv").unlink()
    with pytest.raises(OptionError, match=r"^data\.label_file: file [^\n]* does not exist; give another, or data\.label_file=null"):
        openimages(root).train()
    images = openimages(root, label_file=None).train()
    assert images.targets(0) is None and images.class_names == []


def test_evaluations_say_that_they_need_single_labels(root):
    with pytest.raises(OptionError, match=r"^data\.val_root: is not used: k-NN needs one label per image"):
        openimages(root, val_root="x")
    with pytest.raises(OptionError, match=r"^data\.root: its images may have several labels each, the evaluation needs one of each"):
        labelled_splits(openimages(root))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("k1\tdog\nk2\n", "line 2 is malformed"),
        ("k1\tdog\tmore\n", "line 1 is malformed"),
        ("k1\t[1]\n", "line 1 is malformed"),
        ("k1\tdog\n\nk1\tdog\n", "line 3 gives 'k1' tags again, after line 1"),
    ],
)
def test_a_wrong_line_of_labels_is_named_by_file_and_number(root, text, found):
    (root / "labels.tsv").write_text(text)
    with pytest.raises(OptionError, match=rf"^data\.label_file: [^\n]*labels\.tsv {found}"):
        openimages(root).train().targets(0)


def test_wrong_maps_and_line_indexes_are_told(root):
    (root / "tags.txt").write_text("cat\n\ncat\n")
    with pytest.raises(OptionError, match=r"^data\.label_map: [^\n]*tags\.txt line 3 names 'cat' again"):
        openimages(root).train()
    with pytest.raises(OptionError, match=r"^data\.label_map: file [^\n]*nowhere' does not exist"):
        openimages(root, label_map="nowhere").train()
    (root / "tags.txt").write_text("cat\n")
    for text, found in [("0\n5\n", "names a byte at which no row"), ("0\n99999999\n", "line 2 names a byte"), ("", "names no rows")]:
        (root / "balanced.lineidx").write_text(text)
        with pytest.raises(OptionError, match=rf"^data\.line_index: [^\n]*balanced\.lineidx'? {found}"):
            openimages(root).train()


def test_a_row_without_an_image_is_a_bad_one(root):
    write_tsv(root / "train.tsv", [("k0", "x", b"no image"), ("k1", "x", b"")])
    images = openimages(root, line_index=None).train()
    for index in (0, 1):
        with pytest.raises(BadImage):
            images.read(index)
