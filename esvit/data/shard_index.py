"""Where each image of a tar shard lies, so that any of them can be read without the ones before it.

A sample is what neighbouring members with the same path up to the first dot of the file name make, as WebDataset has it: `a/7.jpg`,
`a/7.cls` and `a/7.json` are one. Its image is the first member with an image's extension. Its label is the number in `.cls`, or else
`label` or `cls` in `.json`; a list `labels` there makes it an image of several classes. A shard gets its index by one pass over its
headers. The index is a file beside the shard, believed as long as the shard has the size that it was made for.

Letters: n samples.
"""

import json
import os
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esvit.data.base import is_image_name
from esvit.errors import OptionError

SUFFIX = ".index.npz"
BLOCK = 512  # bytes of a tar header; contents begin at multiples of it
_MAKE_AGAIN = "copy or make the shard again, or leave it out"


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in its order.

    names        paths of the images in the shard; of a sample without an image its key
    offsets      (n,) int64: where an image begins in the shard; 0 where there is none
    sizes        (n,) int64: bytes; 0 where there is no image
    labels       (n,) int64, or None where no sample has a label, or where samples may have several
    tags         (t,) int64: the labels of all samples that may have several, one after the other; None where no sample has such
    tag_ends     (n,) int64: where those of each sample end
    shard_bytes  size of the whole shard
    """

    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray | None
    tags: np.ndarray | None
    tag_ends: np.ndarray | None
    shard_bytes: int


def index_beside(shard: Path) -> Path:
    return shard.with_name(shard.name + SUFFIX)


def load_index(shard: Path) -> ShardIndex | None:
    """The index beside the shard, if it was made of the shard as it is."""
    index = read_index(index_beside(shard))
    return index if index is not None and index.shard_bytes == shard.stat().st_size else None


def make_index(shard: Path, *, option: str) -> tuple[ShardIndex, bool]:
    """Scan the shard; the index, and whether it could be kept beside the shard.

    Raises OptionError naming `option` for a shard that is damaged.
    """
    index = scan(shard, option=option)
    try:
        write_index(index, index_beside(shard))
    except OSError:  # a disk that is full, or that we may only read
        return index, False
    return index, True


def read_index(file: Path) -> ShardIndex | None:
    """What `write_index` wrote, or None where there is no such file, or no sound one."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            names = arrays["names"].tobytes().split(b"\0")
            labels, tag_ends = arrays["labels"], arrays["tag_ends"]
            index = ShardIndex(
                names=[os.fsdecode(name) for name in names],
                offsets=arrays["offsets"],
                sizes=arrays["sizes"],
                labels=labels if len(labels) else None,
                tags=arrays["tags"] if len(tag_ends) else None,
                tag_ends=tag_ends if len(tag_ends) else None,
                shard_bytes=int(arrays["shard_bytes"]),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return index if len(names) == len(index.offsets) == len(index.sizes) else None


def write_index(index: ShardIndex, file: Path) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as out:
            np.savez(
                out,
                names=np.frombuffer(b"\0".join(map(os.fsencode, index.names)), dtype=np.uint8),
                offsets=index.offsets,
                sizes=index.sizes,
                labels=or_empty(index.labels),
                tags=or_empty(index.tags),
                tag_ends=or_empty(index.tag_ends),
                shard_bytes=np.int64(index.shard_bytes),
            )
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def or_empty(values: np.ndarray | None) -> np.ndarray:
    """For a file, which has no None."""
    return np.empty(0, np.int64) if values is None else values


def scan(shard: Path, *, option: str) -> ShardIndex:
    """One pass over the headers of a shard, and over its labels.

    Raises OptionError naming `option` and the shard for one that is no tar archive, that ends early, that holds no image, or of whose
    samples only some have a label.
    """
    names: list[str] = []
    offsets, sizes = [], []
    labels: list[int | list[int] | None] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for key, members in _samples(archive):
                image = _image(members)
                names.append(key if image is None else image.name)
                offsets.append(0 if image is None else image.offset_data)
                sizes.append(0 if image is None else image.size)
                labels.append(_label(archive, key, members, shard, option))
            _check_end(shard, archive.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        found = f"shard '{shard}' is damaged or ends early, after {len(names)} samples ({error or type(error).__name__})"
        raise OptionError(option, found, _MAKE_AGAIN) from error
    if not any(sizes):
        raise OptionError(option, f"shard '{shard}' holds no images", "give tar files of images, e.g. 7.jpg and 7.cls for each sample")
    single = [label for label in labels if isinstance(label, int)]
    several = [label for label in labels if isinstance(label, list)]
    if len(single) not in (0, len(labels)) or len(several) not in (0, len(labels)):
        kinds = [type(label) for label in labels]
        odd = names[min(map(kinds.index, set(kinds)), key=lambda place: kinds.count(kinds[place]))]
        found = f"sample '{odd}' in shard '{shard}' has {'a' if labels[names.index(odd)] is not None else 'no'} label, others differ"
        raise OptionError(option, found, "give each sample a .cls file, or none")
    return ShardIndex(
        names=names,
        offsets=np.array(offsets, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64),
        labels=np.array(single, dtype=np.int64) if single else None,
        tags=np.array([tag for tags in several for tag in tags], dtype=np.int64) if several else None,
        tag_ends=np.cumsum([len(tags) for tags in several], dtype=np.int64) if several else None,
        shard_bytes=shard.stat().st_size,
    )


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Key and members of each sample. Hidden files and what is no file are left out."""
    before = ""
    members: list[tarfile.TarInfo] = []
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # or it would keep them all
        folder, slash, name = member.name.rpartition("/")
        stem, dot, _ = name.partition(".")
        if not member.isreg() or not stem or not dot:
            continue
        key = f"{folder}{slash}{stem}"
        if members and key != before:
            yield before, members
            members = []
        before = key
        members.append(member)
    if members:
        yield before, members


def _image(members: list[tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The first picture; an array may be anything, and is the image only where there is no picture."""
    named = [(member, member.name.rpartition("/")[2]) for member in members if member.size]
    pictures = [member for member, name in named if is_image_name(name)]
    return next(iter(pictures + [member for member, name in named if name.endswith(".npy")]), None)


def _label(archive: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], shard: Path, option: str) -> int | list[int] | None:
    by_extension = {member.name.rpartition(".")[2].lower(): member for member in members}
    if "cls" in by_extension:
        text: Any = _content(archive, by_extension["cls"]).decode(errors="replace").strip()
    elif "json" in by_extension:
        try:
            described = json.loads(_content(archive, by_extension["json"]))
        except ValueError:
            described = None
        if not isinstance(described, dict):
            raise OptionError(option, f"'{key}.json' in shard '{shard}' is no JSON object", "write it again, or leave it out")
        several = described.get("labels")
        if isinstance(several, list) and all(isinstance(tag, int) and tag >= 0 for tag in several):
            return several
        text = described.get("label", described.get("cls"))
        if text is None:
            return None
    else:
        return None
    if isinstance(text, bool) or not str(text).isdecimal():
        raise OptionError(
            option, f"sample '{key}' in shard '{shard}' has the label '{str(text)[:40]}'", "labels are numbers from 0 upwards"
        )
    return int(text)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read()


def _check_end(shard: Path, end: int) -> None:
    """A whole archive has a block of zeros at `end`, where the member that its reader looked for last would begin."""
    with open(shard, "rb") as file:
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise EOFError("no end of archive")
