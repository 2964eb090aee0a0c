"""OpenImages v4 in TSV files as the original used them: images with several tags each, and a line index that shows rare tags more often.

The line index names rows by the byte at which they begin; a row named twice is seen twice. Tags are in a file of their own, by key. Those
with a minus sign were verified as absent: they, and those that the label map does not have, are left out. Unlike the original's, targets
have as many elements as there are tags, not one more. Nothing but the targets reads the tags, so pre-training never does.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from esvit.data.base import BadImage, Data, EncodedImages, existing_folder
from esvit.data.index import IndexCache
from esvit.data.label_map import listed_names
from esvit.data.tsv import decoded_column
from esvit.data.tsv_files import TsvFiles, line_starts, read_numbers
from esvit.errors import OptionError

_LINE = 1 << 18  # bytes that a line with its image may be expected to have


@dataclass(kw_only=True)
class OpenImagesData(Data):
    """`root/train.tsv`, rows of key, anything and base64.

    line_index  file in `root` of the rows to show, by their first byte, some several times; None shows each row once
    label_file  file in `root` of lines `<key><tab><tags>`: names with ";" between, or a JSON list of records with a "class"; None: no tags
    label_map   file in `root` of the tags, one a line
    """

    line_index: str | None
    label_file: str | None
    label_map: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_root is not None:
            remedy = "leave it out, and evaluate with the images of another set, as in task=knn of=RUN_FOLDER data=folder data.root=..."
            raise OptionError("data.val_root", "is not used: k-NN needs one label per image, these have several", remedy)
        if self.label_file is not None and self.label_map is None:
            raise OptionError("data.label_map", "is not given, but data.label_file is", "give the file of tags, or data.label_file=null")

    def open_train(self) -> "OpenImages":
        root = existing_folder("data.root", self.root)
        files = {
            "data.root": os.path.join(root, "train.tsv"),
            "data.line_index": self.line_index and os.path.join(root, self.line_index),
            "data.label_file": self.label_file and os.path.join(root, self.label_file),
        }
        for option, path in files.items():
            if path and not os.path.isfile(path):
                remedy = "give the folder of train.tsv" if option == "data.root" else f"give another, or {option}=null to do without"
                raise OptionError(option, f"file '{path}' does not exist", remedy)
        tags = listed_names(os.path.join(root, self.label_map), option="data.label_map") if self.label_file and self.label_map else {}
        path = str(files["data.root"])
        return OpenImages(path, line_index=files["data.line_index"], label_file=files["data.label_file"], tags=tags, index=self.index)

    def open_validation(self) -> None:
        return None


class OpenImages(EncodedImages):
    """The rows of a TSV file that a line index names, in its order; class_names are the tags.

    tags  number of each tag

    Raises OptionError for a line index that does not fit.
    """

    labels = None

    def __init__(self, path: str, *, line_index: str | None, label_file: str | None, tags: dict[str, int], index: IndexCache):
        self.class_names = list(tags)
        self._tags = tags
        self._label_file = label_file
        self._files = TsvFiles([path], open_files=1)
        if line_index is None:
            self._starts = line_starts(path, index=index, option="data.root")[:-1]
        else:
            self._starts = read_numbers(line_index, "data.line_index")
            self._check_starts(path, line_index)
        if len(self._files.head(0, int(self._starts[0]), 3)) < 3:
            found = f"'{path}' has no columns of key, label and image at byte {self._starts[0]}"
            raise OptionError("data.root", found, "rows are key, label and image in base64, with tabs in between")

    def __len__(self) -> int:
        return len(self._starts)

    def encoded(self, index: int) -> bytes:
        """The image of row `index`. Raises BadImage for a row without one."""
        try:
            return decoded_column(self._files.line(0, int(self._starts[index]), _LINE).split(b"\t"))
        except OSError as error:
            raise BadImage(f"{type(error).__name__}: {error}") from error

    def name(self, index: int) -> str:
        """By key: repeated rows have one name."""
        try:
            return f"train.tsv@{self._key(index).decode(errors='surrogateescape')}"
        except OSError:
            return f"train.tsv byte {self._starts[index]}"

    def targets(self, index: int) -> np.ndarray | None:
        """(tags,) float32, 1 for the tags that were verified; None without labels."""
        if self._label_file is None:
            return None
        target = np.zeros(len(self.class_names), dtype=np.float32)
        verified = self._verified
        at = int(np.searchsorted(verified.keys, hash(self._key(index))))
        if at < len(verified.keys) and verified.keys[at] == hash(self._key(index)):
            target[verified.tags[verified.ends[at] : verified.ends[at + 1]]] = 1
        return target

    def _key(self, index: int) -> bytes:
        return self._files.head(0, int(self._starts[index]), 2)[0]

    @cached_property
    def _verified(self) -> "_Verified":
        assert self._label_file is not None
        return _read_tags(self._label_file, self._tags)

    def _check_starts(self, path: str, line_index: str) -> None:
        starts, size = self._starts, os.path.getsize(path)
        if not len(starts):
            raise OptionError("data.line_index", f"'{line_index}' names no rows", "copy it again, or use data.line_index=null")
        wrong = np.flatnonzero((starts < 0) | (starts >= size))
        looks = np.unique(starts[np.linspace(0, len(starts) - 1, 100).astype(np.int64)])
        if len(wrong) or not all(start == 0 or self._files.read(0, int(start) - 1, 1) == b"\n" for start in looks):
            place = f" line {wrong[0] + 1}" if len(wrong) else ""
            found = f"{line_index}{place} names a byte at which no row of '{path}' begins"
            raise OptionError("data.line_index", found, "copy it again, or use data.line_index=null")

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_verified"}  # keys are hashed by a seed of the process


@dataclass(frozen=True)
class _Verified:
    """Tags by key: those of `keys[i]` (hashed, rising) are `tags[ends[i] : ends[i + 1]]`."""

    keys: np.ndarray
    tags: np.ndarray
    ends: np.ndarray


def _read_tags(path: str, numbers: dict[str, int]) -> _Verified:
    """Raises OptionError with file and line for a malformed line, and for a key that comes again with other tags."""
    keys, tags, sizes = [], [], []
    lines: dict[int, int] = {}
    with open(path, "rb") as file:
        for line, content in enumerate(file, start=1):
            if not content.strip():
                continue
            columns = content.rstrip(b"\r\n").split(b"\t")
            found = _verified_tags(columns[1], numbers) if len(columns) == 2 else None
            if found is None:
                remedy = "write '<key><tab><tag>;<tag>', or a JSON list of records with a \"class\""
                shown = content[:60].decode(errors="replace").strip()
                raise OptionError("data.label_file", f"{path} line {line} is malformed: '{shown}'", remedy)
            key = hash(columns[0])
            if key in lines:
                name = columns[0].decode(errors="replace")
                raise OptionError("data.label_file", f"{path} line {line} gives '{name}' tags again, after line {lines[key]}", "keep one")
            lines[key] = line
            keys.append(key)
            tags += found
            sizes.append(len(found))
    order = np.argsort(np.array(keys, dtype=np.int64))
    ends = np.cumsum([0, *sizes])
    parts = [np.arange(ends[each], ends[each + 1]) for each in order]
    flat = np.array(tags, dtype=np.int32)[np.concatenate(parts)] if parts else np.empty(0, dtype=np.int32)
    return _Verified(np.array(keys, dtype=np.int64)[order], flat, np.cumsum([0, *np.array(sizes, dtype=np.int64)[order]]))


def _verified_tags(text: bytes, numbers: dict[str, int]) -> list[int] | None:
    """Numbers of the tags, without those verified as absent; None for text that is neither form."""
    names: list[str]
    if text.lstrip().startswith(b"["):
        try:
            names = [str(record["class"]) for record in json.loads(text)]
        except (ValueError, LookupError, TypeError):
            return None
    else:
        names = text.decode(errors="surrogateescape").split(";")
    return [numbers[name] for name in names if name in numbers]  # a name with a minus sign is no tag of the map
