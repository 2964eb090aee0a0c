"""Layers that more than one backbone needs: stochastic depth, the MLP, the relative-position bias, the initialisation.

Letters: B images, N tokens, d width, w side of a window, T = w * w slots of a window.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth per sample: in training, drops a sample's whole residual branch with probability `rate`.

    The branches that stay are divided by 1 - rate (Huang et al. 2016, "Deep networks with stochastic depth").
    """

    def __init__(self, *, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """(B, ...) -> the same shape."""
        if self.rate == 0.0 or not self.training:
            return branch
        stay = 1.0 - self.rate
        mask = branch.new_empty(branch.shape[0], *[1] * (branch.dim() - 1)).bernoulli_(stay)
        return branch * (mask / stay)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class AttentionLayer(nn.Module):
    """A layer that mixes tokens, with the projections before and after: a part of a block that may be recomputed by itself."""


class MlpLayer(nn.Module):
    """A layer that works on each token alone, many times wider inside: likewise."""


class Mlp(MlpLayer):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, *, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, d) -> the same shape."""
        return self.fc2(F.gelu(self.fc1(tokens)))


def drop_path_rates(rate: float, depths: list[int]) -> list[list[float]]:
    """Rates that rise linearly from 0 at the first block to `rate` at the last one, over all stages; one list per stage."""
    rates = torch.linspace(0, rate, sum(depths), device="cpu").tolist()
    ends = [sum(depths[: stage + 1]) for stage in range(len(depths))]
    return [rates[end - depth : end] for depth, end in zip(depths, ends, strict=True)]


def relative_position_bias(table: Tensor, window: int) -> Tensor:
    """Bias between the slots of a window: ((2w - 1)^2, heads) -> (heads, T, T).

    Entry (query, key) is the table's row (y_query - y_key + w - 1) * (2w - 1) + (x_query - x_key + w - 1), the order of Swin
    (Liu et al. 2021). Written with views and copies instead of `table[index]`: the backward of a lookup adds in a racy order (on
    CPU above 32,768 elements; window 14 has 38,416), that of these is one sum per axis, the same bits every time on any device.
    """
    span = 2 * window - 1
    offsets = table.t().reshape(-1, span, span)  # (heads, y offset, x offset)
    columns = _offset_matrix(offsets, window)  # (heads, y offset, x query, x key)
    cells = _offset_matrix(columns.permute(0, 2, 3, 1), window)  # (heads, x query, x key, y query, y key)
    return cells.permute(0, 3, 1, 4, 2).reshape(-1, window * window, window * window)


def _offset_matrix(offsets: Tensor, size: int) -> Tensor:
    """(..., 2 * size - 1) -> (..., size, size) with entry (i, j) = offsets[i - j + size - 1].

    `size` copies in a row, re-cut to rows one longer than a copy, start each row one further: entry (i, j) = offsets[i + j].
    """
    leading = offsets.shape[:-1]
    copies = offsets.unsqueeze(-2).expand(*leading, size, 2 * size - 1).reshape(*leading, size * (2 * size - 1))
    sums = F.pad(copies, (0, size)).view(*leading, size, 2 * size)[..., :size]
    return sums.flip(-1)


def resized_bias_table(table: Tensor, shape: torch.Size) -> Tensor | None:
    """((2w - 1)^2, heads) for another window -> `shape`, bicubic on the square of offsets, as the official Swin's fine-tuning does.

    None where one of the two is no square of offsets, or the heads differ.
    """
    spans = [math.isqrt(rows) for rows in (table.shape[0], shape[0])]
    is_square = all(span % 2 and span**2 == rows for span, rows in zip(spans, (table.shape[0], shape[0]), strict=True))
    if not is_square or table.dim() != 2 or table.shape[1:] != shape[1:]:
        return None
    offsets = table.t().reshape(1, -1, spans[0], spans[0])
    return F.interpolate(offsets, size=(spans[1], spans[1]), mode="bicubic")[0].flatten(1).t().contiguous()


def init_transformer(module: nn.Module) -> None:
    """Initialise one module as the original does; hand it to `Module.apply`. Convolutions keep torch's default.

    The truncation at +-2 is absolute, a hundred standard deviations away: a plain normal, in effect.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
