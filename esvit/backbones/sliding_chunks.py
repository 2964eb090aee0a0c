"""Sliding chunks: attention of each cell to the cells around it, without ever comparing all with all or keeping a cell's nine copies.

A map is cut into chunks of w x w cells. The queries of a chunk share their keys, which are the cells of whole chunks out of the
3 x 3 around it: all nine, its own only, or its own and one neighbour (Zhang et al. 2021, "Multi-scale vision longformer").

Letters: B images, R x Q rows and columns of a map, N = R * Q, g global tokens, w side of a chunk, M chunks of a block, T queries and
K keys of a chunk, m width of a head.

Unusual:
* the chunks that a query sees are named by `places`, (row, column) in the 3 x 3 around its own, which is (1, 1);
* chunks are taken together in blocks: those that have the same number of queries and see equally many cells in each direction. So no
  score is computed for what lies beyond the map. Along an axis, chunks that see the very same cells are one: a map of at most 2 x 2
  chunks is plain attention;
* each cell is a key of up to nine chunks. These copies live for one block at a time; the backward pass makes them again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Places = tuple[tuple[int, int], ...]
OWN: Places = ((1, 1),)
ALL: Places = tuple((row, column) for row in range(3) for column in range(3))
NEIGHBOURS: Places = tuple(place for place in ALL if place not in OWN)

Run = tuple[int, int]  # along one axis: the first of some cells, and how many they are
Rectangle = tuple[Run, Run]  # rows and columns


@dataclass(frozen=True)
class Span:
    """Along one axis, chunks in a row that are alike.

    start    first cell of the first chunk; the others follow w apart
    count    number of chunks
    queries  cells of a chunk
    keys     for each part of the neighbourhood, the runs of cells that a chunk sees, counted from its own first cell
    """

    start: int
    count: int
    queries: int
    keys: tuple[tuple[Run, ...], ...]


@dataclass(frozen=True)
class Block:
    """M chunks that are alike: each of `rows` with each of `columns`."""

    rows: Span
    columns: Span

    def key_rectangles(self) -> list[Rectangle]:
        """What a chunk sees, in the order of its keys."""
        parts = zip(self.rows.keys, self.columns.keys, strict=True)
        return [(rows, columns) for of_rows, of_columns in parts for rows in of_rows for columns in of_columns]

    def rows_of_chunks(self, window: int) -> "list[Block]":
        """The same chunks, one row of them after the other."""
        starts = range(self.rows.start, self.rows.start + self.rows.count * window, window)
        return [replace(self, rows=replace(self.rows, start=start, count=1)) for start in starts]


@dataclass(frozen=True)
class SlidingChunks:
    """How one map is cut.

    places  the neighbourhood of a chunk
    wraps   the chunks beyond an edge are those of the opposite edge; otherwise there are none. As in the original, the padding of the
            last chunks is hidden where it is met inside the map, and seen, as zeros, where it is met beyond the opposite edge
    """

    grid: tuple[int, int]
    window: int
    places: Places
    wraps: bool
    global_tokens: int

    def blocks(self) -> list[Block]:
        rows, columns = (self._spans(axis) for axis in (0, 1))
        return [Block(of_rows, of_columns) for of_rows in rows for of_columns in columns]

    def framed(self, tokens: Tensor) -> Tensor:
        """(..., g + N, heads, m) -> the tokens among which `keys` looks: with `wraps`, cells padded and framed by the opposite chunks."""
        if not self.wraps:
            return tokens
        rows, columns = self.grid
        cells = tokens[..., self.global_tokens :, :, :].unflatten(-3, self.grid)
        cells = F.pad(cells, (0, 0) * 2 + (0, -columns % self.window, 0, -rows % self.window))
        for axis in (-4, -3):
            ends = cells.narrow(axis, cells.shape[axis] - self.window, self.window), cells.narrow(axis, 0, self.window)
            cells = torch.cat([ends[0], cells, ends[1]], dim=axis)
        return torch.cat([tokens[..., : self.global_tokens, :, :], cells.flatten(-4, -3)], dim=-3)

    def query_cells(self, tokens: Tensor, block: Block) -> Tensor:
        """(B, g + N, heads, m) -> a view (B, rows of chunks, columns of chunks, heads, rows, columns, m)."""
        cells = tokens[:, self.global_tokens :].unflatten(1, self.grid)
        for axis, span in ((2, block.columns), (1, block.rows)):
            cells = cells.narrow(axis, span.start, span.count * span.queries).unflatten(axis, (span.count, span.queries))
        return cells.permute(0, 1, 3, 5, 2, 4, 6)

    def queries(self, tokens: Tensor, block: Block) -> Tensor:
        """(B, g + N, heads, m) -> (B * M, heads, T, m)"""
        return self.query_cells(tokens, block).flatten(4, 5).flatten(0, 2)

    def put(self, rows: Tensor, tokens: Tensor, block: Block) -> None:
        """The inverse of `queries`, into `tokens`."""
        slots = self.query_cells(tokens, block)
        slots.copy_(rows.unflatten(0, slots.shape[:3]).unflatten(-2, slots.shape[4:6]))

    def keys(self, framed: Tensor, block: Block) -> Tensor:
        """What `framed` gave (..., B, tokens, heads, m) -> (..., B * M, heads, K, m), global tokens first."""
        heads, width = framed.shape[-2:]
        rectangles = block.key_rectangles()
        count = self.global_tokens + sum(rows[1] * columns[1] for rows, columns in rectangles)
        keys = framed.new_empty(*framed.shape[:-3], block.rows.count, block.columns.count, heads, count, width)
        keys[..., : self.global_tokens, :] = framed[..., None, None, : self.global_tokens, :, :].transpose(-3, -2)
        for rectangle, part in self._parts(keys, rectangles):
            part.copy_(self._key_cells(framed, block, rectangle))
        return keys.flatten(-6, -4)

    def add_to_keys(self, gradient: Tensor, framed: Tensor, block: Block) -> None:
        """Of `keys`, what the backward pass does: each copy (..., B * M, heads, K, m) is added to its token, always in the same order."""
        gradient = gradient.unflatten(-4, (-1, block.rows.count, block.columns.count))
        framed[..., : self.global_tokens, :, :] += gradient[..., : self.global_tokens, :].sum((-5, -4)).transpose(-3, -2)
        for (rows, columns), part in self._parts(gradient, block.key_rectangles()):
            for row in self._apart(rows, block.rows):
                for column in self._apart(columns, block.columns):
                    inside = part.narrow(-3, row[0] - rows[0], row[1]).narrow(-2, column[0] - columns[0], column[1])
                    cells = self._key_cells(framed, block, (row, column))
                    cells += inside

    def bias(self, table: Tensor, block: Block) -> Tensor:
        """Bias between queries and keys that are cells: ((4w - 1)^2, heads) -> (heads, T, K - g).

        The table's row is (y_query - y_key + 2w - 1) * (4w - 1) + (x_query - x_key + 2w - 1). Written with views and copies instead of
        `table[index]`, whose backward adds in a racy order, as `relative_position_bias` in layers.py says.
        """
        offsets = table.t().reshape(-1, 4 * self.window - 1, 4 * self.window - 1)  # (heads, y offset, x offset)
        parts = []
        for rows, columns in block.key_rectangles():
            pairs = self._pairs(offsets, block.columns.queries, columns)  # (heads, y offset, x query, x key)
            pairs = self._pairs(pairs.permute(0, 2, 3, 1), block.rows.queries, rows)  # (heads, x query, x key, y query, y key)
            parts.append(pairs.permute(0, 3, 1, 4, 2).flatten(3).flatten(1, 2))
        return torch.cat(parts, dim=-1)

    def far(self, block: Block, device: torch.device) -> Tensor:
        """(1, T, K) bool: True for a key that is more than w rows or columns away from the query."""
        parts = [torch.zeros(block.rows.queries * block.columns.queries, self.global_tokens, dtype=torch.bool, device=device)]
        for rows, columns in block.key_rectangles():
            y, x = (self._is_far(span.queries, run, device) for span, run in ((block.rows, rows), (block.columns, columns)))
            parts.append((y[:, None, :, None] | x[None, :, None, :]).flatten(2).flatten(0, 1))
        return torch.cat(parts, dim=-1).unsqueeze(0)

    def _spans(self, axis: int) -> list[Span]:
        size = self.grid[axis]
        around = [(-1, 1)] if self.places == ALL else [(place[axis] - 1, place[axis] - 1) for place in self.places]
        distinct: list[tuple[int, int, list[list[Run]]]] = []  # start, cells and what they see
        for start in range(0, size, self.window):
            count = min(self.window, size - start)
            seen = [self._seen(size, start + first * self.window, start + (last + 1) * self.window) for first, last in around]
            if distinct and distinct[-1][2] == seen:
                start, count = distinct[-1][0], distinct.pop()[1] + count
            distinct.append((start, count, seen))
        spans: list[Span] = []
        for start, count, seen in distinct:
            span = Span(start, 1, count, tuple(tuple((first - start, number) for first, number in runs) for runs in seen))
            if spans and replace(spans[-1], start=start, count=1) == span:
                spans[-1] = replace(spans[-1], count=spans[-1].count + 1)
            else:
                spans.append(span)
        return spans

    def _seen(self, size: int, start: int, end: int) -> list[Run]:
        """Of the cells from `start` to before `end`, of which some lie beyond the map, those that are there."""
        padded = size + -size % self.window
        ranges = [(start, end)] if self.wraps and padded == size else [(max(start, 0), min(end, size))]
        if self.wraps and padded > size:
            ranges = [(start, min(end, size)), (max(start, padded), end)]
        return [(first, last - first) for first, last in ranges if last > first]

    def _parts(self, keys: Tensor, rectangles: list[Rectangle]) -> Iterator[tuple[Rectangle, Tensor]]:
        """(..., K, m) -> of each rectangle a view (..., rows, columns, m)."""
        start = self.global_tokens
        for rows, columns in rectangles:
            count = rows[1] * columns[1]
            yield (rows, columns), keys.narrow(-2, start, count).unflatten(-2, (rows[1], columns[1]))
            start += count

    def _key_cells(self, framed: Tensor, block: Block, rectangle: Rectangle) -> Tensor:
        """(..., B, tokens, heads, m) -> a view (..., B, rows of chunks, columns of chunks, heads, rows, columns, m)."""
        frame = self.window if self.wraps else 0
        sides = [size + -size % self.window + 2 * frame if self.wraps else size for size in self.grid]
        cells = framed[..., self.global_tokens :, :, :].unflatten(-3, sides)
        for axis, span, (first, count) in zip((-4, -3), (block.rows, block.columns), rectangle, strict=True):
            cells = cells.narrow(axis, frame + span.start + first, (span.count - 1) * self.window + count)
        cells = cells.unfold(-4, rectangle[0][1], self.window).unfold(-4, rectangle[1][1], self.window)
        return cells.movedim(-3, -1)

    def _apart(self, run: Run, span: Span) -> list[Run]:
        """The run in pieces, none of which two chunks of the span share."""
        if span.count == 1:
            return [run]
        return [(run[0] + at, min(self.window, run[1] - at)) for at in range(0, run[1], self.window)]

    def _pairs(self, offsets: Tensor, queries: int, keys: Run) -> Tensor:
        """(..., 4w - 1) -> (..., queries, keys): entry (query, key) = offsets[query - (first + key) + 2w - 1]."""
        first, count = keys
        lowest = 2 * self.window - 1 - (first + count - 1)
        return offsets.narrow(-1, lowest, queries + count - 1).unfold(-1, count, 1).flip(-1)

    def _is_far(self, queries: int, keys: Run, device: torch.device) -> Tensor:
        """(queries, keys)"""
        seen = torch.arange(keys[1], device=device) + keys[0]
        return (torch.arange(queries, device=device)[:, None] - seen).abs() > self.window
