"""Softmax over prototypes in kernels that never write a logit to memory: Triton, for CUDA GPUs with products in bf16 or fp16.

Imported only where it is used: Triton comes with torch's CUDA wheels alone.

`_attend` is flash attention (Dao 2023, arXiv 2307.08691) with prototypes for keys and values: a program walks over prototypes
with a block of rows, keeping each row's largest logit, its sum of exponentials and its weighted sum of prototypes. The
view loss has few rows, so the prototypes are split over programs (flash-decoding), and `_combine` joins what these found.
`_outer` owns a block of prototypes, walks over all rows and makes their softmax again from the logsumexp: 2 R K E operations
more, but no (R, K) in memory and no atomics. Which numbers are added in which order depends on shapes and the kind of GPU only.

Operands are bf16 or fp16, everything else is float32 in registers. A softmax over 65,536 prototypes lies below fp16's
normal numbers (6e-5), so exponentials are lifted by 2^15, and the values of an outer sum, which hold the small weight of a row
in the total, are divided by their largest. Both are exact or harmless in bf16, which so takes the same way.

Letters: R rows, E embedding width, K prototypes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LIFT = 15 * math.log(2)  # of exponents: the largest exponential is 2^15, and fp16 ends at 2^16
# Two stages of loading ahead, and a * b + c in one operation: Triton's default, which it means to change, and warns.
LAUNCH = {"num_stages": 2, "enable_fp_fusion": True}


@dataclass(frozen=True)
class _Tiles:
    """owned: rows (in _outer prototypes) that a program has for itself; walked: prototypes (rows) it takes in one product."""

    owned: int
    walked: int
    warps: int


LARGE = _Tiles(owned=128, walked=64, warps=8)  # E = 256: 144 KB of shared memory on an A100, 192 KB on an H100
SMALL = _Tiles(owned=64, walked=32, warps=4)  # for GPUs that have 99 KB
LARGE_BYTES = 160 * 2**10


@dataclass(frozen=True)
class _Device:
    """tiles, and programs: how many keep it busy."""

    tiles: _Tiles
    programs: int

    @classmethod
    def of(cls, device: torch.device) -> "_Device":
        if device.type != "cuda":  # Triton's interpreter
            return cls(tiles=SMALL, programs=4)
        properties = torch.cuda.get_device_properties(device)
        tiles = LARGE if properties.shared_memory_per_block_optin >= LARGE_BYTES else SMALL
        return cls(tiles=tiles, programs=2 * properties.multi_processor_count)


@triton.jit(do_not_specialize=["row_count", "split_size"])
def _attend(
    row_pointer,  # (R, E)
    key_pointer,  # (K, E)
    value_pointer,  # (K, E)
    shift_pointer,  # (K,)
    logsumexp_pointer,  # (splits, R)
    mean_pointer,  # (splits, R, E)
    row_count,
    prototype_count,
    split_size,  # prototypes of one split, a multiple of block_prototypes
    width: tl.constexpr,  # E
    block_rows: tl.constexpr,
    block_prototypes: tl.constexpr,
    is_own: tl.constexpr,  # values are the keys
    lift: tl.constexpr,
):
    """Logsumexp and mean value of the logits `rows @ keys.T - shift`, over one split of the prototypes."""
    split = tl.program_id(1)
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    columns = tl.arange(0, width)
    embeddings = tl.load(row_pointer + rows[:, None] * width + columns[None, :], mask=rows[:, None] < row_count, other=0.0)
    largest = tl.full([block_rows], float("-inf"), tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    mean = tl.zeros([block_rows, width], tl.float32)
    end = tl.minimum(split * split_size + split_size, prototype_count)
    for start in range(split * split_size, end, block_prototypes):
        prototypes = start + tl.arange(0, block_prototypes)
        places = prototypes[:, None] * width + columns[None, :]
        keys = tl.load(key_pointer + places, mask=prototypes[:, None] < prototype_count, other=0.0)
        logits = tl.dot(embeddings, tl.trans(keys))
        # Beyond the last prototype the shift is infinite, and the exponential 0.
        logits -= tl.load(shift_pointer + prototypes, mask=prototypes < prototype_count, other=float("inf"))[None, :]
        larger = tl.maximum(largest, tl.max(logits, 1))
        exponentials = tl.exp(logits - (larger - lift)[:, None])
        rescale = tl.exp(largest - larger)
        total = total * rescale + tl.sum(exponentials, 1)
        values = keys if is_own else tl.load(value_pointer + places, mask=prototypes[:, None] < prototype_count, other=0.0)
        mean = tl.dot(exponentials.to(values.dtype), values, mean * rescale[:, None])
        largest = larger
    tl.store(logsumexp_pointer + split * row_count + rows, largest + tl.log(total) - lift, mask=rows < row_count)
    places = (split * row_count + rows)[:, None] * width + columns[None, :]
    tl.store(mean_pointer + places, mean / total[:, None], mask=rows[:, None] < row_count)


@triton.jit(do_not_specialize=["row_count", "split_count"])
def _combine(
    split_logsumexp_pointer,  # (splits, R)
    split_mean_pointer,  # (splits, R, E)
    logsumexp_pointer,  # (R,)
    mean_pointer,  # (R, E)
    row_count,
    split_count,
    width: tl.constexpr,  # E
    padded_splits: tl.constexpr,  # a power of two, as many as split_count or more
    block_splits: tl.constexpr,  # divides padded_splits
):
    """Logsumexp and mean of one row over all prototypes, from those over splits of them."""
    row = tl.program_id(0)
    columns = tl.arange(0, width)
    all_splits = tl.arange(0, padded_splits)
    all_parts = tl.load(split_logsumexp_pointer + all_splits * row_count + row, mask=all_splits < split_count, other=float("-inf"))
    largest = tl.max(all_parts, 0)
    logsumexp = largest + tl.log(tl.sum(tl.exp(all_parts - largest), 0))
    tl.store(logsumexp_pointer + row, logsumexp)
    mean = tl.zeros([width], tl.float32)
    for start in range(0, split_count, block_splits):
        splits = start + tl.arange(0, block_splits)
        parts = tl.load(split_logsumexp_pointer + splits * row_count + row, mask=splits < split_count, other=float("-inf"))
        places = (splits * row_count + row)[:, None] * width + columns[None, :]
        means = tl.load(split_mean_pointer + places, mask=splits[:, None] < split_count, other=0.0)
        mean += tl.sum(tl.exp(parts - logsumexp)[:, None] * means, 0)
    tl.store(mean_pointer + row * width + columns, mean)


@triton.jit(do_not_specialize=["row_count"])
def _outer(
    row_pointer,  # (R, E)
    key_pointer,  # (K, E)
    shift_pointer,  # (K,)
    logsumexp_pointer,  # (R,)
    value_pointer,  # (R, E)
    scale_pointer,  # (1,)
    sum_pointer,  # (K, E)
    row_count,
    prototype_count,
    width: tl.constexpr,  # E
    block_rows: tl.constexpr,
    block_prototypes: tl.constexpr,
    lift: tl.constexpr,
):
    """Add softmax.T @ values, times scale, to the sum: the softmax is that of the logits `rows @ keys.T - shift`, times 2^15."""
    prototypes = tl.program_id(0) * block_prototypes + tl.arange(0, block_prototypes)
    columns = tl.arange(0, width)
    places = prototypes[:, None] * width + columns[None, :]
    keys = tl.load(key_pointer + places, mask=prototypes[:, None] < prototype_count, other=0.0)
    shift = tl.load(shift_pointer + prototypes, mask=prototypes < prototype_count, other=0.0)
    is_real = prototypes[:, None] < prototype_count
    scale = tl.load(scale_pointer)
    outer = tl.load(sum_pointer + places, mask=is_real, other=0.0) / scale
    for start in range(0, row_count, block_rows):
        rows = start + tl.arange(0, block_rows)
        row_places = rows[:, None] * width + columns[None, :]
        embeddings = tl.load(row_pointer + row_places, mask=rows[:, None] < row_count, other=0.0)
        # Beyond the last row the logsumexp is infinite, and the softmax 0.
        logsumexp = tl.load(logsumexp_pointer + rows, mask=rows < row_count, other=float("inf"))
        logits = tl.dot(keys, tl.trans(embeddings)) - shift[:, None]
        softmax = tl.exp(logits - (logsumexp - lift)[None, :])
        values = tl.load(value_pointer + row_places, mask=rows[:, None] < row_count, other=0.0)
        outer = tl.dot(softmax.to(values.dtype), values, outer)
    tl.store(sum_pointer + places, outer * scale, mask=is_real)


class FusedAssignments:
    """`Assignments` of rows to the prototypes `matrix` (K, E) in bf16 or fp16, with E of choice.WIDTHS. What comes out is float32."""

    def __init__(self, matrix: Tensor):
        self._matrix = matrix.contiguous()
        self._device = _Device.of(matrix.device)
        self._sum: Tensor | None = None

    def blocks(self, embeddings: Tensor, matrix: Tensor, shift: Tensor | None = None) -> Iterator[tuple[slice, "_Rows"]]:
        """As in Assignments; all rows are one block."""
        if len(embeddings):
            yield slice(0, len(embeddings)), _Rows(self, embeddings.to(matrix.dtype).contiguous(), matrix.contiguous(), shift)

    def can_keep(self, rows: int) -> bool:
        return True

    def outer_sum(self) -> Tensor:
        if self._sum is None:
            self._sum = torch.zeros(self._matrix.shape, device=self._matrix.device)
        return self._sum

    def attend(self, rows: Tensor, keys: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Logsumexp (R,) of the logits `rows @ keys.T - shift` and the student's mean prototype (R, E) under their softmax.

        rows (R, E) and keys (K, E) contiguous, in the dtype of the products; shift (K,) in float32.
        """
        (row_count, width), count, tiles = rows.shape, len(keys), self._device.tiles
        row_blocks = triton.cdiv(row_count, tiles.owned)
        tile_count = triton.cdiv(count, tiles.walked)
        split_size = triton.cdiv(tile_count, triton.cdiv(self._device.programs, row_blocks)) * tiles.walked
        splits = triton.cdiv(count, split_size)
        logsumexp = torch.empty(splits, row_count, device=rows.device)
        mean = torch.empty(splits, row_count, width, device=rows.device)
        _attend[(row_blocks, splits)](
            rows,
            keys,
            self._matrix,
            shift,
            logsumexp,
            mean,
            row_count,
            count,
            split_size,
            width=width,
            block_rows=tiles.owned,
            block_prototypes=tiles.walked,
            is_own=keys.data_ptr() == self._matrix.data_ptr(),
            lift=LIFT,
            num_warps=tiles.warps,
            **LAUNCH,
        )
        return (logsumexp[0], mean[0]) if splits == 1 else _combined(logsumexp, mean)

    def add_outer(self, rows: Tensor, keys: Tensor, shift: Tensor, logsumexp: Tensor, values: Tensor) -> None:
        """Add softmax.T @ values, with values (R, E), to the `outer_sum`; the rest as `attend` took and gave it."""
        total, tiles = self.outer_sum(), self._device.tiles
        scale = _power_of_two_above(values)
        _outer[(triton.cdiv(len(keys), tiles.owned),)](
            rows,
            keys,
            shift,
            logsumexp,
            (values / scale).to(rows.dtype),
            scale * 2.0**-15,
            total,
            len(rows),
            len(keys),
            width=rows.shape[1],
            block_rows=tiles.walked,
            block_prototypes=tiles.owned,
            lift=LIFT,
            num_warps=tiles.warps,
            **LAUNCH,
        )


class _Rows:
    """The softmax of all rows: kept as what it is made of."""

    def __init__(self, assignments: FusedAssignments, rows: Tensor, keys: Tensor, shift: Tensor | None):
        self._assignments, self._rows, self._keys = assignments, rows, keys
        self._shift = torch.zeros(len(keys), device=keys.device) if shift is None else shift.float().flatten()
        self.logsumexp, self._mean = assignments.attend(rows, keys, self._shift)

    def mean(self) -> Tensor:
        return self._mean

    def add_outer(self, values: Tensor) -> None:
        self._assignments.add_outer(self._rows, self._keys, self._shift, self.logsumexp, values)


def _combined(logsumexp: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Over all splits: logsumexp (R,) of (splits, R), and mean (R, E) of (splits, R, E)."""
    splits, row_count, width = mean.shape
    whole_logsumexp, whole_mean = torch.empty_like(logsumexp[0]), torch.empty_like(mean[0])
    padded_splits = triton.next_power_of_2(splits)
    _combine[(row_count,)](
        logsumexp,
        mean,
        whole_logsumexp,
        whole_mean,
        row_count,
        splits,
        width=width,
        padded_splits=padded_splits,
        block_splits=min(16, padded_splits),
        **LAUNCH,
    )
    return whole_logsumexp, whole_mean


def _power_of_two_above(values: Tensor) -> Tensor:
    """(): above all magnitudes, but not below 2^-80, where dividing the sum so far by it could overflow."""
    peak = values.abs().amax().clamp_min(2.0**-80)
    mantissa, _ = torch.frexp(peak)
    return peak / mantissa
