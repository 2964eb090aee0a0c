"""What is drawn for one view, apart from making it: so that every engine makes the same view, and a picture can tell how it was made."""

from dataclasses import dataclass
from typing import NamedTuple

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


class ColorChange(NamedTuple):
    """A change of colours and its strength.

    name    brightness, contrast, saturation (factor: 1 changes nothing), hue (share of the colour circle) or gamma (exponent)
    factor
    """

    name: str
    factor: float


class Operation(NamedTuple):
    """An operation of RandAugment and its argument, in the unit of the operation; None where it has none."""

    name: str
    argument: float | None


class ErasedBox(NamedTuple):
    """A part of the view, in its pixels, that is filled: with noise made from `seed`, one colour or one value for each pixel."""

    box: Box
    fill: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """One view, as drawn; its parts are carried out in this order.

    size         side of the view in pixels
    box          the part of the image that is cut out and resized
    flip         whether it is mirrored
    operations   of RandAugment
    changes      of colours
    grayscale    whether the colours go
    blur_radius  standard deviation in pixels, or None
    solarize     whether bright values are inverted
    erased       boxes that are filled
    """

    size: int
    box: Box
    flip: bool = False
    operations: tuple[Operation, ...] = ()
    changes: tuple[ColorChange, ...] = ()
    grayscale: bool = False
    blur_radius: float | None = None
    solarize: bool = False
    erased: tuple[ErasedBox, ...] = ()

    def describe(self) -> str:
        """One line for a caption: what differs from the mere image."""
        left, top, right, bottom = self.box
        parts = [f"{right - left} x {bottom - top} at ({left}, {top})"]
        parts += ["mirrored"] * self.flip
        parts += [each.name if each.argument is None else f"{each.name} {each.argument:.3g}" for each in self.operations]
        parts += [f"hue {each.factor:+.2f}" if each.name == "hue" else f"{each.name} {each.factor:.2f}" for each in self.changes]
        parts += ["grey"] * self.grayscale
        parts += [] if self.blur_radius is None else [f"blur {self.blur_radius:.1f}"]
        parts += ["solarized"] * self.solarize
        parts += [f"erased {right - left} x {bottom - top}" for (left, top, right, bottom), _, _ in self.erased]
        return ", ".join(parts)
