"""What each region shows, told by frozen features: a k-NN and a linear classifier of regions, judged by the classes of all pixels.

A region is learned by the class of most of its pixels. At test the votes, or logits, of the regions are enlarged bilinearly to the pixels
of the crop, as linear probes of dense features are judged in DINOv2 (Oquab et al., 2023) and k-NN ones in Balazevic et al. (2023).

Letters: B images, N regions, D feature width, K classes, R regions to learn from, Q regions to judge, h and w pixels of the crop.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from esvit.augmentations.evaluation import EvaluationCrop
from esvit.data.base import BadImage, ImageSet
from esvit.data.masks import IGNORED, Masks
from esvit.errors import OptionError
from esvit.evaluation.logistic import LogisticRegression, Scaling

_LEAST_LABELLED = 0.5  # share of a region's pixels that must not be ignored


class MaskDraws(Dataset):
    """The work of a loading process: numbers of images in; their masks, cropped as they are, and these numbers out.

    Unreadable images are left out. An OptionError comes out as a value, since torch re-raises by text only.
    """

    def __init__(self, images: ImageSet, masks: Masks, transform: EvaluationCrop):
        self._images = images
        self._masks = masks
        self._transform = transform

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor] | OptionError:
        """(B, h, w) int16 classes and (B,) int64 numbers."""
        cropped, kept = [], []
        for index in indices:
            try:
                mask = self._masks.read(index, self._images.read(index).size)
            except BadImage:
                continue
            except OptionError as error:
                return error
            cropped.append(torch.from_numpy(crop_of_mask(mask, self._transform)))
            kept.append(index)
        side = self._transform.crop
        return torch.stack(cropped) if cropped else torch.zeros(0, side, side, dtype=torch.int16), torch.tensor(kept, dtype=torch.int64)


def crop_of_mask(mask: np.ndarray, transform: EvaluationCrop) -> np.ndarray:
    """The part of a mask that `transform` shows of its image, of the nearest pixels: a class cannot be averaged."""
    (width, height), (left, top) = transform.window((mask.shape[1], mask.shape[0]))
    rows = ((np.arange(transform.crop) + top + 0.5) * mask.shape[0] / height).astype(np.int64)
    columns = ((np.arange(transform.crop) + left + 0.5) * mask.shape[1] / width).astype(np.int64)
    return mask[rows[:, None], columns]


def region_labels(masks: Tensor, grid: tuple[int, int], *, classes: int) -> Tensor:
    """(B, N) int64 class of most labelled pixels of each region, the lower of two with equally many.

    masks  (B, h, w), IGNORED where no class counts. A region of which more than half is ignored is IGNORED.
    """
    count, (height, width) = grid[0] * grid[1], masks.shape[1:]
    rows = (2 * torch.arange(height) + 1) * grid[0] // (2 * height)  # the region that the middle of a pixel is in
    columns = (2 * torch.arange(width) + 1) * grid[1] // (2 * width)
    region = rows[:, None] * grid[1] + columns
    pixels = torch.zeros(len(masks), count, classes + 1)
    cell = (region * (classes + 1) + (masks.long() + 1)).flatten(1)  # class 0 of this table is IGNORED
    pixels.view(len(masks), -1).scatter_add_(1, cell, torch.ones_like(cell, dtype=pixels.dtype))
    labelled = pixels[..., 1:]
    enough = labelled.sum(dim=2) >= _LEAST_LABELLED * pixels.sum(dim=2)
    return torch.where(enough, labelled.argmax(dim=2), IGNORED)


def sample(labels: Tensor, count: int, *, seed: int) -> Tensor:
    """Places (R,) int64, rising, of at most `count` labelled entries of `labels` (n,), any of them as likely as any other."""
    labelled = (labels != IGNORED).nonzero().flatten()
    if len(labelled) <= count:
        return labelled
    chosen = np.random.default_rng(seed).choice(len(labelled), count, replace=False)
    return labelled[torch.from_numpy(np.sort(chosen))]


@dataclass(frozen=True, kw_only=True)
class NeighbourVotes:
    """The k most similar regions vote, weighted by exp(cosine / temperature).

    features     (R, D) unit vectors, labels (R,) int64: what was learned
    neighbours   k
    classes      K
    chunk_rows   regions judged at once: bounds the memory to a few tensors of (chunk_rows, R)
    """

    features: Tensor
    labels: Tensor
    neighbours: int
    temperature: float
    classes: int
    chunk_rows: int = 512

    @torch.no_grad()
    def __call__(self, regions: Tensor) -> Tensor:
        """(Q, D) -> (Q, K) each class's share of the votes."""
        shares = []
        for rows in regions.split(self.chunk_rows):
            nearest, places = (F.normalize(rows.float(), dim=1) @ self.features.T).topk(self.neighbours, dim=1)
            weights = (nearest / self.temperature).softmax(dim=1)
            shares.append(weights.new_zeros(len(rows), self.classes).scatter_add_(1, self.labels[places], weights))
        return torch.cat(shares)


@dataclass(frozen=True)
class LinearClassifier:
    """Logistic regression of features scaled to mean 0 and deviation 1."""

    scaling: Scaling
    regression: LogisticRegression

    def __call__(self, regions: Tensor) -> Tensor:
        """(Q, D) -> logits (Q, K)."""
        return self.regression.scores(self.scaling(regions.float().clone()))


def unfitted_linear(features: Tensor, labels: Tensor, *, classes: int, penalty: float) -> LinearClassifier:
    """Of features (R, D) and labels (R,) int64; `regression.advance` fits it."""
    scaling = Scaling("standardize", features)
    return LinearClassifier(scaling, LogisticRegression(scaling(features.clone()), labels, classes=classes, penalty=penalty))


def enlarged(regions: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Scores of regions (B, N, K) -> the class of the largest score at each pixel (B, side, side), scores interpolated bilinearly."""
    maps = regions.transpose(1, 2).reshape(len(regions), -1, *grid)
    return F.interpolate(maps, (side, side), mode="bilinear", align_corners=False).argmax(dim=1)


def confusion(predicted: Tensor, truth: Tensor, *, classes: int) -> Tensor:
    """(K, K) int64: how many pixels of each true class (row) were taken for each class (column); IGNORED ones for none."""
    counted = truth != IGNORED
    cells = truth[counted].long() * classes + predicted[counted].long()
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


@dataclass(frozen=True)
class SegmentationScore:
    """iou             percent for each class, intersection over union; NaN for a class that is neither there nor predicted
    miou            mean over the other classes
    pixel_accuracy  percent
    pixels          how many are of each class in truth
    """

    iou: list[float]
    miou: float
    pixel_accuracy: float
    pixels: list[int]


def of_one_class(counts: Tensor) -> Tensor:
    """The confusion (K, K) of calling every pixel the commonest class, from any other's."""
    pixels = counts.sum(dim=1)
    constant = torch.zeros_like(counts)
    constant[:, pixels.argmax()] = pixels
    return constant


def score(confusions: Tensor) -> SegmentationScore:
    """Of counts (K, K) added up over all images."""
    counts = confusions.double()
    right = counts.diagonal()
    iou = 100 * right / (counts.sum(dim=0) + counts.sum(dim=1) - right)
    accuracy = (100 * right.sum() / counts.sum()).item()
    return SegmentationScore(iou.tolist(), iou.nanmean().item(), accuracy, confusions.sum(dim=1).tolist())
