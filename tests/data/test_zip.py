"""The original's zip layout: same images as from folders, and clear words about damage."""

import pickle
import zipfile

import numpy as np
import pytest

from esvit.data.base import BadImage
from esvit.data.folder import FolderData
from esvit.data.loading import TrainLoader
from esvit.data.zip import ZipData
from esvit.errors import OptionError
from tests.data.pictures import CornerAndNoise, data_options, picture, png, write_classes

OPTIONS = {name: value for name, value in data_options().items() if name != "root"}


def write_zip(folder, split, files, compression=zipfile.ZIP_DEFLATED, lines=None):
    """`files` maps the path in the archive to (content, label)."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{split}.zip", "w", compression) as archive:
        for name, (content, _) in files.items():
            archive.writestr(name, content)
    lines = lines if lines is not None else [f"{split}.zip@/{name}\t{label}" for name, (_, label) in files.items()]
    (folder / f"{split}_map.txt").write_text("".join(f"{line}\n" for line in lines))


def labels_of(images) -> list[int]:
    return images.labels.tolist()


def zip_images(folder):
    return ZipData(root=str(folder), **OPTIONS).train()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_views_are_bit_identical_to_those_of_the_same_images_in_folders(tmp_path, compression):
    files = write_classes(tmp_path / "folders", {"a": 3, "b": 4})
    names = [str(file.relative_to(tmp_path / "folders")) for file in files]
    members = {name: (file.read_bytes(), "ab".index(name[0])) for name, file in zip(names, files, strict=True)}
    write_zip(tmp_path / "zips", "train", members, compression)
    sets = [FolderData(root=str(tmp_path / "folders"), **OPTIONS).train(), zip_images(tmp_path / "zips")]
    assert np.array_equal(sets[0].labels, sets[1].labels)
    ours, theirs = (
        next(TrainLoader(images=images, transform=CornerAndNoise(), batch_size=7, workers=0, seed=3, rank=0, world_size=1, accumulation=1,
                         max_bad_fraction=0.1).from_step(2)) for images in sets
    )  # fmt: skip
    assert all(crop.equal(other) for crop, other in zip(ours.crops, theirs.crops, strict=True))
    assert ours.indices.equal(theirs.indices)


def test_samples_follow_the_archive_and_skip_what_the_original_skips(tmp_path):
    files = {name: (png(number), number) for number, name in enumerate(["z.png", "a/b@c.PNG", ".hidden.png", "note.txt", "unmapped.png"])}
    files["empty.png"] = (b"", 0)
    lines = ["", "x@/z.png\t1\tmore\tcolumns", "y@a/b@c.PNG\t0", "x@/.hidden.png\t0", "x@/note.txt\t0", "x@/empty.png\t0", "x@/gone.png\t0"]
    write_zip(tmp_path, "train", files, lines=lines)
    images = zip_images(tmp_path)
    assert [images.name(index) for index in range(len(images))] == ["train.zip@/z.png", "train.zip@/a/b@c.PNG"]
    assert images.labels.tolist() == [1, 0]
    assert images.class_names == ["0", "1"]
    assert images.read(1).tobytes() == picture(1).tobytes()


def test_an_open_archive_survives_pickling(tmp_path):
    write_zip(tmp_path, "train", {"a.png": (png(1), 0), "b.png": (png(2), 0)})
    images = zip_images(tmp_path)
    images.read(0)
    assert pickle.loads(pickle.dumps(images)).read(1).tobytes() == picture(2).tobytes()


def test_validation_is_found_beside_the_training_archive_or_in_val_root(tmp_path):
    write_zip(tmp_path / "a", "train", {"a.png": (png(1), 0), "b.png": (png(2), 3)})
    assert ZipData(root=str(tmp_path / "a"), **OPTIONS).validation() is None
    write_zip(tmp_path / "b", "val", {"v.png": (png(7), 3)})
    options = {**OPTIONS, "val_root": str(tmp_path / "b")}
    assert labels_of(ZipData(root=str(tmp_path / "a"), **options).validation()) == [3]
    write_zip(tmp_path / "a", "val", {"v.png": (png(7), 2)})
    validation = ZipData(root=str(tmp_path / "a"), **OPTIONS).validation()
    assert labels_of(validation) == [2]
    assert validation.class_names == ["0", "1", "2", "3"]  # those of training
    assert labels_of(ZipData(root=str(tmp_path / "a"), **{**OPTIONS, "classes": [3, 2]}).validation()) == [0]
    write_zip(tmp_path / "a", "val", {"v.png": (png(7), 4)})
    with pytest.raises(OptionError, match=r"^data\.val_root: [^\n]*val\.zip' has label 4, data\.root has 4 classes"):
        ZipData(root=str(tmp_path / "a"), **OPTIONS).validation()


@pytest.mark.parametrize("line", ["a.png\t0", "x@/a.png", "x@/a.png\tcat", "x@/a.png\t-1", "x@/a.png 0"])
def test_a_malformed_line_is_named_by_file_and_number(tmp_path, line):
    write_zip(tmp_path, "train", {"a.png": (png(1), 0)}, lines=["x@/a.png\t0", "", line])
    with pytest.raises(OptionError, match=r"^data\.root: [^\n]*train_map\.txt line 3 is malformed[^\n]*$"):
        zip_images(tmp_path)


def test_conflicting_labels_are_named_by_file_and_number(tmp_path):
    write_zip(tmp_path, "train", {"a.png": (png(1), 0)}, lines=["x@/a.png\t0", "x@/a.png\t0", "y@a.png\t1"])
    with pytest.raises(OptionError, match=r"train_map\.txt line 3 gives 'a\.png' label 1, an earlier line 0"):
        zip_images(tmp_path)


@pytest.mark.parametrize("missing", ["train.zip", "train_map.txt"])
def test_a_missing_file_is_named(tmp_path, missing):
    write_zip(tmp_path, "train", {"a.png": (png(1), 0)})
    (tmp_path / missing).unlink()
    with pytest.raises(OptionError, match=rf"^data\.root: file [^\n]*{missing}' does not exist[^\n]*$"):
        zip_images(tmp_path)


def test_an_archive_without_mapped_images_and_a_broken_one_are_told_apart(tmp_path):
    write_zip(tmp_path, "train", {"a.png": (png(1), 0)}, lines=["x@/b.png\t0"])
    with pytest.raises(OptionError, match="no image in"):
        zip_images(tmp_path)
    (tmp_path / "train.zip").write_bytes(b"nonsense")
    with pytest.raises(OptionError, match="not a readable zip archive"):
        zip_images(tmp_path)


def test_a_rare_packing_is_refused_before_the_run(tmp_path):
    write_zip(tmp_path, "train", {"a.png": (png(1), 0)}, compression=zipfile.ZIP_LZMA)
    with pytest.raises(OptionError, match="rare method; pack the archive again"):
        zip_images(tmp_path)


def test_damage_inside_the_archive_is_a_bad_image_of_that_member_alone(tmp_path):
    write_zip(tmp_path, "train", {"a.png": (png(1), 0), "b.png": (png(2), 0)}, compression=zipfile.ZIP_STORED)
    content = bytearray((tmp_path / "train.zip").read_bytes())
    content[content.index(png(1)) + 300] ^= 255
    (tmp_path / "train.zip").write_bytes(content)
    images = zip_images(tmp_path)
    with pytest.raises(BadImage, match="checksum"):
        images.read(0)
    assert images.read(1).tobytes() == picture(2).tobytes()
