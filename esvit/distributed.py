"""Communication between ranks. Every function is the identity with one process, so no caller ever asks."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    return dist.get_world_size() if is_active() else 1


def environment_world_size() -> int:
    """How many ranks the launcher announced in WORLD_SIZE; 1 when there is no launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def mean(tensor: Tensor) -> Tensor:
    """Mean of `tensor` over ranks, of the same shape; carries no gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def minimum(tensor: Tensor) -> Tensor:
    """Elementwise minimum of `tensor` over ranks; carries no gradient."""
    if world_size() == 1:
        return tensor
    lowest = tensor.detach().clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return lowest


def gather_objects(thing: Any) -> list[Any]:
    """One picklable object per rank, in rank order, on every rank."""
    if world_size() == 1:
        return [thing]
    things: list[Any] = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def broadcast_object(thing: Any) -> Any:
    """Rank 0's object on every rank."""
    if world_size() == 1:
        return thing
    box = [thing]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_rank_zero(function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, on every rank; an exception there is raised on every rank."""
    result, error = None, None
    if rank() == 0:
        try:
            result = function()
        except Exception as exception:
            error = exception
    result, error = broadcast_object((result, error))
    if error is not None:
        raise error
    return result


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenation over ranks of tensors (n_rank, ...) whose first sizes may differ; carries no gradient."""
    if world_size() == 1:
        return rows
    counts = gather_objects(rows.shape[0])
    longest = max(counts)
    padded = torch.zeros((longest, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    padded[: rows.shape[0]] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
