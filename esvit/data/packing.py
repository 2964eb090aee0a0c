"""From any image set to tar shards with an index: what `task=pack` does to one split.

A shard is a run of neighbouring images, in the set's order, so that shards read in order are the set. A file's bytes are copied as they
are; sets without a file for each image give PNG. A shard is written under another name and appears at once, after its index;
`packing.jsonl` has a line for each shard that is done, so that a packing that was killed goes on with the others.

Letters: n images.
"""

import dataclasses
import fcntl
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from esvit.data.base import BadImage, EncodedImages, ImageSet
from esvit.data.index import write_atomically
from esvit.data.loading import sharded_batches
from esvit.data.shard_index import index_beside, scan, write_index
from esvit.data.shards import CLASSES_NAME, LIST_NAME
from esvit.data.subsets import Subset
from esvit.errors import OptionError

PLAN_NAME = "packing.json"
DONE_NAME = "packing.jsonl"
BAD_NAME = "bad_images.txt"
_SAMPLED = 256  # images whose size is looked at, where shards are to have so many megabytes
_TAR_BYTES = 1536  # beside an image's own bytes: its header and padding, and its label with header
_BEGINNINGS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"BM", "bmp"), (b"\x93NUMPY", "npy"), (b"II*\0", "tif"), (b"MM\0*", "tif"),
               (b"II+\0", "tif"), (b"MM\0+", "tif"), (b"P5", "pgm"), (b"P6", "ppm"))  # fmt: skip


@dataclass(frozen=True)
class PackedShard:
    """What became of one shard: its file name, None if none of its images can be read; images and bytes in it; names of those left out."""

    number: int
    name: str | None
    images: int
    size: int
    bad_images: list[str]


@dataclass(frozen=True)
class Plan:
    """What a packing will do; kept beside the shards, so that only the same one goes on.

    source            where the images are from, in words of the options
    split             "train" or "val": how the shards are called
    images            n
    first, last       names of the first and the last image
    images_per_shard  of all shards but the last
    verify            whether images are decoded, and those that cannot be are left out
    """

    source: dict
    split: str
    images: int
    first: str
    last: str
    images_per_shard: int
    verify: bool

    @property
    def shards(self) -> int:
        return -(-self.images // self.images_per_shard)


class Packing:
    """One split on its way into `folder`.

    shard_images  images per shard, or None to go by size
    shard_mb      size of a shard (MB), if `shard_images` is None; as estimated from some of the images
    processes     loading processes

    Raises OptionError if the folder holds something else already.
    """

    def __init__(
        self, images: ImageSet, *, folder: Path, split: str, source: dict, shard_images: int | None, shard_mb: float, verify: bool,
        processes: int,
    ):  # fmt: skip
        self.images = images
        self.folder = folder
        before = _plan_in(folder)
        self.plan = Plan(
            source=json.loads(json.dumps(source, default=str)),
            split=split,
            images=len(images),
            first=images.name(0),
            last=images.name(len(images) - 1),
            images_per_shard=_images_per_shard(images, shard_images, shard_mb),
            verify=verify,
        )
        self._processes = processes
        self._check(before)
        self._done = {shard.number: shard for shard in _done_in(folder)} if before else {}

    @property
    def images_done(self) -> int:
        return sum(shard.images + len(shard.bad_images) for shard in self._done.values())

    @property
    def is_complete(self) -> bool:
        return len(self._done) == self.plan.shards and (self.folder / LIST_NAME).exists()

    def run(self) -> Iterator[PackedShard]:
        """Each shard as it is done. Raises OptionError if the folder cannot be written, or a process dies."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                yield from self._run()
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _run(self) -> Iterator[PackedShard]:
        for left_by_a_kill in self.folder.glob(".*.tmp"):
            left_by_a_kill.unlink()
        write_atomically(self.folder / PLAN_NAME, [json.dumps(dataclasses.asdict(self.plan), indent=1).encode() + b"\n"])
        sound = "".join(f"{json.dumps(dataclasses.asdict(shard))}\n" for shard in self._done.values())
        write_atomically(self.folder / DONE_NAME, [sound.encode()])  # without the half line that a kill may have left
        left = [number for number in range(self.plan.shards) if number not in self._done]
        work = _Work(self.images, self.plan, self.folder, left)
        with open(self.folder / DONE_NAME, "a") as done:
            for shard in sharded_batches(work, count=len(left), batch_size=1, workers=self._processes, rank=0, world_size=1):
                print(json.dumps(dataclasses.asdict(shard)), file=done, flush=True)
                self._done[shard.number] = shard
                yield shard
        self._finish()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Against a second packing at the same time; a lock of the folder itself leaves no file."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OptionError("output_dir", f"another process packs into '{self.folder}'", "wait for it") from None
            yield
        finally:
            os.close(folder)

    def summary(self) -> PackedShard:
        """All shards as if they were one; its `number` is how many there are."""
        shards = [self._done[number] for number in sorted(self._done)]
        return PackedShard(
            number=sum(shard.name is not None for shard in shards),
            name=None,
            images=sum(shard.images for shard in shards),
            size=sum(shard.size for shard in shards),
            bad_images=[name for shard in shards for name in shard.bad_images],
        )

    def _finish(self) -> None:
        """Write what describes the whole. The list of shards comes last: with it the set is complete."""
        bad_images = self.summary().bad_images
        if bad_images:
            _write_lines(self.folder / BAD_NAME, bad_images)
        if self.images.class_names:
            _write_lines(self.folder / CLASSES_NAME, self.images.class_names)
        names = [self._done[number].name for number in sorted(self._done)]
        _write_lines(self.folder / LIST_NAME, [name for name in names if name is not None])

    def _check(self, before: Plan | None) -> None:
        if before is None:
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise OptionError("output_dir", f"'{self.folder}' exists and is no packing of ours", "give another output_dir")
        elif before != self.plan:
            fields = [field.name for field in dataclasses.fields(Plan) if getattr(before, field.name) != getattr(self.plan, field.name)]
            found = f"'{self.folder}' is a packing of other images, or of other options ({', '.join(fields)} differ)"
            raise OptionError("output_dir", found, "give another output_dir, or remove that folder")


class _Work(Dataset):
    """Writes shards in the loading processes. `left` are the numbers of the shards to write."""

    def __init__(self, images: ImageSet, plan: Plan, folder: Path, left: list[int]):
        self._images = images
        self._plan = plan
        self._folder = folder
        self._left = left

    def __getitems__(self, places: list[int]) -> PackedShard | OptionError:
        (place,) = places
        try:
            return write_shard(self._images, plan=self._plan, number=self._left[place], folder=self._folder)
        except OSError as error:
            return _unwritable(self._folder, error)


def write_shard(images: ImageSet, *, plan: Plan, number: int, folder: Path) -> PackedShard:
    """Shard `number` of `plan`, with its index. The same images give the same bytes."""
    name = f"{plan.split}-{number:0{max(6, len(str(plan.shards)))}d}.tar"
    path, temporary = folder / name, folder / f".{name}.{os.getpid()}.tmp"
    bad_images = []
    count = 0
    begin = number * plan.images_per_shard
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            for index in range(begin, min(begin + plan.images_per_shard, plan.images)):
                try:
                    content = file_of(images, index, verify=plan.verify)
                except BadImage:
                    bad_images.append(images.name(index))
                    continue
                key = _key(images, index)
                _add(archive, f"{key}.{_extension(content)}", content)
                if images.labels is not None:
                    _add(archive, f"{key}.cls", str(int(images.labels[index])).encode())
                elif (targets := images.targets(index)) is not None:
                    _add(archive, f"{key}.json", json.dumps({"labels": np.flatnonzero(targets).tolist()}).encode())
                count += 1
        if count == 0:
            return PackedShard(number, None, 0, 0, bad_images)
        size = temporary.stat().st_size
        write_index(scan(temporary, option="output_dir"), index_beside(path))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return PackedShard(number, name, count, size, bad_images)


def file_of(images: ImageSet, index: int, *, verify: bool) -> bytes:
    """An image's file as it is, or PNG where there is none.

    verify  decode it too

    Raises BadImage if it cannot be read.
    """
    while isinstance(images, Subset):
        index = int(images.indices[index])
        images = images.images
    if not isinstance(images, EncodedImages):
        return _png(images.read(index))
    content = images.encoded(index)
    if verify:
        images.pixels.read(content)
    return content


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _extension(content: bytes) -> str:
    """By what the file is, whatever it was called."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    return next((extension for beginning, extension in _BEGINNINGS if content.startswith(beginning)), "jpg")


def _key(images: ImageSet, index: int) -> str:
    """The image's number and, for people, the name of its file without what a key may not have."""
    stem = images.name(index).rpartition("/")[2].rpartition("@")[2].partition(".")[0]
    readable = re.sub(r"[^\w-]+", "_", stem, flags=re.ASCII)[:60]
    return f"{index:09d}-{readable}" if readable else f"{index:09d}"


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Without time or owner, so that the same images give the same shard."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o644
    archive.addfile(member, io.BytesIO(content))


def _images_per_shard(images: ImageSet, shard_images: int | None, shard_mb: float) -> int:
    if shard_images is not None:
        return shard_images
    places = np.unique(np.linspace(0, len(images) - 1, min(_SAMPLED, len(images))).astype(np.int64))
    sizes = []
    for place in places:
        try:
            sizes.append(len(file_of(images, int(place), verify=False)))
        except BadImage:
            continue
    mean = (sum(sizes) / len(sizes) if sizes else 0) + _TAR_BYTES
    return max(1, int(shard_mb * 1e6 / mean))


def _write_lines(file: Path, lines: Sequence[str]) -> None:
    file.write_text("".join(f"{' '.join(line.splitlines())}\n" for line in lines), errors="surrogateescape")


def _plan_in(folder: Path) -> Plan | None:
    try:
        return Plan(**json.loads((folder / PLAN_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _done_in(folder: Path) -> Iterator[PackedShard]:
    """Shards that are there as they were written; a line that was cut off is of none."""
    file = folder / DONE_NAME
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            shard = PackedShard(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if shard.name is None or _size(folder / shard.name) == shard.size:
            yield shard


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def _unwritable(folder: Path, error: OSError) -> OptionError:
    return OptionError(
        "output_dir", f"cannot write to '{folder}' ({error.strerror or error})", "give a folder with room that can be written"
    )
