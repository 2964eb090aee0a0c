"""The photos that pictures are drawn on: where they come from, their names, and the square that the network sees of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from esvit.augmentations.evaluation import EvaluationCrop
from esvit.data.base import BadImage, EncodedImages, ImageSet, file_bytes
from esvit.data.folder import FolderImages
from esvit.data.patches import PACKAGED_PHOTOS
from esvit.errors import OptionError


class PhotoFiles(EncodedImages):
    """Files by name, without labels. Raises OptionError naming `option` for one that does not exist."""

    def __init__(self, files: Sequence[str], *, option: str):
        for file in files:
            if not os.path.isfile(file):
                raise OptionError(option, f"there is no photo '{file}'", "give files that exist")
        self.labels = None
        self.class_names: list[str] = []
        self._files = list(files)

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, index: int) -> bytes:
        return file_bytes(self._files[index])

    def name(self, index: int) -> str:
        return self._files[index]


def open_photos(images: str | Sequence[str] | None, *, option: str) -> ImageSet:
    """A folder, a file, a list of files, or None for the photos that come with the package. Raises OptionError naming `option`."""
    if images is None:
        return FolderImages(str(PACKAGED_PHOTOS), option=option, class_names=None)
    if isinstance(images, str):
        return PhotoFiles([images], option=option) if os.path.isfile(images) else FolderImages(images, option=option, class_names=None)
    if not images:
        raise OptionError(option, "an empty list", "give at least one photo, or leave the option out")
    return PhotoFiles(images, option=option)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers 0 .. count - 1, rising, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


@dataclass(frozen=True)
class Photo:
    """One photo, read.

    index  in its image set
    name   short, unique among those drawn, fit for a file's name
    """

    index: int
    name: str
    image: Image.Image

    def square(self, *, resize: int, crop: int, side: int) -> Tensor:
        """uint8 (C, side, side): what an evaluation crop of `crop` pixels out of a short side of `resize` shows, at another size."""
        return EvaluationCrop(resize=max(side, round(resize * side / crop)), crop=side)(self.image)


def read_photos(images: ImageSet, indices: Sequence[int], *, option: str) -> list[Photo]:
    """Raises OptionError naming `option` for a photo that cannot be read."""
    names = [images.name(index) for index in indices]
    photos = []
    for index, name in zip(indices, _short(names), strict=True):
        try:
            photos.append(Photo(int(index), name, images.read(index)))
        except BadImage as error:
            raise OptionError(option, f"photo '{images.name(index)}' cannot be read ({error})", "replace or remove it") from None
    return photos


def _short(names: list[str]) -> list[str]:
    """Names of files without folders and ending, where they still differ; else with all that tells them apart."""
    stems = [Path(name).stem for name in names]
    return stems if len(set(stems)) == len(stems) else [name.strip("/").replace("/", "_") for name in names]


def as_picture(pixels: Tensor) -> Image.Image:
    """uint8 (3, h, w) -> the picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
