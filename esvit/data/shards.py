"""Images in tar shards as WebDataset has them, on a disk or on a server, with random access by an index.

An index (see esvit/data/shard_index.py) says where each image lies; it is read by `os.pread`, so that forked loading processes share open
files without sharing a position. Shards on a server are fetched whole into a cache folder when their first image is asked for.
"""

import glob
import io
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from esvit.data.base import BadImage, Data, EncodedImages, ImageSet, PackedStrings, existing_folder
from esvit.data.index import CACHED_FROM, IndexCache
from esvit.data.shard_cache import ShardCache, is_remote
from esvit.data.shard_index import BLOCK, SUFFIX, ShardIndex, index_beside, load_index, make_index, or_empty, read_index
from esvit.errors import OptionError

LIST_NAME = "shards.txt"  # the names of the shards in a folder, one a line: what a server cannot be asked for
CLASSES_NAME = "classes.txt"  # names of the classes in the order of their labels, one a line
_OPEN_FILES = 128  # shards that a process holds open


@dataclass(kw_only=True)
class ShardsData(Data):
    """`root` and `val_root`: a folder of `.tar` files, one such file, a pattern of several, or the address of any of these.

    cache     folder for shards that are fetched from a server
    cache_gb  how much of them it may hold (GB)
    """

    cache: str
    cache_gb: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_gb <= 0:
            raise OptionError("data.cache_gb", f"{self.cache_gb}", "give a number of gigabytes above 0")

    def open_train(self) -> ImageSet:
        return ShardImages(self.root, option="data.root", cache=self._shard_cache("data.root"), kept=self.index)

    def open_validation(self) -> ImageSet | None:
        if self.val_root is None:
            return None
        return ShardImages(self.val_root, option="data.val_root", cache=self._shard_cache("data.val_root"), kept=self.index)

    def _shard_cache(self, option: str) -> ShardCache:
        return ShardCache(Path(self.cache).expanduser(), gigabytes=self.cache_gb, option=option)


class ShardImages(EncodedImages):
    """The images of all shards, shard after shard, in the order that they have there; each shard is a chunk.

    root   as in `ShardsData`
    cache  gets the shards that are fetched
    kept   gets the listing of large sets, and of shards in a place that cannot be written to

    Raises OptionError naming `option` for shards that are missing, damaged, or labelled in part.
    """

    def __init__(self, root: str | None, *, option: str, cache: ShardCache, kept: IndexCache):
        places, classes = _places(root, option, cache)
        listing = _remote_listing(places, cache, option) if is_remote(places[0]) else _local_listing(places, kept, option, source=str(root))
        self._cache = cache
        self._places = PackedStrings(places)
        self._names = listing.names
        self._offsets = listing.offsets
        self._sizes = listing.sizes
        self.chunk_ends = listing.chunk_ends
        self.labels = listing.labels
        self._tags, self._tag_ends = listing.tags, listing.tag_ends
        self.class_names = self._named(classes, option)
        if is_remote(places[0]):
            self.chunks_at_hand = cache.room_for(int(listing.shard_bytes.max()))
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()

    def _named(self, classes: list[str] | None, option: str) -> list[str]:
        used = self._tags if self.labels is None else self.labels
        if used is None:
            return []
        count = int(used.max(initial=-1)) + 1
        if classes is None:
            return [str(label) for label in range(count)]
        if len(classes) < count:
            found = f"'{CLASSES_NAME}' has {len(classes)} lines, but there are labels up to {count - 1}"
            raise OptionError(option, found, "give one line for each class")
        return classes

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{os.path.basename(self._places[self._shard_of(index)])}@/{self._names[index]}"

    def fetch(self, index: int) -> None:
        place = self._places[self._shard_of(index)]
        if is_remote(place):
            self._cache.fetch(place)

    def targets(self, index: int) -> np.ndarray | None:
        if self._tags is None or self._tag_ends is None:
            return None
        targets = np.zeros(len(self.class_names), dtype=np.float32)
        targets[self._tags[self._tag_ends[index - 1] if index else 0 : self._tag_ends[index]]] = 1
        return targets

    def encoded(self, index: int) -> bytes:
        """The file of image `index`. Raises BadImage if the shard has none, or another one, at its place; OptionError if a shard cannot be
        fetched."""
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        if size == 0:
            raise BadImage("the sample has no image")
        try:
            content = os.pread(self._file(self._shard_of(index)).fileno(), BLOCK + size, offset - BLOCK)
        except OSError as error:
            raise BadImage(f"{type(error).__name__}: {error}") from error
        if len(content) < BLOCK + size:
            raise BadImage("the shard ends before the image does")
        if _size_in(content[:BLOCK]) != size:
            raise BadImage(
                f"the shard is not the one that its index was made for; remove its {SUFFIX} file, and the listing in data.index_cache"
            )
        return content[BLOCK:]

    def _shard_of(self, index: int) -> int:
        assert self.chunk_ends is not None
        return int(np.searchsorted(self.chunk_ends, index, side="right"))

    def _file(self, shard: int) -> io.FileIO:
        file = self._files.get(shard)
        if file is None:
            place = self._places[shard]
            file = open(self._cache.fetch(place) if is_remote(place) else place, "rb", buffering=0)  # noqa: SIM115
            self._files[shard] = file
            if len(self._files) > self._most_open():
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return file

    def _most_open(self) -> int:
        """A fetched shard keeps its place on the disk as long as any process has it open."""
        return _OPEN_FILES if self.chunks_at_hand is None else max(1, min(_OPEN_FILES, self.chunks_at_hand))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": OrderedDict()}


def _size_in(header: bytes) -> int | None:
    """The size of the member that a tar header describes; None if it is none."""
    try:
        return int(header[124:136].strip(b"\0 "), 8)
    except ValueError:
        return None


# ---------------------------------------------------------------------- which shards


def _places(root: str | None, option: str, cache: ShardCache) -> tuple[list[str], list[str] | None]:
    """Paths or addresses of the shards, in order, and the names of the classes where a file tells them."""
    if not root:
        raise OptionError(option, "no shards are given", f"write {option}=/path/to/shards")
    if is_remote(root):
        return _remote_places(root, option, cache)
    if not re.search(r"\{.*\}|[*?\[]", root) and not root.endswith(".tar"):
        folder = existing_folder(option, root)
        places = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
        if not places:
            splits = [split for split in ("train", "val") if glob.glob(os.path.join(glob.escape(folder), split, "*.tar"))]
            remedy = f"use {option}={os.path.join(folder, splits[0])}" if splits else "give the folder that the shards are in"
            raise OptionError(option, f"folder '{folder}' holds no .tar files", remedy)
    else:
        expanded = list(_expanded(root, option))
        places = [place for pattern in expanded for place in (sorted(glob.glob(pattern)) if re.search(r"[*?\[]", pattern) else [pattern])]
        missing = [place for place in places if not os.path.isfile(place)]
        if missing or not places:
            lacking = f"shard '{missing[0]}' does not exist" if missing else f"no file matches '{root}'"
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise OptionError(option, lacking + more, "give .tar files that are there")
    classes = Path(places[0]).parent / CLASSES_NAME
    return places, classes.read_text().splitlines() if classes.exists() else None


def _remote_places(root: str, option: str, cache: ShardCache) -> tuple[list[str], list[str] | None]:
    if root.startswith("pipe:") or root.partition("?")[0].endswith(".tar"):
        places = list(_expanded(root, option))
    else:
        listed = cache.read_lines(f"{root.rstrip('/')}/{LIST_NAME}")
        if not listed:
            found = f"'{root}' has no {LIST_NAME}, which would say what shards there are"
            raise OptionError(option, found, "give a pattern such as '.../train-{000000..000099}.tar'")
        places = [f"{root.rstrip('/')}/{name}" for name in listed]
    if root.startswith("pipe:"):
        return places, None
    return places, cache.read_lines(f"{places[0].rpartition('/')[0]}/{CLASSES_NAME}")


def _expanded(pattern: str, option: str) -> Sequence[str]:
    from braceexpand import braceexpand  # comes with webdataset

    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise OptionError(option, f"'{pattern}' has a brace without its other half", "write e.g. 'train-{000000..000099}.tar'") from None


# ---------------------------------------------------------------------- what is in them


@dataclass(frozen=True)
class _Listing:
    """Of s shards with n samples in all; see `ShardIndex`.

    chunk_ends   (s,) int64: where each shard's samples end
    shard_bytes  (s,) int64
    """

    names: PackedStrings
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray | None
    tags: np.ndarray | None
    tag_ends: np.ndarray | None
    chunk_ends: np.ndarray
    shard_bytes: np.ndarray


def _local_listing(places: list[str], kept: IndexCache, option: str, *, source: str) -> _Listing:
    """The listing that was kept of the very same shards, or else one made of their indices."""
    described = PackedStrings(f"{place}\0{os.stat(place).st_size}\0{os.stat(place).st_mtime_ns}" for place in places)
    arrays = kept.load("shards", source)
    if arrays is not None and np.array_equal(arrays.pop("described"), described.text):
        names = PackedStrings.from_arrays(arrays.pop("text"), arrays.pop("ends"))
        labels, tags, tag_ends = (arrays.pop(name) for name in ("labels", "tags", "tag_ends"))
        return _Listing(
            names=names,
            labels=labels if len(labels) else None,
            tags=tags if len(tag_ends) else None,
            tag_ends=tag_ends if len(tag_ends) else None,
            **arrays,
        )
    indices, all_beside = [], True
    for place in _shown(places):
        index = load_index(Path(place))
        if index is None:
            index, is_beside = make_index(Path(place), option=option)
            all_beside &= is_beside
        indices.append(index)
    listing = _joined(places, indices, option)
    if len(listing.names) >= CACHED_FROM or not all_beside:
        arrays = {"text": listing.names.text, "ends": listing.names.ends, "described": described.text}
        arrays |= {name: or_empty(getattr(listing, name)) for name in ("labels", "tags", "tag_ends")}
        arrays |= {name: getattr(listing, name) for name in ("offsets", "sizes", "chunk_ends", "shard_bytes")}
        kept.save("shards", source, arrays)
    return listing


def _remote_listing(places: list[str], cache: ShardCache, option: str) -> _Listing:
    """Of the indices beside the shards on the server, fetched once; where there is none it is made of the shard itself."""
    indices = []
    for address in _shown(places):
        beside = index_beside(cache.path_of(address))
        index = read_index(beside)
        if index is None and cache.fetch_index(address):
            index = read_index(beside)
        try:
            indices.append(index or make_index(cache.fetch(address), option=option)[0])
        except OptionError:
            cache.forget(address)  # it may have been cut off on its way
            raise
    return _joined(places, indices, option)


def _joined(places: list[str], indices: list[ShardIndex], option: str) -> _Listing:
    has_labels, has_tags = indices[0].labels is not None, indices[0].tags is not None
    for place, index in zip(places, indices, strict=True):
        if (index.labels is not None, index.tags is not None) != (has_labels, has_tags):
            kind = "one label for each sample" if index.labels is not None else "several" if index.tags is not None else "no labels"
            raise OptionError(option, f"'{place}' has {kind}, unlike '{places[0]}'", "label all shards alike, or none")
    begins = np.cumsum([0, *(len(or_empty(index.tags)) for index in indices[:-1])])  # of each shard's tags
    return _Listing(
        names=PackedStrings(name for index in indices for name in index.names),
        offsets=np.concatenate([index.offsets for index in indices]),
        sizes=np.concatenate([index.sizes for index in indices]),
        labels=np.concatenate([or_empty(index.labels) for index in indices]) if has_labels else None,
        tags=np.concatenate([or_empty(index.tags) for index in indices]) if has_tags else None,
        tag_ends=np.concatenate([begin + or_empty(index.tag_ends) for begin, index in zip(begins, indices, strict=True)])
        if has_tags
        else None,
        chunk_ends=np.cumsum([len(index.names) for index in indices], dtype=np.int64),
        shard_bytes=np.array([index.shard_bytes for index in indices], dtype=np.int64),
    )


def _shown(places: list[str]) -> Iterator[str]:
    """With a bar, should it take longer than a second."""
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(places, desc="indexing shards", unit="shard", delay=1.0, file=sys.stderr, mininterval=interval) as bar:
        yield from bar
