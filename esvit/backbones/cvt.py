"""CvT (Wu et al. 2021) in EsViT's fourth version: convolutions embed and project, attention stays inside windows, nothing marks places.

Letters: B images, R x Q rows and columns of a map, d width of a stage, w side of a window, W windows, T = w * w slots of a window.
Maps are (B, R, Q, d): norms and 1 x 1 convolutions work on rows of d numbers, and larger convolutions see the same memory as channels-last.

Unusual, all kept from the original because published weights depend on it:
* one projection makes queries, keys and values: depth-wise convolution, batch norm, 1 x 1 convolution (Wu et al. have three, strided);
* a map is padded with zeros to whole windows before that projection: padding enters the batch norm's statistics and is not masked as a key;
* a window is never larger than the map, so that small crops are padded little;
* scores are multiplied by d ** -0.5 of the whole stage, not of a head;
* names are places in lists: `stage0.1.layers.0.0.fn.qkv.dw.weight` is stage 0, its blocks, block 0, its attention.
Unlike the original, relative positions work where the map is smaller than the window (the middle of the table is used), a shift can really
shift, `rel_pos_idx` is no buffer, and attention is fused where that is faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esvit.backbones.base import AttentionBlock, AttentionWindows, Backbone, Stage
from esvit.backbones.layers import AttentionLayer, DropPath, MlpLayer, drop_path_rates, relative_position_bias
from esvit.errors import OptionError

Shift = Literal["none", "mask_only", "rolled"]
MASKED = -1000.0  # added to scores between regions that must not see each other; the original's -100 leaves slow denormal numbers


class Cvt(Backbone):
    """Stages of windowed attention behind convolutional embeddings; the first reduces the image 4 times, the others their map 2 times.

    in_channels        channels of the images
    dims               width of each stage
    depths             blocks of each stage
    heads              attention heads of each stage
    window_sizes       side of a window of each stage, in tokens; a smaller map is one window
    mlp_ratio          hidden width of the MLP over the width of the stage
    drop_path_rate     probability that the last block's branch is dropped; rises linearly from 0 at the first block
    residual_stem      three 3 x 3 convolutions with batch norm and ReLU for the first embedding, instead of one 7 x 7 convolution
    relative_position  learned bias per head and relative position
    shift              "none";
                       "mask_only", the original's shift: windows stay, but in every block the last ones are split as if they had moved;
                       "rolled": windows of every second block really move by half their side, where there is more than one

    Raises OptionError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        dims: list[int],
        depths: list[int],
        heads: list[int],
        window_sizes: list[int],
        mlp_ratio: float,
        drop_path_rate: float,
        residual_stem: bool,
        relative_position: bool,
        shift: Shift,
    ):
        super().__init__()
        _check(dims, depths, heads, window_sizes, drop_path_rate, shift)
        self.dim = dims[-1]
        self.block_dims = [width for width, depth in zip(dims, depths, strict=True) for _ in range(depth)]
        rates = drop_path_rates(drop_path_rate, depths)
        for stage, width in enumerate(dims):
            entering = dims[stage - 1] if stage else in_channels
            embed = ResidualStem(entering, width) if residual_stem and stage == 0 else ConvEmbed(entering, width, first=stage == 0)
            blocks = [
                CvtBlock(
                    dim=width,
                    heads=heads[stage],
                    window=window_sizes[stage],
                    mlp_ratio=mlp_ratio,
                    drop_path_rate=rate,
                    relative_position=relative_position,
                    shift="none" if shift == "rolled" and index % 2 == 0 else shift,
                )
                for index, rate in enumerate(rates[stage])
            ]
            self.add_module(f"stage{stage}", CvtStage(embed, blocks))
        self.norm = nn.LayerNorm(self.dim)
        self.apply(_init)

    def encode(self, images: Tensor, *, last_only: bool = False) -> list[Stage]:
        cells = _channels_last(images)
        stages = []
        for stage in self._stages():
            kept = stage(cells, last_only=last_only)
            cells = kept[-1]
            stages.append(Stage([each.flatten(1, 2) for each in kept], (cells.shape[1], cells.shape[2])))
        return stages[-1:] if last_only else stages

    def attention_blocks(self) -> Sequence[Sequence[AttentionBlock]]:
        return [stage.blocks() for stage in self._stages()]

    def _stages(self) -> "list[CvtStage]":
        return [stage for stage in self.children() if isinstance(stage, CvtStage)]


class CvtStage(nn.ModuleList):
    """Place 0 is the embedding, place 1 holds the blocks."""

    def __init__(self, embed: nn.Module, blocks: "list[CvtBlock]"):
        super().__init__([embed, nn.ModuleDict({"layers": nn.ModuleList(blocks)})])

    def blocks(self) -> "list[CvtBlock]":
        return cast(list[CvtBlock], list(cast(dict[str, nn.ModuleList], self[1])["layers"]))

    def forward(self, cells: Tensor, *, last_only: bool) -> list[Tensor]:
        """The map of the previous stage -> the maps before the first block and after each, or that after the last block only."""
        kept = [self[0](cells)]
        for block in self.blocks():
            leaving = block(kept[-1])
            kept = [leaving] if last_only else [*kept, leaving]
        return kept


class LayerNorm(nn.LayerNorm):
    """Keeps the dtype of its input also under autocast, which would leave the residual stream in float32."""

    def forward(self, cells: Tensor) -> Tensor:
        return super().forward(cells).to(cells.dtype)


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution of maps (B, R, Q, d), as the matrix product it is."""

    def __init__(self, entering: int, leaving: int):
        super().__init__(entering, leaving, kernel_size=1)

    def forward(self, cells: Tensor) -> Tensor:
        return F.linear(cells, self.weight.flatten(1), self.bias)


class ConvEmbed(nn.Module):
    """One strided convolution, then a LayerNorm: each side is reduced 4 times (first) or 2 times, rounded up at odd sizes."""

    def __init__(self, entering: int, dim: int, *, first: bool):
        super().__init__()
        kernel, stride, padding = (7, 4, 2) if first else (3, 2, 1)
        self.proj = nn.Conv2d(entering, dim, kernel, stride=stride, padding=padding)
        self.norm = LayerNorm(dim)

    def forward(self, cells: Tensor) -> Tensor:
        return self.norm(_channels_last(self.proj(_channels_first(cells))))


class ResidualStem(nn.Module):
    """The first embedding as a residual network begins: no residuals, three 3 x 3 convolutions of strides 2, 1 and 2."""

    def __init__(self, entering: int, dim: int):
        super().__init__()
        layers: list[nn.Module] = []
        for channels, stride in ((entering, 2), (dim, 1), (dim, 2)):
            layers += [nn.Conv2d(channels, dim, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*layers)

    def forward(self, cells: Tensor) -> Tensor:
        return _channels_last(self.stem(_channels_first(cells)))


class CvtBlock(nn.ModuleList, AttentionBlock):
    """Place 0 is attention inside windows, place 1 an MLP; both pre-normed, residual and with stochastic depth."""

    def __init__(
        self, *, dim: int, heads: int, window: int, mlp_ratio: float, drop_path_rate: float, relative_position: bool, shift: Shift
    ):
        attention = WindowAttention(dim=dim, heads=heads, window=window, relative_position=relative_position, shift=shift)
        mlp = ConvMlp(dim, int(dim * mlp_ratio))
        super().__init__([Residual(dim, attention, drop_path_rate), Residual(dim, mlp, drop_path_rate)])

    def forward(self, cells: Tensor) -> Tensor:
        """(B, R, Q, d) -> the same shape."""
        return self[1](self[0](cells))

    def attention(self, tokens: Tensor, grid: tuple[int, int]) -> AttentionWindows:
        branch = cast(Residual, self[0])
        return cast(WindowAttention, branch.fn).look(branch.norm(tokens.unflatten(1, grid)))


class Residual(nn.Module):
    """cells + drop_path(fn(norm(cells)))"""

    def __init__(self, dim: int, fn: nn.Module, drop_path_rate: float):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.fn = fn
        self.drop_path = DropPath(rate=drop_path_rate)

    def forward(self, cells: Tensor) -> Tensor:
        return cells + self.drop_path(self.fn(self.norm(cells)))


class ConvMlp(MlpLayer):
    """Two 1 x 1 convolutions with a QuickGELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.net = nn.Sequential(Pointwise(dim, hidden_dim), QuickGelu(), Pointwise(hidden_dim, dim))

    def forward(self, cells: Tensor) -> Tensor:
        return self.net(cells)


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), written as a scaled SiLU: the backward then keeps one tensor of the hidden width instead of two."""

    def forward(self, cells: Tensor) -> Tensor:
        return F.silu(cells * 1.702) * (1 / 1.702)


class ConvProjection(nn.Module):
    """Queries, keys and values by one depth-wise 3 x 3 convolution, batch norm and 1 x 1 convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        self.pw = Pointwise(dim, 3 * dim)

    def forward(self, cells: Tensor, windows: "Windows") -> Tensor:
        """(B, R, Q, d) -> (B, W, T, 3 d). Cut before the 1 x 1 convolution, while cells are d wide."""
        mixed = self.bn(self.dw(_channels_first(windows.pad(cells))))
        return self.pw(windows.cut(_channels_last(mixed)))


@dataclass(frozen=True)
class Windows:
    """How one map is cut into windows: padded at the end to whole ones, rolled back, cut.

    grid    rows and columns of the map without padding
    side    w
    roll    rows and columns by which the windows move
    split   where the last windows are split by a mask: rows and columns before the end; None without a mask
    """

    grid: tuple[int, int]
    side: int
    roll: tuple[int, int]
    split: tuple[int, int] | None

    @property
    def padded(self) -> tuple[int, int]:
        rows, columns = self.grid
        return rows + -rows % self.side, columns + -columns % self.side

    def pad(self, cells: Tensor) -> Tensor:
        """(B, R, Q, d) with zeros after the last row and column."""
        if self.padded == self.grid:
            return cells
        return F.pad(cells, (0, 0, 0, self.padded[1] - self.grid[1], 0, self.padded[0] - self.grid[0]))

    def cut(self, cells: Tensor) -> Tensor:
        """A padded map (B, R', Q', d) -> (B, W, T, d)"""
        if any(self.roll):
            cells = cells.roll((-self.roll[0], -self.roll[1]), dims=(1, 2))
        batch, rows, columns, dim = cells.shape
        cells = cells.reshape(batch, rows // self.side, self.side, columns // self.side, self.side, dim)
        return cells.transpose(2, 3).reshape(batch, -1, self.side * self.side, dim)

    def join(self, windows: Tensor) -> Tensor:
        """The inverse, without the padding: (B, W, T, d) -> (B, R, Q, d)"""
        rows, columns = self.padded
        cells = windows.reshape(windows.shape[0], rows // self.side, columns // self.side, self.side, self.side, -1)
        cells = cells.transpose(2, 3).reshape(windows.shape[0], rows, columns, -1)
        if any(self.roll):
            cells = cells.roll(self.roll, dims=(1, 2))
        return cells[:, : self.grid[0], : self.grid[1]]

    def mask(self, device: torch.device) -> Tensor | None:
        """(W, 1, T, T): 0 between slots of one region, MASKED between regions that must not see each other."""
        if self.split is None:
            return None
        (rows, columns), (split_rows, split_columns) = self.padded, self.split
        row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
        row_bands = (row >= rows - self.side).long() + (row >= rows - split_rows).long()
        column_bands = (column >= columns - self.side).long() + (column >= columns - split_columns).long()
        regions = 3 * row_bands[:, None] + column_bands[None, :]
        unmoved = Windows(self.grid, self.side, (0, 0), None)  # regions are those of the rolled map
        labels = unmoved.cut(regions[None, :, :, None])[0, :, :, 0]
        return MASKED * (labels[:, :, None] != labels[:, None, :]).unsqueeze(1).float()

    def places(self, device: torch.device) -> Tensor:
        """(W, T) int64: the cell in each slot, -1 for padding."""
        numbers = torch.arange(1, self.grid[0] * self.grid[1] + 1, device=device).view(1, *self.grid, 1)  # from 1: padding becomes 0
        return self.cut(self.pad(numbers))[0, :, :, 0] - 1


class WindowAttention(AttentionLayer):
    """Multi-head self-attention inside windows of a map, with the projections around it."""

    def __init__(self, *, dim: int, heads: int, window: int, relative_position: bool, shift: Shift):
        super().__init__()
        self.heads = heads
        self.window = window
        self.shift = shift
        self.scale = dim**-0.5  # of the whole width: published weights were trained with it
        self.rel_pos_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads)) if relative_position else None
        self.qkv = ConvProjection(dim)
        self.proj_out = Pointwise(dim, dim)
        if self.rel_pos_bias_table is not None:
            nn.init.trunc_normal_(self.rel_pos_bias_table, std=0.02)

    def forward(self, cells: Tensor) -> Tensor:
        """(B, R, Q, d) -> the same shape."""
        windows = self._windows(cells)
        query, key, value = self._project(cells, windows)
        bias = self._bias(windows, cells.device)
        # On CPU torch has no fused kernel for a bias that needs a gradient; its fallback is slower than the plain path.
        plain = bias is not None and bias.requires_grad and torch.is_grad_enabled() and cells.device.type == "cpu"
        attended = self._plain(query, key, value, bias) if plain else self._fused(query, key, value, bias)
        return self.proj_out(windows.join(attended.transpose(2, 3).flatten(3)))

    def look(self, cells: Tensor) -> AttentionWindows:
        """The softmax weights of a map (B, R, Q, d)."""
        windows = self._windows(cells)
        query, key, _ = self._project(cells, windows)
        return AttentionWindows(self._softmax(query, key, self._bias(windows, cells.device)), windows.places(cells.device))

    def _windows(self, cells: Tensor) -> Windows:
        grid = (cells.shape[1], cells.shape[2])
        side = min(self.window, *grid)
        if self.shift == "none":
            return Windows(grid, side, (0, 0), None)
        if self.shift == "mask_only":
            return Windows(grid, side, (0, 0), (side // 2, side // 2))
        rows, columns = (side // 2 if size > side else 0 for size in grid)  # one window across: nothing to shift
        return Windows(grid, side, (rows, columns), (rows, columns) if rows or columns else None)

    def _project(self, cells: Tensor, windows: Windows) -> tuple[Tensor, ...]:
        """(B, R, Q, d) -> query, key, value, each (B, W, heads, T, d / heads)."""
        return self.qkv(cells, windows).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)

    def _bias(self, windows: Windows, device: torch.device) -> Tensor | None:
        """What is added to the scores: None, or (1 or W, 1 or heads, T, T)."""
        mask = windows.mask(device)
        if self.rel_pos_bias_table is None:
            return mask
        bias = relative_position_bias(_middle(self.rel_pos_bias_table, self.window, windows.side), windows.side).unsqueeze(0)
        return bias if mask is None else bias + mask

    def _softmax(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        scores = (query * self.scale) @ key.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(dim=-1)

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        weights = self._softmax(query, key, bias)
        return weights.to(value.dtype) @ value

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Windows join the axis that lets one bias broadcast over the others: the batch if they share it, else the heads."""
        batch, windows, heads = query.shape[:3]
        shared = bias is None or bias.shape[0] == 1
        first, sizes = (0, (batch, windows)) if shared else (1, (windows, heads))
        if bias is not None:
            bias = bias.to(query.dtype).expand(-1, heads, -1, -1).flatten(0, 1).unsqueeze(0)
        query, key, value = (part.flatten(first, first + 1) for part in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale).unflatten(first, sizes)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}, shift={self.shift}"


def _middle(table: Tensor, window: int, side: int) -> Tensor:
    """The rows of a window's table that a smaller window needs: ((2 window - 1)^2, heads) -> ((2 side - 1)^2, heads).

    Offsets 0 meet in the middle: two cells k rows and l columns apart have the same bias in windows of either size.
    """
    if side == window:
        return table
    offsets = slice(window - side, window + side - 1)
    return table.unflatten(0, (2 * window - 1, 2 * window - 1))[offsets, offsets].flatten(0, 1)


def _channels_first(cells: Tensor) -> Tensor:
    """(B, R, Q, d) -> (B, d, R, Q), the same memory."""
    return cells.permute(0, 3, 1, 2)


def _channels_last(cells: Tensor) -> Tensor:
    """(B, d, R, Q) -> (B, R, Q, d), the same memory."""
    return cells.permute(0, 2, 3, 1)


def _init(module: nn.Module) -> None:
    """As the original: all convolutions, the depth-wise ones too, normal with 0.02, biases 0; norms keep torch's 1 and 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check(dims: list[int], depths: list[int], heads: list[int], window_sizes: list[int], drop_path_rate: float, shift: str) -> None:
    if not dims or min(dims) < 1:
        raise OptionError("backbone.dims", f"{dims}", "give a positive width for each stage")
    for option, values in (("depths", depths), ("heads", heads), ("window_sizes", window_sizes)):
        if len(values) != len(dims):
            found = f"{len(values)} stages, but backbone.dims has {len(dims)}"
            raise OptionError(f"backbone.{option}", found, "give one number for each stage")
    if min(depths) < 1:
        raise OptionError("backbone.depths", f"{depths}", "give at least one block for each stage")
    if min(window_sizes) < 1:
        raise OptionError("backbone.window_sizes", f"{window_sizes}", "give at least 1 token for each stage")
    for stage, (width, count) in enumerate(zip(dims, heads, strict=True)):
        if count < 1 or width % count:
            raise OptionError("backbone.heads", f"{count} heads cannot share the width {width} of stage {stage + 1}", "choose a divisor")
    if not 0 <= drop_path_rate < 1:
        raise OptionError("backbone.drop_path_rate", f"{drop_path_rate}", "choose a probability from 0 to below 1")
    if shift not in get_args(Shift):
        raise OptionError("backbone.shift", f"'{shift}'", f"choose one of {', '.join(get_args(Shift))}")
