"""Views of images that Pillow has no place for: any number of channels, 8 or 16 bits. One path for all engines, in float32.

Crop, antialiased bicubic resize, flip, brightness, contrast (about the mean of all channels), gamma, blur, solarize (at half the range)
and erasing mean the same as for RGB images, and are drawn alike. Saturation, hue, grayscale and RandAugment, which are about RGB, are
left out.

Letters: C channels, h and w sides in pixels.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.augmentations.device import blurred
from esvit.augmentations.erasing import erase
from esvit.augmentations.parameters import ColorChange, ViewParameters


def view(image: np.ndarray, drawn: ViewParameters, *, filter: Literal["bilinear", "bicubic"] = "bicubic") -> Tensor:
    """uint8 or uint16 (C, size, size) as the image (h, w, C)."""
    left, top, right, bottom = drawn.box
    white = int(np.iinfo(image.dtype).max)
    pixels = torch.from_numpy(image[top:bottom, left:right].astype(np.float32)).permute(2, 0, 1)
    pixels = F.interpolate(pixels[None], size=(drawn.size, drawn.size), mode=filter, antialias=True)[0].clamp(0, white)
    if drawn.flip:
        pixels = pixels.flip(2)
    for change in drawn.changes:
        pixels = _changed(pixels, change, white)
    if drawn.blur_radius is not None:
        pixels = blurred(pixels[None], torch.tensor([drawn.blur_radius]))[0]
    if drawn.solarize:
        pixels = torch.where(pixels < (white + 1) / 2, pixels, white - pixels)
    whole = pixels.round().numpy().astype(image.dtype)
    erase(whole, drawn.erased)
    return torch.from_numpy(whole)


def _changed(pixels: Tensor, change: ColorChange, white: int) -> Tensor:
    """float32 (C, h, w) in [0, white]."""
    if change.name == "brightness":
        return (pixels * change.factor).clamp(0, white)
    if change.name == "contrast":
        return torch.lerp(pixels.mean(), pixels, change.factor).clamp(0, white)
    if change.name == "gamma":
        return white * (pixels / white) ** change.factor
    return pixels  # saturation and hue are of RGB images alone
