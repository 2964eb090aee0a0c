"""Images in Parquet files, as Hugging Face's `datasets` writes them: a column of image files, and one of labels.

Parquet packs rows in groups (100 images as a rule), of which a whole one is read for the sake of a single image. Each process keeps the
last few in memory, which serves sampler=chunk (the row groups are its chunks); in random order every image costs a group.
"""

import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from esvit.data.base import BadImage, Data, EncodedImages, existing_folder
from esvit.errors import OptionError

_VALIDATION_NAMES = ("val", "test")


@dataclass(kw_only=True)
class ParquetData(Data):
    """The Parquet files below `root` in whose path a name begins with `train`, else all that are not of validation; for that, those with
    `val` or else `test`, in `val_root`, or else in `root`.

    image_column  bytes of image files, or records with a field `bytes`
    label_column  numbers, or names; None: the images have no labels
    row_groups    how many row groups each process keeps in memory
    """

    image_column: str
    label_column: str | None
    row_groups: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_groups < 1:
            raise OptionError("data.row_groups", f"{self.row_groups} row groups", "use at least 1")

    def open_train(self) -> "ParquetImages":
        root = existing_folder("data.root", self.root)
        of_validation = {path for name in _VALIDATION_NAMES for path in _files(root, name)}
        paths = _files(root, "train") or [path for path in _files(root, "") if path not in of_validation]
        return self._images(root, paths, "data.root", None)

    def open_validation(self) -> "ParquetImages | None":
        if self.val_root is not None:
            root = existing_folder("data.val_root", self.val_root)
            paths = next((found for name in (*_VALIDATION_NAMES, "") if (found := _files(root, name))), [])
        else:
            root = existing_folder("data.root", self.root)
            paths = next((found for name in _VALIDATION_NAMES if (found := _files(root, name))), [])
            if not paths:
                return None
        return self._images(root, paths, "data.val_root", self.open_train())

    def _images(self, root: str, paths: list[str], option: str, training: "ParquetImages | None") -> "ParquetImages":
        if not paths:
            raise OptionError(option, f"folder '{root}' holds no Parquet files", "give the folder that they are in")
        return ParquetImages(
            root,
            paths,
            image_column=self.image_column,
            label_column=self.label_column,
            row_groups=self.row_groups,
            class_names=None if training is None else training.class_names,
            option=option,
        )


class ParquetImages(EncodedImages):
    """The rows of some Parquet files, file after file.

    root         what names are relative to
    class_names  the labels' meaning; None takes the names that the file gives, or sorted labels, or numbers

    Raises OptionError naming `option`, or the column's option, with the file that is wrong.
    """

    def __init__(
        self,
        root: str,
        paths: list[str],
        *,
        image_column: str,
        label_column: str | None,
        row_groups: int,
        class_names: list[str] | None,
        option: str,
    ):
        self._root = root
        self._paths = paths
        self._image_column = image_column
        self._kept_groups = row_groups
        self._groups: OrderedDict[tuple[int, int, int], Any] = OrderedDict()
        files = [_Metadata(path, image_column, label_column, option) for path in paths]
        sizes = [size for file in files for size in file.group_sizes]
        self._group_places = [(number, group) for number, file in enumerate(files) for group in range(len(file.group_sizes))]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        if not sizes or not self._ends[-1]:
            raise OptionError(option, f"'{paths[0]}' and the {len(paths) - 1} other files hold no rows", "copy them again")
        self.chunk_ends = np.unique(self._ends[self._ends > 0])
        self.class_names, self.labels = _labels(files, class_names, option) if label_column else ([], None)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def encoded(self, index: int) -> bytes:
        """The image of row `index`. Raises BadImage for a row without one."""
        place = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[place - 1]) if place else 0)
        value = self._column(place)[row].as_py()
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                raise BadImage(f"the row has no bytes, only the path '{value['path']}'")
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise BadImage("the row has no image")
        return value

    def name(self, index: int) -> str:
        place = int(np.searchsorted(self._ends, index, side="right"))
        file = self._group_places[place][0]
        first = next(number for number, (each, _) in enumerate(self._group_places) if each == file)
        begin = int(self._ends[first - 1]) if first else 0
        return f"{os.path.relpath(self._paths[file], self._root)} row {index - begin}"

    def _column(self, place: int) -> Any:
        """The images of a row group; Arrow's threads do not survive a fork, so each process reads by itself and without any."""
        file, group = self._group_places[place]
        key = (os.getpid(), file, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        try:
            with pq.ParquetFile(self._paths[file], memory_map=True) as opened:
                column = opened.read_row_group(group, columns=[self._image_column], use_threads=False).column(0)
        except (OSError, pa.ArrowException) as error:
            raise BadImage(f"{type(error).__name__}: {error}") from error
        self._groups[key] = column
        while len(self._groups) > self._kept_groups:
            self._groups.popitem(last=False)
        return column

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_groups": OrderedDict()}


class _Metadata:
    """What a file says of itself, and its labels.

    group_sizes  rows of each row group
    names        names of the classes, where the file has them
    labels       the column, or None
    """

    def __init__(self, path: str, image_column: str, label_column: str | None, option: str):
        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                for each, name in (("data.image_column", image_column), ("data.label_column", label_column)):
                    if name is not None and name not in schema.names:
                        remedy = f"name another with {each}" + ("; null means no labels" if each == "data.label_column" else "")
                        raise OptionError(each, f"'{path}' has no column '{name}' but {', '.join(schema.names)}", remedy)
                kind = schema.field(image_column).type
                if not _holds_bytes(kind):
                    remedy = "name a column of bytes, or of records with a field 'bytes'"
                    raise OptionError("data.image_column", f"column '{image_column}' of '{path}' holds {kind}", remedy)
                metadata = file.metadata
                self.group_sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
                self.names = None if label_column is None else _class_names(schema.metadata or {}, label_column)
                self.labels: Any = None if label_column is None else file.read(columns=[label_column], use_threads=False).column(0)
        except (OSError, pa.ArrowException) as error:
            raise OptionError(option, f"'{path}' is no readable Parquet file ({error})", "make or copy it again") from error


def _files(root: str, name: str) -> list[str]:
    """Parquet files below `root` with a name, or that of a folder, that begins with `name`; sorted by path."""
    paths = [path for path in sorted(Path(root).rglob("*.parquet")) if not path.name.startswith(".")]
    return [str(path) for path in paths if any(part.startswith(name) for part in path.relative_to(root).parts)]


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _class_names(metadata: dict[bytes, bytes], column: str) -> list[str] | None:
    """Names of the classes as Hugging Face's `datasets` notes them."""
    try:
        return [str(name) for name in json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]]
    except (LookupError, TypeError, ValueError):
        return None


def _labels(files: list[_Metadata], class_names: list[str] | None, option: str) -> tuple[list[str], np.ndarray]:
    """Names of the classes, and (n,) int64 numbers."""
    columns = []
    for file in files:
        column = file.labels
        if column.null_count:
            row = int(pc.index(pc.is_null(column), True).as_py())
            raise OptionError(option, f"'{file.path}' row {row} has no label", "give each row one, or use data.label_column=null")
        columns.append(np.asarray(column.to_pylist() if pa.types.is_string(column.type) else column.to_numpy()))
    labels = np.concatenate(columns)
    if labels.dtype.kind in "US":
        names = class_names or sorted(set(labels.tolist()))
        unknown = sorted(set(labels.tolist()) - set(names))
        if unknown:
            found = f"label '{unknown[0]}' is none of the {len(names)} classes of data.root"
            raise OptionError(option, found, "give both the same classes")
        return names, np.searchsorted(names, labels).astype(np.int64)
    if labels.dtype.kind not in "iu":
        raise OptionError("data.label_column", f"holds {labels.dtype}", "name a column of whole numbers or of names, or null")
    names = class_names or files[0].names or [str(number) for number in range(int(labels.max()) + 1)]
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        found = f"row {wrong[0]} has label {labels[wrong[0]]} of {len(names)} classes"
        raise OptionError(option, found, "give each row a label from 0 upwards")
    return names, labels.astype(np.int64)
