"""Communication between ranks. Every function is the identity with one process, so no caller ever asks."""

import os
import sys
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
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


def joined(rows: Tensor) -> Tensor:
    """Concatenation over ranks of tensors (r, ...) of one shape, in the order of the ranks; carries no gradient."""
    if world_size() == 1:
        return rows
    everyones = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
    dist.all_gather_into_tensor(everyones, rows.detach().contiguous())
    return everyones


def sum_of_rows(rows: Tensor) -> Tensor:
    """This rank's part (r, ...) of the sum over ranks of tensors (n r, ...), n ranks; carries no gradient."""
    if world_size() == 1:
        return rows
    own = rows.new_empty((len(rows) // world_size(), *rows.shape[1:]))
    dist.reduce_scatter_tensor(own, rows.detach().contiguous())
    return own


def own_part(tensor: Tensor, *, dim: int) -> Tensor:
    """This rank's of equal parts of a tensor that every rank has."""
    return tensor.chunk(world_size(), dim=dim)[rank()]


# ---------------------------------------------------------------------------------------------------- tensors in shares


def is_sharded(thing: Any) -> TypeGuard["DTensor"]:
    """Whether it is a tensor of which each rank has a share only."""
    loaded = sys.modules.get("torch.distributed.tensor")  # its import takes seconds, which only those wait who shard
    return loaded is not None and isinstance(thing, loaded.DTensor)


def shares(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's share of each, and what is whole as it is; they have the memory of `tensors`."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norms (n,) of the n tensors, which may be in shares; one communication for all whose shares lie alike."""
    found = torch.stack(list(torch._foreach_norm(shares(tensors))))
    spreads = [spread(tensor) for tensor in tensors]
    for each in dict.fromkeys(each for each in spreads if each is not None):
        places = [number for number, other in enumerate(spreads) if other == each]
        members = torch.tensor(places).to(found.device)
        example = tensors[places[0]]
        assert is_sharded(example)
        (dimension,) = (number for number, placement in enumerate(example.placements) if placement.is_shard())
        squares = found[members].square()
        dist.all_reduce(squares, group=example.device_mesh.get_group(dimension))
        found = found.index_copy(0, members, squares.sqrt())
    return found


@dataclass(frozen=True)
class Scattered:
    """A whole tensor of which only boxes are at hand, as a checkpoint in shares has it.

    pieces  where in the whole each begins, and its values; together they are all of it
    """

    shape: tuple[int, ...]
    pieces: list[tuple[tuple[int, ...], Tensor]]

    def box(self, begin: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A copy of what begins there; only pieces that reach into it are looked at."""
        found = torch.empty(shape, dtype=self.pieces[0][1].dtype)
        for start, values in self.pieces:
            lows = [max(a, b) for a, b in zip(begin, start, strict=True)]
            highs = [min(a + n, b + m) for a, n, b, m in zip(begin, shape, start, values.shape, strict=True)]
            if all(low < high for low, high in zip(lows, highs, strict=True)):
                there = tuple(slice(low - a, high - a) for low, high, a in zip(lows, highs, begin, strict=True))
                here = tuple(slice(low - b, high - b) for low, high, b in zip(lows, highs, start, strict=True))
                found[there] = values[here]
        return found

    def whole(self) -> Tensor:
        return self.box((0,) * len(self.shape), self.shape)


def begin_of_share(tensor: "DTensor") -> tuple[int, ...]:
    """Where in the whole tensor this rank's share begins."""
    from torch.distributed.tensor import Shard

    begin, shape = [0] * tensor.ndim, list(tensor.shape)
    for position, ways, placement in zip(_position(tensor), tensor.device_mesh.shape, tensor.placements, strict=True):
        if type(placement) is Shard:
            size = shape[placement.dim]
            length = -(-size // ways)  # as torch.chunk has it: the last ones may be shorter, or empty
            first = min(length * position, size)
            begin[placement.dim] += first
            shape[placement.dim] = min(length, size - first)
        elif not placement.is_replicate():
            raise ValueError(f"nobody knows where a share of {placement} begins")
    assert tuple(shape) == tuple(tensor.to_local().shape)
    return tuple(begin)


def is_first_copy(tensor: "DTensor") -> bool:
    """Whether no rank before this one has the same share."""
    copies = [place for place, placement in zip(_position(tensor), tensor.placements, strict=True) if placement.is_replicate()]
    return not any(copies)


def _position(tensor: "DTensor") -> list[int]:
    position = tensor.device_mesh.get_coordinate()
    assert position is not None, "all ranks have a share"
    return list(position)


def gathered(state: Any, *, everywhere: bool) -> Any:
    """The same containers with whole tensors, those that were in shares on the CPU in memory of their own; all ranks call it together.

    everywhere  on every rank; otherwise ranks other than 0, where memory for it is lacking, get empty tensors instead
    """
    if isinstance(state, dict):
        return type(state)((name, gathered(value, everywhere=everywhere)) for name, value in state.items())
    if isinstance(state, (list, tuple)):
        return type(state)(gathered(value, everywhere=everywhere) for value in state)
    if not is_sharded(state):
        return state
    whole = state.full_tensor()
    return whole.to("cpu", copy=True) if everywhere or rank() == 0 else whole.new_empty(0)


def from_share(share: Tensor, *, like: Tensor) -> Tensor:
    """The tensor of which each rank has `share`, in shares as `like` is."""
    assert is_sharded(like)
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(share, like.device_mesh, like.placements, run_check=False)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be in shares, on every rank, which all call it together; carries no gradient."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def spread(tensor: Tensor) -> Hashable:
    """How its shares lie, the same for tensors that one kernel takes together; None where it is whole."""
    return (tensor.device_mesh, tuple(tensor.placements)) if is_sharded(tensor) else None


def shared_like(whole: Tensor | Scattered, ours: Tensor) -> Tensor:
    """`whole`, which every rank has, in shares as `ours` is; all of it where `ours` is whole. Of what is scattered only that is read."""
    if not is_sharded(ours):
        return whole.whole() if isinstance(whole, Scattered) else whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(whole, Scattered):
        share = whole.box(begin_of_share(ours), tuple(ours.to_local().shape)).to(ours.device)
        return DTensor.from_local(share, ours.device_mesh, ours.placements, run_check=False, shape=ours.shape, stride=ours.stride())
    return distribute_tensor(whole.to(ours.device), ours.device_mesh, ours.placements, src_data_rank=None)


# ---------------------------------------------------------------------------------------------------- whole networks


def over_ranks(network: nn.Module, *, device: torch.device, deterministic: bool) -> nn.Module:
    """The network, its gradients averaged over ranks, but for those of what is in shares already.

    Buffers (batch norm's statistics, which training never reads) are not broadcast.

    deterministic  a resumed run rounds as one that was never stopped, with more than two ranks too
    """
    if world_size() == 1:
        return network
    if in_shares := [name for name, parameter in network.named_parameters() if is_sharded(parameter)]:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, in_shares)  # torch has no other way
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
