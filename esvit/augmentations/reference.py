"""The reference engine: Pillow makes the views, as for the published models. The other engines are measured against it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from esvit.augmentations import arrays, photometric, randaugment
from esvit.augmentations.erasing import erase
from esvit.augmentations.parameters import ViewParameters


class Reference:
    decode: Callable[[bytes], Any] | None = None

    def views(self, image: Any, parameters: list[ViewParameters]) -> list[Tensor]:
        """uint8 (C, h, w) each of an RGB image of Pillow; of an array (h, w, C), see arrays.py."""
        if isinstance(image, np.ndarray):
            return [arrays.view(image, each) for each in parameters]
        return [view(image, each, filter=Image.Resampling.BICUBIC) for each in parameters]

    finished = views

    def left_over(self, image: Any, parameters: list[ViewParameters]) -> list[Tensor]:
        return []


def view(image: Image.Image, drawn: ViewParameters, *, filter: Image.Resampling) -> Tensor:
    """uint8 (C, h, w) of an RGB image."""
    picture = image.crop(drawn.box).resize((drawn.size, drawn.size), filter)
    if drawn.flip:
        picture = photometric.horizontal_flip(picture)
    picture = randaugment.carry_out(picture, drawn.operations)
    for change in drawn.changes:
        picture = photometric.change_color(picture, change)
    if drawn.grayscale:
        picture = photometric.grayscale(picture)
    if drawn.blur_radius is not None:
        picture = photometric.gaussian_blur(picture, drawn.blur_radius)
    if drawn.solarize:
        picture = photometric.solarize(picture)
    pixels = np.array(picture).transpose(2, 0, 1)
    erase(pixels, drawn.erased)
    return torch.from_numpy(pixels)
