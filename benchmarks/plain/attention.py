"""Shifted-window attention as the Swin paper's code computes it, on the weights of our own blocks.

Never used by the product. Every forward looks the bias up by an index, makes the shift mask anew on the CPU and copies it to
the device, and keeps the whole softmax for the backward pass.

Letters: B images, R x Q rows and columns of a map, d width, w side of a window, T = w * w slots of a window, W windows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esvit.backbones.swin import SwinBlock, SwinStage

MASKED = -100.0  # as published; ours is lower, see esvit/backbones/swin.py


def use_plain_attention(network: nn.Module) -> None:
    """Replace every block of every Swin stage in `network` by a plain one that shares its parameters and their names."""
    for stage in network.modules():
        if isinstance(stage, SwinStage):
            stage.blocks = nn.ModuleList(PlainSwinBlock(block) for block in stage.blocks if isinstance(block, SwinBlock))


class PlainSwinBlock(nn.Module):
    """The same map as `SwinBlock`."""

    relative_index: Tensor

    def __init__(self, block: SwinBlock):
        super().__init__()
        self.window = block.window
        self.shift = block.shift
        self.norm1 = block.norm1
        self.attn = block.attn
        self.drop_path = block.drop_path
        self.norm2 = block.norm2
        self.mlp = block.mlp
        device = block.attn.relative_position_bias_table.device
        self.register_buffer("relative_index", relative_index(self.window).to(device), persistent=False)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, R * Q, d) -> the same shape."""
        rows, columns = grid
        w, shift = self.window, self.shift
        cells = self.norm1(tokens).unflatten(1, grid)
        cells = F.pad(cells, (0, 0, 0, -columns % w, 0, -rows % w))
        padded = cells.shape[1:3]
        if shift:
            cells = torch.roll(cells, (-shift, -shift), dims=(1, 2))
        attended = self._attend(cut(cells, w), len(tokens), padded)
        cells = join(attended, w, padded)
        if shift:
            cells = torch.roll(cells, (shift, shift), dims=(1, 2))
        tokens = tokens + self.drop_path(cells[:, :rows, :columns].flatten(1, 2))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))

    def _attend(self, windows: Tensor, images: int, padded: torch.Size) -> Tensor:
        """(B * W, T, d) -> the same shape."""
        heads, slots = self.attn.heads, windows.shape[1]
        query, key, value = self.attn.qkv(windows).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (query * query.shape[-1] ** -0.5) @ key.mT  # (B * W, heads, T, T)
        bias = self.attn.relative_position_bias_table[self.relative_index.flatten()].view(slots, slots, heads)
        scores = scores + bias.permute(2, 0, 1)
        if self.shift:
            mask = shift_mask(padded[0], padded[1], self.window, self.shift).to(windows.device)  # (W, T, T)
            scores = scores.unflatten(0, (images, -1)) + mask[:, None]
            scores = scores.flatten(0, 1)
        attended = scores.softmax(dim=-1).to(value.dtype) @ value
        return self.attn.proj(attended.transpose(1, 2).flatten(2))


def relative_index(window: int) -> Tensor:
    """(T, T) int64: the bias table's row for each pair of query and key."""
    places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)  # (2, T)
    offsets = places[:, :, None] - places[:, None, :] + window - 1
    return offsets[0] * (2 * window - 1) + offsets[1]


def shift_mask(rows: int, columns: int, window: int, shift: int) -> Tensor:
    """(W, T, T) on the CPU: MASKED between cells that only the roll brought into one window, else 0."""
    labels = torch.zeros(1, rows, columns, 1)
    edges = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for down, across in ((down, across) for down in range(3) for across in range(3)):
        labels[:, edges[down], edges[across]] = 3 * down + across
    slots = cut(labels, window).squeeze(-1)  # (W, T)
    apart = slots[:, :, None] - slots[:, None, :]
    return torch.zeros_like(apart).masked_fill(apart != 0, MASKED)


def cut(cells: Tensor, window: int) -> Tensor:
    """(B, R, Q, d) -> (B * W, T, d)."""
    cells = cells.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, R / w, w, Q / w, w, d)
    return cells.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def join(windows: Tensor, window: int, padded: torch.Size) -> Tensor:
    """The inverse of `cut`: (B * W, T, d) -> (B, R, Q, d)."""
    cells = windows.unflatten(1, (window, window)).unflatten(0, (-1, padded[0] // window, padded[1] // window))
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)
