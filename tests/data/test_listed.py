"""Lists of images as text, CSV and JSONL: the same set from each, and what is said of a line that is wrong."""

import json
from pathlib import Path

import pytest

from esvit.data.base import BadImage
from esvit.data.listed import ListData
from esvit.errors import OptionError
from tests.data.pictures import data_options, picture, png


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, name in enumerate(["a.png", "my cat 1.png", "deep/b.png"]):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(number))
    return tmp_path


def list_data(folder: Path, name: str, text: str, **changed) -> ListData:
    (folder / name).write_text(text)
    options = {"train_list": str(folder / name), "val_list": None, "path_column": "path", "label_column": None}
    return ListData(**data_options(root=str(folder / "images")) | options | changed)


ROWS = [("deep/b.png", "dog"), ("a.png", "cat"), ("my cat 1.png", "dog")]
LABELLED = {
    "tabs.txt": "".join(f"{path}\t{label}\n" for path, label in ROWS),
    "words.lst": "\n".join(f"{path} {label}" for path, label in ROWS),
    "table.csv": "label,path,more\n" + "".join(f"{label},{path},1\n" for path, label in ROWS),
    "quoted.csv": '"path","label"\r\n' + "".join(f'"{path}","{label}"\r\n' for path, label in ROWS),
    "lines.jsonl": "\n".join(json.dumps({"path": path, "label": label, "more": [1]}) for path, label in ROWS) + "\n\n",
}
UNLABELLED = {
    "paths.txt": "".join(f"{path}\n" for path, _ in ROWS),
    "table.csv": "path\n" + "".join(f"{path}\n" for path, _ in ROWS),
    "lines.jsonl": "\n".join(json.dumps({"path": path}) for path, _ in ROWS),
}


@pytest.mark.parametrize("name", LABELLED)
def test_every_kind_of_list_names_the_same_labelled_images_in_its_order(folder, name):
    images = list_data(folder, name, LABELLED[name]).train()
    assert [images.name(index) for index in range(3)] == [path for path, _ in ROWS]
    assert images.labels.tolist() == [1, 0, 1]
    assert images.class_names == ["cat", "dog"]
    assert images.read(2).tobytes() == picture(1).tobytes()


@pytest.mark.parametrize("name", UNLABELLED)
def test_labels_may_be_missing_everywhere(folder, name):
    images = list_data(folder, name, UNLABELLED[name]).train()
    assert [images.name(index) for index in range(3)] == [path for path, _ in ROWS]  # "my cat 1.png" is one path
    assert images.labels is None and images.class_names == []


def test_labels_that_are_all_numbers_are_the_numbers_of_the_classes(folder):
    images = list_data(folder, "x.txt", "a.png\t2\ndeep/b.png\t10\n").train()
    assert images.labels.tolist() == [2, 10]
    assert len(images.class_names) == 11
    assert list_data(folder, "x.jsonl", '{"path": "a.png", "label": 3}').train().labels.tolist() == [3]


def test_columns_have_other_names_on_request(folder):
    text = "file,what\na.png,cat\n"
    images = list_data(folder, "x.csv", text, path_column="file", label_column="what").train()
    assert images.class_names == ["cat"]
    assert list_data(folder, "x.csv", text, path_column="file").train().labels is None


def test_paths_begin_in_the_lists_own_folder_without_a_root_and_absolute_ones_stay(folder):
    assert len(list_data(folder, "x.txt", "images/a.png\n", root=None).train()) == 1
    assert list_data(folder, "x.txt", f"{folder}/images/a.png\n").train().read(0).tobytes() == picture(0).tobytes()


def test_validation_follows_the_classes_of_training(folder):
    (folder / "val.txt").write_text("a.png\tdog\n")
    data = list_data(folder, "x.txt", LABELLED["tabs.txt"], val_list=str(folder / "val.txt"))
    assert data.validation().labels.tolist() == [1]
    assert data.validation().class_names == ["cat", "dog"]
    (folder / "val.txt").write_text("a.png\tdog\na.png\tfish\n")
    with pytest.raises(OptionError, match=r"^data\.val_list: [^\n]*val\.txt line 2 has label 'fish', which data\.train_list does not have"):
        data.validation()
    assert list_data(folder, "x.txt", "a.png\n").validation() is None


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("x.txt", "a.png\tcat\n\na.png\tdog\n", "line 3 gives 'a.png' label dog, line 1 gave it cat"),
        ("x.txt", "a.png\tcat\ndeep/b.png\n", "line 2 has no label, others have one"),
        ("x.txt", "a.png\ndeep/b.png\tcat\n", "line 2 has a label, others have none"),
        ("x.txt", "a.png\tcat\tmore\n", "line 1 has 3 columns"),
        ("x.txt", "\tcat\n", "line 1 has no path"),
        ("x.txt", "\n", "names no images"),
        ("x.csv", "file,label\na.png,cat\n", "line 1 has no column 'path' but file, label"),
        ("x.csv", "", "line 1 has no column 'path' but nothing"),
        ("x.csv", "path,label\na.png,cat\na.png\n", "line 3 has 1 columns, line 1 has 2"),
        ("x.jsonl", '{"path": "a.png"}\nnonsense\n', "line 2 is no JSON"),
        ("x.jsonl", '{"file": "a.png"}\n', "line 1 has no text field 'path'"),
        ("x.jsonl", '{"path": "a.png", "label": [1]}\n', r"line 1 has the label \[1\]"),
    ],
)
def test_a_wrong_line_is_named_by_file_and_number(folder, name, text, found):
    with pytest.raises(OptionError, match=rf"^data\.train_list: [^\n]*{name}'? {found}[^\n]*$"):
        list_data(folder, name, text).train()


def test_a_missing_column_that_was_asked_for_is_told(folder):
    with pytest.raises(OptionError, match="line 1 has no column 'what' but path, label"):
        list_data(folder, "x.csv", "path,label\na.png,cat\n", label_column="what").train()
    with pytest.raises(OptionError, match="line 1 has no field 'what'"):
        list_data(folder, "x.jsonl", '{"path": "a.png"}', label_column="what").train()


def test_a_missing_list_and_a_wrong_root_are_told_apart(folder):
    with pytest.raises(OptionError, match=r"^data\.train_list: file [^\n]*nowhere' does not exist"):
        list_data(folder, "x.txt", "a.png\n", train_list=str(folder / "nowhere")).train()
    with pytest.raises(OptionError, match=r"^data\.root: 'images/a\.png' of [^\n]* is not in [^\n]*images'"):
        list_data(folder, "x.txt", "images/a.png\n").train()
    with pytest.raises(OptionError, match=r"^data\.val_list: is not given, but data\.val_root is"):
        list_data(folder, "x.txt", "a.png\n", val_root="x")


def test_a_listed_file_that_is_missing_or_damaged_is_a_bad_image(folder):
    (folder / "images" / "bad.png").write_bytes(png(1)[:100])
    images = list_data(folder, "x.txt", "a.png\nbad.png\ngone.png\n").train()
    images.read(0)
    for index in (1, 2):
        with pytest.raises(BadImage):
            images.read(index)
