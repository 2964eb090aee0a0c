"""Vision transformer (Dosovitskiy et al. 2021) in the sizes of DeiT (Touvron et al. 2021), as EsViT and DINO train it.

Letters: B images, C channels, H x W pixels, R x Q rows and columns of patches, N = R * Q, T = 1 + N tokens (the class token first),
d width.

Unusual:
* the whole network is one stage, so that base.py's final norm is applied to each of the last blocks, as in the original; the class
  token stands for the image;
* LayerNorm's eps is 1e-6;
* on another grid than the nominal one, position embeddings are interpolated as in the original (bicubic, without antialiasing).
Unlike the original, images may be rectangular, and the interpolation is two small matrix products: the backward of torch's own adds
in a racy order on CUDA.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esvit.backbones.base import AttentionBlock, AttentionWindows, Backbone, Stage
from esvit.backbones.layers import AttentionLayer, DropPath, Mlp, drop_path_rates, init_transformer
from esvit.errors import OptionError

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class ViT(Backbone):
    """Blocks of global attention over patches and a class token.

    in_channels     channels of the images
    image_size      nominal image side in pixels: fixes the number of position embeddings, not what `forward` accepts
    patch_size      pixels of a patch's side; images are cut down to whole patches
    dim             width
    depth           blocks
    heads           attention heads
    mlp_ratio       hidden width of the MLP over `dim`
    drop_path_rate  probability that the last block's branch is dropped; rises linearly from 0 at the first block

    Raises OptionError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        drop_path_rate: float,
    ):
        super().__init__()
        _check(image_size, patch_size, dim, depth, heads, drop_path_rate)
        self.dim = dim
        self.block_dims = [dim] * depth
        self.nominal_side = image_size // patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.nominal_side**2, dim))
        self.patch_embed = PatchEmbed(in_channels=in_channels, patch_size=patch_size, dim=dim)
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        self.blocks = nn.ModuleList(ViTBlock(dim=dim, heads=heads, mlp_ratio=mlp_ratio, drop_path_rate=rate) for rate in rates)
        self.norm = LayerNorm(dim)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_transformer)

    def encode(self, images: Tensor, *, last_only: bool = False) -> list[Stage]:
        cells, grid = self.patch_embed(images)
        class_tokens = self.cls_token.expand(cells.shape[0], -1, -1)
        kept = [torch.cat([class_tokens, cells], dim=1) + self.position_embeddings(grid)]
        for block in self.blocks:
            leaving = block(kept[-1])
            kept = [leaving] if last_only else [*kept, leaving]
        return [Stage(kept, grid)]

    def attention_blocks(self) -> Sequence[Sequence[AttentionBlock]]:
        return [cast(list[AttentionBlock], list(self.blocks))]

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From torchvision; the original, DINO, DeiT and timm have the names of ours."""
        return {_from_torchvision(name): value for name, value in state.items()}

    def resize_positions(self, name: str, table: Tensor, shape: torch.Size) -> Tensor | None:
        """The position embeddings: the class token's stays, the others are interpolated between squares as in `forward`."""
        if name != "pos_embed" or table.dim() != 3 or table.shape[2] != shape[2]:
            return None
        old_side = math.isqrt(table.shape[1] - 1)
        if 1 + old_side**2 != table.shape[1]:
            return None
        matrix = _bicubic_matrix(old_side, self.nominal_side, like=table)
        cells = torch.einsum("rs,stc,qt->rqc", matrix, table[0, 1:].unflatten(0, (old_side, old_side)), matrix)
        return torch.cat([table[:, :1], cells.flatten(0, 1).unsqueeze(0)], dim=1)

    def position_embeddings(self, grid: tuple[int, int]) -> Tensor:
        """(1, T, d) for R x Q patches: the class token's as it is, the others interpolated from the nominal square."""
        side = self.nominal_side
        if grid == (side, side):
            return self.pos_embed
        rows, columns = (_bicubic_matrix(side, size, like=self.pos_embed) for size in grid)
        with torch.autocast(self.pos_embed.device.type, enabled=False):
            nominal = self.pos_embed[0, 1:].unflatten(0, (side, side))
            cells = torch.einsum("rs,stc,qt->rqc", rows, nominal, columns)
        return torch.cat([self.pos_embed[:, :1], cells.flatten(0, 1).unsqueeze(0)], dim=1)


class PatchEmbed(nn.Module):
    """One linear map of each patch's pixels."""

    def __init__(self, *, in_channels: int, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, H, W) -> tokens (B, N, d) row by row, and the grid of whole patches; the rest of the image is cut off."""
        patches = self.proj(images)
        rows, columns = patches.shape[2:]
        return patches.flatten(2).transpose(1, 2), (rows, columns)


class ViTBlock(AttentionBlock):
    """Global attention, then an MLP; both pre-normed, residual and with stochastic depth."""

    def __init__(self, *, dim: int, heads: int, mlp_ratio: float, drop_path_rate: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim=dim, heads=heads)
        self.drop_path = DropPath(rate=drop_path_rate)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, d) -> the same shape."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))

    def attention(self, tokens: Tensor, grid: tuple[int, int]) -> AttentionWindows:
        """One window of all T tokens; the class token, first, has no place on the grid."""
        places = torch.arange(-1, grid[0] * grid[1], device=tokens.device).unsqueeze(0)
        return AttentionWindows(self.attn.weights(self.norm1(tokens)).unsqueeze(1), places)


class Attention(AttentionLayer):
    """Multi-head self-attention of all tokens."""

    def __init__(self, *, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, d) -> the same shape."""
        query, key, value = self._project(tokens)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def weights(self, tokens: Tensor) -> Tensor:
        """(B, T, d) -> softmax weights (B, heads, T, T)."""
        query, key, _ = self._project(tokens)
        return ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(dim=-1)

    def _project(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """(B, T, d) -> query, key, value, each (B, heads, T, d / heads)."""
        projected = self.qkv(tokens).unflatten(-1, (3, self.heads, -1))
        return projected.permute(2, 0, 3, 1, 4).unbind(0)


TORCHVISION_NAMES = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj.": "patch_embed.proj.",
    "encoder.ln.": "norm.",
    "encoder.layers.encoder_layer_": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".self_attention.in_proj_": ".attn.qkv.",
    ".self_attention.out_proj.": ".attn.proj.",
    ".mlp.linear_1.": ".mlp.fc1.",
    ".mlp.linear_2.": ".mlp.fc2.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.3.": ".mlp.fc2.",
}


def _from_torchvision(name: str) -> str:
    for theirs, ours in TORCHVISION_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _bicubic_matrix(size: int, new_size: int, *, like: Tensor) -> Tensor:
    """(new_size, size): what `F.interpolate(mode="bicubic")` does along one axis, read off its effect on unit vectors."""
    with torch.no_grad():
        units = torch.eye(size, device=like.device, dtype=like.dtype)
        columns = units.view(1, size, size, 1)  # channel i is an image of one column, the i-th unit vector
        return F.interpolate(columns, size=(new_size, 1), mode="bicubic").view(size, new_size).t()


def _check(image_size: int, patch_size: int, dim: int, depth: int, heads: int, drop_path_rate: float) -> None:
    if depth < 1:
        raise OptionError("backbone.depth", f"{depth}", "give at least one block")
    if heads < 1 or dim % heads:
        raise OptionError("backbone.heads", f"{heads} heads cannot share the width {dim}", "choose a divisor")
    if not 0 <= drop_path_rate < 1:
        raise OptionError("backbone.drop_path_rate", f"{drop_path_rate}", "choose a probability from 0 to below 1")
    if patch_size < 1 or image_size < patch_size:
        raise OptionError(
            "backbone.image_size", f"{image_size} pixels hold no patch of {patch_size}", "give at least the patch's side, and a patch of 1"
        )
