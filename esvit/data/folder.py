"""Images in folders, one folder for each class, as in ImageNet's own layout; or just images in folders, without classes.

Unlike torchvision's ImageFolder: empty class folders keep their label; validation labels follow the training folder's classes by
name; and images that lie directly in the root make the whole set unlabelled, because guessing would lose images silently.
"""

import os
from collections.abc import Iterator

import numpy as np

from esvit.data.base import Data, EncodedImages, ImageSet, PackedStrings, existing_folder, file_bytes, is_image_name
from esvit.errors import OptionError

_SPLITS = {"train", "val", "test"}


class FolderData(Data):
    """`root/<class>/**/*.jpg` (labelled), or `root/**/*.jpg` with images directly in `root` (unlabelled); `val_root` likewise."""

    def train(self) -> ImageSet:
        return FolderImages(self.root, option="data.root", class_names=None)

    def validation(self) -> ImageSet | None:
        if self.val_root is None:
            return None
        training_classes, loose = _list(existing_folder("data.root", self.root), "data.root")
        labelled = training_classes and not loose
        return FolderImages(self.val_root, option="data.val_root", class_names=training_classes if labelled else None)


class FolderImages(EncodedImages):
    """Every image under `root`: classes in sorted order, files of a class sorted by their path.

    class_names  the labels' meaning; None takes the names of the folders in `root`

    Raises OptionError naming `option`.
    """

    def __init__(self, root: str | None, *, option: str, class_names: list[str] | None):
        self.root = existing_folder(option, root)
        folders, loose = _list(self.root, option)
        if "train" in folders and set(folders) <= _SPLITS and not loose:
            remedy = f"use {option}={os.path.join(self.root, 'train')}"
            if "val" in folders and option == "data.root":
                remedy += f" data.val_root={os.path.join(self.root, 'val')}"
            raise OptionError(option, f"'{self.root}' holds the splits {', '.join(folders)} instead of classes", remedy)
        self.class_names = [] if loose else folders if class_names is None else class_names
        unknown = sorted(set(folders) - set(self.class_names))
        if unknown and not loose:
            raise OptionError(
                option,
                f"class folder '{unknown[0]}' is not among the {len(self.class_names)} classes of data.root",
                "give both sets the same class folders",
            )
        label_of = {name: label for label, name in enumerate(self.class_names)}
        names: list[str] = list(loose)
        labels: list[int] = []
        for folder in folders:
            found = sorted(_walk(self.root, folder, option))
            names += found
            labels += [] if loose else [label_of[folder]] * len(found)
        if not names:
            raise OptionError(option, f"folder '{self.root}' holds no images", "give the folder that holds one folder of images per class")
        self._names = PackedStrings(names)
        self.labels = None if loose else np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def encoded(self, index: int) -> bytes:
        return file_bytes(os.path.join(self.root, self._names[index]))

    def name(self, index: int) -> str:
        return self._names[index]


def _list(folder: str, option: str) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the images directly in `folder`, without hidden ones."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():  # costs no system call but for symbolic links
                    folders.append(entry.name)
                elif is_image_name(entry.name):
                    images.append(entry.name)
    except OSError as error:
        raise OptionError(option, f"folder '{folder}' cannot be listed ({error.strerror})", "check its permissions and links") from error
    return sorted(folders), sorted(images)


def _walk(root: str, folder: str, option: str) -> Iterator[str]:
    """Paths of all images below `root/folder`, relative to `root`."""
    folders, images = _list(os.path.join(root, folder), option)
    for image in images:
        yield f"{folder}/{image}"
    for inner in folders:
        yield from _walk(root, f"{folder}/{inner}", option)
