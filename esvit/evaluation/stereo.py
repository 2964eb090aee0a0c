"""Pairs of stereo photos whose disparity was measured: true matches between two real views, for the correspondence measure.

A folder holds left/, right/ and disparity/ with files of the same names: photos that are rectified, so that a point at x of the left one
is at x - disparity in the same row of the right one. Disparity is a 16-bit PNG of 256 times its value where 0 means unknown (as KITTI has
it), or a .npy array in which what is not finite or not above 0 is unknown.

Unusual: what the right camera cannot see is found from the disparity itself: there another point, nearer, falls on the same place. That
point's own disparity has to be known.

Letters: h and w the sides of the left photo in pixels.
"""

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from esvit.augmentations.evaluation import EvaluationCrop
from esvit.data.base import decode_rgb, existing_folder, file_bytes, is_image_name
from esvit.errors import OptionError
from esvit.evaluation.correspondence import Cells, Pair

_TOLERANCE = 1.0  # pixels of disparity by which a point may be farther than the nearest one at its place and still be seen
_LEAST_VISIBLE = 0.5  # share of a region's known points that the right camera has to see


class StereoPhotos:
    """The pairs in a folder. Raises OptionError, naming `option`, if a file or all are missing."""

    def __init__(self, folder: str | None, *, option: str):
        self._folder = existing_folder(option, folder)
        self._option = option
        for part in ("left", "right", "disparity"):
            existing_folder(option, os.path.join(self._folder, part))
        files = {part: self._files(part) for part in ("left", "right", "disparity")}
        self.names = sorted(files["left"])
        if not self.names:
            raise OptionError(option, f"'{self._folder}/left' holds no images", "give the folder of left/, right/ and disparity/")
        for part in ("right", "disparity"):
            missing = sorted(set(self.names) - set(files[part]))
            if missing:
                found = f"{len(missing)} of {len(self.names)} left photos have no file in '{self._folder}/{part}', '{missing[0]}' for one"
                raise OptionError(option, found, "give all three the same name, but for the ending")
        self._triples = [tuple(files[part][name] for part in ("left", "right", "disparity")) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def digest(self) -> str:
        """Hash of the names."""
        return hashlib.sha256("\0".join(self.names).encode(errors="surrogateescape")).hexdigest()[:16]

    def read(self, index: int) -> tuple[Image.Image, Image.Image, np.ndarray]:
        """Left and right photo, and the disparity (h, w) float64, NaN where it is unknown.

        Raises BadImage for a photo, and OptionError for a disparity, that cannot be used.
        """
        left_file, right_file, disparity_file = self._triples[index]
        left, right, disparity = decode_rgb(file_bytes(left_file)), decode_rgb(file_bytes(right_file)), self._disparity(disparity_file)
        if left.size != right.size or left.size[::-1] != disparity.shape:
            sizes = f"left {left.size}, right {right.size}, disparity {disparity.shape[::-1]}"
            raise OptionError(self._option, f"the files '{self.names[index]}' differ in width and height ({sizes})", "give rectified pairs")
        return left, right, disparity

    def _files(self, part: str) -> dict[str, str]:
        """Name without its ending -> path."""
        folder = os.path.join(self._folder, part)
        names = [name for name in os.listdir(folder) if is_image_name(name) or (part == "disparity" and name.endswith(".npy"))]
        return {os.path.splitext(name)[0]: os.path.join(folder, name) for name in names}

    def _disparity(self, file: str) -> np.ndarray:
        try:
            if file.endswith(".npy"):
                values = np.load(file).astype(np.float64)
            else:
                with Image.open(file) as image:
                    values = np.array(image).astype(np.float64) / 256
            if values.ndim != 2:
                raise ValueError(f"it has {values.ndim} dimensions, not 2")
        except (OSError, ValueError, SyntaxError) as error:
            found = f"the disparity '{file}' cannot be read ({error})"
            raise OptionError(self._option, found, "give a 16-bit PNG of 256 times the disparity, or a .npy array") from None
        return np.where(np.isfinite(values) & (values > 0), values, np.nan)


@dataclass(frozen=True)
class StereoViews:
    """The same crop of the left and the right photo, and the true places by their disparity."""

    photos: StereoPhotos
    transform: EvaluationCrop
    cells: Cells

    def __call__(self, index: int) -> Pair:
        left, right, disparity = self.photos.read(index)
        (width, height), (left_edge, top_edge) = self.transform.window(left.size)
        scale = np.array([width / left.size[0], height / left.size[1]])
        points = self.cells.centres()
        regions = self._region_disparities(disparity, scale, np.array([left_edge, top_edge]))
        points[:, 0] -= torch.from_numpy(regions * scale[0])
        points[~self.cells.inside(points)] = torch.nan
        return Pair(self.transform(left), self.transform(right), points, scale=float(scale[0]))

    def _region_disparities(self, disparity: np.ndarray, scale: np.ndarray, corner: np.ndarray) -> np.ndarray:
        """(N,) median of what the right camera sees of each region; NaN where that is nothing, or less than what it does not see."""
        visible = seen_from_the_right(disparity)
        found = np.full(self.cells.count, np.nan)
        half = self.cells.size.numpy() / 2
        for number, middle in enumerate(self.cells.centres().numpy()):
            # the pixels of the photo whose own middle is in the region
            x, y = np.ceil((corner + middle - half) / scale - 0.5).astype(int)
            x_end, y_end = np.ceil((corner + middle + half) / scale - 0.5).astype(int)
            values, seen = disparity[y:y_end, x:x_end], visible[y:y_end, x:x_end]
            known = np.isfinite(values).sum()
            if known and seen.sum() >= _LEAST_VISIBLE * known and seen.any():
                found[number] = np.median(values[seen])
        return found


def seen_from_the_right(disparity: np.ndarray) -> np.ndarray:
    """(h, w) bool: points of known disparity that lie in the right photo and have no nearer point before them."""
    rows, columns = np.nonzero(np.isfinite(disparity))
    values = disparity[rows, columns]
    places = np.round(columns - values).astype(int)
    in_photo = places >= 0
    rows, columns, values, places = (each[in_photo] for each in (rows, columns, values, places))
    nearest = np.full(disparity.shape, -np.inf)
    np.maximum.at(nearest, (rows, places), values)
    visible = np.zeros(disparity.shape, dtype=bool)
    visible[rows, columns] = values >= nearest[rows, places] - _TOLERANCE
    return visible
