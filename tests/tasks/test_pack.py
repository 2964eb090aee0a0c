"""task=pack: any format to tar shards, whole or going on after a kill; nothing lost, nothing overwritten."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from esvit.data.base import ImageSet
from esvit.data.folder import FolderData
from esvit.data.patches import PhotoPatches
from esvit.data.shards import ShardsData
from esvit.errors import OptionError
from esvit.tasks.pack import Pack
from tests.data.pictures import data_options, png, write_classes


@pytest.fixture
def files(tmp_path):
    write_classes(tmp_path / "images" / "val", {"cat": 2, "dog": 1})
    return write_classes(tmp_path / "images" / "train", {"cat": 7, "dog": 4})


def packed(tmp_path, *, folder="packed", shard_images=None, shard_mb=256.0, **data) -> Path:
    """The folder that the task leaves."""
    images = {"root": str(tmp_path / "images" / "train"), "val_root": str(tmp_path / "images" / "val")}
    task = Pack(data=FolderData(**data_options(**images, **data)), shard_images=shard_images, shard_mb=shard_mb, verify=True,
                folder=str(tmp_path / folder))  # fmt: skip
    task.run()
    return tmp_path / folder


def opened(folder: Path) -> ImageSet:
    return ShardsData(cache=str(folder / "cache"), cache_gb=1.0, **data_options(root=str(folder))).train()


def test_shards_hold_the_same_files_labels_and_classes_in_the_same_order(tmp_path, files, capsys):
    folder = packed(tmp_path, shard_images=4)
    images = opened(folder / "train")
    assert [images.encoded(i) for i in range(11)] == [file.read_bytes() for file in files]
    assert images.labels.tolist() == [0] * 7 + [1] * 4
    assert images.class_names == ["cat", "dog"]
    assert images.chunk_ends.tolist() == [4, 8, 11]
    assert images.name(9) == "train-000002.tar@/000000009-002.png"
    assert opened(folder / "val").labels.tolist() == [0, 0, 1]
    assert (folder / "train" / "shards.txt").read_text().split() == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert not (folder / "train" / "bad_images.txt").exists()
    *_, command = capsys.readouterr().out.splitlines()
    assert command == f"to use them: python run.py data=shards data.root={folder}/train data.val_root={folder}/val"


def test_a_shard_is_of_the_size_asked_for(tmp_path, files):
    sizes = [len(png(i)) for i in range(11)]
    folder = packed(tmp_path, shard_mb=3.5 * (np.mean(sizes) + 1536) / 1e6)
    assert opened(folder / "train").chunk_ends.tolist() == [3, 6, 9, 11]


def test_a_part_of_the_images_and_images_without_files_can_be_packed(tmp_path, files):
    folder = packed(tmp_path, classes=["dog"], label_fraction=0.5)
    images = opened(folder / "train")
    assert images.labels.tolist() == [0, 0] and images.class_names == ["dog"]
    data = PhotoPatches(patch_size=20, train_patches_per_photo=1, val_patches_per_photo=1, **data_options(workers=2))
    Pack(data=data, shard_images=5, shard_mb=1.0, verify=True, folder=str(tmp_path / "patches")).run()
    images, patches = opened(tmp_path / "patches" / "train"), data.train()
    assert images.labels.tolist() == patches.labels.tolist() and images.class_names == patches.class_names
    for i in (0, 13, 20):
        assert images.encoded(i).startswith(b"\x89PNG")
        assert images.read(i).tobytes() == patches.read(i).tobytes()


def test_images_that_cannot_be_read_are_left_out_and_listed(tmp_path, files, capsys):
    files[1].write_bytes(b"")
    files[8].write_bytes(png(8)[:200])
    folder = packed(tmp_path, shard_images=4)
    assert (folder / "train" / "bad_images.txt").read_text() == "cat/001.png\ndog/001.png\n"
    images = opened(folder / "train")
    assert [images.encoded(i) for i in range(9)] == [files[i].read_bytes() for i in (0, 2, 3, 4, 5, 6, 7, 9, 10)]
    assert images.labels.tolist() == [0] * 6 + [1] * 3
    assert "left out 2 that cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_packing_that_was_killed_goes_on_with_what_is_missing(tmp_path, files, capsys, workers):
    whole = packed(tmp_path, shard_images=2, folder="whole")
    folder = packed(tmp_path, shard_images=2)
    train = folder / "train"
    lines = (train / "packing.jsonl").read_text().splitlines(keepends=True)
    (train / "packing.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # the line of shard 3 was cut off
    (train / "train-000005.tar").unlink()
    (train / "shards.txt").unlink()
    kept = (train / "train-000001.tar").stat().st_mtime_ns
    capsys.readouterr()
    assert packed(tmp_path, shard_images=2, workers=workers) == folder
    assert "train  goes on after 6 images" in capsys.readouterr().out
    assert (train / "train-000001.tar").stat().st_mtime_ns == kept
    for shard in sorted((whole / "train").glob("*.tar")):
        assert (train / shard.name).read_bytes() == shard.read_bytes()
    assert (train / "shards.txt").read_text() == (whole / "train" / "shards.txt").read_text()
    assert sorted(path.name for path in train.iterdir()) == sorted(path.name for path in (whole / "train").iterdir())
    kept = [path.stat().st_mtime_ns for path in sorted(train.iterdir())]
    packed(tmp_path, shard_images=2, workers=1)  # there is nothing to do
    assert kept == [path.stat().st_mtime_ns for path in sorted(train.iterdir())]


def test_a_folder_with_anything_else_is_left_alone(tmp_path, files):
    (tmp_path / "packed" / "train").mkdir(parents=True)
    (tmp_path / "packed" / "train" / "file").write_text("precious")
    with pytest.raises(OptionError, match=r"^output_dir: '[^']*/packed/train' exists and is no packing of ours"):
        packed(tmp_path)
    with pytest.raises(OptionError, match=r"^output_dir: '[^']*' holds other things \('images'\)"):
        packed(tmp_path, folder=".")
    packed(tmp_path, shard_images=4, folder="other")
    for change, what in (({"shard_images": 5}, "images_per_shard"), ({"label_fraction": 0.5}, "source, images")):
        with pytest.raises(OptionError, match=rf"^output_dir: .*other images, or of other options \({what}[^)]* differ\)"):
            packed(tmp_path, folder="other", **({"shard_images": 4} | change))
    with pytest.raises(OptionError, match=r"^task\.shard_images: 0"):
        packed(tmp_path, shard_images=0, folder="third")
    with pytest.raises(OptionError, match=r"^task\.shard_mb: -1"):
        packed(tmp_path, shard_mb=-1, folder="third")
    assert not (tmp_path / "third").exists()


def test_shards_are_what_any_tar_program_reads(tmp_path, files):
    folder = packed(tmp_path)
    with tarfile.open(folder / "train" / "train-000000.tar") as archive:
        names = archive.getnames()
    assert names[:4] == ["000000000-000.png", "000000000-000.cls", "000000001-001.png", "000000001-001.cls"]
    assert json.loads((folder / "train" / "packing.json").read_text())["images"] == 11
