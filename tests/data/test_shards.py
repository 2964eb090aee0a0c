"""Tar shards: what is grouped to samples, random access, damage, patterns, and shards on a server."""

import functools
import http.server
import io
import itertools
import json
import os
import pickle
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from esvit.data.base import BadImage
from esvit.data.index import IndexCache
from esvit.data.loading import TrainLoader
from esvit.data.sampling import SHUFFLE, Chunked
from esvit.data.shard_cache import ShardCache
from esvit.data.shard_index import index_beside, scan
from esvit.data.shards import ShardImages
from esvit.errors import OptionError
from tests.command_line.commands import wait_until
from tests.data.pictures import CornerAndNoise, picture, png


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, sizes=(3, 2, 4)) -> Path:
    """Sample i has picture i and label i % 4."""
    first = 0
    for number, size in enumerate(sizes):
        samples = range(first, first + size)
        members = {f"{i:03d}.{kind}": content for i in samples for kind, content in (("png", png(i)), ("cls", str(i % 4).encode()))}
        write_tar(folder / f"train-{number:03d}.tar", members)
        first += size
    return folder


def opened(root, tmp_path, *, gigabytes=1.0, kept=None) -> ShardImages:
    cache = ShardCache(tmp_path / "cache", gigabytes=gigabytes, option="data.root")
    return ShardImages(str(root), option="data.root", cache=cache, kept=IndexCache(kept))


def assert_holds_the_nine(images):
    assert len(images) == 9
    assert images.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert images.chunk_ends.tolist() == [3, 5, 9]
    for i in (8, 0, 4, 5, 3):
        assert images.encoded(i) == png(i)
        assert images.read(i).tobytes() == picture(i).tobytes()
    assert images.name(4) == "train-001.tar@/004.png"


def test_images_are_read_in_any_order_from_an_index_that_is_made_once(tmp_path):
    root = write_shards(tmp_path / "shards")
    images = opened(root, tmp_path)
    assert_holds_the_nine(images)
    assert images.class_names == ["0", "1", "2", "3"]
    made = [index_beside(shard).stat().st_mtime_ns for shard in sorted(root.glob("*.tar"))]
    assert_holds_the_nine(pickle.loads(pickle.dumps(opened(root, tmp_path))))
    assert made == [index_beside(shard).stat().st_mtime_ns for shard in sorted(root.glob("*.tar"))]
    assert not list(root.glob(".*"))


@pytest.mark.parametrize("pattern", ["", "train-*.tar", "train-{000..002}.tar", "train-00[0-2].tar"])
def test_shards_are_named_by_folder_or_pattern(tmp_path, pattern):
    root = write_shards(tmp_path / "shards")
    assert_holds_the_nine(opened(root / pattern if pattern else root, tmp_path))


def test_class_names_come_from_the_file_beside_the_shards(tmp_path):
    root = write_shards(tmp_path / "shards")
    (root / "classes.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    assert opened(root, tmp_path).class_names == ["ant", "bee", "cat", "dog", "eel"]
    (root / "classes.txt").write_text("ant\n")
    with pytest.raises(OptionError, match=r"^data\.root: 'classes\.txt' has 1 lines, but there are labels up to 3"):
        opened(root, tmp_path)


def test_neighbours_with_the_same_key_are_one_sample(tmp_path):
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "x/1.json": json.dumps({"label": 5}).encode(),
            "x/1.seg.png": png(1),
            "y/1.JPG": png(2),
            "y/1.txt": b"a caption",
            "y/1.cls": b" 7\n",
            "no_dot": b"not part of any sample",
            "y/2.npy": b"an array",
            "y/2.cls": b"0",
            "y/.hidden.png": png(3),
            "z/3.png": b"",
            "z/3.cls": b"1",
        },
    )
    index = scan(shard, option="data.root")
    assert index.names == ["x/1.seg.png", "y/1.JPG", "y/2.npy", "z/3"]
    assert index.labels.tolist() == [5, 7, 0, 1]
    assert index.sizes.tolist() == [len(png(1)), len(png(2)), 8, 0]


def test_images_of_several_classes_keep_all_of_them(tmp_path):
    for name, tags in (("a", [[2, 0], []]), ("b", [[1], [3, 1]])):
        members = {f"{i}.json": json.dumps({"labels": some}).encode() for i, some in enumerate(tags)}
        members |= {f"{i}.png": png(i) for i in range(2)}
        write_tar(tmp_path / "shards" / f"{name}.tar", dict(sorted(members.items())))
    for _ in range(2):  # made, and read
        images = opened(tmp_path / "shards", tmp_path)
        assert images.labels is None and images.class_names == ["0", "1", "2", "3"]
        expected = [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1]]
        assert [images.targets(i).tolist() for i in range(4)] == expected
    write_tar(tmp_path / "shards" / "c.tar", {"1.png": png(1)})
    with pytest.raises(OptionError, match=r"c\.tar' has no labels, unlike"):
        opened(tmp_path / "shards", tmp_path)


def test_long_names_and_unlabelled_samples(tmp_path):
    name = "folder/" * 30 + "ü.png"
    images = opened(write_tar(tmp_path / "shards" / "a.tar", {name: png(3)}).parent, tmp_path)
    assert images.labels is None and images.class_names == []
    assert images.name(0) == f"a.tar@/{name}"
    assert images.encoded(0) == png(3)


def test_a_sample_without_an_image_is_a_bad_image(tmp_path):
    root = write_tar(tmp_path / "shards" / "a.tar", {"1.json": b"{}", "2.png": png(2)}).parent
    images = opened(root, tmp_path)
    assert images.name(0) == "a.tar@/1"
    with pytest.raises(BadImage, match="has no image"):
        images.read(0)
    assert images.encoded(1) == png(2)


@pytest.mark.parametrize("cut", [100, 700, 10_000, -1200, -20 * 512])
def test_a_truncated_shard_is_named(tmp_path, cut):
    root = write_shards(tmp_path / "shards")
    shard = root / "train-001.tar"
    content = shard.read_bytes()
    end = content.rstrip(b"\0")
    shard.write_bytes(end[:cut] if cut > 0 else content[: len(end) + 1])  # the last two: nothing but the end of the archive is missing
    with pytest.raises(OptionError, match=r"^data\.root: shard '[^']*train-001\.tar' (is damaged or ends early|holds no images)"):
        opened(root, tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.txt": b"text"}, "holds no images"),
        ({"1.png": png(1), "2.png": png(2), "2.cls": b"0"}, r"sample '1\.png' in shard '[^']*a\.tar' has no label"),
        ({"1.png": png(1), "1.cls": b"cat"}, r"sample '1' in shard '[^']*a\.tar' has the label 'cat'"),
        ({"1.png": png(1), "1.json": b"{"}, r"'1\.json' in shard '[^']*a\.tar' is no JSON object"),
    ],
)
def test_what_is_wrong_in_a_shard_is_told_with_its_name(tmp_path, members, message):
    root = write_tar(tmp_path / "shards" / "a.tar", members).parent
    with pytest.raises(OptionError, match=message):
        opened(root, tmp_path)


def test_what_is_no_shard_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    write_shards(tmp_path / "parent" / "train")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.tar").write_bytes(b"no archive at all" * 100)
    for place, message in (
        ("nowhere", "does not exist"),
        ("empty", r"holds no \.tar files"),
        ("parent", rf"use data\.root={tmp_path}/parent/train"),
        ("parent/train/train-{000..004}.tar", r"train-003\.tar' does not exist, and 1 more"),
        ("parent/train/val-*.tar", "no file matches"),
        ("parent/train/train-{000..004.tar", "brace without its other half"),
        ("bad", r"a\.tar' is damaged"),
    ):
        with pytest.raises(OptionError, match=message):
            opened(tmp_path / place, tmp_path)


def test_labels_in_some_shards_only_are_refused(tmp_path):
    root = write_shards(tmp_path / "shards")
    write_tar(root / "train-009.tar", {"1.png": png(1)})
    with pytest.raises(OptionError, match=r"'[^']*train-009\.tar' has no labels, unlike '[^']*train-000\.tar'"):
        opened(root, tmp_path)


def test_a_changed_shard_gets_a_new_index_or_its_images_are_bad(tmp_path):
    root = write_shards(tmp_path / "shards")
    images = opened(root, tmp_path)
    shard = root / "train-000.tar"
    size = shard.stat().st_size
    write_tar(shard, {"a.png": png(7), "a.cls": b"1", **{f"a.{i}.txt": b"" for i in range(30)}})
    assert shard.stat().st_size != size
    assert len(opened(root, tmp_path)) == 7
    with pytest.raises(BadImage, match="not the one that its index was made for|ends before"):
        images.encoded(1)
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(BadImage, match="ends before the image does"):
        images.encoded(1)


def test_shards_that_may_only_be_read_are_listed_in_the_cache(tmp_path, monkeypatch):
    root = write_shards(tmp_path / "shards")
    if os.geteuid() == 0:  # root may write everywhere: let the disk be full instead

        def no_room(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("esvit.data.shard_index.write_index", no_room)
    else:
        root.chmod(0o555)
    assert_holds_the_nine(opened(root, tmp_path, kept=str(tmp_path / "kept")))
    assert not list(root.glob("*.npz")) and len(list((tmp_path / "kept").iterdir())) == 1
    monkeypatch.setattr("esvit.data.shards.make_index", None)  # would fail if a shard were scanned again
    assert_holds_the_nine(opened(root, tmp_path, kept=str(tmp_path / "kept")))


# ---------------------------------------------------------------------- on a server


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):  # noqa: N802 (the library's name)
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """The address of `tmp_path`; `Quiet.asked` are the paths that were asked for."""
    Quiet.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("has_index", [False, True])
def test_shards_on_a_server_are_fetched_once(tmp_path, server, has_index):
    root = write_shards(tmp_path / "shards")
    if has_index:
        opened(root, tmp_path)
    images = opened(f"{server}/shards/train-{{000..002}}.tar", tmp_path)
    assert any(path.endswith(".tar") for path in Quiet.asked) != has_index  # with an index nothing else is needed to begin with
    assert_holds_the_nine(images)
    Quiet.asked = []
    assert_holds_the_nine(opened(f"{server}/shards/train-{{000..002}}.tar", tmp_path))
    assert [path for path in Quiet.asked if path.endswith((".tar", ".npz"))] == []


def test_a_folder_on_a_server_needs_a_list_of_its_shards(tmp_path, server):
    root = write_shards(tmp_path / "shards")
    with pytest.raises(OptionError, match=r"has no shards\.txt"):
        opened(f"{server}/shards", tmp_path)
    (root / "shards.txt").write_text("train-000.tar\ntrain-001.tar\ntrain-002.tar\n")
    (root / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    images = opened(f"{server}/shards/", tmp_path)
    assert_holds_the_nine(images)
    assert images.class_names == ["ant", "bee", "cat", "dog"]


def test_the_cache_keeps_within_its_size_and_windows_that_do_not_fit_are_refused(tmp_path, server):
    root = write_shards(tmp_path / "shards", sizes=(4, 4, 4, 4))
    shard_bytes = max(shard.stat().st_size for shard in root.glob("*.tar"))
    opened(root, tmp_path)
    images = opened(f"{server}/shards/train-{{000..003}}.tar", tmp_path, gigabytes=2.5 * shard_bytes / 1e9)
    assert images.chunks_at_hand == 2
    for i in (0, 5, 9, 14, 1):
        assert images.encoded(i) == png(i)
        assert len(list((tmp_path / "cache").glob("*.tar"))) <= 2
    assert Quiet.asked.count("/shards/train-000.tar") == 2
    with pytest.raises(OptionError, match=r"^sampler: reads all 4 shards at a time, .* use sampler=chunk sampler\.window=1"):
        SHUFFLE.check(images)
    Chunked(window=1, chunk_size=1, own_chunks=True).check(images)
    with pytest.raises(OptionError, match=r"^sampler\.window: two windows of 2 shards"):
        Chunked(window=2, chunk_size=1, own_chunks=True).check(images)
    SHUFFLE.check(opened(f"{server}/shards/train-{{000..003}}.tar", tmp_path))


def test_shards_are_on_their_way_before_they_are_needed(tmp_path, server):
    root = write_shards(tmp_path / "shards", sizes=(4, 4, 4, 4, 4, 4))
    shard_bytes = max(shard.stat().st_size for shard in root.glob("*.tar"))
    opened(root, tmp_path)
    images = opened(f"{server}/shards/train-{{000..005}}.tar", tmp_path, gigabytes=4.5 * shard_bytes / 1e9)
    sampler = Chunked(window=2, chunk_size=1, own_chunks=True)
    loader = TrainLoader(images=images, transform=CornerAndNoise(), batch_size=4, workers=0, seed=1, rank=0, world_size=1,
                         accumulation=1, max_bad_fraction=0.5, sampler=sampler)  # fmt: skip
    order = sampler.order(images, images_per_step=4, seed=1, epoch=0)
    second_window = {f"/shards/train-{number:03d}.tar" for number in set(order[8:16] // 4)}
    stream = loader.from_step(0)
    begun = [next(stream) for _ in range(2)]  # four images of two shards each: the fifth is of the second shard
    wait_until(lambda: second_window <= set(Quiet.asked), "the next window")
    local = TrainLoader(images=opened(root, tmp_path), transform=CornerAndNoise(), batch_size=4, workers=0, seed=1, rank=0, world_size=1,
                        accumulation=1, max_bad_fraction=0.5, sampler=sampler)  # fmt: skip
    for ours, theirs in zip([*begun, *itertools.islice(stream, 10)], local.from_step(0), strict=False):
        assert ours.indices.equal(theirs.indices) and ours.crops[0].equal(theirs.crops[0])
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetching of shards" and not wait_until(
        lambda thread=thread: not thread.is_alive(), "the thread's end")]  # fmt: skip


def test_a_shard_that_cannot_be_fetched_ends_the_run_with_its_address(tmp_path, server):
    write_shards(tmp_path / "shards")
    with pytest.raises(OptionError, match=rf"^data\.root: cannot fetch '{server}/shards/train-003\.tar' "):
        opened(f"{server}/shards/train-{{000..003}}.tar", tmp_path)
    with pytest.raises(OptionError, match=r"^data\.cache_gb: a shard of "):
        opened(f"{server}/shards/train-{{000..002}}.tar", tmp_path / "other", gigabytes=1e-6).encoded(0)
    assert not list((tmp_path / "cache").glob(".*.part"))


@pytest.mark.parametrize("has_index", [False, True])
def test_a_shard_that_arrives_damaged_is_fetched_anew_the_next_time(tmp_path, server, has_index):
    root = write_shards(tmp_path / "shards")
    if has_index:
        opened(root, tmp_path)
    shard = root / "train-001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:2000])
    with pytest.raises(OptionError, match=r"^data\.root: .*train-001\.tar' (has 2,000 bytes, its index|is damaged or ends early)"):
        opened(f"{server}/shards/train-{{000..002}}.tar", tmp_path).encoded(3)
    shard.write_bytes(whole)
    assert_holds_the_nine(opened(f"{server}/shards/train-{{000..002}}.tar", tmp_path))


FAKE_AWS = """#!/bin/sh
# aws s3 cp s3://bucket/FILE - --only-show-errors
[ "$1 $2 $4" = "s3 cp -" ] || exit 2
cat "{root}/${{3#s3://bucket/}}"
"""


def test_a_bucket_is_read_by_the_command_of_its_owner(tmp_path, monkeypatch, capfd):
    root = write_shards(tmp_path / "shards")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "aws").write_text(FAKE_AWS.format(root=root))
    (tmp_path / "bin" / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert_holds_the_nine(opened("s3://bucket/train-{000..002}.tar", tmp_path))
    assert capfd.readouterr().err == ""  # nothing about the index and the classes, which are not there
    with pytest.raises(OptionError, match=r"^data\.root: cannot fetch 's3://bucket/train-003\.tar' "):
        opened("s3://bucket/train-{000..003}.tar", tmp_path)


def test_any_command_may_bring_a_shard(tmp_path):
    root = write_shards(tmp_path / "shards")
    images = opened(f"pipe:cat {root}/train-{{000..002}}.tar", tmp_path)
    assert images.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert images.encoded(5) == png(5)
    assert np.array_equal(images.chunk_ends, [3, 5, 9])
