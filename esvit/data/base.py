"""What every data format offers: a `Data` description made from options, and the `ImageSet`s that it opens.

An image set knows its images by number; nothing of it but `read` touches pixels. Image sets are pickled to, or forked into,
the loading processes, so they keep their names in `PackedStrings`: a list of a million Python strings would be copied page by
page into every process, because counting references writes to them.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from esvit.data.decoding import IMAGE_EXTENSIONS, RGB, BadImage, Decoder, Pixels, decode_rgb
from esvit.data.index import IndexCache
from esvit.errors import OptionError

__all__ = [
    "BadImage",
    "Data",
    "Decoder",
    "EncodedImages",
    "ImageSet",
    "PackedStrings",
    "decode_rgb",
    "existing_folder",
    "file_bytes",
    "is_image_name",
]


class ImageSet(ABC):
    """Numbered images. `labels` is (len,) int64 numbers into `class_names`, or None where the images have no classes.

    pixels      what `read` gives
    chunk_ends  where each chunk of images that lie together (a shard, a file of a composite set) ends, rising up to len; or None
    chunks_at_hand  how many chunks can be read from at a time without fetching them again from a server; None: all
    """

    labels: np.ndarray | None
    class_names: list[str]
    pixels: Pixels = RGB
    chunk_ends: np.ndarray | None = None
    chunks_at_hand: int | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int, decode: "Decoder | None" = None) -> Any:
        """Image `index`: an RGB image, or what `decode` makes of its file. Raises BadImage if it cannot be read.

        A set that has no file for each image gives an RGB image in any case; one whose `pixels` are not RGB of 8 bits gives an array
        (h, w, C) uint8 or uint16.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What a person would look for: a path relative to the root, or to the archive."""

    def fetch(self, index: int) -> None:
        """Have the chunk of image `index` at hand, where chunks come from a server. Raises OptionError if it cannot be fetched."""
        return

    def targets(self, index: int) -> np.ndarray | None:
        """Where an image may be of several classes, so that `labels` is None: (classes,) float32, 1 for those that it is of."""
        return None


class EncodedImages(ImageSet):
    """An image set that has the bytes of a file for each image."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The file of image `index`. Raises BadImage if it cannot be read."""

    def read(self, index: int, decode: "Decoder | None" = None) -> Any:
        return self.pixels.read(self.encoded(index), decode)


class FileImages(EncodedImages):
    """Files below the folder `root`, by their path in it."""

    root: str
    _names: Sequence[str]

    def __len__(self) -> int:
        return len(self._names)

    def encoded(self, index: int) -> bytes:
        return file_bytes(os.path.join(self.root, self._names[index]))

    def name(self, index: int) -> str:
        return self._names[index]


@dataclass(kw_only=True)
class Data(ABC):
    """Where the images are and how they are loaded; one subclass for each format.

    root              the training images
    val_root          the labelled images of the k-NN and other evaluations, or None
    batch_size        images per process in one forward pass
    workers           loading processes for each training process; 0 loads in the training process
    max_bad_fraction  share of distinct unreadable images above which a run stops
    classes           names of the classes to use, or a text file of such names, one a line; None uses all
    label_fraction    share of each class's training images to use (of all images where there are no classes), drawn by a seed of its own
    channels, depth   what images are read as: see `Pixels`
    max_pixels        images of more pixels count as unreadable
    index_cache       folder that keeps the listings of large sets, so that they open at once the next time; None keeps none

    Raises OptionError for a value that cannot work.
    """

    root: str | None
    val_root: str | None
    batch_size: int
    workers: int
    max_bad_fraction: float
    classes: Sequence[str] | str | None
    label_fraction: float
    channels: int
    depth: int
    max_pixels: int
    index_cache: str | None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise OptionError("data.batch_size", f"{self.batch_size} images per process", "use at least 1")
        if self.workers < 0:
            raise OptionError("data.workers", f"{self.workers} loading processes", "use 0 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise OptionError("data.max_bad_fraction", f"{self.max_bad_fraction} is no share", "use a number from 0 to 1")
        if not 0 < self.label_fraction <= 1:
            raise OptionError("data.label_fraction", f"{self.label_fraction} is no share of the images", "use a number above 0, up to 1")
        if self.channels < 1:
            raise OptionError("data.channels", f"{self.channels} channels", "use at least 1; 3 is RGB")
        if self.depth not in (8, 16):
            raise OptionError("data.depth", f"{self.depth} bits per value", "use 8 or 16")
        if self.max_pixels < 1:
            raise OptionError("data.max_pixels", f"{self.max_pixels} pixels", "use at least 1")

    def train(self) -> ImageSet:
        """The training images that the options ask for. Raises OptionError naming data.root if there are none."""
        from esvit.data.selection import fraction_of, of_classes  # selections are image sets, whose base is in this file

        images = self.open_train()
        images.pixels = self.pixels
        return of_classes(fraction_of(images, self.label_fraction), self.classes)

    def validation(self) -> ImageSet | None:
        """The validation images, or None if there are none to use. Raises OptionError naming data.val_root."""
        from esvit.data.selection import of_classes

        images = self.open_validation()
        if images is None:
            return None
        images.pixels = self.pixels
        return of_classes(images, self.classes)

    @property
    def pixels(self) -> Pixels:
        return Pixels(channels=self.channels, depth=self.depth, max_pixels=self.max_pixels)

    @property
    def index(self) -> IndexCache:
        return IndexCache(self.index_cache)

    @abstractmethod
    def open_train(self) -> ImageSet:
        """All training images. Raises OptionError naming data.root if there are none."""

    @abstractmethod
    def open_validation(self) -> ImageSet | None:
        """All validation images, or None if there are none to use. Raises OptionError naming data.val_root."""


class PackedStrings(Sequence[str]):
    """An immutable sequence of file names in two arrays, 8 bytes above their text, shared by forked processes."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]  # file names need not be valid UTF-8
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    @classmethod
    def from_arrays(cls, text: np.ndarray, ends: np.ndarray) -> "PackedStrings":
        """The strings whose `text` and `ends` were kept; the arrays may be those of a mapped file."""
        strings = cls.__new__(cls)
        strings.text, strings.ends = text, ends
        return strings

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self.text[self.ends[index] : self.ends[index + 1]].tobytes())


def is_image_name(name: str, extensions: frozenset[str] = IMAGE_EXTENSIONS) -> bool:
    """Whether a file of this name (without its folders) counts as an image; hidden files do not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions


def file_bytes(path: str) -> bytes:
    """The content of a file. Raises BadImage if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def existing_folder(option: str, folder: str | None) -> str:
    """`folder` if it is one. Raises OptionError naming `option` otherwise."""
    if not folder:
        raise OptionError(option, "no folder is given", f"write {option}=/path/to/images")
    if not os.path.exists(folder):
        raise OptionError(option, f"folder '{folder}' does not exist", "give the path of an existing folder")
    if not os.path.isdir(folder):
        raise OptionError(option, f"'{folder}' is a file", "give the folder that the images are in")
    return folder
