"""Pillow's approximation of a Gaussian blur as numbers, for the engines that blur without Pillow.

Pillow passes an "extended box" three times over every row and three times over every column: 2l + 1 pixels of equal weight and a lighter
one at either end, with which a box can have any standard deviation (Gwosdek et al. 2011). Pixels over the edge repeat the last one.
"""

import math

import numpy as np

PASSES = 3


def box(radius: float) -> np.ndarray:
    """Weights of one pass, (2l + 3,), for a blur with a standard deviation of `radius` pixels."""
    variance = radius**2 / PASSES
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    weights = np.ones(2 * whole + 3)
    weights[[0, -1]] = end
    return weights / (2 * whole + 1 + 2 * end)


def kernel(radius: float) -> np.ndarray:
    """Weights of all three passes together, which differ from them within three boxes of the edge only."""
    single = box(radius)
    return np.convolve(np.convolve(single, single), single)
