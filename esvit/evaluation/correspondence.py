"""Whether the features of a region find the same place again in another view: the correspondence measure of EsViT (Li et al., 2022).

Every region of the first view is matched with the region of the second that has the largest cosine. Published are the 10 most similar
pairs of an image and its mirror image in grey. Here also: all regions, pairs that choose each other, and views cut out differently.

Unusual: an error is counted in cells, from the region found to the region that shows the place; an error of 0 is a right match. What the
original reports as similarity is that of the 11th pair; here it is the mean of those that count.

Letters: B pairs of views, C channels, N regions of a view, D feature width, R offsets, h and w the sides of a view in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from esvit.augmentations import photometric
from esvit.augmentations.evaluation import EvaluationCrop
from esvit.augmentations.multicrop import draw_box, to_tensor
from esvit.data.base import BadImage, ImageSet
from esvit.errors import OptionError

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "gamma": 0.0}  # of the second view, as published
JITTER_PROBABILITY = 0.8
FLIP_PROBABILITY = 0.5  # of the second view where both are cut out
KINDS = ("top", "all", "mutual")  # which pairs count: the most similar ones, all, those that choose each other

_PAIRS = 2  # what a generator is for, the first number of its key: 0 and 1 are those of training


@dataclass(frozen=True)
class Cells:
    """The regions of a square view of `side` pixels: rows and columns of `grid`, taken to share it evenly.

    They do where the side is a multiple of the backbone's stride; otherwise padding makes the last ones smaller.
    """

    grid: tuple[int, int]
    side: int

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def size(self) -> Tensor:
        """(2,) float64 width and height of a cell in pixels."""
        return self.side / torch.tensor([self.grid[1], self.grid[0]], dtype=torch.float64)

    def centres(self) -> Tensor:
        """(N, 2) float64 x, y in pixels, row by row."""
        return (self.places(torch.arange(self.count)) + 0.5) * self.size

    def places(self, regions: Tensor) -> Tensor:
        """Numbers of regions (...) -> (..., 2) int64 column and row."""
        return torch.stack([regions % self.grid[1], regions // self.grid[1]], dim=-1)

    def containing(self, points: Tensor) -> Tensor:
        """x, y in pixels (..., 2) -> (..., 2) int64 column and row of the cell they are in."""
        return (points / self.size).floor().long()

    def inside(self, points: Tensor) -> Tensor:
        """Which of the points (..., 2) are in the view; NaN is in none."""
        return ((points >= 0) & (points < self.side)).all(dim=-1)


@dataclass(frozen=True)
class Pair:
    """Two views, and where each region of the first is in the second.

    one, two  (C, h, w) uint8
    points    (N, 2) float64 x, y in pixels of the second view of what the middle of each region shows; NaN where it is not to be seen
    scale     pixels of the view for one of the image it was made of; 1 where nobody asks
    """

    one: Tensor
    two: Tensor
    points: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Pairs:
    """B pairs: one, two (B, C, h, w) uint8, points (B, N, 2) and scale (B,) float64; places (B,) int64 and the names of unreadable ones."""

    one: Tensor
    two: Tensor
    points: Tensor
    scale: Tensor
    places: Tensor
    bad: list[str]

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class FlippedViews:
    """The evaluation crop of an image, and its mirror image with colours jittered, in grey, as published; see `photometric`.

    photometric  whether the colours of the second view change
    """

    images: ImageSet
    transform: EvaluationCrop
    cells: Cells
    photometric: bool
    seed: int

    def __call__(self, index: int) -> Pair:
        one = self.transform(self.images.read(index))
        two = photometric.horizontal_flip(Image.fromarray(one.permute(1, 2, 0).numpy()))
        if self.photometric:
            two = changed_colors(two, generator(self.seed, index))
        return Pair(one, to_tensor(two), mirrored(self.cells.centres(), self.cells.side))


@dataclass(frozen=True)
class CroppedViews:
    """Two random areas of an image, each resized to the whole view; the second is mirrored half the time, its colours as in FlippedViews.

    scale  smallest and largest share of the image's area
    """

    images: ImageSet
    cells: Cells
    scale: tuple[float, float]
    photometric: bool
    seed: int

    def __call__(self, index: int) -> Pair:
        image, rng, side = self.images.read(index), generator(self.seed, index), self.cells.side
        first, second = draw_box(image.size, self.scale, rng), draw_box(image.size, self.scale, rng)
        one, two = (image.crop(box).resize((side, side), Image.Resampling.BICUBIC) for box in (first, second))
        points = moved(self.cells.centres(), first, second, side)
        if rng.random() < FLIP_PROBABILITY:
            two, points = photometric.horizontal_flip(two), mirrored(points, side)
        if self.photometric:
            two = changed_colors(two, rng)
        points[~self.cells.inside(points)] = torch.nan
        return Pair(to_tensor(one), to_tensor(two), points)


def generator(seed: int, index: int) -> np.random.Generator:
    """The random numbers of one image: the same whichever process draws them."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_PAIRS, index))))


def changed_colors(view: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < JITTER_PROBABILITY:
        view = photometric.color_jitter(view, rng, **JITTER)
    return photometric.grayscale(view)


def mirrored(points: Tensor, side: int) -> Tensor:
    """x, y (N, 2) of a view -> those in its mirror image."""
    return torch.stack([side - points[:, 0], points[:, 1]], dim=1)


def moved(points: Tensor, one: Sequence[int], two: Sequence[int], side: int) -> Tensor:
    """x, y (N, 2) in a view of the area `one` -> those in a view of the area `two`; areas are left, top, right, bottom in the image."""
    (first, last), (other, end) = (torch.tensor(box, dtype=torch.float64).view(2, 2) for box in (one, two))
    return (first + points * (last - first) / side - other) * side / (end - other)


class PairDraws(Dataset):
    """The work of a loading process: numbers of pairs in, `Pairs` out. An OptionError comes out as a value, since torch re-raises by text.

    draw    the pair of an index
    places  (n,) index of each number
    name    of an index, for the list of unreadable ones
    """

    def __init__(self, draw: Callable[[int], Pair], places: np.ndarray, name: Callable[[int], str]):
        self._draw = draw
        self._places = places
        self.name = name

    def __len__(self) -> int:
        return len(self._places)

    def __getitems__(self, numbers: list[int]) -> Pairs | OptionError:
        pairs, places, bad = [], [], []
        for place in (int(self._places[number]) for number in numbers):
            try:
                pairs.append(self._draw(place))
                places.append(place)
            except BadImage:
                bad.append(self.name(place))
            except OptionError as error:
                return error
        if not pairs:
            nothing = torch.empty(0)
            return Pairs(nothing, nothing, nothing, nothing, places=nothing, bad=bad)
        return Pairs(
            one=torch.stack([pair.one for pair in pairs]),
            two=torch.stack([pair.two for pair in pairs]),
            points=torch.stack([pair.points for pair in pairs]),
            scale=torch.tensor([pair.scale for pair in pairs], dtype=torch.float64),
            places=torch.tensor(places),
            bad=bad,
        )


@dataclass(frozen=True)
class Matches:
    """best        (B, N) int64, the region of the second view that is most similar to each of the first
    similarity  (B, N) float32, their cosine
    mutual      (B, N) bool, whether that region finds this one most similar in turn
    """

    best: Tensor
    similarity: Tensor
    mutual: Tensor

    def cpu(self) -> "Matches":
        return Matches(self.best.cpu(), self.similarity.cpu(), self.mutual.cpu())


def match(one: Tensor, two: Tensor) -> Matches:
    """Of the regions (B, N, D) of both views."""
    cosine = F.normalize(one.float(), dim=2) @ F.normalize(two.float(), dim=2).transpose(1, 2)
    similarity, best = cosine.max(dim=2)
    back = cosine.argmax(dim=1).gather(1, best)
    return Matches(best=best, similarity=similarity, mutual=back == torch.arange(one.shape[1], device=one.device))


def most_similar(similarity: Tensor, known: Tensor, pairs: int) -> Tensor:
    """(B, N) bool: the `pairs` most similar matches of each image among the `known` ones, all of them where there are fewer."""
    order = similarity.masked_fill(~known, -torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(known).scatter_(1, order[:, :pairs], True)
    return chosen & known


_SUMS = ("pairs", "error_pixels", "similarity", "disparity_error", "disparity_error_of_true_region")  # before the counts within each offset


def tally_width(cells: Cells) -> int:
    return len(_SUMS) + max(cells.grid)


def tally(matches: Matches, points: Tensor, scale: Tensor, cells: Cells, *, pairs: int) -> Tensor:
    """What adds up over images, for each image and kind of pairs: (B, 3, 5 + R) float64.

    First the number of pairs and the sums of their errors, similarities and disparity errors (see `Score`); then how many have an error of
    at most 0, 1, ... R - 1 cells, where R is the longer side of the grid.

    matches  on the CPU
    points   (B, N, 2), as in Pair
    scale    (B,), as in Pair
    pairs    how many of the most similar matches count as "top"
    """
    known = cells.inside(points)
    found, true = cells.places(matches.best), cells.containing(points.nan_to_num(0.0))
    offset = (found - true).double()
    error_pixels = (offset * cells.size).norm(dim=2)
    x_true, width = points[..., 0].nan_to_num(0.0), cells.size[0]
    columns = [
        torch.ones_like(error_pixels),
        error_pixels,
        matches.similarity.double(),
        ((found[..., 0] + 0.5) * width - x_true).abs() / scale[:, None],
        ((true[..., 0] + 0.5) * width - x_true).abs() / scale[:, None],
        *((offset.square().sum(dim=2) <= allowed**2).double() for allowed in range(max(cells.grid))),
    ]
    chosen = torch.stack([most_similar(matches.similarity, known, pairs), known, matches.mutual & known], dim=1)  # (B, 3, N)
    return chosen.double() @ torch.stack(columns, dim=2)


@dataclass(frozen=True)
class Score:
    """Of all pairs of one kind; NaN where there is none.

    pairs         how many there are
    within        percent with an error of at most 0, 1, ... cells
    error_pixels  mean distance from the region found to the true one
    similarity    mean cosine
    disparity_error, disparity_error_of_true_region  mean horizontal distance, in pixels of the images as they are, from the middle of the
                  region found, and of the right region, to the true point: the second is what the size of the regions costs anyhow
    """

    pairs: int
    within: list[float]
    error_pixels: float
    similarity: float
    disparity_error: float
    disparity_error_of_true_region: float

    @property
    def accuracy(self) -> float:
        """Percent of right matches."""
        return self.within[0]


def scores(tallies: Tensor) -> dict[str, Score]:
    """One score for each of KINDS, from the tallies (n, 3, 5 + R) of all images."""
    found = {}
    for kind, sums in zip(KINDS, tallies.sum(dim=0), strict=True):
        means = (sums / sums[0]).tolist()
        found[kind] = Score(
            pairs=int(sums[0]),
            within=[100 * share for share in means[len(_SUMS) :]],
            **dict(zip(_SUMS[1:], means[1 : len(_SUMS)], strict=True)),
        )
    return found
