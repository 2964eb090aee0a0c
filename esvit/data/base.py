"""What every data format offers: a `Data` description made from options, and the `ImageSet`s that it opens.

An image set knows its images by number; nothing of it but `read` touches pixels. Image sets are pickled to, or forked into,
the loading processes, so they keep their names in `PackedStrings`: a list of a million Python strings would be copied page by
page into every process, because counting references writes to them.
"""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from PIL import Image

from esvit.errors import OptionError

Decoder = Callable[[bytes], Any]  # the bytes of an image file -> an image; raises BadImage

IMAGE_EXTENSIONS = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


class BadImage(Exception):  # noqa: N818 (the image is bad, the program is not in error)
    """An image that cannot be read: missing, empty, truncated, damaged, or no image at all."""


class ImageSet(ABC):
    """Numbered images. `labels` is (len,) int64 numbers into `class_names`, or None where the images have no classes."""

    labels: np.ndarray | None
    class_names: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int, decode: "Decoder | None" = None) -> Any:
        """Image `index`: an RGB image, or what `decode` makes of its file. Raises BadImage if it cannot be read.

        A set that has no file for each image gives an RGB image in any case.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What a person would look for: a path relative to the root, or to the archive."""


class EncodedImages(ImageSet):
    """An image set that has the bytes of a file for each image."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The file of image `index`. Raises BadImage if it cannot be read."""

    def read(self, index: int, decode: "Decoder | None" = None) -> Any:
        return (decode or decode_rgb)(self.encoded(index))


@dataclass(kw_only=True)
class Data(ABC):
    """Where the images are and how they are loaded; one subclass for each format.

    root              the training images
    val_root          the labelled images of the k-NN and other evaluations, or None
    batch_size        images per process in one forward pass
    workers           loading processes for each training process; 0 loads in the training process
    max_bad_fraction  share of distinct unreadable images above which a run stops

    Raises OptionError for a value that cannot work.
    """

    root: str | None
    val_root: str | None
    batch_size: int
    workers: int
    max_bad_fraction: float

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise OptionError("data.batch_size", f"{self.batch_size} images per process", "use at least 1")
        if self.workers < 0:
            raise OptionError("data.workers", f"{self.workers} loading processes", "use 0 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise OptionError("data.max_bad_fraction", f"{self.max_bad_fraction} is no share", "use a number from 0 to 1")

    @abstractmethod
    def train(self) -> ImageSet:
        """The training images. Raises OptionError naming data.root if there are none."""

    @abstractmethod
    def validation(self) -> ImageSet | None:
        """The validation images, or None if there are none to use. Raises OptionError naming data.val_root."""


class PackedStrings(Sequence[str]):
    """An immutable sequence of file names in two arrays, 8 bytes above their text, shared by forked processes."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]  # file names need not be valid UTF-8
        self._text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]].tobytes())


def is_image_name(name: str) -> bool:
    """Whether a file of this name (without its folders) counts as an image; hidden files do not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def decode_rgb(encoded: bytes) -> Image.Image:
    """The image in a file's bytes in RGB. Raises BadImage if it cannot be read, whatever the decoder says."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders answer damage with OSError, SyntaxError, ValueError, struct.error, ...
        raise BadImage(f"{type(error).__name__}: {error}") from error


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
