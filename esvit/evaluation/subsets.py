"""Parts of labelled images in which every class keeps its share: so many percent of the labels, or a part held out of training.

Letters: n images.
Unusual: of the same labels and seed a smaller fraction is part of a larger one, so that 1% of the labels are among the 10%.
"""

import numpy as np

_FRACTION, _HELD_OUT = 0, 1  # what a generator is for: the first number of its key


def stratified_fraction(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Indices, rising, of `fraction` of each class of `labels` (n,), rounded, but at least one image of each; 1 gives all.

    Raises ValueError unless 0 < fraction <= 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"{fraction} is no share of the images")
    kept = [members[: max(1, round(fraction * len(members)))] for members in _shuffled_classes(labels, seed, _FRACTION)]
    return np.sort(np.concatenate(kept))


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
    return [rng.permutation(np.flatnonzero(labels == each)) for each in np.unique(labels)]
