"""Statistics of whole views, by which one engine could be told from another."""

import numpy as np
from torch import Tensor

BANDS = 4  # rings of spatial frequency of equal width, from 0 to the highest
BINS = 32  # of a histogram of values


def statistics(views: list[Tensor]) -> dict[str, np.ndarray]:
    """One row for each view (C, h, w): mean and variance of channels, log power of the luma in rings of frequency, share of each bin."""
    rows: dict[str, list[np.ndarray]] = {"mean": [], "variance": [], "spectrum": [], "histogram": []}
    for view in views:
        pixels = view.numpy()
        rows["mean"].append(pixels.mean((1, 2)))
        rows["variance"].append(pixels.var((1, 2)))
        rows["histogram"].append(np.bincount(pixels.ravel() // (256 // BINS), minlength=BINS) / pixels.size)
        rows["spectrum"].append(np.log(ring_power(pixels.mean(0)) + 1e-3))
    return {name: np.stack(values) for name, values in rows.items()}


def ring_power(luma: np.ndarray) -> np.ndarray:
    """(BANDS,): mean power of (h, w) in each ring, without the mean of all pixels."""
    power = np.abs(np.fft.rfft2(luma - luma.mean(), norm="ortho")) ** 2
    rows, columns = np.fft.fftfreq(luma.shape[0])[:, None], np.fft.rfftfreq(luma.shape[1])
    ring = np.minimum((np.hypot(rows, columns) / 0.5 * BANDS).astype(int), BANDS - 1).ravel()
    return np.bincount(ring, power.ravel(), BANDS) / np.bincount(ring, minlength=BANDS)
