"""Features that need no network: what a learned feature has to beat to be worth anything.

Letters: B images, h and w their height and width in pixels. Both serve as input of the same k-NN as the learned features.
Both are given in the form that serves them best there: a weak baseline flatters whatever is compared with it.
"""

import torch
from torch import Tensor

BINS_PER_CHANNEL = 8


def raw_pixels(images: Tensor) -> Tensor:
    """(B, 3 * h * w) float32: the pixels themselves as shares of white, less the image's mean, so that brightness does not rule the cosine.

    images  (B, 3, h, w) uint8
    """
    pixels = images.flatten(1).float() / 255
    return pixels - pixels.mean(dim=1, keepdim=True)


def color_histogram(images: Tensor) -> Tensor:
    """(B, 512) float32: square root of the share of the pixels in each cell of a joint 8 x 8 x 8 RGB histogram; rows have unit length.

    images  (B, 3, h, w) uint8

    With the root, the cosine of two rows is the Bhattacharyya coefficient of the two histograms: few large cells do not rule it.
    """
    red, green, blue = (images.long() * BINS_PER_CHANNEL // 256).flatten(2).unbind(1)
    cell = (red * BINS_PER_CHANNEL + green) * BINS_PER_CHANNEL + blue
    counts = torch.zeros(len(images), BINS_PER_CHANNEL**3, device=images.device)
    return (counts.scatter_add_(1, cell, torch.ones_like(cell, dtype=counts.dtype)) / cell.shape[1]).sqrt()
