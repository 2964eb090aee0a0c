"""What every network offers, derived once from its one method `encode`: features, last blocks, attention on the image grid.

Letters: B images, C channels, H x W pixels, N cells of a grid, d width of a stage, D width of the last stage, W windows, T slots
of a window.
Unusual: the final norm belongs to the last stage only, and features of earlier stages are the raw residual stream, as in the original.
A stage may carry class tokens before its grid's cells; then the first of them stands for the image, otherwise the mean of the cells does.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import cast

import torch
from torch import Tensor, nn

from esvit.backbones.layers import AttentionLayer, DropPath, MlpLayer, resized_bias_table
from esvit.backbones.recomputing import recompute
from esvit.errors import OptionError
from esvit.records import Features

GRAPHS = 1024  # how many graphs the blocks of student and teacher may need together


@dataclass(frozen=True)
class Stage:
    """Tokens of one resolution. tokens[0] enters the first block, tokens[i + 1] leaves block i.

    tokens  each (B, N, d), with class tokens, where there are any, before the N cells
    grid    (rows, columns) with rows * columns == N; class tokens are not counted
    """

    tokens: list[Tensor]
    grid: tuple[int, int]


@dataclass(frozen=True)
class AttentionWindows:
    """Attention of one block, window by window.

    weights  (B, W, heads, T, T)  softmax weights, query by key; a row sums to 1 over all T slots
    places   (W, T) int64         the grid cell that sits in each slot, or -1 for padding and class tokens
    """

    weights: Tensor
    places: Tensor

    def on_grid(self, grid: tuple[int, int]) -> Tensor:
        """(B, heads, N, N) weights between the cells of the grid; zero where two cells share no window.

        What a cell gives to padding (which the original does not mask) or to class tokens has no place on the grid: it is left
        out, and each row is divided by what remains, so that a row is a distribution over the image. Without padding nothing changes.
        """
        count = grid[0] * grid[1]
        batch, _, heads = self.weights.shape[:3]
        places = torch.where(self.places < 0, count, self.places)  # slots outside the grid land in one extra row and column
        whole = self.weights.new_zeros(batch, heads, count + 1, count + 1)
        whole[:, :, places[:, :, None], places[:, None, :]] = self.weights.transpose(1, 2)
        cells = whole[:, :, :count, :count]
        return cells / cells.sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class BlockAttention:
    """Where one block looks.

    windows       its attention as computed
    grid          (rows, columns) of its stage
    class_tokens  how many class tokens sit in the first slots of its one window; the first of them stands for the image. 0: no such
                  token, and the mean of the cells stands for it
    """

    windows: AttentionWindows
    grid: tuple[int, int]
    class_tokens: int


class NoAttention(OptionError):  # noqa: N818 (a convolutional network is not in error, until it is asked where it looks)
    """The backbone has no attention, or none that has a place on the image."""


class AttentionBlock(nn.Module, ABC):
    """A block that can say where it looks."""

    @abstractmethod
    def attention(self, tokens: Tensor, grid: tuple[int, int]) -> AttentionWindows:
        """Explicit weights for `tokens` (B, N, d) as they enter the block."""


class Backbone(nn.Module, ABC):
    """Images to features. A subclass sets the attributes and writes `encode`; one with attention also lists its blocks.

    dim         D, width of pooled and region features
    block_dims  width of every block, first to last: a linear probe on the last n blocks has sum(block_dims[-n:]) inputs
    norm        what is applied to the tokens that leave the last stage's blocks
    """

    dim: int
    block_dims: list[int]
    norm: nn.Module

    @abstractmethod
    def encode(self, images: Tensor, *, last_only: bool = False) -> list[Stage]:
        """(B, C, H, W) -> every stage with the tokens between its blocks, before the final norm.

        last_only  keep nothing but the tokens that leave the last block, as the only tokens of the only stage: what training asks for
        """

    def attention_blocks(self) -> Sequence[Sequence[AttentionBlock]]:
        """Blocks of each stage, in order; empty for a network without attention."""
        return []

    def all_blocks(self) -> list[nn.Module]:
        """Every block, first to last: those with attention, unless a network has others and lists them."""
        return [block for stage in self.attention_blocks() for block in stage]

    def repeated_parts(self) -> list[nn.Module]:
        """The modules that make up nearly all of the network, block by block: what recomputing and compiling go by."""
        return self.all_blocks()

    def recompute(self, what: str) -> None:
        """In training, compute activations of these parts again instead of keeping them: "none", "mlp", "attention" or "blocks".

        Raises OptionError for a network that has no such parts.
        """
        layers = {"mlp": MlpLayer, "attention": AttentionLayer}
        if what == "none":
            return
        parts = [part for part in self.modules() if isinstance(part, layers[what])] if what in layers else self.repeated_parts()
        if not parts:
            raise OptionError("task.recompute", f"{what}, of which {type(self).__name__} has none", "use blocks, or none")
        for part in parts:
            recompute(part)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Let torch.compile make each block one graph for each size of crops. Names and values of parameters stay.

        To be called after `recompute`, whose choice the graphs hold too. Hooks of a block, those of shares for example, stay outside.

        Raises OptionError for a network without blocks.
        """
        if not self.repeated_parts():
            raise OptionError("task.compile", f"{type(self).__name__} has no blocks to compile", "use task.compile=false")
        import torch._dynamo  # seconds, for nothing where nothing is compiled

        # Blocks share their code, of which each stage, drop-path rate and size of crops needs a graph: more than torch allows.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, GRAPHS)
        for block in self.repeated_parts():
            forward = cast(MethodType, block.forward).__func__
            compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)
            block.forward = MethodType(compiled, block)  # bound: a copy of the block gets one that is bound to the copy

    def parameters_by_depth(self) -> list[list[str]]:
        """Names of all parameters, from input to output: before the first block, each block with what leads to the next, the final norm.

        Two entries more than there are blocks; the last is empty without a final norm. What belongs to no block is placed by the order in
        which the network registers its parts, which has to be the order of their use.
        """
        blocks = self.all_blocks()
        block_of = {id(parameter): number for number, block in enumerate(blocks, start=1) for parameter in block.parameters()}
        of_norm = {id(parameter) for parameter in self.norm.parameters()}
        names: list[list[str]] = [[] for _ in range(len(blocks) + 2)]
        depth = 0
        for name, parameter in self.named_parameters():
            depth = block_of.get(id(parameter), depth)
            names[-1 if id(parameter) in of_norm else depth].append(name)
        return names

    def forward(self, images: Tensor) -> Features:
        """(B, C, H, W) -> Features of width D."""
        (stage,) = self.encode(images, last_only=True)
        tokens = self.norm(stage.tokens[-1])
        return Features(pooled=_pool(tokens, stage.grid), regions=_cells(tokens, stage.grid), grid=stage.grid)

    def last_blocks(self, images: Tensor, count: int) -> list[Tensor]:
        """Pooled tokens of the last `count` blocks over all stages, first to last: each (B, d), normed only in the last stage.

        Raises ValueError if the network has fewer blocks.
        """
        return self.last_blocks_and_regions(images, count)[0]

    def last_blocks_and_regions(self, images: Tensor, count: int) -> tuple[list[Tensor], Tensor]:
        """`last_blocks`, and from the same pass the mean (B, D) of the regions that `forward` gives."""
        if not 1 <= count <= len(self.block_dims):
            raise ValueError(f"features of the last {count} blocks were asked for; give a number from 1 to {len(self.block_dims)}")
        stages = self.encode(images)
        leaving = [(stage, tokens) for stage in stages for tokens in stage.tokens[1:]][-count:]
        leaving = [(stage, self.norm(tokens) if stage is stages[-1] else tokens) for stage, tokens in leaving]
        last_stage, last_tokens = leaving[-1]
        return [_pool(tokens, stage.grid) for stage, tokens in leaving], _cells(last_tokens, last_stage.grid).mean(dim=1)

    def attentions(self, images: Tensor) -> list[Tensor]:
        """Per block, first to last: (B, heads, N, N) on the whole grid of its stage, windows and shifts undone, rows sum to 1.

        The first stage of a 224-pixel Swin takes 39 MB per image and head: ask for few images at a time.
        Raises NoAttention for a network without attention.
        """
        return [block.windows.on_grid(block.grid) for block in self.looks(images)]

    def window_attentions(self, images: Tensor) -> list[AttentionWindows]:
        """Per block, first to last: the attention as computed, padding included. Raises NoAttention without attention."""
        return [block.windows for block in self.looks(images)]

    def looks(self, images: Tensor) -> Iterator[BlockAttention]:
        """Block after block, first to last: one at a time is in memory. Raises NoAttention, at the first, without attention."""
        stage_blocks = self.attention_blocks()
        if not stage_blocks:
            raise NoAttention("backbone", f"{type(self).__name__} has no attention", "choose a transformer, such as backbone=swin_tiny")
        for blocks, stage in zip(stage_blocks, self.encode(images), strict=True):
            class_tokens = stage.tokens[0].shape[1] - stage.grid[0] * stage.grid[1]
            for block, entering in zip(blocks, stage.tokens[:-1], strict=True):
                yield BlockAttention(block.attention(entering, stage.grid), stage.grid, class_tokens)

    def disable_drop_path(self) -> None:
        """Never drop a branch again, in training neither: what the teacher asks for."""
        for module in self.modules():
            if isinstance(module, DropPath):
                module.rate = 0.0

    def set_progress(self, share: float) -> None:  # noqa: B027
        """Tell the network which share of training, from 0 to below 1, is done before this step; most do not care."""

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of this architecture under the names that other programs give them -> the same under this network's names.

        Entries that have this network's names stay as they are, and unknown ones keep theirs: strict loading refuses those. An
        integer index or a classifier need not be removed here, esvit.published sees to it.
        """
        return state

    def resize_positions(self, name: str, table: Tensor, shape: torch.Size) -> Tensor | None:
        """A table of positions from a network with another window or nominal image size, in the `shape` that entry `name` has here.

        None if the entry is no such table, or cannot be resized. Here: biases by relative position, entries "...bias_table".
        """
        return resized_bias_table(table, shape) if name.endswith("bias_table") else None


def _cells(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens[:, tokens.shape[1] - grid[0] * grid[1] :]


def _pool(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    has_class_token = tokens.shape[1] > grid[0] * grid[1]
    return tokens[:, 0] if has_class_token else tokens.mean(dim=1)
