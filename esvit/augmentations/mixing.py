"""Mixup and CutMix of the student's crops, with the matrix that tells the loss which teacher images each mixed image is made of.

The original mixed in place, so its teacher saw mixed images too, and it read the weights as [teacher, student], which is wrong
where they are not symmetric (mode "elem"). Here the crops handed in stay as they are, and a matrix row belongs to a student image.

Letters: V crops, B images, C channels, h and w the sides of a crop in pixels.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from esvit.errors import OptionError

OPTION = "task.mixing"


class Mixing:
    """Mix image i of a crop with image B - 1 - i, each crop with weights of its own (mixup, Zhang et al. 2018; CutMix, Yun et al. 2019).

    mixup_alpha, cutmix_alpha  Beta(alpha, alpha) gives the weight of the image itself; 0 turns that kind off
    cutmix_minmax              [smallest, largest]: CutMix's boxes lie inside the crop, with sides of such shares of its own, each uniform
                               (as timm); CutMix is then on whatever cutmix_alpha is. None: by cutmix_alpha
    probability                that a draw mixes at all
    switch_probability         that it is CutMix, where both kinds are on
    mode                       one draw for the whole "batch", for each "pair" (i, B - 1 - i), or for each image ("elem")
    crops                      how many of the first crops are mixed; the others get the identity

    Raises OptionError for a value that cannot work.
    """

    def __init__(
        self,
        *,
        mixup_alpha: float,
        cutmix_alpha: float,
        cutmix_minmax: Sequence[float] | None,
        probability: float,
        switch_probability: float,
        mode: Literal["batch", "pair", "elem"],
        crops: int,
    ):
        for option, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if alpha < 0:
                raise OptionError(f"{OPTION}.{option}", f"{alpha}", "use 0 (off) or more")
        if cutmix_minmax is not None and (len(cutmix_minmax) != 2 or not 0 <= cutmix_minmax[0] < cutmix_minmax[1] <= 1):
            remedy = "give [smallest, largest] with 0 <= smallest < largest <= 1, or null"
            raise OptionError(f"{OPTION}.cutmix_minmax", f"{list(cutmix_minmax)}", remedy)
        has_cutmix = cutmix_alpha > 0 or cutmix_minmax is not None
        if mixup_alpha == 0 and not has_cutmix:
            raise OptionError(f"{OPTION}.mixup_alpha", "both mixup_alpha and cutmix_alpha are 0", "turn one on, or leave mixing out")
        for option, share in (("probability", probability), ("switch_probability", switch_probability)):
            if not 0 <= share <= 1:
                raise OptionError(f"{OPTION}.{option}", f"{share}", "use a number from 0 to 1")
        if mode not in ("batch", "pair", "elem"):
            raise OptionError(f"{OPTION}.mode", f"'{mode}'", "use batch, pair or elem")
        if crops < 0:
            raise OptionError(f"{OPTION}.crops", f"{crops}", "use 0 or more")
        self._options: dict[str, Any] = {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha, "probability": probability, "mode": mode}
        self._options |= {"switch_probability": switch_probability, "crops": crops}
        if cutmix_minmax is not None:
            self._options["cutmix_minmax"] = list(cutmix_minmax)
        self._mixup_alpha = mixup_alpha
        self._cutmix_probability = 0.0 if not has_cutmix else 1.0 if mixup_alpha == 0 else switch_probability
        self._cutmix_alpha = cutmix_alpha
        self._cutmix_minmax = None if cutmix_minmax is None else (float(cutmix_minmax[0]), float(cutmix_minmax[1]))
        self._probability = probability
        self.is_on = probability > 0 and crops > 0
        self._mode = mode
        self._crops = crops

    def __call__(self, crops: list[Tensor], rng: np.random.Generator) -> tuple[list[Tensor], Tensor]:
        """Mixed crops, and the weights (V, B, B) float32: [v, i, j] is the share of image j in mixed image i of crop v.

        crops  V floating-point tensors (B, C, h, w), left as they are

        Raises OptionError for an odd batch in mode "pair".
        """
        count = len(crops[0])
        if self._mode == "pair" and count % 2:
            raise OptionError("data.batch_size", f"{count} images cannot be mixed in pairs", f"use an even batch or {OPTION}.mode=batch")
        mixed, matrices = list(crops), np.zeros((len(crops), count, count), dtype=np.float32)
        matrices[:, range(count), range(count)] = 1
        for v, crop in enumerate(crops[: self._crops]):
            shares, boxes = self._draw(count, crop.shape[-2], crop.shape[-1], rng)
            mixed[v] = _mix(crop, shares, boxes)
            matrices[v] = np.diag(shares) + np.diag(1 - shares)[:, ::-1]  # the middle image of an odd batch keeps a share of 1
        return mixed, torch.from_numpy(matrices).to(crops[0].device, non_blocking=True)

    def describe(self) -> dict[str, Any]:
        """What a protocol has to say of it; of what is off, only that."""
        return self._options if self.is_on else {"probability": 0.0}

    def _draw(self, count: int, height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Share of each image in its own mixture (B,) float32; boxes to take from the partner, (B, 4) top, bottom, left, right.

        An empty box means mixup. CutMix's share is corrected for the part of its box that lies outside the image.
        """
        draws = {"batch": 1, "pair": count // 2, "elem": count}[self._mode]
        shares, boxes = np.ones(draws), np.zeros((draws, 4), dtype=np.int64)
        for draw in range(draws):
            if rng.random() >= self._probability:
                continue
            if rng.random() >= self._cutmix_probability:
                shares[draw] = rng.beta(self._mixup_alpha, self._mixup_alpha)
                continue
            if self._cutmix_minmax is None:
                side = np.sqrt(1 - rng.beta(self._cutmix_alpha, self._cutmix_alpha))
                (top, bottom), (left, right) = _interval(height, side, rng), _interval(width, side, rng)
            else:
                (top, bottom), (left, right) = (_inner_interval(length, self._cutmix_minmax, rng) for length in (height, width))
            boxes[draw] = top, bottom, left, right
            shares[draw] = 1 - (bottom - top) * (right - left) / (height * width)
        if self._mode == "pair":
            shares, boxes = np.concatenate([shares, shares[::-1]]), np.concatenate([boxes, boxes[::-1]])
        return np.broadcast_to(shares, count).astype(np.float32), np.broadcast_to(boxes, (count, 4))


def _interval(length: int, side: float, rng: np.random.Generator) -> tuple[int, int]:
    """Begin and end of `side` * `length` pixels around a random middle, cut at the borders."""
    half = int(length * side) // 2
    middle = int(rng.integers(length))
    return max(0, middle - half), min(length, middle + half)


def _inner_interval(length: int, shares: tuple[float, float], rng: np.random.Generator) -> tuple[int, int]:
    """Begin and end of a random part of `length` pixels, between these shares of it in length, in a random place inside."""
    least, most = int(length * shares[0]), int(length * shares[1])
    part = int(rng.integers(least, max(most, least + 1)))
    begin = int(rng.integers(length - part, endpoint=True))
    return begin, begin + part


def _mix(crop: Tensor, shares: np.ndarray, boxes: np.ndarray) -> Tensor:
    """(B, C, h, w): image i with its partner B - 1 - i, blended by share where its box is empty, else pasted inside the box."""
    top, bottom, left, right = (torch.from_numpy(each.copy()).to(crop.device, non_blocking=True).view(-1, 1, 1, 1) for each in boxes.T)
    rows = torch.arange(crop.shape[-2], device=crop.device).view(1, 1, -1, 1)
    columns = torch.arange(crop.shape[-1], device=crop.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # (B, 1, h, w)
    pasted = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
    # where something is pasted the rest keeps its pixels whole; elsewhere all pixels are blended
    outside_share = torch.from_numpy(np.where(pasted, 1, shares).astype(np.float32)).to(crop.device, non_blocking=True).view(-1, 1, 1, 1)
    own = torch.where(inside, 0.0, outside_share).to(crop.dtype)
    return crop * own + crop.flip(0) * (1 - own)
