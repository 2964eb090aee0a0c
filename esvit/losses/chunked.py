"""Softmax over prototypes chunk of rows by chunk of rows, with torch's own matrix products: on every device, in every precision.

One buffer holds the float32 logits of a chunk, and then their softmax.

Letters: r rows of a chunk, E embedding width, K prototypes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Size of one chunk of float32 logits. CPU: 256 rows of 65,536 prototypes, from where the matrix
# products, each of which reads all prototypes once per chunk, gain no more by more rows. Elsewhere: 1,024 rows, to fill the device.
CPU_CHUNK_BYTES = 64 * 2**20
DEVICE_CHUNK_BYTES = 256 * 2**20
FEW = 1 / 4  # of a chunk's rows: a product of fewer takes as long as reading and writing the prototypes' gradient


class ChunkedAssignments:
    """`Assignments` of rows to the prototypes `matrix` (K, E), whose dtype is that of the matrix products; dtype: of everything else.

    Float16 alone needs care: its normal numbers end at 6e-5 and 65,504, and a probability of a 65,536-way softmax as well as
    the weight of one row in the total are below. Both are scaled up, so far that their product, summed over a chunk, still fits.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype):
        budget = CPU_CHUNK_BYTES if matrix.device.type == "cpu" else DEVICE_CHUNK_BYTES
        self._rows = max(1, budget // (4 * len(matrix)))
        self._few = int(self._rows * FEW)
        self._is_exact = matrix.dtype == dtype
        self._lift = 2.0**15 / self._rows if matrix.dtype == torch.float16 else 1.0
        self._matrix, self._dtype = matrix, dtype
        self._sum: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []  # softmax and values of few rows, which wait until there are more of them

    def blocks(self, embeddings: Tensor, matrix: Tensor, shift: Tensor | None = None) -> Iterator[tuple[slice, "_Chunk"]]:
        """As in Assignments; the chunks share one buffer."""
        buffer = embeddings.new_empty(min(len(embeddings), self._rows), len(matrix))
        for start in range(0, len(embeddings), self._rows):
            rows = slice(start, min(start + self._rows, len(embeddings)))
            yield rows, _Chunk(self, *self._softmax(buffer[: rows.stop - start], embeddings[rows], matrix, shift))

    def can_keep(self, rows: int) -> bool:
        return rows <= self._few

    def outer_sum(self) -> Tensor:
        self._add_waiting()
        return self._total()

    def _softmax(self, logits: Tensor, embeddings: Tensor, matrix: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Softmax (r, K) over the logits `embeddings @ matrix.T - shift`, and their logsumexp (r,).

        The softmax takes the place of `logits`; it comes in the dtype of the products and times `lift`, ready for them.
        """
        if self._is_exact:
            torch.mm(embeddings, matrix.T, out=logits)
        else:
            logits.copy_(embeddings.to(matrix.dtype) @ matrix.T)
        if shift is not None:
            logits.sub_(shift)
        largest = logits.amax(dim=1)
        probabilities = torch.softmax(logits, dim=1, out=logits)
        # The largest logit is also its own probability's logarithm plus the logsumexp: cheaper than a second sum of exponentials.
        logsumexp = largest - probabilities.amax(dim=1).log()
        if self._lift != 1:
            probabilities.mul_(self._lift)
        return probabilities.to(matrix.dtype), logsumexp

    def mix(self, softmax: Tensor) -> Tensor:
        """(r, E): the mean prototype under each row's softmax."""
        return (softmax @ self._matrix).to(self._dtype) / self._lift

    def add(self, softmax: Tensor, values: Tensor) -> None:
        """softmax (r, K), which may be overwritten afterwards; values (r, E)."""
        if len(values) > self._few:
            self._add_outer(softmax, values)
            return
        if sum(len(waiting) for _, waiting in self._waiting) + len(values) > self._few:
            self._add_waiting()
        self._waiting.append((softmax.clone(), values))

    def _add_waiting(self) -> None:
        if self._waiting:
            softmax, values = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._add_outer(softmax, values)
            self._waiting.clear()

    def _add_outer(self, softmax: Tensor, values: Tensor) -> None:
        """Accumulated in float32; at most a chunk of rows."""
        total = self._total()
        if self._is_exact:
            total.addmm_(softmax.T, values)
        elif softmax.dtype == torch.float16:
            peak = values.abs().amax().clamp_min(torch.finfo(values.dtype).tiny)
            total += (softmax.T @ (values / peak).half()).float() * (peak / self._lift)
        else:
            total += softmax.T @ values.to(softmax.dtype)

    def _total(self) -> Tensor:
        if self._sum is None:
            self._sum = torch.zeros(self._matrix.shape, dtype=self._dtype, device=self._matrix.device)
        return self._sum


class _Chunk:
    def __init__(self, assignments: ChunkedAssignments, softmax: Tensor, logsumexp: Tensor):
        self._assignments, self._softmax = assignments, softmax
        self.logsumexp = logsumexp

    def mean(self) -> Tensor:
        return self._assignments.mix(self._softmax)

    def add_outer(self, values: Tensor) -> None:
        self._assignments.add(self._softmax, values)
