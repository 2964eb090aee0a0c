"""WebVision's lists: Google's before Flickr's, labels from 1000 on left out."""

import pytest

from esvit.data.base import BadImage
from esvit.data.webvision import WebVisionData
from esvit.errors import OptionError
from tests.data.pictures import data_options, picture, png

LISTS = {
    "train_filelist_google.txt": "google/q0001/a.jpg 0\ngoogle/q0002/b c.jpg 999\ngoogle/q0003/d.jpg 1000\n",
    "train_filelist_flickr.txt": "flickr/q0001/e.jpg 7\n\n",
    "val_filelist.txt": "val1.jpg 3\n",
}
FILES = ["google/q0001/a.jpg", "google/q0002/b c.jpg", "flickr/q0001/e.jpg", "val_images_256/val1.jpg"]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "info").mkdir()
    for name, text in LISTS.items():
        (tmp_path / "info" / name).write_text(text)
    for number, name in enumerate(FILES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(number))
    return tmp_path


def webvision(root, **changed) -> WebVisionData:
    return WebVisionData(**data_options(root=str(root)) | changed)


def test_the_sets_are_those_of_the_lists(root):
    train, validation = webvision(root).train(), webvision(root).validation()
    assert [train.name(index) for index in range(len(train))] == FILES[:3]
    assert train.labels.tolist() == [0, 999, 7]
    assert train.read(1).tobytes() == picture(1).tobytes()
    assert validation.labels.tolist() == [3]
    assert validation.read(0).tobytes() == picture(3).tobytes()
    assert validation.class_names == train.class_names == [str(number) for number in range(1000)]


def test_classes_are_named_by_the_synsets_where_they_are_present(root):
    (root / "info" / "synsets.txt").write_text("".join(f"n{number:08d} some words\n" for number in range(1000)))
    assert webvision(root, classes=["n00000007"]).train().name(0) == "flickr/q0001/e.jpg"
    (root / "info" / "synsets.txt").write_text("n1 a\nn1 b\n")
    with pytest.raises(OptionError, match=r"synsets\.txt' has 1 different classes instead of 1000"):
        webvision(root).train()


def test_validation_may_be_elsewhere_or_nowhere(root, tmp_path):
    assert len(webvision(root, val_root=str(root)).validation()) == 1
    (root / "info" / "val_filelist.txt").unlink()
    assert webvision(root).validation() is None
    with pytest.raises(OptionError, match=r"^data\.val_root: file [^\n]*val_filelist\.txt' does not exist"):
        webvision(root, val_root=str(root)).validation()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("google/a.jpg\n", r"google\.txt line 1 is malformed: 'google/a\.jpg'"),
        ("\ngoogle/a.jpg x\n", r"google\.txt line 2 is malformed"),
        ("google/a.jpg 1\ngoogle/a.jpg 2\n", r"google\.txt line 2 gives 'google/a\.jpg' label 2, [^\n]*google\.txt line 1 gave it 1"),
        ("flickr/q0001/e.jpg 1\n", r"flickr\.txt line 1 gives 'flickr/q0001/e\.jpg' label 7, [^\n]*google\.txt line 1 gave it 1"),
    ],
)
def test_a_wrong_line_is_named_by_file_and_number(root, text, found):
    (root / "info" / "train_filelist_google.txt").write_text(text)
    with pytest.raises(OptionError, match=rf"^data\.root: [^\n]*{found}"):
        webvision(root).train()


def test_a_missing_list_is_named_and_a_missing_image_is_a_bad_one(root):
    (root / FILES[0]).unlink()
    (root / FILES[1]).write_bytes(b"")
    for index in (0, 1):
        with pytest.raises(BadImage):
            webvision(root).train().read(index)
    (root / "info" / "train_filelist_flickr.txt").unlink()
    with pytest.raises(OptionError, match=r"^data\.root: file [^\n]*flickr\.txt' does not exist"):
        webvision(root).train()
