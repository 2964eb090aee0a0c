"""Colours for regions: their first three principal components as red, green and blue, so that alike features get alike colours.

One set of components serves all images and sizes, so that a colour means the same everywhere. It is that of the finest maps.

Letters: N regions of an image, D feature width, n regions of all images together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_DARKEST, _BRIGHTEST = 0.01, 0.99  # quantiles of a component that become 0 and 1: a few extreme regions would leave the others grey


@dataclass(frozen=True)
class Components:
    """mean    (D,) of the features
    axes    (D, 3) unit vectors, the strongest first; fewer where the features have fewer dimensions
    shares  (3,) of the whole variance that lie along the axes
    """

    mean: Tensor
    axes: Tensor
    shares: Tensor

    def along(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., 3)."""
        return (features.double() - self.mean) @ self.axes


def principal_components(features: Tensor) -> Components:
    """Of features (n, D), in float64. An axis and its negative are equally right: here its entry of largest size is positive."""
    features = features.double()
    mean = features.mean(dim=0)
    centred = features - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(features))  # rising
    variances, axes = variances.flip(0).clamp(min=0), axes.flip(1)[:, :3]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return Components(
        mean=mean, axes=axes * largest.sign(), shares=variances[:3] / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    )


@dataclass(frozen=True)
class ColorMap:
    """From features to colours, made by `color_map`.

    components   of the regions that get a colour
    low, high    (3,) components that become 0 and 1
    foreground   the components of all regions, if the background gets no colour
    side         1 or -1: the sign of the first of those in the foreground
    """

    components: Components
    low: Tensor
    high: Tensor
    foreground: Components | None
    side: int

    def colors(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., 3) float64 from 0 to 1; NaN in the background."""
        along = self.components.along(features)
        colors = ((along - self.low) / (self.high - self.low).clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
        if self.foreground is not None:
            colors[self.foreground.along(features)[..., 0] * self.side <= 0] = torch.nan
        return colors


def color_map(maps: list[Tensor], *, only_foreground: bool) -> ColorMap:
    """Made for the region features of several images, each (rows, columns, D).

    only_foreground  colour only one side of the first principal component (Oquab et al. 2023), with the components of that side alone: the
                     side that has less of the images' borders, where the subject rarely is
    """
    features = torch.cat([each.flatten(0, 1) for each in maps])
    everything, side = principal_components(features), 1
    kept = features
    if only_foreground:
        borders = torch.cat([everything.along(_border(each))[:, 0] for each in maps])
        side = -1 if float((borders > 0).double().mean()) > 0.5 else 1
        kept = features[everything.along(features)[:, 0] * side > 0]
    components = principal_components(kept)
    along = components.along(kept)
    low, high = (torch.quantile(along, share, dim=0) for share in (_DARKEST, _BRIGHTEST))
    return ColorMap(components=components, low=low, high=high, foreground=everything if only_foreground else None, side=side)


def _border(regions: Tensor) -> Tensor:
    """(rows, columns, D) -> those of the outermost rows and columns."""
    rows, columns = regions.shape[:2]
    inside = torch.zeros(rows, columns, dtype=torch.bool, device=regions.device)
    inside[1:-1, 1:-1] = True
    return regions[~inside]
