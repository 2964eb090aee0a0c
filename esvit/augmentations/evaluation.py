"""The fixed crop that features are measured on, and the normalisation that every image passes on its way into a network.

Letters: B images, C channels, h and w the sides of a crop in pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from esvit.errors import OptionError


class EvaluationCrop:
    """The short side resized to `resize` pixels (bicubic), then the central square of `crop` pixels. Published: 256 and 224.

    Raises OptionError, naming `option`, unless 1 <= crop <= resize.
    """

    def __init__(self, *, resize: int, crop: int, option: str = "task.online_knn.crop"):
        if not 1 <= crop <= resize:
            found = f"a crop of {crop} pixels from a short side of {resize}"
            raise OptionError(option, found, "use 1 <= crop <= resize")
        self._resize = resize
        self.crop = crop

    def __call__(self, image: Image.Image) -> Tensor:
        """uint8 (C, crop, crop)."""
        size, (left, top) = self.window(image.size)
        square = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + self.crop, top + self.crop))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)

    def window(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """What an image of (width, height) is resized to, and the left and top edge of the square in that."""
        short = min(size)
        width, height = int(self._resize * size[0] / short), int(self._resize * size[1] / short)
        return (width, height), (round((width - self.crop) / 2), round((height - self.crop) / 2))


class Normalize:
    """uint8 (B, C, h, w) on any device -> float32 (x / 255 - mean) / std there. ImageNet: [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]."""

    def __init__(self, *, mean: Sequence[float], std: Sequence[float]):
        if min(std) <= 0 or len(mean) != len(std):
            raise OptionError("task.normalize.std", f"{list(std)} for means {list(mean)}", "give one positive number for each channel")
        self.mean, self.std = list(mean), list(std)
        self._mean_and_std = torch.tensor([list(mean), list(std)]).view(2, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        if self._mean_and_std.device != images.device:  # once: a copy in every step would make the host wait
            self._mean_and_std = self._mean_and_std.to(images.device)
        mean, std = self._mean_and_std
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)
