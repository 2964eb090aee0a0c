"""Small real image files for the tests of data formats, and a cheap transform that shows which random numbers it was given."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def data_options(**changed: Any) -> dict[str, Any]:
    """The options that all data formats share, with values that suit small sets."""
    loading = {"root": None, "val_root": None, "batch_size": 2, "workers": 0, "max_bad_fraction": 0.1, "index_cache": None}
    images = {"classes": None, "label_fraction": 1.0, "channels": 3, "depth": 8, "max_pixels": 1_000_000}
    return {**loading, **images, **changed}


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A noisy picture of (width, height), different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(number: int, size: tuple[int, int] = (20, 16)) -> bytes:
    buffer = io.BytesIO()
    picture(number, size).save(buffer, "PNG")
    return buffer.getvalue()


def write_classes(root: Path, counts: dict[str, int]) -> list[Path]:
    """`root/<class>/<number>.png`; returns the files in the order that an image set has them."""
    files = []
    for name in sorted(counts):
        (root / name).mkdir(parents=True)
        for number in range(counts[name]):
            files.append(root / name / f"{number:03d}.png")
            files[-1].write_bytes(png(len(files)))
    return files


class CornerAndNoise:
    """Two global views of one kind (the image's corner) and one local view (random numbers)."""

    global_count = 2
    decode = None

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> list[Tensor]:
        corner = torch.from_numpy(np.array(image.crop((0, 0, 4, 4)))).permute(2, 0, 1)
        noise = torch.from_numpy(rng.integers(0, 256, (3, 2, 2), dtype=np.uint8))
        return [corner, corner.flip(2), noise]
