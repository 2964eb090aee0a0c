"""What the losses ask of a softmax of rows over K prototypes, which is too large to be kept: there are several ways to compute it.

Letters: R rows, r rows of one block, E embedding width, K prototypes.
"""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Assignment(Protocol):
    """The softmax of a block of rows over the prototypes; logsumexp (r,) of their logits."""

    logsumexp: Tensor

    def mean(self) -> Tensor:
        """(r, E): the student's mean prototype under each row's softmax."""

    def add_outer(self, values: Tensor) -> None:
        """Add softmax.T @ values, with values (r, E), to the `outer_sum`."""


class Assignments(Protocol):
    """One way to compute them, for one matrix of the student's prototypes."""

    def blocks(self, embeddings: Tensor, matrix: Tensor, shift: Tensor | None = None) -> Iterator[tuple[slice, Assignment]]:
        """Which rows, and their softmax over the logits `embeddings @ matrix.T - shift`; it may hold only until the next block.

        embeddings (R, E), divided by the temperature; matrix (K, E); shift (1, K).
        """

    def can_keep(self, rows: int) -> bool:
        """Whether so many rows are one block, which holds for good and is small beside the prototypes' gradient."""

    def outer_sum(self) -> Tensor:
        """(K, E): what was added so far."""
