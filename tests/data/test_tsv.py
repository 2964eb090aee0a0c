"""TSV files: the images of folders again, line indexes made when missing, labels by number, name and chunk, mistakes with their line."""

import base64
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from esvit.data.base import BadImage
from esvit.data.folder import FolderData
from esvit.data.index import IndexCache
from esvit.data.loading import TrainLoader
from esvit.data.tsv import TsvData
from esvit.data.tsv_files import line_starts
from esvit.errors import OptionError
from tests.data.pictures import CornerAndNoise, data_options, picture, png, write_classes


def tsv_data(root: Path, **changed) -> TsvData:
    return TsvData(**data_options(root=str(root), label_map=None, open_files=4) | changed)


def write_tsv(path: Path, rows: list[tuple], end: str = "\n") -> None:
    """Rows of key, label and a picture's number, or the bytes of the image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for key, label, image in rows:
        content = png(image) if isinstance(image, int) else image
        lines.append(f"{key}\t{label}\t{base64.b64encode(content).decode()}")
    path.write_bytes(("\n".join(lines) + end).encode())


def test_views_are_bit_identical_to_those_of_the_same_images_in_folders(tmp_path):
    files = write_classes(tmp_path / "folders", {"a": 3, "b": 4})
    write_tsv(
        tmp_path / "tsv" / "train.tsv", [(file.stem + file.parent.name, "ab".index(file.parent.name), file.read_bytes()) for file in files]
    )
    sets = [FolderData(**data_options(root=str(tmp_path / "folders"))).train(), tsv_data(tmp_path / "tsv").train()]
    assert np.array_equal(sets[0].labels, sets[1].labels)
    ours, theirs = (
        next(TrainLoader(images=images, transform=CornerAndNoise(), batch_size=7, workers=0, seed=3, rank=0, world_size=1, accumulation=1,
                         max_bad_fraction=0.1).from_step(2)) for images in sets
    )  # fmt: skip
    assert all(crop.equal(other) for crop, other in zip(ours.crops, theirs.crops, strict=True))


@pytest.mark.parametrize("end", ["\n", "", "\r\n"])
def test_a_missing_line_index_is_made_beside_the_file(tmp_path, end):
    write_tsv(tmp_path / "train.tsv", [("a", 0, 1), ("b", 1, 2)], end=end)
    images = tsv_data(tmp_path).train()
    lines = (tmp_path / "train.tsv").read_bytes().splitlines(keepends=True)
    assert (tmp_path / "train.lineidx").read_text().split() == ["0", str(len(lines[0]))]
    again = tsv_data(tmp_path).train()
    for each in (images, again):
        assert len(each) == 2
        assert each.read(1).tobytes() == picture(2).tobytes()
    assert sorted(os.listdir(tmp_path)) == ["train.lineidx", "train.tsv"]
    assert images.name(1) == "train.tsv line 2 (b)"


def test_where_the_folder_cannot_be_written_to_the_line_index_goes_to_the_cache(tmp_path, monkeypatch):
    write_tsv(tmp_path / "set" / "train.tsv", [("a", 0, 1), ("b", 1, 2)])
    path, cache = str(tmp_path / "set" / "train.tsv"), IndexCache(str(tmp_path / "cache"))

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("esvit.data.tsv_files.write_atomically", refuse)  # root may write anywhere
    starts = line_starts(path, index=cache, option="data.root")
    assert not (tmp_path / "set" / "train.lineidx").exists()
    assert np.array_equal(cache.load("lineidx", path)["starts"], starts)
    monkeypatch.setattr("esvit.data.tsv_files._find_starts", lambda *_: pytest.fail("searched again"))
    assert np.array_equal(line_starts(path, index=cache, option="data.root"), starts)


def test_several_processes_may_make_the_line_index_at_once(tmp_path):
    write_tsv(tmp_path / "train.tsv", [(f"k{number}", 0, b"x" * 50) for number in range(2000)])
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=tsv_data(tmp_path).train) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(os.listdir(tmp_path)) == ["train.lineidx", "train.tsv"]
    assert len((tmp_path / "train.lineidx").read_text().splitlines()) == 2000


def test_a_line_list_chooses_rows(tmp_path):
    write_tsv(tmp_path / "train.tsv", [("a", 0, 1), ("b", 1, 2), ("c", 0, 3)])
    (tmp_path / "train.linelist").write_text("2\n0\n")
    images = tsv_data(tmp_path).train()
    assert images.labels.tolist() == [0, 0]
    assert [images.name(index) for index in range(2)] == ["train.tsv line 1 (a)", "train.tsv line 3 (c)"]
    (tmp_path / "train.linelist").write_text("0\n3\n")
    with pytest.raises(OptionError, match=r"train\.linelist line 2 names row 3, [^\n]* has 3"):
        tsv_data(tmp_path).train()
    (tmp_path / "train.linelist").write_text("0\nx\n")
    with pytest.raises(OptionError, match=r"train\.linelist line 2 is no number: 'x'"):
        tsv_data(tmp_path).train()


def test_names_are_looked_up_in_the_label_map(tmp_path):
    rows = [("a", json.dumps([{"class": "cat", "rect": [0, 0]}]), 1), ("b", "dog", 2), ("c", json.dumps([{"class": "cat"}]), 3)]
    write_tsv(tmp_path / "train.tsv", rows)
    (tmp_path / "map.txt").write_text("dog\t0\ncat\t1\n")
    images = tsv_data(tmp_path, label_map="map.txt").train()
    assert images.labels.tolist() == [1, 0, 1]
    assert images.class_names == ["dog", "cat"]
    assert len(tsv_data(tmp_path, label_map="map.txt", classes=["cat"]).train()) == 2


def test_chunks_label_rows_without_reading_them_and_leave_out_unknown_classes(tmp_path):
    write_tsv(tmp_path / "train.tsv", [(key, "no label", number) for number, key in enumerate("abcde")])
    (tmp_path / "map.txt").write_text("dog\t0\ncat\t1\n")
    (tmp_path / "train.chunks").write_text(json.dumps({"cat": [0, 1], "fish": [2, 2], "dog": [3, 4]}))
    images = tsv_data(tmp_path, label_map="map.txt").train()
    assert images.labels.tolist() == [1, 1, 0, 0]
    assert images.read(2).tobytes() == picture(3).tobytes()
    for chunks, found in [
        ({"cat": [0, 5]}, "class 'cat' has rows 0 to 5, there are 5"),
        ({"cat": [0, 2], "dog": [2, 3]}, "another chunk too"),
        ([1], "no JSON of classes"),
    ]:
        (tmp_path / "train.chunks").write_text(json.dumps(chunks))
        with pytest.raises(OptionError, match=rf"train\.chunks[^\n]*{found}"):
            tsv_data(tmp_path, label_map="map.txt").train()


def test_a_folder_of_files_is_one_set_in_the_order_of_their_names_with_few_of_them_open(tmp_path):
    for file in range(6):  # written in another order than that of their names
        write_tsv(
            tmp_path / "train" / f"part{5 - file}.tsv", [(f"{file}{row}", 5 - file, 10 * (5 - file) + row) for row in range(1 + file % 2)]
        )
    images = tsv_data(tmp_path, open_files=2).train()
    expected = [(part, row) for part in range(6) for row in range(1 + (5 - part) % 2)]
    assert images.labels.tolist() == [part for part, _ in expected]
    assert images.chunk_ends.tolist() == np.cumsum([2, 1, 2, 1, 2, 1]).tolist()
    before = len(os.listdir("/proc/self/fd"))
    for index in np.random.default_rng(0).permutation(len(images)):
        part, row = expected[index]
        assert images.read(int(index)).tobytes() == picture(10 * part + row).tobytes()
        assert images.name(int(index)).startswith(f"train/part{part}.tsv line {row + 1} ")
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    again = pickle.loads(pickle.dumps(images))
    assert again.read(3).tobytes() == images.read(3).tobytes()


def test_forked_processes_read_through_one_open_file_without_disturbing_each_other(tmp_path):
    write_tsv(tmp_path / "train.tsv", [(f"k{number}", 0, number) for number in range(20)])
    images = tsv_data(tmp_path).train()
    images.read(0)  # opens the file before the fork
    loader = TrainLoader(images=images, transform=CornerAndNoise(), batch_size=5, workers=2, seed=0, rank=0, world_size=1, accumulation=1,
                         max_bad_fraction=0.0)  # fmt: skip
    stream = loader.from_step(0)
    for _ in range(8):
        views = next(stream)
        assert not views.bad_images
        for index, corner in zip(views.indices.tolist(), views.crops[0], strict=True):
            assert np.array_equal(corner.permute(1, 2, 0).numpy(), np.asarray(picture(index))[:4, :4])


def test_validation_takes_the_classes_of_training(tmp_path):
    write_tsv(tmp_path / "train.tsv", [("a", 0, 1), ("b", 2, 2)])
    assert tsv_data(tmp_path).validation() is None
    write_tsv(tmp_path / "val.tsv", [("c", 1, 3)])
    validation = tsv_data(tmp_path).validation()
    assert validation.class_names == tsv_data(tmp_path).train().class_names == ["0", "1", "2"]
    write_tsv(tmp_path / "other" / "val.tsv", [("c", 1, 3), ("d", 3, 3)])
    with pytest.raises(OptionError, match=r"^data\.val_root: [^\n]*val\.tsv line 2 has label 3, data\.root has 3 classes"):
        _ = tsv_data(tmp_path, val_root=str(tmp_path / "other")).validation().labels


def test_unreadable_rows_are_bad_images(tmp_path):
    write_tsv(tmp_path / "train.tsv", [("a", 0, 1), ("b", 0, b""), ("c", 0, b"no image"), ("d", 0, png(1)[:99])])
    with open(tmp_path / "train.tsv", "a") as file:
        file.write("e\t0\t!!not base64!!\nf\t0\n\n")
    images = tsv_data(tmp_path).train()
    assert len(images) == 7
    images.read(0)
    for index in range(1, 7):
        with pytest.raises(BadImage):
            images.read(index)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (("b", "cat", 2), r"line 2 has 'cat' for a label, which is no number; [^\n]*data\.label_map"),
        (("b", -1, 2), r"line 2 has '-1' for a label"),
        (("a", 1, 2), r"line 2 gives its key label 1, line 1 gave it 0"),
    ],
)
def test_a_wrong_label_is_named_by_file_and_line_once_labels_are_asked_for(tmp_path, row, found):
    write_tsv(tmp_path / "train.tsv", [("a", 0, 1), row])
    images = tsv_data(tmp_path).train()
    with pytest.raises(OptionError, match=rf"^data\.root: [^\n]*train\.tsv {found}"):
        _ = images.labels


def test_a_row_without_columns_is_named_by_file_and_line(tmp_path):
    write_tsv(tmp_path / "train.tsv", [("a", 0, 1)])
    with open(tmp_path / "train.tsv", "a") as file:
        file.write("b\t0\n")
    with pytest.raises(OptionError, match=r"train\.tsv line 2 has 2 columns; rows are key, label and image"):
        _ = tsv_data(tmp_path).train().labels
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.tsv").write_text("one column\n")
    with pytest.raises(OptionError, match=r"train\.tsv line 1 has 1 columns"):  # at once
        tsv_data(tmp_path / "other").train()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("cat 0\n", "line 1 is malformed"),
        ("cat\t0\n\ncat\t1\n", "line 3 gives 'cat' a number again"),
        ("cat\t0\ndog\t0\n", "line 2 gives 'dog' the number of 'cat'"),
        ("dog\t0\n", None),
        ("", "holds no names"),
    ],
)
def test_a_wrong_label_map_is_named_by_file_and_line(tmp_path, content, found):
    write_tsv(tmp_path / "train.tsv", [("a", "dog", 1), ("b", '[{"class": "cat"}]', 1)])
    (tmp_path / "map.txt").write_text(content)
    expected = (
        rf"^data\.label_map: [^\n]*map\.txt'? {found}" if found else r"^data\.root: [^\n]*line 2 is of class 'cat', which [^\n]*map\.txt"
    )
    with pytest.raises(OptionError, match=expected):
        _ = tsv_data(tmp_path, label_map="map.txt").train().labels


def test_missing_empty_and_foreign_files_are_told_apart(tmp_path):
    with pytest.raises(OptionError, match=r"^data\.root: [^\n]*neither train\.tsv nor TSV files in train/"):
        tsv_data(tmp_path).train()
    with pytest.raises(OptionError, match=r"^data\.label_map: file [^\n]*map\.txt' does not exist"):
        write_tsv(tmp_path / "train.tsv", [("a", 0, 1)])
        tsv_data(tmp_path, label_map="map.txt").train()
    (tmp_path / "train.lineidx").write_text("0\n7\n")
    with pytest.raises(OptionError, match=r"train\.lineidx' is not the line index of [^\n]*delete it"):
        tsv_data(tmp_path).train()
    (tmp_path / "train.lineidx").write_text("0\nx7\n")
    with pytest.raises(OptionError, match=r"train\.lineidx line 2 is no number"):
        tsv_data(tmp_path).train()
    (tmp_path / "train.lineidx").unlink()
    (tmp_path / "train.tsv").write_text("")
    with pytest.raises(OptionError, match=r"train\.tsv' is empty"):
        tsv_data(tmp_path).train()
