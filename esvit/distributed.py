"""Communication between ranks. Every function is the identity with one process, so no caller ever asks."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


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


# ---------------------------------------------------------------------------------------------------- tensors in shares


def is_sharded(thing: Any) -> TypeGuard["DTensor"]:
    """Whether it is a tensor of which each rank has a share only."""
    loaded = sys.modules.get("torch.distributed.tensor")  # its import takes seconds, which only those wait who shard
    return loaded is not None and isinstance(thing, loaded.DTensor)


def shares(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's share of each, and what is whole as it is; they have the memory of `tensors`."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norms (n,) of the n tensors, which may be in shares; one communication for all that are."""
    found = torch.stack(list(torch._foreach_norm(shares(tensors))))
    sharded = next((tensor for tensor in tensors if is_sharded(tensor)), None)
    if sharded is None:
        return found
    (dimension,) = (number for number, placement in enumerate(sharded.placements) if placement.is_shard())
    in_shares = torch.tensor([is_sharded(tensor) for tensor in tensors]).to(found.device)
    squares = torch.where(in_shares, found.square(), 0.0)
    dist.all_reduce(squares, group=sharded.device_mesh.get_group(dimension))
    return torch.where(in_shares, squares.sqrt(), found)


def gathered(state: Any, *, everywhere: bool) -> Any:
    """The same containers with whole tensors, those that were in shares on the CPU; all ranks call it together.

    everywhere  on every rank; otherwise ranks other than 0, where memory for it is lacking, get empty tensors instead
    """
    if isinstance(state, dict):
        return type(state)((name, gathered(value, everywhere=everywhere)) for name, value in state.items())
    if isinstance(state, (list, tuple)):
        return type(state)(gathered(value, everywhere=everywhere) for value in state)
    if not is_sharded(state):
        return state
    whole = state.full_tensor()
    return whole.cpu() if everywhere or rank() == 0 else whole.new_empty(0)


def shared_like(whole: Tensor, ours: Tensor) -> Tensor:
    """`whole`, which every rank has, in shares as `ours` is; itself where `ours` is whole."""
    if not is_sharded(ours):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(ours.device), ours.device_mesh, ours.placements, src_data_rank=None)


# ---------------------------------------------------------------------------------------------------- whole networks


def over_ranks(network: nn.Module, *, device: torch.device, deterministic: bool) -> nn.Module:
    """The network, its gradients averaged over ranks (one in shares does so itself).

    Buffers (batch norm's statistics, which training never reads) are not broadcast.

    deterministic  a resumed run rounds as one that was never stopped, with more than two ranks too
    """
    if world_size() == 1 or any(is_sharded(parameter) for parameter in network.parameters()):
        return network
    device_ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():  # torch 2.15 deprecates the only spelling that torch 2.11 knows
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = DistributedDataParallel(network, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    if deterministic and world_size() > 2:
        wrapped.register_comm_hook(None, _average_in_rank_order)
    return wrapped


def _average_in_rank_order(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Mean over ranks of a bucket of gradients, (n,), added up in the order of the ranks.

    An all-reduce adds in an order that depends on the place in the bucket, and DistributedDataParallel rearranges its buckets after the
    first step of a process, which is another step in a run that was resumed. Two numbers have one order only.
    """
    mine = bucket.buffer()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    work = dist.all_gather(parts, mine, async_op=True)
    assert work is not None

    def average(_: torch.futures.Future) -> Tensor:
        mine.copy_(parts[0])
        for part in parts[1:]:
            mine.add_(part)
        return mine.div_(len(parts))

    return work.get_future().then(average)
