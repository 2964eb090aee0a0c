"""Vision Longformer (Zhang et al. 2021, "Multi-scale vision longformer") as EsViT trains it: sliding chunks, then full attention.

Letters: B images, R x Q rows and columns of a map, N = R * Q, g global tokens of a stage, d width, w side of a chunk, T queries and
K keys of a chunk, m width of a head.

Unusual, all kept from the original because published weights depend on it:
* every stage has global tokens of its own, before its cells; the previous stage's are dropped;
* where a map is not the nominal one, the matrix of pairwise biases (N x N) is resized as if it were a picture;
* positions (`absolute_positions`) are resized by a factor that counts global tokens, so slightly even on the nominal map;
* a random neighbour (`neighbours=random`) is drawn for each call of a layer, by student and teacher alike, in training only.
Unlike the original, images may have any size and be rectangular, all neighbours follow at a share of training, each stage says by
itself whether it slides, and local and global projections have one name instead of two (`query`, not also `query_global`).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor, nn

from esvit.backbones.base import AttentionBlock, AttentionWindows, Backbone, Stage
from esvit.backbones.chunk_attention import attend, attend_in_chunks, softmax_weights
from esvit.backbones.layers import AttentionLayer, DropPath, Mlp, drop_path_rates, init_transformer, relative_position_bias
from esvit.backbones.sliding_chunks import ALL, NEIGHBOURS, OWN, Block, Places, SlidingChunks
from esvit.errors import OptionError

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
CUBIC = -0.75  # the free parameter of cubic convolution, as torch's bicubic interpolation has it


class Vil(Backbone):
    """Stages of attention with global tokens: between sliding chunks on large maps, between all cells on small ones.

    Options in plural have one entry for each stage; the letters are those of the original's architecture string.

    in_channels          channels of the images
    image_size           nominal image side in pixels: fixes the sizes of positions and biases, not what `forward` accepts
    patch_sizes          p: side of the patches, in cells of the stage before; what does not fill a patch is cut off
    dims                 d: width
    depths               n: blocks
    heads                h: attention heads
    window_sizes         f: side of a chunk, in tokens; without meaning where `sliding` is false
    sliding              s: attention between sliding chunks instead of all cells
    global_tokens        g: tokens that attend to every cell and are attended to by every cell; the first stands for the image
    absolute_positions   a: learned positions on the stage's map instead of biases by relative position
    neighbours           "all": the nine chunks around a cell; "own": its own chunk only; "random": in training its own and one of
                         the eight others, in evaluation all
    all_neighbours_from  share of training, from 0 to 1, from which "random" means all; 1 for never
    reach                "chunks": whole chunks; "window": of all neighbours, the cells at most `window_sizes` rows and columns away;
                         "wrapped": chunks beyond an edge are those of the opposite edge
    mlp_ratio            hidden width of the MLP over the width of the stage
    drop_path_rate       probability that the last block's branch is dropped; rises linearly from 0 at the first block

    Raises OptionError for options that do not fit together.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        image_size: int,
        patch_sizes: list[int],
        dims: list[int],
        depths: list[int],
        heads: list[int],
        window_sizes: list[int],
        sliding: list[bool],
        global_tokens: list[int],
        absolute_positions: list[bool],
        neighbours: str,
        all_neighbours_from: float,
        reach: str,
        mlp_ratio: float,
        drop_path_rate: float,
    ):
        super().__init__()
        per_stage: dict[str, Sequence[int]] = {
            "patch_sizes": patch_sizes,
            "depths": depths,
            "heads": heads,
            "window_sizes": window_sizes,
            "sliding": sliding,
            "global_tokens": global_tokens,
            "absolute_positions": absolute_positions,
        }
        _check_stages(dims, per_stage, image_size)
        _check_choices(neighbours, all_neighbours_from, reach, drop_path_rate)
        self.dim = dims[-1]
        self.block_dims = [dim for dim, depth in zip(dims, depths, strict=True) for _ in range(depth)]
        self.neighbours = neighbours
        self.all_neighbours_from = all_neighbours_from
        self.stage_count = len(dims)
        rates = drop_path_rates(drop_path_rate, depths)
        side = image_size
        for index, dim in enumerate(dims):
            side //= patch_sizes[index]
            stage = VilStage(
                in_channels=dims[index - 1] if index else in_channels,
                patch_size=patch_sizes[index],
                dim=dim,
                heads=heads[index],
                nominal_size=side,
                window=window_sizes[index] if sliding[index] else None,
                global_tokens=global_tokens[index],
                absolute_positions=absolute_positions[index],
                neighbours=neighbours,
                reach=reach,
                mlp_ratio=mlp_ratio,
                drop_path_rates=rates[index],
            )
            self.add_module(f"layer{index + 1}", stage)
        self.norm = LayerNorm(self.dim)
        self.apply(init_transformer)

    def encode(self, images: Tensor, *, last_only: bool = False) -> list[Stage]:
        cells = images
        stages = []
        for layer in self._layers():
            tokens, grid = layer.embed(cells)
            stage = Stage(layer(tokens, grid, last_only=last_only), grid)
            stages.append(stage)
            cells = stage.tokens[-1][:, layer.global_tokens :].transpose(1, 2).unflatten(2, grid)
        return stages[-1:] if last_only else stages

    def attention_blocks(self) -> list[list[AttentionBlock]]:
        return [cast(list[AttentionBlock], layer.attention_blocks()) for layer in self._layers()]

    def repeated_parts(self) -> list[nn.Module]:
        """Here attention and MLP are blocks of their own."""
        return [part for layer in self._layers() for part in list(layer)[1:]]

    def compile_blocks(self, backend: str = "inductor") -> None:
        if self.neighbours == "random":
            found = "a graph cannot hold the draws of backbone.neighbours=random"
            raise OptionError("task.compile", found, "use backbone.neighbours=all, or task.compile=false")
        super().compile_blocks(backend)

    def set_progress(self, share: float) -> None:
        """From the share `all_neighbours_from` of training on, a random neighbour gives way to all of them."""
        if self.neighbours == "random":
            neighbours = "random" if share < self.all_neighbours_from else "all"
            for module in self.modules():
                if isinstance(module, SlidingChunkAttention):
                    module.neighbours = neighbours

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the original, without the second names of tied projections. Projections that are not tied stay, and are refused."""
        local_names = {name: re.sub(r"\.(query|kv|proj)_global\.", r".\1.", name) for name in state}
        return {
            name: value for name, value in state.items() if local_names[name] == name or not _are_tied(value, state.get(local_names[name]))
        }

    def resize_positions(self, name: str, table: Tensor, shape: torch.Size) -> Tensor | None:
        """Besides biases, the positions along each axis (1, side, width); those of global tokens have no side."""
        if not name.endswith(("x_pos_embed", "y_pos_embed")):
            return super().resize_positions(name, table, shape)
        if table.dim() != 3 or table.shape[2] != shape[2]:
            return None
        return _resample(table, shape[1], scale=shape[1] / table.shape[1])

    def _layers(self) -> "list[VilStage]":
        return [cast(VilStage, self.get_submodule(f"layer{number}")) for number in range(1, self.stage_count + 1)]


class VilStage(nn.ModuleList):
    """The embedding of a map's patches, then attention and MLP in turn: a flat list, as the original's layout has it."""

    def __init__(
        self,
        *,
        in_channels: int,
        patch_size: int,
        dim: int,
        heads: int,
        nominal_size: int,
        window: int | None,
        global_tokens: int,
        absolute_positions: bool,
        neighbours: str,
        reach: str,
        mlp_ratio: float,
        drop_path_rates: list[float],
    ):
        embed = VilPatchEmbed(
            in_channels=in_channels,
            patch_size=patch_size,
            dim=dim,
            global_tokens=global_tokens,
            nominal_size=nominal_size if absolute_positions else None,
        )
        super().__init__([embed])
        self.global_tokens = global_tokens
        for rate in drop_path_rates:
            attention: VilAttention
            if window is None:
                attention = FullAttention(
                    dim=dim, heads=heads, global_tokens=global_tokens, nominal_size=None if absolute_positions else nominal_size
                )
            else:
                attention = SlidingChunkAttention(
                    dim=dim,
                    heads=heads,
                    global_tokens=global_tokens,
                    window=window,
                    relative_positions=not absolute_positions,
                    neighbours=neighbours,
                    reach=reach,
                )
            self.append(VilAttentionBlock(dim=dim, attention=attention, drop_path_rate=rate))
            self.append(VilMlpBlock(dim=dim, mlp_ratio=mlp_ratio, drop_path_rate=rate))

    def embed(self, cells: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, R, Q) -> tokens (B, g + N, d) and the grid of whole patches."""
        return self[0](cells)

    def forward(self, tokens: Tensor, grid: tuple[int, int], *, last_only: bool) -> list[Tensor]:
        """(B, g + N, d) -> the tokens before the first block and after each, or those after the last block only."""
        kept = [tokens]
        for attention, mlp in zip(self.attention_blocks(), list(self)[2::2], strict=True):
            leaving = mlp(attention(kept[-1], grid))
            kept = [leaving] if last_only else [*kept, leaving]
        return kept

    def attention_blocks(self) -> "list[VilAttentionBlock]":
        return cast(list[VilAttentionBlock], list(self)[1::2])


class VilPatchEmbed(nn.Module):
    """One linear map of each patch, a LayerNorm, the stage's global tokens, and positions where `nominal_size` is given."""

    def __init__(self, *, in_channels: int, patch_size: int, dim: int, global_tokens: int, nominal_size: int | None):
        super().__init__()
        self.global_tokens = global_tokens
        self.nominal_size = nominal_size
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.norm_embed = LayerNorm(dim)
        if global_tokens:
            self.cls_token = _table(1, global_tokens, dim)
        if nominal_size is not None:
            self.cls_pos_embed = _table(1, global_tokens, dim)  # without global tokens it is empty, and still in the layout
            self.x_pos_embed = _table(1, nominal_size, dim // 2)  # of rows, whatever its name
            self.y_pos_embed = _table(1, nominal_size, dim // 2)

    def forward(self, cells: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, R, Q) -> tokens (B, g + N, d), global ones first, and the grid of whole patches."""
        patches = self.proj(cells)
        grid = (patches.shape[2], patches.shape[3])
        tokens = self.norm_embed(patches.flatten(2).transpose(1, 2))
        if self.global_tokens:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        if self.nominal_size is not None:
            tokens = tokens + torch.cat([self.cls_pos_embed, self._positions(grid, tokens.shape[1])], dim=1)
        return tokens, grid

    def _positions(self, grid: tuple[int, int], token_count: int) -> Tensor:
        """(1, N, d): rows in the first half of the width, columns in the second.

        The original resizes by sqrt(tokens / cells of the table), counting global tokens: on any map the scale is a little
        larger than the ratio of the sizes.
        """
        excess = (token_count / (grid[0] * grid[1])) ** 0.5
        rows, columns = (
            _resample(table[0], size, scale=size / table.shape[1] * excess)
            for table, size in zip((self.x_pos_embed, self.y_pos_embed), grid, strict=True)
        )
        of_rows, of_columns = rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)
        return torch.cat([of_rows, of_columns], dim=-1).flatten(0, 1).unsqueeze(0)


class VilAttentionBlock(AttentionBlock):
    """Attention, pre-normed, residual and with stochastic depth."""

    def __init__(self, *, dim: int, attention: "VilAttention", drop_path_rate: float):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.attn = attention
        self.drop_path = DropPath(rate=drop_path_rate)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, g + N, d) -> the same shape."""
        return tokens + self.drop_path(self.attn(self.norm(tokens), grid))

    def attention(self, tokens: Tensor, grid: tuple[int, int]) -> AttentionWindows:
        """One window of all g + N tokens, also where attention slides over chunks."""
        places = torch.arange(tokens.shape[1], device=tokens.device) - self.attn.global_tokens
        return AttentionWindows(self.attn.weights(self.norm(tokens), grid).unsqueeze(1), places.clamp(min=-1).unsqueeze(0))


class VilMlpBlock(nn.Module):
    """The MLP, pre-normed, residual and with stochastic depth."""

    def __init__(self, *, dim: int, mlp_ratio: float, drop_path_rate: float):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio))
        self.drop_path = DropPath(rate=drop_path_rate)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, g + N, d) -> the same shape."""
        return tokens + self.drop_path(self.mlp(self.norm(tokens)))


class VilAttention(AttentionLayer, ABC):
    """What full and sliding attention share: the biases of global tokens, and their rows of the attention.

    span  differences of position along one axis that the bias tells apart, or None for no bias at all
    """

    def __init__(self, *, heads: int, global_tokens: int, span: int | None):
        super().__init__()
        self.heads = heads
        self.global_tokens = global_tokens
        self.has_bias = span is not None
        if span is not None:
            self.local_relative_position_bias_table = _table(span**2, heads)
            if global_tokens:
                self.g2l_relative_position_bias = _table(2, heads, global_tokens)
                self.g2g_relative_position_bias = _table(heads, global_tokens, global_tokens)

    @abstractmethod
    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, g + N, d) -> the same shape."""

    @abstractmethod
    def weights(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, g + N, d) -> softmax weights (B, heads, g + N, g + N), query by key."""

    def _bias_of_globals(self, cells: int) -> Tensor | None:
        """(heads, g, g + N): what the scores of global queries get."""
        if not self.has_bias:
            return None
        to_cells = self.g2l_relative_position_bias[0].unsqueeze(-1).expand(-1, -1, cells)
        return torch.cat([self.g2g_relative_position_bias, to_cells], dim=-1)

    def _with_bias_to_globals(self, bias: Tensor) -> Tensor:
        """(heads, queries, keys) -> (heads, queries, g + keys): queries are cells, and global tokens come before their keys."""
        if not self.global_tokens:
            return bias
        to_globals = self.g2l_relative_position_bias[1].unsqueeze(1).expand(-1, bias.shape[1], -1)
        return torch.cat([to_globals, bias], dim=-1)


class FullAttention(VilAttention):
    """All tokens attend to all, with a bias by relative position on a map of `nominal_size` cells a side, or None for no bias."""

    def __init__(self, *, dim: int, heads: int, global_tokens: int, nominal_size: int | None):
        super().__init__(heads=heads, global_tokens=global_tokens, span=None if nominal_size is None else 2 * nominal_size - 1)
        self.nominal_size = nominal_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        query, key, value = self._project(tokens)
        attended = attend(query, key, value, self._bias(grid[0] * grid[1]))
        return self.proj(attended.transpose(1, 2).flatten(2))

    def weights(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        query, key, _ = self._project(tokens)
        return softmax_weights(query, key, self._bias(grid[0] * grid[1]))

    def _project(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, each (B, heads, g + N, m)."""
        return self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _bias(self, cells: int) -> Tensor | None:
        """(1, heads, g + N, g + N)."""
        if self.nominal_size is None:
            return None
        bias = relative_position_bias(self.local_relative_position_bias_table, self.nominal_size)
        if bias.shape[-1] != cells:
            bias = _resample(_resample(bias, cells, scale=cells / bias.shape[-1]).mT, cells, scale=cells / bias.shape[-1]).mT
        bias = self._with_bias_to_globals(bias)
        of_globals = self._bias_of_globals(cells) if self.global_tokens else None
        return (bias if of_globals is None else torch.cat([of_globals, bias], dim=1)).unsqueeze(0)


class SlidingChunkAttention(VilAttention):
    """Cells attend to global tokens and to the cells of the chunks around them; global tokens attend to all, by the same projections.

    neighbours  which of the 3 x 3 chunks around its own a query sees, see `Vil`; `Vil.set_progress` may change it
    """

    def __init__(self, *, dim: int, heads: int, global_tokens: int, window: int, relative_positions: bool, neighbours: str, reach: str):
        super().__init__(heads=heads, global_tokens=global_tokens, span=4 * window - 1 if relative_positions else None)
        self.window = window
        self.neighbours = neighbours
        self.reach = reach
        self.query = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.attend(tokens, grid, self._draw_places())

    def attend(self, tokens: Tensor, grid: tuple[int, int], places: Places) -> Tensor:
        """(B, g + N, d) -> the same shape, with the chunks at `places`."""
        chunks = self._chunks(grid, places)
        blocks = chunks.blocks()
        query, keys_and_values = self._project(tokens)
        attended = attend_in_chunks(
            first=self._first(query, keys_and_values, grid),
            query=query,
            keys_and_values=chunks.framed(keys_and_values),
            biases=[self._bias(chunks, block, tokens.device) for block in blocks],
            chunks=chunks,
            blocks=blocks,
        )
        return self.proj(attended.flatten(2))

    def weights(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """As documented; with reach "wrapped", what goes to padding is left out, and a row may sum to less than 1."""
        chunks = self._chunks(grid, self._draw_places())
        query, (key, _) = self._project(tokens)
        batch, count = tokens.shape[:2]
        numbers = torch.arange(1, count + 1, device=tokens.device).view(1, count, 1, 1)  # from 1, so that padding becomes 0
        whole = tokens.new_zeros(batch, self.heads, (count + 1) ** 2)
        for block in chunks.blocks():
            weights = softmax_weights(
                chunks.queries(query, block), chunks.keys(chunks.framed(key), block), self._bias(chunks, block, tokens.device)
            )
            rows, columns = chunks.queries(numbers, block), chunks.keys(chunks.framed(numbers), block).mT
            weights = weights.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
            whole.index_add_(2, (rows * (count + 1) + columns).flatten(), weights.to(whole.dtype))  # a wrapped map may show a key twice
        whole = whole.unflatten(2, (count + 1, count + 1))[:, :, 1:, 1:]
        if self.global_tokens:
            of_globals = softmax_weights(query[:, : self.global_tokens].transpose(1, 2), key.transpose(1, 2), self._first_bias(grid))
            whole[:, :, : self.global_tokens] = of_globals
        return whole

    def _draw_places(self) -> Places:
        if self.neighbours == "own":
            return OWN
        if self.neighbours == "random" and self.training:
            # On the host, by torch's generator: keyed like every other draw of a step, and the device is not waited for.
            return (*OWN, NEIGHBOURS[int(torch.randint(len(NEIGHBOURS), (), device="cpu"))])
        return ALL

    def _chunks(self, grid: tuple[int, int], places: Places) -> SlidingChunks:
        return SlidingChunks(grid, self.window, places, self.reach == "wrapped", self.global_tokens)

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Query (B, g + N, heads, m), keys and values (2, B, g + N, heads, m)."""
        keys_and_values = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).movedim(2, 0)
        return self.query(tokens).unflatten(-1, (self.heads, -1)), keys_and_values

    def _first(self, query: Tensor, keys_and_values: Tensor, grid: tuple[int, int]) -> Tensor:
        """What global tokens get: (B, g, heads, m)."""
        if not self.global_tokens:
            return query[:, :0]
        key, value = keys_and_values.transpose(2, 3).unbind(0)
        return attend(query[:, : self.global_tokens].transpose(1, 2), key, value, self._first_bias(grid)).transpose(1, 2)

    def _bias(self, chunks: SlidingChunks, block: Block, device: torch.device) -> Tensor | None:
        """What is added to the scores of a block: None, or (1, 1 or heads, T, K)."""
        hidden = torch.zeros((), device=device).masked_fill(chunks.far(block, device), float("-inf")) if self.reach == "window" else None
        if not self.has_bias:
            return None if hidden is None else hidden.unsqueeze(0)
        bias = self._with_bias_to_globals(chunks.bias(self.local_relative_position_bias_table, block))
        return (bias if hidden is None else bias + hidden).unsqueeze(0)

    def _first_bias(self, grid: tuple[int, int]) -> Tensor | None:
        """What is added to the scores of global tokens: (1, heads, g, g + N)."""
        bias = self._bias_of_globals(grid[0] * grid[1])
        return None if bias is None else bias.unsqueeze(0)

    def extra_repr(self) -> str:
        return f"window={self.window}, neighbours={self.neighbours}, reach={self.reach}"


def _table(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02) if 0 not in shape else torch.empty(shape))


def _are_tied(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and (one is other or torch.equal(one, other))


def _resample(values: Tensor, size: int, *, scale: float) -> Tensor:
    """(..., rows, columns) -> (..., size, columns), bicubic along the rows; `scale` is new cells per old cell.

    The same numbers as torch's bicubic interpolation, whose backward adds in a racy order on a GPU; this is one matrix product.
    """
    make = _make_bicubic if torch.compiler.is_compiling() else _bicubic
    with torch.autocast(values.device.type, enabled=False):
        return make(size, values.shape[-2], scale, values.device).to(values.dtype) @ values


def _make_bicubic(size: int, old_size: int, scale: float, device: torch.device) -> Tensor:
    """(size, old_size) weights of cubic convolution with half-cell centres; beyond its ends a line goes on with its last value."""
    centres = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / scale - 0.5
    taps = centres.floor()[:, None] + torch.arange(-1, 3, device="cpu")
    distance = (centres[:, None] - taps).abs()
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * CUBIC - 4 * CUBIC
    weights = torch.where(distance <= 1, near, far)
    matrix = torch.zeros(size, old_size, dtype=torch.float64, device="cpu")
    matrix.scatter_add_(1, taps.clamp(0, old_size - 1).long(), weights)
    return matrix.to(device=device, dtype=torch.float32)


@lru_cache(maxsize=64)
def _bicubic(size: int, old_size: int, scale: float, device: torch.device) -> Tensor:
    """Made once for a pair of sizes."""
    with torch.inference_mode(False):  # weights first made while evaluating must serve training too
        return _make_bicubic(size, old_size, scale, device)


def _check_stages(dims: list[int], per_stage: dict[str, Sequence[int]], image_size: int) -> None:
    if not dims:
        raise OptionError("backbone.dims", "[]", "give one width for each stage")
    for option, values in per_stage.items():
        if len(values) != len(dims):
            found = f"{len(values)} stages, but backbone.dims has {len(dims)}"
            raise OptionError(f"backbone.{option}", found, "give one entry for each stage")
    for option in ("patch_sizes", "depths", "window_sizes"):
        if min(per_stage[option]) < 1:
            raise OptionError(f"backbone.{option}", f"{list(per_stage[option])}", "give at least 1 for each stage")
    if min(per_stage["global_tokens"]) < 0:
        raise OptionError("backbone.global_tokens", f"{list(per_stage['global_tokens'])}", "give 0 or more for each stage")
    side = image_size
    for stage, dim in enumerate(dims):
        heads = per_stage["heads"][stage]
        if heads < 1 or dim % heads:
            raise OptionError("backbone.heads", f"{heads} heads cannot share the width {dim} of stage {stage + 1}", "choose a divisor")
        if per_stage["absolute_positions"][stage] and dim % 2:
            found = f"positions halve the width of stage {stage + 1}, which is {dim}"
            raise OptionError("backbone.dims", found, "choose an even width, or backbone.absolute_positions=false there")
        side //= per_stage["patch_sizes"][stage]
        if side < 1:
            found = f"{image_size} pixels leave no token for stage {stage + 1} with backbone.patch_sizes={list(per_stage['patch_sizes'])}"
            raise OptionError("backbone.image_size", found, "give more pixels, or smaller patches")


def _check_choices(neighbours: str, all_neighbours_from: float, reach: str, drop_path_rate: float) -> None:
    for option, value, known in (
        ("backbone.neighbours", neighbours, ("all", "own", "random")),
        ("backbone.reach", reach, ("chunks", "window", "wrapped")),
    ):
        if value not in known:
            raise OptionError(option, f"'{value}'", f"choose one of {', '.join(known)}")
    if reach == "window" and neighbours != "all":
        raise OptionError("backbone.reach", f"'window' is measured over all neighbours, not '{neighbours}'", "use backbone.neighbours=all")
    if not 0 <= all_neighbours_from <= 1:
        raise OptionError("backbone.all_neighbours_from", f"{all_neighbours_from}", "give a share of training, from 0 to 1")
    if not 0 <= drop_path_rate < 1:
        raise OptionError("backbone.drop_path_rate", f"{drop_path_rate}", "choose a probability from 0 to below 1")
