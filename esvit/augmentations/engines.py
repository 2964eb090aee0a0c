"""The engines by name. All make the views that were drawn; they differ in time and, within stated limits, in rounding."""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from esvit.augmentations.fast import Device, Fast
from esvit.augmentations.parameters import ViewParameters
from esvit.augmentations.reference import Reference

EngineName = Literal["reference", "fast", "device"]


class Engine(Protocol):
    """`decode` makes of a file what `views` takes, or None where Pillow is to judge; without it, `views` takes an RGB image of Pillow."""

    @property
    def decode(self) -> Callable[[bytes], Any] | None: ...
    def views(self, image: Any, parameters: list[ViewParameters]) -> list[Tensor]: ...  # what the loading processes make
    def left_over(self, image: Any, parameters: list[ViewParameters]) -> list[Tensor]: ...  # a vector for each view, or nothing
    def finished(self, image: Any, parameters: list[ViewParameters]) -> list[Tensor]: ...  # whole views


ENGINES = ("reference", "fast", "device")


def make_engine(name: EngineName, *, crops: set[tuple[int, float]]) -> Engine:
    """crops: see `Fast`."""
    if name == "reference":
        return Reference()
    return Fast(crops) if name == "fast" else Device(crops)


def size_of(image: Any) -> tuple[int, int]:
    """(width, height) of anything that an engine takes."""
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    width, height = image.size
    return width, height
