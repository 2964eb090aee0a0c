"""Images that a list names: a text, CSV or JSONL file with a path for each image and perhaps a label.

In text files a tab separates path and label. Without one, a line that ends like an image's name is a path, spaces and all; of any other
line the last word is the label. Labels that are all whole numbers are the classes' numbers; others are names, and their sorted order
gives the numbers.
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from esvit.data.base import Data, FileImages, ImageSet, PackedStrings, existing_folder, is_image_name
from esvit.data.decoding import Pixels
from esvit.data.label_map import first_conflict
from esvit.errors import OptionError

_LOOKED_FOR = 20  # images of which at least one has to be there


@dataclass(kw_only=True)
class ListData(Data):
    """The images of `train_list`, below `root`, or below the list's own folder; those of `val_list`, below `val_root` or where those are.

    path_column, label_column  names of columns (CSV) or fields (JSONL); label_column None takes "label", if there is one
    """

    train_list: str
    val_list: str | None
    path_column: str
    label_column: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_root is not None and self.val_list is None:
            raise OptionError("data.val_list", "is not given, but data.val_root is", "give the list of the images in it")

    def open_train(self) -> "ListedImages":
        return self._images(self.train_list, "data.train_list", self.root, "data.root", None)

    def open_validation(self) -> ImageSet | None:
        if self.val_list is None:
            return None
        training = self.open_train()
        option = "data.root" if self.val_root is None else "data.val_root"
        return self._images(self.val_list, "data.val_list", self.val_root or self.root, option, training)

    def _images(self, file: str, option: str, root: str | None, root_option: str, training: "ListedImages | None") -> "ListedImages":
        if not os.path.isfile(file):
            raise OptionError(option, f"file '{file}' does not exist", "give a .csv, .jsonl or text file with one image a line")
        folder = os.path.dirname(os.path.abspath(file)) if root is None else existing_folder(root_option, root)
        reader = _Reader(file, path_column=self.path_column, label_column=self.label_column, pixels=self.pixels, option=option)
        return ListedImages(folder, reader, training=training, option=option, root_option=root_option)


@dataclass(frozen=True)
class _Entry:
    line: int
    path: str
    label: str | None


class ListedImages(FileImages):
    """The images that a list names, in its order.

    root      folder that paths begin in
    training  the training images, whose classes these are, or None

    Raises OptionError naming `option` for a list that is wrong, and `root_option` where none of its first images is there.
    """

    def __init__(self, root: str, reader: "_Reader", *, training: "ListedImages | None", option: str, root_option: str):
        self.root = root
        paths: list[str] = []
        labels: list[str | None] = []
        lines: list[int] = []
        for entry in reader.entries():
            if labels and (entry.label is None) != (labels[0] is None):
                found = "has a label, others have none" if entry.label else "has no label, others have one"
                raise reader.wrong(entry.line, found, "label all or none")
            paths.append(entry.path)
            labels.append(entry.label)
            lines.append(entry.line)
        if not paths:
            raise OptionError(option, f"'{reader.path}' names no images", "write one a line")
        if not any(os.path.exists(os.path.join(root, path)) for path in paths[:_LOOKED_FOR]):
            found = f"'{paths[0]}' of '{reader.path}' is not in '{root}', nor is any of the next ones"
            raise OptionError(root_option, found, "give the folder that the list's paths begin in")
        self._names = PackedStrings(paths)
        self.class_names, self.labels = _numbered(labels, lines, reader, training)
        if self.labels is not None:
            conflict = first_conflict(np.array([hash(path) for path in paths], dtype=np.int64), self.labels)
            if conflict is not None:
                found = f"gives '{paths[conflict.later]}' label {labels[conflict.later]}"
                found += f", line {lines[conflict.earlier]} gave it {labels[conflict.earlier]}"
                raise reader.wrong(lines[conflict.later], found, "give each image one label")


def _numbered(
    labels: list[str | None], lines: list[int], reader: "_Reader", training: ListedImages | None
) -> tuple[list[str], np.ndarray | None]:
    """Names of the classes, and (n,) int64 numbers or None. Raises OptionError for a label that the training images do not have."""
    if labels[0] is None:
        return [], None
    given = [str(label) for label in labels]
    if training is not None and training.labels is None:
        raise OptionError("data.val_list", "has labels, data.train_list has none", "label both, or leave data.val_list out")
    if training is not None:
        names = training.class_names
    elif all(label.isdecimal() for label in given):
        names = [str(number) for number in range(max(map(int, given)) + 1)]
    else:
        names = sorted(set(given))
    are_numbers = names == [str(number) for number in range(len(names))]
    number_of = {name: number for number, name in enumerate(names)}
    numbers = np.empty(len(given), dtype=np.int64)
    for place, label in enumerate(given):
        known = number_of.get(str(int(label)) if are_numbers and label.isdecimal() else label)
        if known is None:
            raise reader.wrong(lines[place], f"has label '{label}', which data.train_list does not have", "give both the same classes")
        numbers[place] = known
    return names, numbers


class _Reader:
    """The lines of a list."""

    def __init__(self, path: str, *, path_column: str, label_column: str | None, pixels: Pixels, option: str):
        self.path = path
        self._path_column = path_column
        self._label_column = label_column
        self._pixels = pixels
        self._option = option

    def entries(self) -> Iterator[_Entry]:
        """Raises OptionError for a line that is wrong."""
        ending = os.path.splitext(self.path)[1].lower()
        entries = {".csv": self._of_csv, ".jsonl": self._of_json, ".json": self._of_json}.get(ending, self._of_text)
        with open(self.path, encoding="utf-8", errors="surrogateescape", newline="" if ending == ".csv" else None) as file:
            for entry in entries(file):
                if not entry.path:
                    raise self.wrong(entry.line, "has no path", "give each image's path")
                yield entry

    def wrong(self, line: int, found: str, remedy: str) -> OptionError:
        return OptionError(self._option, f"{self.path} line {line} {found}", remedy)

    def _of_text(self, file: Iterator[str]) -> Iterator[_Entry]:
        for number, line in enumerate(file, start=1):
            line = line.strip(" \r\n")
            if not line:
                continue
            if "\t" in line:
                path, *columns = line.split("\t")
                if len(columns) > 1:
                    raise self.wrong(number, f"has {len(columns) + 1} columns", "write '<path><tab><label>', or use CSV")
                yield _Entry(number, path.strip(), columns[0].strip() or None)
                continue
            *words, last = line.rsplit(maxsplit=1)
            is_path = not words or is_image_name(os.path.basename(line), self._pixels.extensions)
            yield _Entry(number, line, None) if is_path else _Entry(number, words[0], last)

    def _of_csv(self, file: Iterator[str]) -> Iterator[_Entry]:
        rows = csv.reader(file)
        header = [name.strip() for name in next(rows, [])]
        if self._path_column not in header:
            remedy = "name the column with data.path_column, or give a first line of column names"
            raise self.wrong(1, f"has no column '{self._path_column}' but {', '.join(header) or 'nothing'}", remedy)
        if self._label_column is not None and self._label_column not in header:
            raise self.wrong(1, f"has no column '{self._label_column}' but {', '.join(header)}", "name another with data.label_column")
        label_column = self._label_column or "label"
        path_at, label_at = header.index(self._path_column), header.index(label_column) if label_column in header else None
        try:
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise self.wrong(rows.line_num, f"has {len(row)} columns, line 1 has {len(header)}", "quote values that hold commas")
                yield _Entry(rows.line_num, row[path_at].strip(), None if label_at is None else row[label_at].strip() or None)
        except csv.Error as error:
            raise self.wrong(rows.line_num, f"is no CSV ({error})", "mend it") from None

    def _of_json(self, file: Iterator[str]) -> Iterator[_Entry]:
        label_column = self._label_column or "label"
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise self.wrong(number, f"is no JSON ({error})", 'write {"path": ..., "label": ...}, one a line') from None
            if not isinstance(fields, dict) or not isinstance(fields.get(self._path_column), str):
                raise self.wrong(number, f"has no text field '{self._path_column}'", "name another with data.path_column")
            label = fields.get(label_column)
            if self._label_column is not None and label is None:
                raise self.wrong(number, f"has no field '{self._label_column}'", "name another with data.label_column")
            if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
                raise self.wrong(number, f"has the label {json.dumps(label)[:60]}", "use a name or a whole number")
            yield _Entry(number, fields[self._path_column], None if label is None else str(label).strip())
