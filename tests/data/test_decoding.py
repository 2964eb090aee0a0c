"""Pixels of every kind of file, in any number of channels and both depths; and what is no image."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from esvit.data.decoding import RGB, BadImage, Pixels, decode_rgb
from tests.data.pictures import picture, png

LEVELS = np.array([[0, 257, 25600, 65535]], dtype=np.uint16)  # in 8 bits: 0, 1, 100, 255
SIX = np.random.default_rng(0).integers(0, 65536, (12, 10, 6), dtype=np.uint16)


def pixels(channels: int, depth: int = 8, max_pixels: int = 10**6) -> Pixels:
    return Pixels(channels=channels, depth=depth, max_pixels=max_pixels)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_keeps_its_white_in_8_bits_and_all_of_it_in_16(kind):
    file = encoded(Image.fromarray(LEVELS), kind)
    assert np.asarray(decode_rgb(file))[0].tolist() == [[0] * 3, [1] * 3, [100] * 3, [255] * 3]
    assert pixels(1).read(file)[0, :, 0].tolist() == [0, 1, 100, 255]
    assert pixels(3, 16).read(file)[0, :, 2].tolist() == LEVELS[0].tolist()


def test_colour_of_16_bits_is_read_whole_from_png_and_tiff():
    colors = SIX[:, :, :3]
    for file in (png16(colors), tiff(colors, photometric="rgb")):
        read = pixels(3, 16).read(file)
        assert read.dtype == np.uint16 and np.array_equal(read, colors)
        assert pixels(4, 16).read(file)[:, :, 3].min() == 65535
    assert np.array_equal(pixels(4, 16).read(png16(SIX[:, :, :4])), SIX[:, :, :4])
    for file in (png16(colors), tiff(colors, photometric="rgb")):
        assert np.abs(pixels(4).read(file)[:, :, :3] - colors / 257).max() <= 0.5
    with pytest.raises(BadImage):
        pixels(3, 16).read(png16(colors)[:300])


def test_what_tifffile_cannot_unpack_pillow_does():
    image = picture(2).convert("L")
    assert np.array_equal(pixels(1).read(encoded(image, "TIFF", compression="tiff_lzw"))[:, :, 0], np.asarray(image))
    palette = picture(2).quantize(16)
    assert np.array_equal(pixels(4).read(encoded(palette, "TIFF"))[:, :, :3], np.asarray(palette.convert("RGB")))


def png16(colors: np.ndarray) -> bytes:
    """A PNG of 16 bits by hand: Pillow writes none. Rows are unfiltered."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colors)
    return png_of(colors.shape[1], colors.shape[0], 16, {3: 2, 4: 6}[colors.shape[2]], zlib.compress(rows))


def png_of(width: int, height: int, bits: int, kind: int, content: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_any_picture_can_be_had_in_one_to_four_channels(mode):
    image = picture(3).convert(mode)
    file = encoded(image, "PNG")
    rgb, luma = np.asarray(image.convert("RGB")), np.asarray(image.convert("L"))
    assert np.array_equal(pixels(3, 16).read(file), rgb.astype(np.uint16) * 257)
    assert np.array_equal(pixels(4).read(file)[:, :, :3], rgb)
    assert np.abs(pixels(1).read(file)[:, :, 0].astype(int) - luma).max() <= 1  # Pillow rounds luma otherwise
    assert pixels(2).read(file).shape == (16, 20, 2)


@pytest.mark.parametrize(
    "file",
    [
        tiff(SIX.transpose(2, 0, 1), photometric="minisblack"),
        tiff(SIX.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate"),
        tiff(SIX, photometric="minisblack", planarconfig="contig", compression="deflate"),
        npy(SIX),
        npy(SIX.transpose(2, 0, 1)),
    ],
    ids=["pages", "planes", "samples", "rows first", "channels first"],
)
def test_six_channels_are_read_from_any_layout(file):
    assert np.array_equal(pixels(6, 16).read(file), SIX)
    eight = pixels(6).read(file)
    assert eight.dtype == np.uint8 and np.abs(eight - SIX / 257).max() <= 0.5
    with pytest.raises(BadImage, match="channels"):
        pixels(5).read(file)
    with pytest.raises(BadImage):
        pixels(6, 16).read(file[: len(file) // 2])


def test_the_white_of_8_bits_survives_the_way_to_16_and_back():
    file = npy(np.arange(256, dtype=np.uint8)[:, None])
    wide = pixels(1, 16).read(file)
    assert wide.max() == 65535
    assert np.array_equal(pixels(1).read(npy(wide)).ravel(), np.arange(256))


@pytest.mark.parametrize("channels", [3, 1, 6])
@pytest.mark.parametrize(
    "file",
    [b"", b"no image", b"II*\0nonsense", b"\x93NUMPY", npy(np.zeros((4, 4, 6))), npy(np.zeros((0, 4, 6), np.uint8)), png(1)[:200]],
    ids=["empty", "text", "no tiff", "no npy", "floats", "no pixels", "truncated"],
)
def test_what_is_no_image_is_a_bad_one(channels, file):
    with pytest.raises(BadImage):
        pixels(channels).read(file)


def test_arrays_with_objects_are_refused_since_they_could_run_code():
    with pytest.raises(BadImage, match="allow_pickle"):
        pixels(1).read(npy(np.array([[print]], dtype=object)))


def test_floating_point_pixels_have_no_white():
    with pytest.raises(BadImage, match="floating-point"):
        decode_rgb(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


@pytest.mark.parametrize("channels", [3, 1])
def test_a_giant_image_is_bad_before_it_is_decoded_and_pillow_does_not_warn(channels):
    file = png_of(20000, 10000, 8, 0, zlib.compress(b""))  # Pillow itself would raise
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match="20000 x 10000 pixels are more than data.max_pixels=1000000"):
            pixels(channels).read(file, lambda _: pytest.fail("decoded"))
        with pytest.raises(BadImage, match="more than data.max_pixels=100"):
            pixels(channels, max_pixels=100).read(png(1))
        with pytest.raises(BadImage, match="more than data.max_pixels=100"):
            pixels(6, 16, max_pixels=100).read(npy(SIX))


def test_a_larger_limit_lets_giants_pass_and_their_crops_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = pixels(3, max_pixels=1000).read(png(1))
        assert image.crop((0, 0, 20, 16)).size == (20, 16)


def test_a_decoder_that_is_handed_in_gets_the_bytes_of_rgb_images_only():
    assert RGB.read(png(1), len) == len(png(1))
    assert isinstance(pixels(1).read(png(1), len), np.ndarray)
