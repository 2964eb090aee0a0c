"""Images in folders, one folder for each class, as in ImageNet's own layout; or just images in folders, without classes.

Unlike torchvision's ImageFolder: empty class folders keep their label; validation labels follow the training folder's classes by
name; and images that lie directly in the root make the whole set unlabelled, because guessing would lose images silently.
"""

import os

import numpy as np

from esvit.data.base import Data, FileImages, ImageSet, existing_folder
from esvit.data.decoding import RGB, Pixels
from esvit.data.index import IndexCache
from esvit.data.listing import folders_and_images, list_images
from esvit.errors import OptionError

_SPLITS = {"train", "val", "test"}


class FolderData(Data):
    """`root/<class>/**/*.jpg` (labelled), or `root/**/*.jpg` with images directly in `root` (unlabelled); `val_root` likewise."""

    def open_train(self) -> ImageSet:
        return FolderImages(self.root, option="data.root", class_names=None, pixels=self.pixels, index=self.index)

    def open_validation(self) -> ImageSet | None:
        if self.val_root is None:
            return None
        root = existing_folder("data.root", self.root)
        training_classes, loose = folders_and_images(root, extensions=self.pixels.extensions, option="data.root")
        classes = training_classes if training_classes and not loose else None
        return FolderImages(self.val_root, option="data.val_root", class_names=classes, pixels=self.pixels, index=self.index)


class FolderImages(FileImages):
    """Every image under `root`: classes in sorted order, files of a class sorted by their path.

    class_names  the labels' meaning; None takes the names of the folders in `root`
    index        where the listing of a large folder is kept

    Raises OptionError naming `option`.
    """

    def __init__(
        self, root: str | None, *, option: str, class_names: list[str] | None, pixels: Pixels = RGB, index: IndexCache | None = None
    ):
        self.root = existing_folder(option, root)
        self.pixels = pixels
        _refuse_splits(self.root, option, pixels)
        listing = list_images(self.root, extensions=pixels.extensions, index=index or IndexCache(None), option=option)
        folders = list(listing.folders)
        self.class_names = [] if listing.loose else folders if class_names is None else class_names
        unknown = sorted(set(folders) - set(self.class_names))
        if unknown and not listing.loose:
            raise OptionError(
                option,
                f"class folder '{unknown[0]}' is not among the {len(self.class_names)} classes of data.root",
                "give both sets the same class folders",
            )
        if not len(listing.names):
            raise OptionError(option, f"folder '{self.root}' holds no images", "give the folder that holds one folder of images per class")
        self._names = listing.names
        self.labels = None
        if not listing.loose:
            label_of = {name: label for label, name in enumerate(self.class_names)}
            self.labels = np.array([label_of[folder] for folder in folders], dtype=np.int64)[listing.folder_of]


def _refuse_splits(root: str, option: str, pixels: Pixels) -> None:
    """Raises OptionError if `root` holds the splits of a data set, as in "train" and "val", instead of classes."""
    folders, loose = folders_and_images(root, extensions=pixels.extensions, option=option)
    if "train" in folders and set(folders) <= _SPLITS and not loose:
        remedy = f"use {option}={os.path.join(root, 'train')}"
        if "val" in folders and option == "data.root":
            remedy += f" data.val_root={os.path.join(root, 'val')}"
        raise OptionError(option, f"'{root}' holds the splits {', '.join(folders)} instead of classes", remedy)
