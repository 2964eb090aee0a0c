"""What the device engine leaves to the device: colours, grayscale, blur and solarize of all crops of one size in one pass.

The loader hands over crops that are cut and mirrored, and for each a vector of what was drawn for it. Vectors stay on the host until it
is known which images meet which operation; only row numbers and factors follow the crops, so the host never waits for the device.
Values pass from step to step as whole numbers in float32, cut off where Pillow cuts them off. The blur is exact at the edges too: it is
two products with band matrices, one for each image and direction.

Letters: B images, C channels, h and w the sides of a crop in pixels, V crops, P = 13 numbers for each crop.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from esvit.augmentations.blurring import PASSES
from esvit.augmentations.parameters import ViewParameters

CODES = {"brightness": 1, "contrast": 2, "saturation": 3, "hue": 4, "gamma": 5}  # 0: nothing
SLOTS = len(CODES)  # changes of colour, in their order: (code, factor) each
GRAYSCALE, BLUR, SOLARIZE, WIDTH = 2 * SLOTS, 2 * SLOTS + 1, 2 * SLOTS + 2, 2 * SLOTS + 3


def vector(drawn: ViewParameters) -> Tensor:
    """(P,) float32: what is left to the device of one view."""
    numbers = np.zeros(WIDTH, dtype=np.float32)
    for slot, (name, factor) in enumerate(drawn.changes):
        numbers[2 * slot : 2 * slot + 2] = CODES[name], factor
    numbers[GRAYSCALE], numbers[SOLARIZE] = drawn.grayscale, drawn.solarize
    numbers[BLUR] = -1 if drawn.blur_radius is None else drawn.blur_radius
    return torch.from_numpy(numbers)


def nothing() -> Tensor:
    """(P,) float32: nothing is left to the device."""
    numbers = torch.zeros(WIDTH)
    numbers[BLUR] = -1
    return numbers


def finish(crops: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """The finished views: uint8 (B, C, h, w) each, on the device of `crops`.

    crops    V uint8 tensors (B, C, h, w), equal sizes adjacent
    vectors  V float32 tensors (B, P) on the host; an empty list if nothing was left over
    """
    if not vectors:
        return crops
    finished: list[Tensor] = []
    while len(finished) < len(crops):
        begin = end = len(finished)
        while end < len(crops) and crops[end].shape == crops[begin].shape:
            end += 1
        group = _finish_group(torch.cat(crops[begin:end]), torch.cat(vectors[begin:end]))
        finished += group.chunk(end - begin)
    return finished


def _finish_group(crops: Tensor, vectors: Tensor) -> Tensor:
    """uint8 (B, C, h, w) with vectors (B, P)."""
    if crops.dtype != torch.uint8 or crops.shape[1] != 3:
        return crops  # made whole by the workers, see arrays.py
    with torch.no_grad(), torch.autocast(crops.device.type, enabled=False):
        pixels = crops.float()
        for slot in range(SLOTS):
            codes, factors = vectors[:, 2 * slot], vectors[:, 2 * slot + 1]
            for name, code in CODES.items():
                _change(pixels, codes == code, CHANGES[name], factors)
        _change(pixels, vectors[:, GRAYSCALE] == 1, lambda images, _: luma(images).expand_as(images), vectors[:, GRAYSCALE])
        _change(pixels, vectors[:, BLUR] >= 0, lambda images, radii: blurred(images, radii.view(-1)).round_(), vectors[:, BLUR])
        _change(pixels, vectors[:, SOLARIZE] == 1, lambda images, _: torch.minimum(images, 255 - images), vectors[:, SOLARIZE])
        return pixels.to(torch.uint8)


def _change(pixels: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor], factors: Tensor) -> None:
    """Put changed images in the place of those `chosen` (B,), on the host, whose factors (B,) are on the host too."""
    rows = chosen.nonzero().view(-1)
    if len(rows):
        factor = factors[rows].to(pixels.device, non_blocking=True).view(-1, 1, 1, 1)
        rows = rows.to(pixels.device, non_blocking=True)
        pixels.index_copy_(0, rows, change(pixels.index_select(0, rows), factor))


def luma(images: Tensor) -> Tensor:
    """(B, 1, h, w): Pillow's whole-number luma of (B, 3, h, w) in 0..255."""
    red, green, blue = images.unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor_().unsqueeze(1)


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return (base + factor * (images - base)).clamp_(0, 255).floor_()


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 255).floor_()


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend((luma(images).mean((1, 2, 3), keepdim=True) + 0.5).floor_(), images, factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(luma(images), images, factor)


def _gamma(images: Tensor, exponent: Tensor) -> Tensor:
    return ((256 - 1e-3) * (images / 255) ** exponent).floor_()


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """By way of hue and saturation in whole numbers of 0..255, as Pillow."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    spread = value - low
    divisor = spread.clamp_min(1)
    from_red, from_green, from_blue = ((value - each) / divisor for each in (red, green, blue))
    sextant = torch.where(
        red == value, from_blue - from_green, torch.where(green == value, 2 + from_red - from_blue, 4 + from_green - from_red)
    )
    hue = ((sextant / 6 + 1) % 1 * 255).floor_()
    saturation = (spread / value.clamp_min(1) * 255).floor_() / 255
    turned = (hue + (shift.view(-1, 1, 1) * 255).trunc_()) % 256 * (6 / 255)
    channels = []
    for place in (5, 3, 1):  # of red, green and blue on the colour circle, in sixths
        distance = (place + turned) % 6
        share = torch.minimum(distance, 4 - distance).clamp_(0, 1)
        channels.append((value * (1 - saturation * share)).add_(0.5).floor_())
    return torch.stack(channels, dim=1)


CHANGES = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue, "gamma": _gamma}


def blurred(images: Tensor, radii: Tensor) -> Tensor:
    """float32 (B, C, h, w) blurred as Pillow does, each image with its own radius (B,)."""
    rows, columns = (_blur_matrices(radii, side).unsqueeze(1) for side in images.shape[-2:])
    return rows @ images @ columns.transpose(-1, -2)


def _blur_matrices(radii: Tensor, side: int) -> Tensor:
    """(B, side, side): what a row of `side` pixels is multiplied by, for radii (B,). Boxes as in blurring.py, all images at once."""
    variance = radii.float().square().view(-1, 1, 1) / PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    end = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    places = torch.arange(side, device=radii.device, dtype=torch.float32)
    distance = (places.view(-1, 1) - places).abs()
    single = (distance <= whole).float() + end * (distance == whole + 1)
    for edge, column in ((places, 0), (side - 1 - places, side - 1)):  # what falls over an edge goes to the pixel there
        edge = edge.view(1, -1)
        single[:, :, column] += (whole[..., 0] - edge).clamp_min(0) + end[..., 0] * (edge <= whole[..., 0])
    single /= 2 * whole + 1 + 2 * end
    return single @ single @ single
