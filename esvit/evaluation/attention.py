"""Where a network looks: maps of attention on the image, the cells that hold most of it, and how spread out it is.

Unusual: all of it is computed inside the windows, block after block, so that no N x N matrix is made: a first stage with 12,544 cells (Swin
at 448 pixels) needs as much memory as its windows have.

Letters: B images, N cells of a block's grid, W windows, T slots of a window.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from esvit.backbones.base import AttentionWindows, Backbone, BlockAttention

UNSEEN = 1e-30  # a weight below this goes to a slot that a mask hides (e ** -100) or that no key fills


@dataclass(frozen=True)
class Query:
    """The cell that is asked: `row` and `column` as shares of the image, 0 at the top and left, 1 at the bottom and right."""

    row: float
    column: float

    def cell(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Its row and column in a grid."""
        return min(int(self.row * grid[0]), grid[0] - 1), min(int(self.column * grid[1]), grid[1] - 1)


def attention_map(block: BlockAttention, query: Query | None) -> Tensor:
    """(B, heads, rows, columns): how the attention of one query, or of the pooled feature, is spread over the cells; each sums to 1.

    query  whose attention; None is the pooled feature: the class token that stands for the image where there is one, otherwise the mean of
           all cells, so that a cell's value is what it receives from all of them on average

    What goes to padding and class tokens is left out of each query's attention, and the rest is divided by what remains.
    """
    windows, grid = block.windows, block.grid
    on_grid = windows.places >= 0  # (W, T)
    weights = windows.weights.float() * on_grid[:, None, None, :]
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    given = (weights * _asked(block, query)[:, None, :, None]).sum(dim=3).transpose(1, 2)  # a matrix product would be rounded by autocast
    spread = given.new_zeros(*given.shape[:2], grid[0] * grid[1])
    spread[:, :, windows.places[on_grid]] = given[:, :, on_grid]  # no cell sits in two slots
    return spread.unflatten(2, grid)


def _asked(block: BlockAttention, query: Query | None) -> Tensor:
    """(W, T): the share that each slot has in the query."""
    places = block.windows.places
    if query is not None:
        row, column = query.cell(block.grid)
        return (places == row * block.grid[1] + column).float()
    if block.class_tokens > 0:
        asked = torch.zeros(places.shape, device=places.device)
        asked[0, 0] = 1
        return asked
    return (places >= 0).float() / (block.grid[0] * block.grid[1])


def mass_mask(attention: Tensor, threshold: float) -> Tensor:
    """(..., rows, columns) bool: the smallest set of cells that holds `threshold` of the attention (..., rows, columns)."""
    flat = attention.double().flatten(-2)
    ordered, cells = flat.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    needed = mass_before < threshold * flat.sum(dim=-1, keepdim=True) * (1 - 1e-6)
    return torch.zeros_like(needed).scatter(-1, cells, needed).view(attention.shape)


def entropy_bits(weights: Tensor) -> Tensor:
    """(..., T) weights that sum to 1 -> (...): their entropy in bits, where 0 * log 0 is 0."""
    return torch.special.entr(weights.float()).sum(dim=-1) / math.log(2)


@dataclass(frozen=True)
class HeadEntropy:
    """Mean over the cells of an image: bits (B, heads), and shares (B, heads) of the most that was possible for each cell."""

    bits: Tensor
    shares: Tensor


def head_entropy(windows: AttentionWindows) -> HeadEntropy:
    """How spread out the attention of each head is, padding and class tokens included as keys, as they are in the network.

    The most possible for a query is log2 of the number of slots that it sees: of its window, without what a mask hides.
    """
    bits = entropy_bits(windows.weights)  # (B, W, heads, T)
    most = (windows.weights > UNSEEN).sum(dim=-1).log2()
    shares = torch.where(most > 0, bits / most, 1.0)  # a single slot is filled evenly, whatever it gets
    cells = windows.places >= 0
    return HeadEntropy(*(each.transpose(2, 3)[:, cells].mean(dim=1) for each in (bits, shares)))


def heads_per_block(backbone: Backbone, image: Tensor) -> list[int]:
    """Of a network that sees images like `image` (1, C, h, w). Raises NoAttention for one without attention."""
    return [block.windows.weights.shape[2] for block in backbone.looks(image)]


def entropy_row(backbone: Backbone, images: Tensor) -> Tensor:
    """(B, 2 * all heads) of images (B, C, h, w): bits of every head, block after block, then their shares; see `HeadEntropy`.

    One image at a time: the attention of a batch over whole images would not fit.
    """
    rows = []
    for image in images.split(1):
        heads = [head_entropy(block.windows) for block in backbone.looks(image)]
        rows.append(torch.cat([each.bits for each in heads] + [each.shares for each in heads], dim=1))
    return torch.cat(rows)


@dataclass(frozen=True)
class EntropySummary:
    """Of one block over a set of images.

    bits, share              (heads,) mean over the images
    bits_spread              (heads,) standard deviation over the images; 0 for a single image
    mean_bits, mean_share    over heads and images
    """

    bits: Tensor
    bits_spread: Tensor
    share: Tensor

    @property
    def mean_bits(self) -> float:
        return float(self.bits.mean())

    @property
    def mean_share(self) -> float:
        return float(self.share.mean())


def summarise_entropy(rows: Tensor, heads: list[int]) -> list[EntropySummary]:
    """One summary per block, of the rows (n, 2 * all heads) of `entropy_row` and the number of heads of each block."""
    bits, shares = rows.double().split(sum(heads), dim=1)
    return [
        EntropySummary(bits=of_block.mean(dim=0), bits_spread=of_block.std(dim=0, correction=0), share=share.mean(dim=0))
        for of_block, share in zip(bits.split(heads, dim=1), shares.split(heads, dim=1), strict=True)
    ]
