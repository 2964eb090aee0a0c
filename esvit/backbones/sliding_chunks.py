"""Sliding chunks: how a map is cut so that each cell attends to the cells around it, without ever comparing all with all.

A map is cut into chunks of w x w cells. The queries of a chunk share their keys, which are the cells of whole chunks out of the
3 x 3 around it: all nine, its own only, or its own and one neighbour (Zhang et al. 2021, "Multi-scale vision longformer").

Letters: B images, R x Q rows and columns of a map, N = R * Q, w side of a chunk, T = w * w cells of a chunk, M chunks of a map,
K keys of a chunk, m width of a head.

Unusual: the chunks that a query sees are named by `places`, (row, column) in the 3 x 3 around its own, which is (1, 1). Keys of all
places are gathered by one copy, and keys, bias and limits come in the order of `places`.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Places = tuple[tuple[int, int], ...]
OWN: Places = ((1, 1),)
ALL: Places = tuple((row, column) for row in range(3) for column in range(3))
NEIGHBOURS: Places = tuple(place for place in ALL if place not in OWN)


def query_chunks(cells: Tensor, window: int) -> Tensor:
    """(B, R, Q, heads, m) -> (B, M, heads, T, m): padded at the end to whole chunks, cut row by row."""
    return _cut(cells, window).flatten(1, 2)


def key_chunks(cells: Tensor, window: int, places: Places, *, wraps: bool) -> list[Tensor]:
    """(B, R, Q, heads, m) -> for each place, what every chunk finds there: (B, M, heads, T, m).

    Beyond the map lie zeros, or with `wraps` the chunks of the opposite edge.
    """
    chunks = _cut(cells, window)
    rows, columns = chunks.shape[1:3]
    framed = _wrap(_wrap(chunks, 1), 2) if wraps else F.pad(chunks, (0, 0) * 3 + (1, 1) * 2)
    return [framed[:, row : row + rows, column : column + columns].flatten(1, 2) for row, column in places]


def join_chunks(chunks: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The inverse of `query_chunks`: (B, M, heads, T, m) -> (B, N, heads * m) without the padding."""
    rows, columns = (-(-size // window) for size in grid)
    cells = chunks.unflatten(1, (rows, columns)).unflatten(4, (window, window)).permute(0, 1, 4, 2, 5, 3, 6)
    return cells.flatten(5).flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]].flatten(1, 2)


def neighbourhood_bias(table: Tensor, window: int, places: Places) -> Tensor:
    """Bias between the cells of a chunk and those of the chunks at `places`: ((4w - 1)^2, heads) -> (heads, T, places * T).

    The table's row is (y_query - y_key + 2w - 1) * (4w - 1) + (x_query - x_key + 2w - 1). Written with views and copies instead of
    `table[index]`, whose backward adds in a racy order, as `relative_position_bias` in layers.py says.
    """
    span = 4 * window - 1
    offsets = table.t().reshape(-1, span, span)  # (heads, y offset, x offset)
    columns = _pairs(offsets, window)  # (heads, y offset, x query, x key)
    cells = _pairs(columns.permute(0, 2, 3, 1), window)  # (heads, x query, x key, y query, y key)
    cells = cells.permute(0, 3, 1, 4, 2).unflatten(4, (3, window)).unflatten(3, (3, window))  # (heads, y, x, row, y, column, x)
    return torch.cat([cells[:, :, :, row, :, column].flatten(3).flatten(1, 2) for row, column in places], dim=-1)


def limits(grid: tuple[int, int], window: int, places: Places, reach: str, global_tokens: int, device: torch.device) -> Tensor:
    """What is added to scores: 0 where a query may look and -inf elsewhere; (M, 1, T or 1, global_tokens + places * T).

    reach  "chunks": whole chunks, but nothing beyond the map
           "window": of these, what is at most w rows and columns away
           "wrapped": whole chunks of a map that wraps around. As in the original, padding is hidden where it is met inside the map,
           and seen, as zeros, where it is met beyond the opposite edge
    """
    make = _make_limits if torch.compiler.is_compiling() else _limits  # a graph makes its own: no tensor of a trace is kept
    return make(grid, window, places, reach, global_tokens, device)


def _cut(cells: Tensor, window: int) -> Tensor:
    """(B, R, Q, heads, m) -> (B, rows of chunks, columns of chunks, heads, T, m)."""
    missing_rows, missing_columns = -cells.shape[1] % window, -cells.shape[2] % window
    if missing_rows or missing_columns:
        cells = F.pad(cells, (0, 0) * 2 + (0, missing_columns, 0, missing_rows))
    cells = cells.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return cells.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


def _wrap(chunks: Tensor, axis: int) -> Tensor:
    return torch.cat([chunks.narrow(axis, -1, 1), chunks, chunks.narrow(axis, 0, 1)], dim=axis)


def _pairs(offsets: Tensor, window: int) -> Tensor:
    """(..., 4w - 1) -> (..., w, 3w): entry (query, key) = offsets[query - key + 3w - 1]; the query's chunk is the middle one of three."""
    return offsets.unfold(-1, 3 * window, 1).flip(-1)


def _make_limits(grid: tuple[int, int], window: int, places: Places, reach: str, global_tokens: int, device: torch.device) -> Tensor:
    rows, columns = (_seen(size, window, reach, device) for size in grid)
    parts = [torch.ones(rows.shape[0], columns.shape[0], rows.shape[1] * columns.shape[1], global_tokens, dtype=torch.bool, device=device)]
    for row, column in places:
        of_rows, of_columns = rows[:, None, :, None, row, :, None], columns[None, :, None, :, column, None, :]
        parts.append((of_rows & of_columns).flatten(4).flatten(2, 3))
    seen = torch.cat(parts, dim=-1).flatten(0, 1).unsqueeze(1)
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, float("-inf"))


@lru_cache(maxsize=256)
def _limits(grid: tuple[int, int], window: int, places: Places, reach: str, global_tokens: int, device: torch.device) -> Tensor:
    """Made once for a map size: a block in every forward of every crop size asks for it."""
    with torch.inference_mode(False):  # limits first made while evaluating must serve training too
        return _make_limits(grid, window, places, reach, global_tokens, device)


def _seen(size: int, window: int, reach: str, device: torch.device) -> Tensor:
    """Along one axis: bool (chunks, w or 1 queries, 3 places, w keys)."""
    starts = torch.arange(0, size, window, device=device)
    queries = starts[:, None] + torch.arange(window, device=device)
    keys = (starts[:, None] + torch.arange(-window, 2 * window, device=device)).view(-1, 1, 3, window)
    inside = (keys >= 0) & (keys < size)
    if reach == "wrapped":
        return (keys < size) | (keys >= len(starts) * window)
    if reach == "window":
        return inside & ((keys - queries[:, :, None, None]).abs() <= window)
    return inside
