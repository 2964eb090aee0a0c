"""A backbone whose regions are the mean colours of patches, and pictures made of patches, with masks: answers can be read off them."""

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from esvit.backbones.base import Backbone, Stage

PATCH = 4


class PatchColours(Backbone):
    """Regions of 4 x 4 pixels, three features each: their mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 3
        self.block_dims = [3]
        self.norm = nn.Identity()

    def encode(self, images: Tensor, *, last_only: bool = False) -> list[Stage]:
        means = F.avg_pool2d(images, PATCH)
        cells = means.flatten(2).transpose(1, 2)
        return [Stage([cells] if last_only else [cells, cells], (means.shape[2], means.shape[3]))]


def colours(number: int, *, rows: int = 4) -> np.ndarray:
    """(rows, rows, 3) uint8: directions of colour that all differ."""
    return np.random.default_rng(number).integers(0, 256, (rows, rows, 3), dtype=np.uint8)


def of_patches(patches: np.ndarray) -> Image.Image:
    """A picture of (rows, columns, 3) colours, or a mask of (rows, columns) numbers."""
    return Image.fromarray(patches.repeat(PATCH, axis=0).repeat(PATCH, axis=1))


def write_masked(root: Path, *, train: int, val: int) -> Path:
    """`root/images` and `root/masks` with the splits train and val: red objects (255) on blue (0), of any brightness, at random places."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for part in ("images", "masks"):
            (root / part / split / "scene").mkdir(parents=True)
        for number in range(count):
            mask = rng.integers(0, 2, (4, 4), dtype=np.uint8)
            mask[0, 0], mask[3, 3] = 0, 1
            bright = rng.integers(200, 256, (4, 4), dtype=np.uint8)
            picture = np.stack([np.where(mask, bright, 20), np.full_like(mask, 20), np.where(mask, 20, bright)], axis=2).astype(np.uint8)
            of_patches(picture).save(root / "images" / split / "scene" / f"{number}.png")
            of_patches(255 * mask).save(root / "masks" / split / "scene" / f"{number}.png")
    return root
