"""Parts of an image set; among them those in which every class keeps its share: so many percent of the labels, or a part held out.

Letters: n images.
Unusual: of the same labels and seed a smaller fraction is part of a larger one, so that 1% of the labels are among the 10%.
"""

from typing import Any

import numpy as np

from esvit.data.base import Decoder, ImageSet

_FRACTION, _HELD_OUT = 0, 1  # what a generator is for: the first number of its key


class Subset(ImageSet):
    """The images of `images` at `indices` (n,) int64, with their labels where there are any."""

    def __init__(self, images: ImageSet, indices: np.ndarray):
        self.images = images
        self.indices = indices
        self.labels = None if images.labels is None else images.labels[indices]
        self.class_names = images.class_names
        self.pixels = images.pixels
        self.chunk_ends = _ends_of_part(images.chunk_ends, indices)
        self.chunks_at_hand = images.chunks_at_hand

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, decode: Decoder | None = None) -> Any:
        return self.images.read(int(self.indices[index]), decode)

    def fetch(self, index: int) -> None:
        self.images.fetch(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.images.name(int(self.indices[index]))

    def targets(self, index: int) -> np.ndarray | None:
        return self.images.targets(int(self.indices[index]))


def _ends_of_part(chunk_ends: np.ndarray | None, indices: np.ndarray) -> np.ndarray | None:
    """Where the chunks end among the images at `indices`; None where these do not rise."""
    if chunk_ends is None or (np.diff(indices) <= 0).any():
        return None
    ends = np.unique(np.searchsorted(indices, chunk_ends))
    return ends[ends > 0]


def stratified_fraction(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Indices, rising, of `fraction` of each class of `labels` (n,), rounded, but at least one image of each; 1 gives all.

    Raises ValueError unless 0 < fraction <= 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"{fraction} is no share of the images")
    kept = [members[: max(1, round(fraction * len(members)))] for members in _shuffled_classes(labels, seed, _FRACTION)]
    return np.sort(np.concatenate(kept))


def random_fraction(count: int, fraction: float, seed: int) -> np.ndarray:
    """Indices, rising, of `fraction` of `count` images without classes, rounded, but at least one; a smaller share is part of a larger."""
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_FRACTION,)))).permutation(count)
    return np.sort(order[: max(1, round(fraction * count))])


def held_out(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices, rising, of the images of `labels` (n,) to train on and of those held out: `fraction` of each class, rounded, at least one.

    Every class keeps an image to train on: a class of a single image has none held out. Raises ValueError unless 0 <= fraction < 1.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"{fraction} cannot be held out")
    if fraction == 0:
        return np.arange(len(labels)), np.arange(0)
    out = [
        members[: min(max(1, round(fraction * len(members))), len(members) - 1)] for members in _shuffled_classes(labels, seed, _HELD_OUT)
    ]
    chosen = np.sort(np.concatenate(out))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def _shuffled_classes(labels: np.ndarray, seed: int, purpose: int) -> list[np.ndarray]:
    """The indices of each class that there is, in an order that depends on the seed alone."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(purpose,))))
    by_class = np.argsort(labels, kind="stable")  # one pass, however many classes there are
    begins = np.unique(labels[by_class], return_index=True)[1]
    return [rng.permutation(members) for members in np.split(by_class, begins[1:])]
