"""The fast engine: bytes from end to end, a fast JPEG decoder, PyTorch's antialiased bicubic resize, and OpenCV for colours and blur.

It makes the views that were drawn and differs from the reference by rounding: by a level or two of 255 as a rule, by more in saturated
colours after a turn of the hue, and at the edges of a strong blur. tests/augmentations/test_engines.py holds it to the limits in
docs/data.md. A mirrored view is mirrored last, which is the same since nothing before knows left from right; only RandAugment does.

Large JPEG files are decoded at a half, a quarter or an eighth of their size, if even the smallest box that may be drawn keeps twice the
pixels of its view in each direction. The decision depends on the size of the image alone.

Letters: C channels, h and w sides in pixels.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from esvit.augmentations import arrays, device, randaugment
from esvit.augmentations.blurring import kernel
from esvit.augmentations.erasing import erase
from esvit.augmentations.parameters import Box, ColorChange, ViewParameters
from esvit.augmentations.photometric import gamma_table

cv2.setNumThreads(1)  # loading processes are parallel already, and a pool of threads does not survive a fork

NARROWEST = 3 / 4  # width to height of a box, or the other way round
KEPT = 2.0  # pixels of the scaled image for each pixel of a view, in each direction, that scaled decoding must leave
LUMA = (0.299, 0.587, 0.114)
# (3, 4) matrices of red, green, blue and 1
KEEP_COLORS = np.eye(3, 4, dtype=np.float32)
KEEP_LUMA = np.tile(np.array([*LUMA, 0], dtype=np.float32), (3, 1))
CUT_OFF = np.zeros((3, 4), dtype=np.float32)
CUT_OFF[:, 3] = -0.499  # Pillow cuts off where OpenCV rounds
resize = torch.ops.aten._upsample_bicubic2d_aa  # what torch.nn.functional.interpolate comes to


@dataclass(frozen=True)
class Decoded:
    """A decoded image: uint8 (h, w, 3), and the (width, height) of the file, which are larger after scaled decoding."""

    pixels: np.ndarray
    size: tuple[int, int]


class Fast:
    """crops: size and smallest share of the image's area of every kind of crop that will be drawn."""

    def __init__(self, crops: set[tuple[int, float]]):
        self._crops = crops

    def decode(self, encoded: bytes) -> Decoded | None:
        """The image in a sound JPEG file; None for any other, which Pillow is to judge."""
        if not encoded.startswith(b"\xff\xd8"):
            return None
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
            if colors not in ("YCbCr", "Gray") or width * height > (Image.MAX_IMAGE_PIXELS or np.inf):
                return None
            scale = self._decoding_scale(width, height)
            least = (-(-height // scale), -(-width // scale))
            pixels = simplejpeg.decode_jpeg(encoded, "RGB", min_height=least[0], min_width=least[1], strict=True)
        except ValueError:
            return None
        return Decoded(pixels, (width, height))

    def _decoding_scale(self, width: int, height: int) -> int:
        """1, 2, 4 or 8: what the sides of a file of this size are divided by."""
        kept = min(min((share * NARROWEST * width * height) ** 0.5, width, height) / size for size, share in self._crops)
        return next((scale for scale in (8, 4, 2) if kept / scale >= KEPT), 1)

    def views(self, image: Any, parameters: list[ViewParameters]) -> list[Tensor]:
        """uint8 (C, h, w) each of what `decode` gave, of an RGB image of Pillow, or of an array (h, w, C), see arrays.py."""
        if isinstance(image, np.ndarray):
            return [arrays.view(image, each) for each in parameters]
        source = _source(image)
        return [_view(source, each) for each in parameters]

    finished = views

    def left_over(self, image: Any, parameters: list[ViewParameters]) -> list[Tensor]:
        return []


class Device(Fast):
    """Crop, resize, flip and RandAugment as by the fast engine; the rest is told in vectors to device.py."""

    def views(self, image: Any, parameters: list[ViewParameters]) -> list[Tensor]:
        if isinstance(image, np.ndarray):
            return [arrays.view(image, each) for each in parameters]
        source = _source(image)
        return [_planes(_shape(source, each), flip=each.flip and not each.operations) for each in parameters]

    def finished(self, image: Any, parameters: list[ViewParameters]) -> list[Tensor]:
        crops, vectors = self.views(image, parameters), self.left_over(image, parameters)
        return [view[0] for view in device.finish([crop[None] for crop in crops], [each[None] for each in vectors])]

    def left_over(self, image: Any, parameters: list[ViewParameters]) -> list[Tensor]:
        if isinstance(image, np.ndarray):
            return [device.nothing() for _ in parameters]
        return [device.vector(each) for each in parameters]


def _source(image: Any) -> Decoded:
    return image if isinstance(image, Decoded) else Decoded(np.array(image), image.size)


def _view(source: Decoded, drawn: ViewParameters) -> Tensor:
    pixels = _recolored(_shape(source, drawn), drawn.changes)
    if drawn.grayscale:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)  # (h, w) from here on: a third of the work
    if drawn.blur_radius is not None:
        pixels = _blurred(pixels, drawn.blur_radius)
    if drawn.solarize:
        pixels = cv2.min(pixels, cv2.bitwise_not(pixels))  # 255 - value is the smaller one from 128 on
    view = _planes(pixels, flip=drawn.flip and not drawn.operations)
    if drawn.erased:
        erase(view.numpy(), drawn.erased)
    return view


def _shape(source: Decoded, drawn: ViewParameters) -> np.ndarray:
    """uint8 (h, w, 3): the box, resized; and mirrored where RandAugment follows."""
    if source.pixels.shape[1] == source.size[0] and source.pixels.shape[0] == source.size[1]:
        pixels = _resized(source.pixels, drawn.box, drawn.size)
    else:
        pixels = _resized_from_part(source, drawn.box, drawn.size)
    if drawn.operations:
        pixels = cv2.flip(pixels, 1) if drawn.flip else pixels
        pixels = np.asarray(randaugment.carry_out(Image.fromarray(pixels), drawn.operations))
    return pixels


def _resized(pixels: np.ndarray, box: Box, size: int) -> np.ndarray:
    left, top, right, bottom = box
    cut = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right])).unsqueeze(0).permute(0, 3, 1, 2)
    return resize(cut, [size, size], False, None, None).permute(0, 2, 3, 1).numpy()[0]


def _resized_from_part(source: Decoded, box: Box, size: int) -> np.ndarray:
    """After scaled decoding, where a box begins and ends between pixels, which Pillow can do: only the pixels around the box pass to it."""
    height, width = source.pixels.shape[:2]
    across, down = width / source.size[0], height / source.size[1]
    left, top, right, bottom = box[0] * across, box[1] * down, box[2] * across, box[3] * down
    begin, end = (int(left), int(top)), (min(width, -int(-right // 1)), min(height, -int(-bottom // 1)))
    part = Image.fromarray(np.ascontiguousarray(source.pixels[begin[1] : end[1], begin[0] : end[0]]))
    inside = (left - begin[0], top - begin[1], min(right - begin[0], part.width), min(bottom - begin[1], part.height))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC, box=inside))


def _planes(pixels: np.ndarray, *, flip: bool) -> Tensor:
    """uint8 (3, h, w) of (h, w, 3) or gray (h, w)."""
    if flip:
        pixels = cv2.flip(pixels, 1)
    if pixels.ndim == 2:
        return torch.from_numpy(pixels).expand(3, -1, -1).contiguous()
    planes = np.empty((3, *pixels.shape[:2]), dtype=np.uint8)
    cv2.split(pixels, list(planes))
    return torch.from_numpy(planes)


def _recolored(pixels: np.ndarray, changes: tuple[ColorChange, ...]) -> np.ndarray:
    for name, factor in changes:
        if name == "hue":
            pixels = _turned(pixels, factor)
        elif name == "gamma":
            pixels = cv2.LUT(pixels, np.array(gamma_table(factor), dtype=np.uint8))
        else:
            pixels = cv2.transform(pixels, _blend(pixels, name, factor))
    return pixels


def _blend(pixels: np.ndarray, name: str, factor: float) -> np.ndarray:
    """(3, 4): what red, green, blue and 1 are multiplied by, to be blended with black, with their mean luma or with their luma."""
    matrix = factor * KEEP_COLORS + CUT_OFF
    if name == "contrast":
        red, green, blue, _ = cv2.mean(pixels)
        matrix[:, 3] += (1 - factor) * int(LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 0.5)
    elif name == "saturation":
        matrix += (1 - factor) * KEEP_LUMA
    return matrix


def _turned(pixels: np.ndarray, shift: float) -> np.ndarray:
    """Every hue moved by `shift` of the colour circle, in steps of 1 / 256."""
    colors = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    colors[..., 0] += np.array(int(shift * 255)).astype(np.uint8)  # wraps around
    return cv2.cvtColor(colors, cv2.COLOR_HSV2RGB_FULL)


def _blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    """With weights in 256ths that sum to one, which is how OpenCV blurs bytes: rounded one by one they would change the brightness.

    Over the edge the image is mirrored, which comes closest to repeating the last pixel in each of three passes; for a small radius it is
    the same.
    """
    weights = np.rint(kernel(radius) * 256)
    weights[len(weights) // 2] += 256 - weights.sum()
    weights = (weights / 256).astype(np.float32)
    return cv2.sepFilter2D(pixels, -1, weights, weights, borderType=cv2.BORDER_REFLECT)
