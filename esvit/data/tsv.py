"""Images in TSV files, a few large files instead of millions of small ones: rows of key, label and base64, as the original's.

Labels are read when they are first asked for: pre-training of 14 million images does not wait until every row was looked at. They are kept
in the cache of listings. What the first row of each file can tell is checked before the run.
"""

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from esvit import distributed
from esvit.data.base import BadImage, Data, EncodedImages, existing_folder
from esvit.data.index import CACHED_FROM, IndexCache
from esvit.data.label_map import first_conflict, numbered_names
from esvit.data.tsv_files import TsvFiles, line_starts, selected_rows
from esvit.errors import OptionError

_SECONDS_UNTIL_SHOWN = 2
_ROWS = "rows are key, label and image in base64, with tabs in between"


@dataclass(kw_only=True)
class TsvData(Data):
    """`root/train.tsv`, or every `root/train/*.tsv` by name; `val.tsv` or `val/` in `val_root`, or else, if present, in `root`.

    label_map   file in `root` of lines `<name><tab><number>`: the label column holds names; None: it holds numbers
    open_files  how many of the files each process keeps open
    """

    label_map: str | None
    open_files: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.open_files < 1:
            raise OptionError("data.open_files", f"{self.open_files} files", "use at least 1")

    def open_train(self) -> "TsvImages":
        root = existing_folder("data.root", self.root)
        return self._images(root, "train", "data.root", None)

    def open_validation(self) -> "TsvImages | None":
        root = existing_folder("data.root", self.root)
        if self.val_root is not None:
            return self._images(existing_folder("data.val_root", self.val_root), "val", "data.val_root", self.open_train())
        return self._images(root, "val", "data.val_root", self.open_train()) if _files(root, "val") else None

    def _images(self, folder: str, split: str, option: str, training: "TsvImages | None") -> "TsvImages":
        paths = _files(folder, split)
        if not paths:
            found = f"folder '{folder}' has neither {split}.tsv nor TSV files in {split}/"
            raise OptionError(option, found, f"give the folder that {split}.tsv or {split}/ is in")
        return TsvImages(
            folder,
            paths,
            label_map=None if self.label_map is None else os.path.join(existing_folder("data.root", self.root), self.label_map),
            training=training,
            open_files=self.open_files,
            index=self.index,
            option=option,
        )


class TsvImages(EncodedImages):
    """The rows of some TSV files, file after file; of a file with a `.linelist`, the rows in that.

    With a label map, `<stem>.chunks` ({"name": [first row, last row]}) says which rows have which label; rows in no chunk, or in one that
    the map does not know, are left out. Without chunks the label column does: a name, or a list of records whose first "class" counts.

    folder     what names are relative to
    label_map  path of the file of names and numbers, or None
    training   the training images, whose classes these are, or None

    Raises OptionError naming `option` for files that cannot be what they should be, with the line where one is wrong.
    """

    def __init__(
        self,
        folder: str,
        paths: list[str],
        *,
        label_map: str | None,
        training: "TsvImages | None",
        open_files: int,
        index: IndexCache,
        option: str,
    ):
        self._folder = folder
        self._option = option
        self._index = index
        self._training = training
        self._map_path = label_map
        self._numbers = None if label_map is None else numbered_names(label_map, option="data.label_map")
        self._files = TsvFiles(paths, open_files=open_files)
        self._starts = [line_starts(path, index=index, option=option) for path in paths]
        for file in range(len(paths)):
            self._check_first_row(file)
        self._rows: list[np.ndarray | None] = []
        self._chunk_labels: list[np.ndarray | None] = []
        for path, starts in zip(paths, self._starts, strict=True):
            self._select(path, len(starts) - 1)
        sizes = [len(starts) - 1 if rows is None else len(rows) for starts, rows in zip(self._starts, self._rows, strict=True)]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        if not len(self):
            raise OptionError(option, f"no row of '{paths[0]}' is left by its .linelist and .chunks", "check them")
        self.chunk_ends = np.unique(self._ends[self._ends > 0]) if len(paths) > 1 else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def encoded(self, index: int) -> bytes:
        """The image of row `index`. Raises BadImage for a row without one."""
        file, row = self._place(index)
        starts = self._starts[file]
        try:
            columns = self._files.line(file, int(starts[row]), int(starts[row + 1] - starts[row])).split(b"\t")
        except OSError as error:
            raise BadImage(f"{type(error).__name__}: {error}") from error
        return decoded_column(columns)

    def name(self, index: int) -> str:
        file, row = self._place(index)
        try:
            key = self._files.head(file, int(self._starts[file][row]), 2)[0].decode(errors="surrogateescape")
        except OSError:
            key = "?"
        return f"{os.path.relpath(self._files.paths[file], self._folder)} line {row + 1} ({key})"

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        if self._numbers is not None:
            names = {number: name for name, number in self._numbers.items()}
            return [names.get(number, str(number)) for number in range(max(names) + 1)]
        if self._training is not None:
            return self._training.class_names
        return [str(number) for number in range(int(self._own_labels.max()) + 1)]

    @cached_property
    def labels(self) -> np.ndarray:  # type: ignore[override]
        largest = int(self._own_labels.max())
        if largest >= len(self.class_names):
            file, row = self._place(int(self._own_labels.argmax()))
            place = f"{self._files.paths[file]} line {row + 1}"
            found = f"{place} has label {largest}, data.root has {len(self.class_names)} classes"
            raise OptionError(self._option, found, "give both sets the same classes")
        return self._own_labels

    @cached_property
    def _own_labels(self) -> np.ndarray:
        """(len,) int64."""
        if all(labels is not None for labels in self._chunk_labels):
            return np.concatenate([labels for labels in self._chunk_labels if labels is not None])
        state = self._state()
        kept = self._index.load("labels", self._files.paths[0])
        if kept is not None and np.array_equal(kept["state"], state):
            return kept["labels"]
        labels = self._read_labels()
        if len(self) >= CACHED_FROM:
            self._index.save("labels", self._files.paths[0], {"labels": labels, "state": state})
        return labels

    def _read_labels(self) -> np.ndarray:
        labels = np.empty(len(self), dtype=np.int64)
        keys = np.empty(len(self), dtype=np.int64)  # hashed: as text they would take gigabytes
        is_quiet = distributed.rank() > 0
        for index in tqdm(range(len(self)), "reading labels", unit=" rows", delay=_SECONDS_UNTIL_SHOWN, leave=False, disable=is_quiet):
            file, row = self._place(index)
            columns = self._files.head(file, int(self._starts[file][row]), 3)
            if len(columns) < 3:
                raise self._wrong(file, row, f"has {len(columns)} columns", _ROWS)
            labels[index] = self._number(columns[1], file, row)
            keys[index] = hash(columns[0])
        conflict = first_conflict(keys, labels)
        if conflict is not None:
            (file, row), (other, earlier) = self._place(conflict.later), self._place(conflict.earlier)
            place = f"{self._files.paths[other]} line {earlier + 1}" if other != file else f"line {earlier + 1}"
            found = f"gives its key label {labels[conflict.later]}, {place} gave it {labels[conflict.earlier]}"
            raise self._wrong(file, row, found, "give each image a key, and one label")
        return labels

    def _number(self, text: bytes, file: int, row: int) -> int:
        """The label in a row's label column."""
        if self._numbers is None:
            if not text.strip().isdigit():
                found = f"has '{_shown(text)}' for a label, which is no number"
                raise self._wrong(file, row, found, "write numbers from 0 upwards, or give data.label_map=FILE with a number for each name")
            return int(text)
        name = _class_in(text)
        if name is None:
            remedy = 'write a name, or a JSON list like [{"class": "n01440764"}]'
            raise self._wrong(file, row, f"has '{_shown(text)}' for a label, which names no class", remedy)
        if name not in self._numbers:
            raise self._wrong(file, row, f"is of class '{name}', which '{self._map_path}' does not know", "add a line for it")
        return self._numbers[name]

    def _wrong(self, file: int, row: int, found: str, remedy: str) -> OptionError:
        return OptionError(self._option, f"{self._files.paths[file]} line {row + 1} {found}", remedy)

    def _check_first_row(self, file: int) -> None:
        columns = self._files.head(file, 0, 3)
        if len(columns) < 3:
            raise self._wrong(file, 0, f"has {len(columns)} columns", _ROWS)

    def _select(self, path: str, rows: int) -> None:
        """Which rows of a file are kept, and their labels where chunks tell them."""
        chosen = selected_rows(path, rows, self._option)
        chunks = os.path.splitext(path)[0] + ".chunks"
        if self._numbers is None or not os.path.exists(chunks):
            self._rows.append(chosen)
            self._chunk_labels.append(None)
            return
        label_of_row = np.full(rows, -1, dtype=np.int64)
        for name, (first, last) in _read_chunks(chunks, rows, self._option):
            if name in self._numbers:
                if (label_of_row[first : last + 1] >= 0).any():
                    raise OptionError(self._option, f"{chunks}: rows {first} to {last} of '{name}' are in another chunk too", "mend it")
                label_of_row[first : last + 1] = self._numbers[name]
        candidates = np.arange(rows) if chosen is None else chosen
        kept = candidates[label_of_row[candidates] >= 0]
        self._rows.append(kept)
        self._chunk_labels.append(label_of_row[kept])

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the file, and of the row in it."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[file - 1]) if file else 0)
        rows = self._rows[file]
        return file, row if rows is None else int(rows[row])

    def _state(self) -> np.ndarray:
        """What labels depend on: names, sizes and times of the files, and which rows are kept; (32,) uint8."""
        digest = hashlib.sha256(repr(self._numbers).encode())
        for path, rows in zip(self._files.paths, self._rows, strict=True):
            status = os.stat(path)
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape"))
            digest.update(b"all" if rows is None else rows.tobytes())
        return np.frombuffer(digest.digest(), dtype=np.uint8)


def decoded_column(columns: list[bytes]) -> bytes:
    """The image in the last of a row's columns. Raises BadImage."""
    if len(columns) < 3:
        raise BadImage(f"the row has {len(columns)} columns instead of key, label and image")
    try:
        return base64.b64decode(columns[-1], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImage(f"not base64: {error}") from error


def _files(folder: str, split: str) -> list[str]:
    """`folder/<split>.tsv`, or else the TSV files in `folder/<split>`, sorted by name."""
    single = os.path.join(folder, f"{split}.tsv")
    if os.path.isfile(single):
        return [single]
    return [str(path) for path in sorted(Path(folder, split).glob("*.tsv")) if not path.name.startswith(".")]


def _class_in(text: bytes) -> str | None:
    """The class that a label column names: a name, or the "class" of the first record of a JSON list."""
    label = text.decode(errors="surrogateescape").strip()
    if not label.startswith("["):
        return label or None
    try:
        return str(json.loads(label)[0]["class"])
    except (ValueError, LookupError, TypeError):
        return None


def _read_chunks(path: str, rows: int, option: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Each class of a `.chunks` file, with its first and last row."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        chunks = [(str(name), (int(first), int(last))) for name, (first, last) in content.items()]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        found = f"'{path}' is no JSON of classes and their rows ({error})"
        raise OptionError(option, found, 'write {"name": [first, last], ...}') from None
    for name, (first, last) in chunks:
        if not 0 <= first <= last < rows:
            found = f"{path}: class '{name}' has rows {first} to {last}, there are {rows}"
            raise OptionError(option, found, "count from 0, the last one included")
        yield name, (first, last)


def _shown(text: bytes) -> str:
    return text[:60].decode(errors="replace")
