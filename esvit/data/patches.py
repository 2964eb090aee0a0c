"""Patches cut at load time from a few photos: real images for a demo that fits into a repository. The class is the photo.

Training patches come from the left 58% of each photo, validation patches from the right 34%, so no pixel is seen by both.
Where patches lie depends on the photo's file name and a fixed seed alone: every run, whatever its `seed`, sees the same data set.
"""

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from esvit.data.base import Data, Decoder, ImageSet, decode_rgb, existing_folder, file_bytes, is_image_name
from esvit.errors import OptionError

TRAIN_PERCENT = 58  # of a photo's width, from the left
VALIDATION_PERCENT = 34  # of a photo's width, from the right
PLACES_SEED = 20210617
PACKAGED_PHOTOS = Path(__file__).parent / "photos"


@dataclass(kw_only=True)
class PhotoPatches(Data):
    """Square patches of the photos in the folder `root`; None takes the photos that come with the package.

    patch_size               side of a patch in pixels
    train_patches_per_photo  how many patches the left of each photo gives
    val_patches_per_photo    how many patches the right of each photo gives
    """

    patch_size: int
    train_patches_per_photo: int
    val_patches_per_photo: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_root is not None:
            raise OptionError(
                "data.val_root", f"'{self.val_root}' is not used: validation patches come from the same photos", "leave data.val_root out"
            )
        if not self.pixels.is_rgb:
            found = f"photos are read in RGB with 8 bits, not in {self.channels} channels with {self.depth}"
            raise OptionError("data.channels" if self.channels != 3 else "data.depth", found, "leave it out, or use data=folder")
        for option in ("patch_size", "train_patches_per_photo", "val_patches_per_photo"):
            if getattr(self, option) < 1:
                raise OptionError(f"data.{option}", f"{getattr(self, option)}", "use at least 1")

    def open_train(self) -> ImageSet:
        return PatchImages(self._photos(), patch_size=self.patch_size, patches_per_photo=self.train_patches_per_photo, from_left=True)

    def open_validation(self) -> ImageSet:
        return PatchImages(self._photos(), patch_size=self.patch_size, patches_per_photo=self.val_patches_per_photo, from_left=False)

    def _photos(self) -> list[Path]:
        folder = Path(existing_folder("data.root", str(PACKAGED_PHOTOS) if self.root is None else self.root))
        photos = sorted(path for path in folder.iterdir() if is_image_name(path.name) and path.is_file())
        if not photos:
            raise OptionError("data.root", f"folder '{folder}' holds no photos", "give a folder of photos, or leave data.root out")
        return photos


class PatchImages(ImageSet):
    """Patches of `photos`, photo after photo. Each process decodes a photo at its first patch and keeps it.

    from_left  whether patches come from the left (training) or the right (validation) of each photo

    Raises OptionError for a photo that cannot be read or is too small for a patch.
    """

    def __init__(self, photos: list[Path], *, patch_size: int, patches_per_photo: int, from_left: bool):
        self.class_names = [photo.stem for photo in photos]
        self.labels = np.repeat(np.arange(len(photos), dtype=np.int64), patches_per_photo)
        self._photos = photos
        self._patch_size = patch_size
        self._places = np.concatenate([_places(photo, patch_size, patches_per_photo, from_left) for photo in photos])
        self._decoded: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int, decode: Decoder | None = None) -> Image.Image:
        photo = int(self.labels[index])  # type: ignore[index]
        if photo not in self._decoded:
            self._decoded[photo] = decode_rgb(file_bytes(os.fspath(self._photos[photo])))
        left, top = (int(place) for place in self._places[index])
        return self._decoded[photo].crop((left, top, left + self._patch_size, top + self._patch_size))

    def name(self, index: int) -> str:
        left, top = self._places[index]
        return f"{self._photos[int(self.labels[index])].name}@{left},{top}"  # type: ignore[index]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_decoded": {}}


def _places(photo: Path, patch_size: int, count: int, from_left: bool) -> np.ndarray:
    """Left and top pixel of `count` patches: (count, 2) int64."""
    try:
        with Image.open(photo) as image:
            width, height = image.size
    except OSError as error:
        raise OptionError("data.root", f"photo '{photo}' cannot be read ({error})", "replace or remove it") from error
    first, end = (0, width * TRAIN_PERCENT // 100) if from_left else (width - width * VALIDATION_PERCENT // 100, width)
    if end - first < patch_size or height < patch_size:
        raise OptionError(
            "data.patch_size",
            f"photo '{photo.name}' leaves {end - first} x {height} pixels for patches of {patch_size}",
            f"use data.patch_size={min(end - first, height)} or larger photos",
        )
    key = (zlib.crc32(os.fsencode(photo.name)), int(from_left))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(PLACES_SEED, spawn_key=key)))
    lefts = rng.integers(first, end - patch_size, count, endpoint=True)
    tops = rng.integers(0, height - patch_size, count, endpoint=True)
    return np.stack([lefts, tops], axis=1)
