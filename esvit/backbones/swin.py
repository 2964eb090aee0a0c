"""Swin transformer (Liu et al. 2021) as EsViT trains it: shifted windows whose size is frozen for one nominal image size.

Letters: B images, R x Q rows and columns of a map, N = R * Q, d width, w side of a window, W windows, T = w * w slots of a window.

Unusual, all kept from the original because published weights depend on it:
* windows and shifts are chosen for `image_size` and stay, whatever the image: a 96-pixel crop is padded up to whole windows;
* padding is not masked: its keys and values are the bias of `qkv`, and they take part in the softmax;
* LayerNorm's eps is 1e-6, not the official Swin's 1e-5.
Unlike the original, images may be rectangular, shift masks are made once per map size and device, attention is fused where that is
faster, and the relative-position index is no buffer (state dicts lack `relative_position_index`). No layer runs on padding: what it
adds is known beforehand, and a map that fits into one window is not cut at all.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from esvit.backbones.base import AttentionBlock, AttentionWindows, Backbone, Stage
from esvit.backbones.layers import AttentionLayer, DropPath, Mlp, drop_path_rates, init_transformer, relative_position_bias
from esvit.errors import OptionError

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
# Added to scores between regions that only the shift brought together. The original's -100 leaves weights of e^-100 beside those of a
# sum of 1: nothing in float32, but denormal numbers, which made a shifted block's step on CPU two to three times as long.
MASKED = -1000.0


class Swin(Backbone):
    """Stages of shifted-window blocks; the map halves and the width doubles between stages.

    in_channels     channels of the images
    patch_size      pixels of a patch's side; images are cut down to whole patches
    dim             width of the first stage; the others double it
    depths          blocks of each stage
    heads           attention heads of each stage
    window_size     side of a window, in tokens, where the nominal map is larger; otherwise one window holds the nominal map
    mlp_ratio       hidden width of the MLP over the width of the stage
    drop_path_rate  probability that the last block's branch is dropped; rises linearly from 0 at the first block
    image_size      nominal image side in pixels: fixes windows and shifts, not what `forward` accepts

    Raises OptionError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        patch_size: int,
        dim: int,
        depths: list[int],
        heads: list[int],
        window_size: int,
        mlp_ratio: float,
        drop_path_rate: float,
        image_size: int,
    ):
        super().__init__()
        _check(patch_size, dim, depths, heads, window_size, drop_path_rate, image_size)
        stage_dims = [dim * 2**stage for stage in range(len(depths))]
        self.dim = stage_dims[-1]
        self.block_dims = [width for width, depth in zip(stage_dims, depths, strict=True) for _ in range(depth)]
        self.patch_embed = PatchEmbed(in_channels=in_channels, patch_size=patch_size, dim=dim)
        rates = drop_path_rates(drop_path_rate, depths)
        self.layers = nn.ModuleList(
            SwinStage(
                dim=stage_dims[stage],
                heads=heads[stage],
                nominal_size=image_size // patch_size // 2**stage,
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                drop_path_rates=rates[stage],
                downsample=stage < len(depths) - 1,
            )
            for stage in range(len(depths))
        )
        self.norm = LayerNorm(self.dim)
        self.apply(init_transformer)

    def encode(self, images: Tensor, *, last_only: bool = False) -> list[Stage]:
        tokens, grid = self.patch_embed(images)
        stages = []
        for layer in self._layers():
            stage = Stage(layer(tokens, grid, last_only=last_only), grid)
            stages.append(stage)
            if layer.downsample is not None:
                tokens, grid = layer.downsample(stage.tokens[-1], grid)
        return stages[-1:] if last_only else stages

    def attention_blocks(self) -> list[list[AttentionBlock]]:
        return [cast(list[AttentionBlock], list(layer.blocks)) for layer in self._layers()]

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the official Swin, timm (where the merging begins a stage instead of ending one) and torchvision (one list of stages)."""
        state = {_from_torchvision(name): value for name, value in state.items() if not name.endswith(".attn_mask")}
        merging = sorted({int(name.split(".")[1]) for name in state if re.match(r"layers\.\d+\.downsample\.", name)})
        if merging and merging[0] == 1:
            state = {re.sub(r"^layers\.(\d+)\.downsample\.", _one_stage_earlier, name): value for name, value in state.items()}
        return state

    def _layers(self) -> "list[SwinStage]":
        return cast(list[SwinStage], list(self.layers))


class PatchEmbed(nn.Module):
    """One linear map of each patch's pixels, then a LayerNorm."""

    def __init__(self, *, in_channels: int, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = LayerNorm(dim)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, H, W) -> tokens (B, N, d) row by row, and the grid of whole patches; the rest of the image is cut off."""
        patches = self.proj(images)
        rows, columns = patches.shape[2:]
        return self.norm(patches.flatten(2).transpose(1, 2)), (rows, columns)


class PatchMerging(nn.Module):
    """Joins 2 x 2 tokens into one of twice the width; an odd map gets a row or column of zeros at its end."""

    def __init__(self, *, dim: int):
        super().__init__()
        self.norm = LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """(B, R * Q, d) -> (B, ceil(R / 2) * ceil(Q / 2), 2 d) and the halved grid."""
        cells = _pad_to_multiple(tokens.unflatten(1, grid), 2)
        batch, rows, columns, dim = cells.shape
        quads = cells.view(batch, rows // 2, 2, columns // 2, 2, dim)
        quads = quads.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)  # (row, column) order in a quad: (0,0) (1,0) (0,1) (1,1)
        return self.reduction(self.norm(quads)), (rows // 2, columns // 2)


class SwinStage(nn.Module):
    """Blocks at one resolution, every second one shifted, and the merging that leads to the next stage."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        nominal_size: int,
        window_size: int,
        mlp_ratio: float,
        drop_path_rates: list[float],
        downsample: bool,
    ):
        super().__init__()
        window = min(window_size, nominal_size)
        shift = window_size // 2 if nominal_size > window_size else 0  # one window holds the nominal map: nothing to shift
        self.blocks = nn.ModuleList(
            SwinBlock(dim=dim, heads=heads, window=window, shift=shift * (index % 2), mlp_ratio=mlp_ratio, drop_path_rate=rate)
            for index, rate in enumerate(drop_path_rates)
        )
        self.downsample = PatchMerging(dim=dim) if downsample else None

    def forward(self, tokens: Tensor, grid: tuple[int, int], *, last_only: bool) -> list[Tensor]:
        """(B, N, d) -> the tokens before the first block and after each, or those after the last block only: each (B, N, d)."""
        kept = [tokens]
        for block in self.blocks:
            leaving = block(kept[-1], grid)
            kept = [leaving] if last_only else [*kept, leaving]
        return kept


class SwinBlock(AttentionBlock):
    """Attention inside (shifted) windows, then an MLP; both pre-normed, residual and with stochastic depth."""

    def __init__(self, *, dim: int, heads: int, window: int, shift: int, mlp_ratio: float, drop_path_rate: float):
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim=dim, heads=heads, window=window)
        self.drop_path = DropPath(rate=drop_path_rate)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, d) -> the same shape."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid, self.shift, self._mask(grid, tokens.device)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))

    def attention(self, tokens: Tensor, grid: tuple[int, int]) -> AttentionWindows:
        windows = _to_windows(self.norm1(tokens).unflatten(1, grid), self.window, self.shift)
        numbers = torch.arange(1, grid[0] * grid[1] + 1, device=tokens.device).view(1, *grid, 1)  # from 1, so that padding becomes 0
        places = _to_windows(numbers, self.window, self.shift)[0, :, :, 0] - 1
        return AttentionWindows(self.attn.weights(windows, self._mask(grid, tokens.device)), places)

    def _mask(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        if self.shift == 0:
            return None
        make = _make_shift_mask if torch.compiler.is_compiling() else _shift_mask  # a graph makes its own: no tensor of a trace is kept
        rows, columns = (size + -size % self.window for size in grid)
        return make(rows, columns, self.window, self.shift, device)

    def extra_repr(self) -> str:
        return f"window={self.window}, shift={self.shift}"


class WindowAttention(AttentionLayer):
    """Multi-head self-attention inside windows, with a learned bias per head and relative position."""

    def __init__(self, *, dim: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.window = window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, tokens: Tensor, grid: tuple[int, int], shift: int, mask: Tensor | None) -> Tensor:
        """(B, N, d), mask (W, 1, T, T) or None -> (B, N, d)."""
        attend = self._in_one_window if max(grid) <= self.window else self._in_windows
        return self.proj(attend(tokens, grid, shift, mask))

    def _in_windows(self, tokens: Tensor, grid: tuple[int, int], shift: int, mask: Tensor | None) -> Tensor:
        """(B, N, d) -> (B, N, d), before the last projection."""
        places = _places(grid, self.window, shift, tokens.device)
        if len(places.padding):
            projected = _into_slots(self.qkv(tokens), self.qkv.bias, places)
        else:
            projected = self.qkv(_into_slots(tokens, None, places))
        query, key, value = self._parts(projected.unflatten(1, (-1, self.window**2)))
        attended = self._attend(query, key, value, self._bias(mask))
        return _out_of_slots(attended.transpose(2, 3).flatten(3).flatten(1, 2), places)

    def _in_one_window(self, tokens: Tensor, grid: tuple[int, int], shift: int, mask: Tensor | None) -> Tensor:
        """The same for a map of one window: cells stay in their order, and all padding is one more key."""
        query, key, value = self._parts(self.qkv(tokens).unsqueeze(1))
        if tokens.shape[1] < self.window**2:
            _, key_of_padding, value_of_padding = self._parts(self.qkv.bias.to(key.dtype).expand(tokens.shape[0], 1, 1, -1))
            key, value = torch.cat([key, key_of_padding], dim=3), torch.cat([value, value_of_padding], dim=3)
        attended = self._attend(query, key, value, self._bias_of_cells(grid, shift, mask))
        return attended.squeeze(1).transpose(1, 2).flatten(2)

    def weights(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """(B, W, T, d), mask (W, 1, T, T) or None -> softmax weights (B, W, heads, T, T)."""
        query, key, _ = self._parts(self.qkv(windows))
        return self._softmax(query, key, self._bias(mask))

    def _parts(self, projected: Tensor) -> tuple[Tensor, ...]:
        """(B, W, T, 3 d) -> query, key, value, each (B, W, heads, T, d / heads)."""
        return projected.unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)

    def _bias(self, mask: Tensor | None) -> Tensor:
        """What is added to the scores: (1, heads, T, T), or (W, heads, T, T) with a mask."""
        bias = relative_position_bias(self.relative_position_bias_table, self.window).unsqueeze(0)
        return bias if mask is None else bias + mask

    def _bias_of_cells(self, grid: tuple[int, int], shift: int, mask: Tensor | None) -> Tensor:
        """The same for a map of one window, cell by cell instead of slot by slot: (1, heads, N, N), or N + 1 keys with padding.

        All padding has one key and one value, so that its part of the softmax is that of one key whose bias is the logsumexp of theirs.
        """
        rows, columns = grid
        bias = self._bias(mask)[0].unflatten(2, (self.window, self.window)).unflatten(1, (self.window, self.window))
        if shift:
            bias = bias.roll((shift,) * 4, dims=(1, 2, 3, 4))
        bias = bias[:, :rows, :columns].flatten(1, 2)
        of_cells = bias[:, :, :rows, :columns].flatten(2)
        if rows * columns == self.window**2:
            return of_cells.unsqueeze(0)
        of_padding = torch.cat([bias[:, :, rows:].flatten(2), bias[:, :, :rows, columns:].flatten(2)], dim=-1)
        return torch.cat([of_cells, of_padding.logsumexp(dim=-1, keepdim=True)], dim=-1).unsqueeze(0)

    @classmethod
    def _attend(cls, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        # On CPU torch has no fused kernel for a mask that needs a gradient; its fallback takes 1.3 to 1.7 times as long as the plain path.
        plain = query.device.type == "cpu" and torch.is_grad_enabled() and bias.requires_grad
        return cls._plain(query, key, value, bias) if plain else cls._fused(query, key, value, bias)

    @staticmethod
    def _softmax(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
        return scores.softmax(dim=-1)

    @classmethod
    def _plain(cls, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        weights = cls._softmax(query, key, bias)
        return weights.to(value.dtype) @ value

    @staticmethod
    def _fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Windows join the axis that lets one bias broadcast over the others: the batch if they share it, else the heads."""
        batch, windows, heads = query.shape[:3]
        first, sizes = (0, (batch, windows)) if bias.shape[0] == 1 else (1, (windows, heads))
        query, key, value = (part.flatten(first, first + 1) for part in (query, key, value))
        bias = bias.to(query.dtype).flatten(0, 1).unsqueeze(0)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).unflatten(first, sizes)


def _to_windows(cells: Tensor, window: int, shift: int) -> Tensor:
    """(B, R, Q, d) -> (B, W, T, d): padded at the end to whole windows, rolled back by `shift`, cut."""
    cells = _pad_to_multiple(cells, window)
    if shift:
        cells = cells.roll((-shift, -shift), dims=(1, 2))
    batch, rows, columns, dim = cells.shape
    cells = cells.view(batch, rows // window, window, columns // window, window, dim)
    return cells.transpose(2, 3).reshape(batch, -1, window * window, dim)


@dataclass(frozen=True)
class Places:
    """Where the cells of a map are, once it is cut into windows.

    cells    (W * T) int64  the cell in each slot, N for padding
    slots    (N) int64      the slot of each cell
    padding  int64          the slots without a cell
    """

    cells: Tensor
    slots: Tensor
    padding: Tensor


def _make_places(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> Places:
    count = grid[0] * grid[1]
    numbers = torch.arange(1, count + 1, device=device).view(1, *grid, 1)  # from 1, so that padding becomes 0
    cells = (_to_windows(numbers, window, shift).flatten() + count) % (count + 1)
    whole = [size + -size % window for size in grid]
    rows, columns = ((torch.arange(size, device=device) + (size - shift)) % size for size in whole)
    windows = (rows // window)[:, None] * (whole[1] // window) + columns // window
    slots = windows * window**2 + (rows % window)[:, None] * window + columns % window  # of the padded map
    padding = torch.cat([slots[grid[0] :].flatten(), slots[: grid[0], grid[1] :].flatten()])
    return Places(cells=cells, slots=slots[: grid[0], : grid[1]].flatten(), padding=padding)


@lru_cache(maxsize=64)
def _kept_places(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> Places:
    """Made once for a map size, like `_shift_mask`."""
    with torch.inference_mode(False):
        return _make_places(grid, window, shift, device)


def _places(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> Places:
    make = _make_places if torch.compiler.is_compiling() else _kept_places
    return make(grid, window, shift, device)


def _into_slots(cells: Tensor, padding: Tensor | None, places: Places) -> Tensor:
    """(B, N, d) and, where there is padding, what stands there (d) -> (B, W * T, d)."""
    if padding is not None:
        padding = padding.to(cells.dtype)
    return _IntoSlots.apply(cells, padding, places.cells, places.slots, places.padding)


def _out_of_slots(slots: Tensor, places: Places) -> Tensor:
    """(B, W * T, d) -> (B, N, d) without the padding."""
    return _OutOfSlots.apply(slots, places.cells, places.slots, len(places.padding) > 0)


class _IntoSlots(torch.autograd.Function):
    """One lookup, whose backward is a lookup too: torch's own would add into the cells, which it cannot know to be met once each."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, padding: Tensor | None, of_slots: Tensor, of_cells: Tensor, of_padding: Tensor) -> Tensor:
        ctx.save_for_backward(of_cells, of_padding)
        ctx.has_padding = padding is not None
        if padding is not None:
            cells = torch.cat([cells, padding.expand(cells.shape[0], 1, -1)], dim=1)
        return cells.index_select(1, of_slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_cells, of_padding = ctx.saved_tensors
        padding = gradient.index_select(1, of_padding).sum(dim=(0, 1)) if ctx.has_padding else None
        return gradient.index_select(1, of_cells), padding, None, None, None


class _OutOfSlots(torch.autograd.Function):
    """The same in the other direction; padding's gradient is zero."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, of_slots: Tensor, of_cells: Tensor, has_padding: bool) -> Tensor:
        ctx.save_for_backward(of_slots)
        ctx.has_padding = has_padding
        return slots.index_select(1, of_cells)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_slots,) = ctx.saved_tensors
        if ctx.has_padding:
            gradient = F.pad(gradient, (0, 0, 0, 1))
        return gradient.index_select(1, of_slots), None, None, None


def _pad_to_multiple(cells: Tensor, size: int) -> Tensor:
    """(B, R, Q, d) with zeros after the last row and column, up to multiples of `size`."""
    missing_rows, missing_columns = -cells.shape[1] % size, -cells.shape[2] % size
    if missing_rows == 0 and missing_columns == 0:
        return cells
    return F.pad(cells, (0, 0, 0, missing_columns, 0, missing_rows))


def _make_shift_mask(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(W, 1, T, T): 0 between slots of one region of the rolled map, MASKED between regions that only the roll brought together."""

    def bands(size: int) -> Tensor:
        place = torch.arange(size, device=device)
        return (place >= size - window).long() + (place >= size - shift).long()

    regions = 3 * bands(rows)[:, None] + bands(columns)[None, :]
    labels = _to_windows(regions[None, :, :, None], window, 0)[0, :, :, 0]  # (W, T)
    apart = labels[:, :, None] != labels[:, None, :]
    return MASKED * apart.unsqueeze(1).float()


@lru_cache(maxsize=64)
def _shift_mask(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
    """The mask of a map size, made once: a block in every forward of every crop size asks for it."""
    with torch.inference_mode(False):  # a mask first made while evaluating must serve training too
        return _make_shift_mask(rows, columns, window, shift, device)


TORCHVISION_NAMES: dict[str, Callable[[re.Match[str]], str]] = {
    r"features\.0\.0\.": lambda _: "patch_embed.proj.",
    r"features\.0\.2\.": lambda _: "patch_embed.norm.",
    r"features\.(\d+)\.(\d+)\.": lambda found: f"layers.{int(found[1]) // 2}.blocks.{found[2]}.",
    r"features\.(\d+)\.(?=norm|reduction)": lambda found: f"layers.{int(found[1]) // 2 - 1}.downsample.",
}


def _from_torchvision(name: str) -> str:
    """Stages are features 1, 3, 5, ..., mergings features 2, 4, ...; any other name stays."""
    for pattern, ours in TORCHVISION_NAMES.items():
        found = re.match(pattern, name)
        if found:
            rest = name[found.end() :]
            return ours(found) + rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
    return name


def _one_stage_earlier(found: re.Match[str]) -> str:
    return f"layers.{int(found[1]) - 1}.downsample."


def _check(
    patch_size: int, dim: int, depths: list[int], heads: list[int], window_size: int, drop_path_rate: float, image_size: int
) -> None:
    if not depths or min(depths) < 1:
        raise OptionError("backbone.depths", f"{depths}", "give at least one block for each stage")
    if len(heads) != len(depths):
        raise OptionError("backbone.heads", f"{len(heads)} stages, but backbone.depths has {len(depths)}", "give one number for each stage")
    for stage, count in enumerate(heads):
        width = dim * 2**stage
        if count < 1 or width % count:
            raise OptionError("backbone.heads", f"{count} heads cannot share the width {width} of stage {stage + 1}", "choose a divisor")
    if window_size < 1:
        raise OptionError("backbone.window_size", f"{window_size}", "give at least 1 token")
    if not 0 <= drop_path_rate < 1:
        raise OptionError("backbone.drop_path_rate", f"{drop_path_rate}", "choose a probability from 0 to below 1")
    smallest = patch_size * 2 ** (len(depths) - 1)
    if patch_size < 1 or image_size < smallest:
        found = f"{image_size} pixels leave no token for the last of {len(depths)} stages with patches of {patch_size}"
        raise OptionError("backbone.image_size", found, f"give at least {smallest} pixels, or fewer stages")
