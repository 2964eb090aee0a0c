"""From the bytes of an image file to pixels: 8-bit RGB as a rule, or any number of channels with 8 or 16 bits where that is asked for.

Pillow decodes pictures. It clips grey pictures of 16 bits and cuts off the low half of colour ones, so those are converted here; and it
knows no more than four channels, so TIFF of more is read by tifffile, colour PNG of 16 bits by OpenCV, and arrays in .npy files by numpy.
Tifffile and OpenCV are imported where they are needed.

Letters: h and w the sides of an image in pixels, n channels in the file, C channels asked for.
"""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
IMAGE_EXTENSIONS = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))

Decoder = Callable[[bytes], Any]  # the bytes of an image file -> an image, or None where Pillow is to judge; raises BadImage

_NPY = b"\x93NUMPY"
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LUMA = np.array([299, 587, 114])  # of ITU-R 601, in thousandths, as Pillow's
_PLAIN_PHOTOMETRICS = (1, 2)  # of TIFF: black is zero, and RGB
_PLAIN_COMPRESSIONS = (1, 8, 32946)  # of TIFF: none, and deflate


class BadImage(Exception):  # noqa: N818 (the image is bad, the program is not in error)
    """An image that cannot be read: missing, empty, truncated, damaged, too large, or no image at all."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What images are read as.

    channels    3: RGB; 1: grey; 2: grey and alpha; 4: RGB and alpha; otherwise as many as the file has to have
    depth       bits per value, 8 or 16; files of the other depth are scaled, so that white stays white
    max_pixels  images of more pixels are bad: a small file may hold a picture that fills the memory
    """

    channels: int
    depth: int
    max_pixels: int

    @property
    def is_rgb(self) -> bool:
        """Whether images come as PIL images in RGB; otherwise they are arrays."""
        return self.channels == 3 and self.depth == 8

    @property
    def extensions(self) -> frozenset[str]:
        """Endings of files that count as images."""
        return IMAGE_EXTENSIONS if self.is_rgb else IMAGE_EXTENSIONS | {".npy"}

    def read(self, encoded: bytes, decode: Decoder | None = None) -> Any:
        """An RGB image, by `decode` where that is given; or, unless `is_rgb`, an array (h, w, C) uint8 or uint16.

        Raises BadImage if it cannot be read, whatever the decoder says.
        """
        if not self.is_rgb:
            return decode_array(encoded, self)
        if decode is None:
            return decode_rgb(encoded, self.max_pixels)
        with _opened(encoded, self.max_pixels):  # reads no more than the head of the file
            pass
        image = decode(encoded)
        return decode_rgb(encoded, self.max_pixels) if image is None else image


RGB = Pixels(channels=3, depth=8, max_pixels=MAX_PIXELS)


def decode_rgb(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file's bytes in RGB, 8 bits. Raises BadImage if it cannot be read."""
    with _opened(encoded, max_pixels) as image:
        if image.mode == "I" or image.mode.startswith("I;16"):
            return Image.fromarray(_to_depth(_grey16(image), 8)).convert("RGB")
        if image.mode == "F":
            raise BadImage("its pixels are floating-point numbers, of which nobody knows which one is white")
        return image.convert("RGB")


def decode_array(encoded: bytes, pixels: Pixels) -> np.ndarray:
    """The image in a file's bytes: (h, w, C) uint8 or uint16. Raises BadImage if it cannot be read."""
    if encoded.startswith(_NPY):
        values = _guarded(_npy, encoded, pixels)
    elif encoded.startswith(_TIFF):
        values = _guarded(_tiff, encoded, pixels)
    else:
        values = _picture(encoded, pixels)
    return np.ascontiguousarray(_to_depth(values, pixels.depth))


@contextmanager
def _opened(encoded: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The image, not yet decoded. Whatever goes wrong in the block is a BadImage."""
    try:
        with _open(encoded, max_pixels) as image:
            yield image
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders answer damage with OSError, SyntaxError, ValueError, struct.error, ...
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _open(encoded: bytes, max_pixels: int) -> Image.Image:
    """Pillow's own limit is lifted while it opens, and raised to `max_pixels` for good: it holds for the crops of an image too."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(io.BytesIO(encoded))
    finally:
        Image.MAX_IMAGE_PIXELS = None if limit is None else max(limit, max_pixels)
    _check_size(*image.size, max_pixels)
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels are more than data.max_pixels={max_pixels}")


def _guarded(read: Callable[[bytes, Pixels], np.ndarray], encoded: bytes, pixels: Pixels) -> np.ndarray:
    try:
        return read(encoded, pixels)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # whatever the decoder makes of garbage
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _picture(encoded: bytes, pixels: Pixels) -> np.ndarray:
    """By Pillow: (h, w, C) uint8 or uint16, in whatever depth the file has."""
    with _opened(encoded, pixels.max_pixels) as image:
        if pixels.channels > 4:
            raise BadImage(f"a {image.format} file has at most 4 channels, data.channels={pixels.channels} needs TIFF or .npy")
        if image.mode == "F":
            raise BadImage("its pixels are floating-point numbers, of which nobody knows which one is white")
        if encoded.startswith(_PNG) and encoded[24] == 16 and encoded[25] != 0:  # bits per value, and anything but grey
            values = _colour_png16(encoded)
        elif image.mode == "I" or image.mode.startswith("I;16"):
            values = _grey16(image)[:, :, None]
        else:
            values = np.asarray(_in_plain_mode(image))
            values = values if values.ndim == 3 else values[:, :, None]
        return _to_channels(values, pixels.channels)


def _in_plain_mode(image: Image.Image) -> Image.Image:
    """The image in L, LA, RGB or RGBA, whichever holds all of it."""
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image
    if image.mode == "1":
        return image.convert("L")
    return image.convert("RGBA" if image.mode in ("PA", "RGBa") or "transparency" in image.info else "LA" if image.mode == "La" else "RGB")


def _grey16(image: Image.Image) -> np.ndarray:
    """(h, w) uint16."""
    values = np.asarray(image)
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= 65535:
        raise BadImage("its pixels are not within 16 bits")
    return values.astype(np.uint16)


def _colour_png16(encoded: bytes) -> np.ndarray:
    """(h, w, n) uint16."""
    import cv2

    decoded = cv2.imdecode(np.frombuffer(encoded, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:
        raise BadImage("a damaged PNG of 16 bits")
    return decoded[:, :, [2, 1, 0, 3][: decoded.shape[2]]]  # from BGR


def _tiff(encoded: bytes, pixels: Pixels) -> np.ndarray:
    """The first image of the file, whose channels may be samples, planes or pages: (h, w, C)."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it tells of damage by itself, and then raises
    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        series = file.series[0]
        page = series.keyframe
        shape = dict(zip(series.axes, series.shape, strict=True))
        height, width = shape.pop("Y"), shape.pop("X")
        _check_size(width, height, pixels.max_pixels)
        channels = int(np.prod(list(shape.values()), dtype=np.int64))
        is_picture = channels <= 4 and pixels.channels <= 4
        if channels != pixels.channels and not is_picture:
            raise BadImage(f"it has {channels} channels, data.channels={pixels.channels} asks for others")
        is_plain = page.photometric in _PLAIN_PHOTOMETRICS and page.compression in _PLAIN_COMPRESSIONS
        if is_picture and not is_plain:
            return _picture(encoded, pixels)  # Pillow knows palettes and unpacks what tifffile would need another library for
        if series.dtype not in (np.uint8, np.uint16):
            raise BadImage(f"its pixels are {series.dtype}, not 8 or 16 bits")
        values = series.asarray()
    order = [series.axes.index("Y"), series.axes.index("X")]
    order += [axis for axis in range(values.ndim) if axis not in order]
    values = values.transpose(order).reshape(height, width, channels)
    return _to_channels(values, pixels.channels)


def _npy(encoded: bytes, pixels: Pixels) -> np.ndarray:
    """An array (h, w, C), (C, h, w), or (h, w) for one channel, as (h, w, C)."""
    values = np.load(io.BytesIO(encoded), allow_pickle=False)
    if values.dtype not in (np.uint8, np.uint16):
        raise BadImage(f"its values are {values.dtype}, not uint8 or uint16")
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or pixels.channels not in (values.shape[2], values.shape[0]):
        raise BadImage(f"an array of shape {values.shape} has not the {pixels.channels} channels of data.channels")
    if values.shape[2] != pixels.channels:
        values = values.transpose(1, 2, 0)
    if not values.size:
        raise BadImage("it has no pixels")
    _check_size(values.shape[1], values.shape[0], pixels.max_pixels)
    return values


def _to_depth(values: np.ndarray, depth: int) -> np.ndarray:
    """Values of 8 or 16 bits, scaled so that white stays white and 8 bits survive the way to 16 and back."""
    if values.dtype == np.uint8:
        return values if depth == 8 else values.astype(np.uint16) * 257
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8) if depth == 8 else values.astype(np.uint16)


def _to_channels(values: np.ndarray, channels: int) -> np.ndarray:
    """Grey, grey and alpha, RGB or RGBA (h, w, n) as that one of them that has `channels`; where alpha is missing, it is full."""
    if values.shape[2] == channels:
        return values
    has_alpha = values.shape[2] in (2, 4)
    color = values[:, :, :-1] if has_alpha else values
    alpha = values[:, :, -1:] if has_alpha else np.full_like(values[:, :, :1], np.iinfo(values.dtype).max)
    if channels <= 2 and color.shape[2] == 3:
        color = ((color @ _LUMA + 500) // 1000).astype(values.dtype)[:, :, None]
    elif channels > 2 and color.shape[2] == 1:
        color = np.repeat(color, 3, axis=2)
    return np.concatenate([color, alpha], axis=2) if channels in (2, 4) else color
