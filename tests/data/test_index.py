"""Kept listings: the same as fresh ones, noticed when the tree changes, and never trusted when damaged."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from esvit.data import listing
from esvit.data.base import PackedStrings
from esvit.data.folder import FolderData
from esvit.data.index import IndexCache
from esvit.data.listing import list_images
from esvit.data.zip import ZipData
from tests.data.pictures import data_options, png
from tests.data.test_zip import write_zip

EXTENSIONS = frozenset({".png"})


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """400 empty files in three folders, one of them nested, that have not been touched for a while; so many are worth keeping."""
    monkeypatch.setattr(listing, "CACHED_FROM", 100)
    for folder, count in (("a", 150), ("b/deep", 100), ("c", 150)):
        (tmp_path / "tree" / folder).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "tree" / folder / f"{number:03d}.png").touch()
    (tmp_path / "tree" / "empty").mkdir()
    settle(tmp_path / "tree")
    return tmp_path / "tree"


def settle(tree: Path) -> None:
    for folder in (tree, *(path for path in tree.rglob("*") if path.is_dir())):
        os.utime(folder, (1_700_000_000, 1_700_000_000))


def listed(tree: Path, cache: Path) -> listing.Listing:
    return list_images(str(tree), extensions=EXTENSIONS, index=IndexCache(str(cache)), option="data.root")


def is_same(one: listing.Listing, other: listing.Listing) -> bool:
    return (
        list(one.names) == list(other.names) and list(one.folders) == list(other.folders) and np.array_equal(one.folder_of, other.folder_of)
    )


def test_the_second_listing_is_the_first_one_without_a_walk(tree, tmp_path, monkeypatch):
    fresh = listed(tree, tmp_path / "cache")
    monkeypatch.setattr(listing, "_Walk", lambda *_: pytest.fail("walked again"))
    kept = listed(tree, tmp_path / "cache")
    assert is_same(fresh, kept)
    assert list(kept.folders) == ["a", "b", "c", "empty"]
    assert isinstance(kept.names.text.base, np.ndarray | np.memmap) and not kept.names.text.flags.writeable  # a mapped file
    assert list(pickle.loads(pickle.dumps(kept.names))) == list(fresh.names)


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "deep", "a folder", "a folder gone"])
def test_a_changed_tree_is_listed_again(tree, tmp_path, change):
    listed(tree, tmp_path / "cache")
    if change == "added":
        (tree / "a" / "new.png").touch()
    elif change == "removed":
        (tree / "a" / "000.png").unlink()
    elif change == "renamed":
        (tree / "a" / "000.png").rename(tree / "a" / "zzz.png")
    elif change == "deep":
        (tree / "b" / "deep" / "new.png").touch()
    elif change == "a folder":
        (tree / "d").mkdir()
    else:
        (tree / "empty").rmdir()
    assert is_same(listed(tree, tmp_path / "cache"), listed(tree, tmp_path / "fresh"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "nonsense"])
def test_a_damaged_listing_is_made_again_with_a_warning(tree, tmp_path, damage, caplog):
    fresh = listed(tree, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    content[-200] ^= 255
    file.write_bytes({"cut": content[:-100], "flipped": content, "emptied": b"", "nonsense": b"[1]\n"}[damage])
    assert is_same(listed(tree, tmp_path / "cache"), fresh)
    assert "is damaged" in caplog.text
    caplog.clear()
    assert is_same(listed(tree, tmp_path / "cache"), fresh)
    assert not caplog.text


def test_a_folder_that_was_changed_just_now_is_not_kept(tree, tmp_path):
    """Within one tick of the clock it may change again without another time."""
    (tree / "a" / "new.png").touch()
    listed(tree, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_small_sets_are_not_kept(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "CACHED_FROM", 401)
    listed(tree, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_to_costs_a_warning(tree, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert len(listed(tree, tmp_path / "file" / "cache").names) == 400
    assert "cannot be kept in data.index_cache" in caplog.text


def test_a_folder_set_from_a_kept_listing_has_the_same_labels(tree, tmp_path):
    def images():
        return FolderData(**data_options(root=str(tree), index_cache=str(tmp_path / "cache"))).train()

    first, second = images(), images()
    assert np.array_equal(first.labels, second.labels)
    assert first.class_names == second.class_names == ["a", "b", "c", "empty"]
    assert second.name(399) == "c/149.png"
    assert np.bincount(second.labels).tolist() == [150, 100, 150]


def test_the_directory_of_an_archive_is_kept_until_the_archive_or_its_map_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("esvit.data.zip.CACHED_FROM", 1)
    data = ZipData(**data_options(root=str(tmp_path), index_cache=str(tmp_path / "cache")))
    write_zip(tmp_path, "train", {"a.png": (png(1), 0), "b.png": (png(2), 1)})
    first = data.train()
    with monkeypatch.context() as patched:
        patched.setattr("esvit.data.zip._read_directory", lambda *_: pytest.fail("read again"))
        second = data.train()
    assert second.encoded(1) == first.encoded(1) == png(2)
    assert second.labels.tolist() == [0, 1]
    (tmp_path / "train_map.txt").write_text("x@a.png\t1\n")
    assert data.train().labels.tolist() == [1]


def test_arrays_of_any_type_and_shape_come_back(tmp_path):
    cache = IndexCache(str(tmp_path / "cache"))
    arrays = {
        "a": np.arange(7, dtype=np.int64),
        "none": np.empty(0, np.uint8),
        "flags": np.array([[True], [False]]),
        "text": PackedStrings("xy").text,
    }
    cache.save("kind", "source", arrays)
    kept = cache.load("kind", "source")
    assert all(np.array_equal(kept[name], array) and kept[name].dtype == array.dtype for name, array in arrays.items())
    assert cache.load("kind", "other") is None
    assert IndexCache(None).load("kind", "source") is None
