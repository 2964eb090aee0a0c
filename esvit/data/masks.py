"""Masks that say of every pixel of an image which class it shows: one PNG for each image, of the same relative name.

Letters: h and w the sides of an image in pixels.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from esvit.data.base import ImageSet, existing_folder
from esvit.errors import OptionError

IGNORED = -1
LARGEST_NUMBER = 65535
_UNKNOWN = -2


@dataclass(frozen=True, kw_only=True)
class MaskClasses:
    """What the numbers in a mask mean.

    values   the number of each class, in the order of the classes
    ignored  the number of pixels that count nowhere, or None
    """

    values: Sequence[int]
    ignored: int | None

    def table(self) -> np.ndarray:
        """(65536,) int16 class of each number; IGNORED, or -2 for numbers that mean nothing."""
        table = np.full(LARGEST_NUMBER + 1, _UNKNOWN, dtype=np.int16)
        table[list(self.values)] = np.arange(len(self.values))
        if self.ignored is not None:
            table[self.ignored] = IGNORED
        return table


class Masks:
    """The masks in `folder` of a set of images: that of `class/name.jpg` is `class/name.png`, whatever folder or archive the image is in.

    Raises OptionError, naming `option`, if the folder does not exist.
    """

    def __init__(self, folder: str | None, *, images: ImageSet, classes: MaskClasses, option: str):
        self._folder = existing_folder(option, folder)
        self._images = images
        self._table = classes.table()
        self._option = option

    def require_all(self) -> None:
        """Raises OptionError if an image has no mask."""
        missing = [path for path in map(self.path, range(len(self._images))) if not os.path.isfile(path)]
        if missing:
            found = f"{len(missing)} of {len(self._images)} images have no mask, '{missing[0]}' is missing"
            raise OptionError(self._option, found, "give the folder that has the images' own tree, with .png for their ending")

    def path(self, index: int) -> str:
        """Where the mask of an image is; of one in an archive, its name there counts."""
        name = self._images.name(index).rpartition("@/")[2]
        return os.path.join(self._folder, os.path.splitext(name)[0] + ".png")

    def read(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """(h, w) int16 class of every pixel, IGNORED where none counts.

        size  (width, height) of the image

        Raises OptionError if the file cannot be read, is of another size, or holds a number that is no class.
        """
        path = self.path(index)
        try:
            with Image.open(path) as image:
                numbers = np.array(image.convert("L") if image.mode == "1" else image)
        except MemoryError:
            raise
        except Exception as error:  # whatever the decoder makes of garbage
            raise OptionError(self._option, f"mask '{path}' cannot be read ({error})", "repair it") from None
        if numbers.ndim != 2:
            raise OptionError(self._option, f"mask '{path}' has {numbers.shape[2]} channels", "give one: the number of the class")
        if numbers.shape != (size[1], size[0]):
            found = f"mask '{path}' has {numbers.shape[1]} x {numbers.shape[0]} pixels, its image has {size[0]} x {size[1]}"
            raise OptionError(self._option, found, "give both the same size")
        classes = self._table[numbers]
        if (classes == _UNKNOWN).any():
            number = int(numbers[classes == _UNKNOWN][0])
            remedy = f"list every class in task.mask_values, or leave these pixels out with task.ignore={number}"
            raise OptionError(self._option, f"mask '{path}' holds {number}, which is no class", remedy)
        return classes
