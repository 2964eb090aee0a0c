"""WebVision v1: images from Google and Flickr by the lists that come with them.

As in the original, the training set is Google's list and then Flickr's, and labels from 1000 on are left out.
"""

import os
from collections.abc import Iterator

import numpy as np

from esvit.data.base import Data, FileImages, ImageSet, PackedStrings, existing_folder
from esvit.data.label_map import first_conflict
from esvit.errors import OptionError

CLASSES = 1000
_TRAINING_LISTS = ("train_filelist_google.txt", "train_filelist_flickr.txt")
_VALIDATION_LIST = "val_filelist.txt"
_VALIDATION_FOLDER = "val_images_256"


class WebVisionData(Data):
    """`info/train_filelist_{google,flickr}.txt` in `root`; `info/val_filelist.txt` and `val_images_256/` in `val_root`, or else in `root`.

    Lines are `<path> <label>`. Classes are named as in `root/info/synsets.txt`, where that is present: the first word of each line.
    """

    def open_train(self) -> ImageSet:
        root = existing_folder("data.root", self.root)
        return WebVisionImages(root, _TRAINING_LISTS, folder="", class_names=self._class_names(root), option="data.root")

    def open_validation(self) -> ImageSet | None:
        root = existing_folder("data.root", self.root)
        names = self._class_names(root)
        if self.val_root is not None:
            root = existing_folder("data.val_root", self.val_root)
        elif not os.path.isfile(os.path.join(root, "info", _VALIDATION_LIST)):
            return None
        return WebVisionImages(root, (_VALIDATION_LIST,), folder=_VALIDATION_FOLDER, class_names=names, option="data.val_root")

    def _class_names(self, root: str) -> list[str]:
        path = os.path.join(root, "info", "synsets.txt")
        if not os.path.isfile(path):
            return [str(number) for number in range(CLASSES)]
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            names = [line.split()[0] for line in lines if line.strip()]
        if len(names) != CLASSES or len(set(names)) != CLASSES:
            raise OptionError("data.root", f"'{path}' has {len(set(names))} different classes instead of {CLASSES}", "copy it again")
        return names


class WebVisionImages(FileImages):
    """The images of some lists, list after list.

    lists   their names in `root/info`
    folder  what their paths begin in, below `root`

    Raises OptionError naming `option`, with file and line for a malformed or contradictory one.
    """

    def __init__(self, root: str, lists: tuple[str, ...], *, folder: str, class_names: list[str], option: str):
        self.root = root
        self.class_names = class_names
        names: list[str] = []
        labels: list[int] = []
        places: list[tuple[str, int]] = []  # list and line of each image
        for each in lists:
            path = os.path.join(root, "info", each)
            if not os.path.isfile(path):
                raise OptionError(option, f"file '{path}' does not exist", "give the folder of WebVision v1 that has info/ in it")
            for number, (name, label) in _lines(path, option):
                if label < CLASSES:
                    names.append(f"{folder}/{name}" if folder else name)
                    labels.append(label)
                    places.append((path, number))
        if not names:
            raise OptionError(option, f"'{os.path.join(root, 'info')}' lists no images", "copy the lists again")
        self._names = PackedStrings(names)
        self.labels = np.array(labels, dtype=np.int64)
        conflict = first_conflict(np.array([hash(name) for name in names], dtype=np.int64), self.labels)
        if conflict is not None:
            (path, line), (other, earlier) = places[conflict.later], places[conflict.earlier]
            found = f"{path} line {line} gives '{names[conflict.later]}' label {labels[conflict.later]}"
            raise OptionError(option, f"{found}, {other} line {earlier} gave it {labels[conflict.earlier]}", "give each image one label")


def _lines(path: str, option: str) -> Iterator[tuple[int, tuple[str, int]]]:
    """Number, and path and label, of each line that is not empty."""
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, _, label = line.strip().rpartition(" ")
            if not name.strip() or not label.isdecimal():
                found = f"{path} line {number} is malformed: '{line.strip()[:80]}'"
                raise OptionError(option, found, "write '<path> <label>' with a label from 0 upwards")
            yield number, (name.strip(), int(label))
