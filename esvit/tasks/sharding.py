"""Student and teacher spread over the ranks, block by block: for backbones that with gradients and moments fill a GPU (FSDP2).

Each rank keeps a share of every weight, its gradient, moments and average, and borrows the rest of a block while the block works.
Unusual: the prototypes stay whole on every rank, because the loss uses them outside of the network's forward pass; their gradient is
averaged here. Gradients go over the ranks once a step, in the last pass, as without sharding; until then they are whole on each rank.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from esvit import distributed
from esvit.backbones.base import Backbone
from esvit.errors import OptionError
from esvit.networks import MultiCropNetwork
from esvit.optimizers import AdamW
from esvit.teacher import Teacher

NONE, FSDP, HSDP = "none", "fsdp", "hsdp"
OPTION = "task.sharding"


def is_on(sharding: str) -> bool:
    """Whether anything is spread: there is nothing to spread over with one process."""
    return sharding != NONE and distributed.world_size() > 1


def check(*, network: MultiCropNetwork, optimizer: object, sharding: str, precision: str, world_size: int) -> None:
    """Raises OptionError for what cannot be combined with sharding."""
    if sharding == NONE:
        return
    if precision == "fp16":
        raise OptionError("precision", f"the loss scale of fp16 knows no gradients in shares, which {OPTION}={sharding} makes", "use bf16")
    if not isinstance(optimizer, AdamW):
        raise OptionError("optimizer", f"only AdamW takes weights in shares, which {OPTION}={sharding} makes", "use optimizer=adamw")
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules()):
        raise OptionError(OPTION, f"'{sharding}' needs a network without batch norm", f"use {OPTION}=none, or another backbone or head")
    machine = _processes_of_a_machine(world_size)
    if sharding == HSDP and world_size % machine:
        found = f"'hsdp' needs as many processes on every machine, there are {world_size} with {machine} on this one"
        raise OptionError(OPTION, found, f"use {OPTION}=fsdp, or the same number everywhere")


def shard(student: MultiCropNetwork, teacher: Teacher, *, sharding: str, device: torch.device) -> None:
    """Spread both over all ranks ("fsdp"), or over those of one machine, the machines being copies of each other ("hsdp").

    To be called before the optimizer is made: it takes the shares. With one process, or "none", nothing is done.
    """
    if not is_on(sharding):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # outputs that are views are handed on, and nobody changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    world_size = distributed.world_size()
    machine = _processes_of_a_machine(world_size)
    shape = (world_size,) if sharding == FSDP else (world_size // machine, machine)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copies", "shares")[-len(shape) :])
    for network, has_backward in ((student, True), (teacher.network, False)):
        empty = {parameter for parameter in network.parameters() if parameter.numel() == 0}
        for block in blocks(network.backbone):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=empty)
        for part in _parts(network):  # what is in no block; in the student it is needed again at once, by the backward pass
            fully_shard(part, mesh=mesh, reshard_after_forward=not has_backward, ignored_params=empty)


def blocks(backbone: Backbone) -> list[nn.Module]:
    """What is borrowed and given back as one: its blocks, or for a network that lists none what its outermost lists of modules hold."""
    return backbone.all_blocks() or _listed(backbone)


def _listed(module: nn.Module) -> list[nn.Module]:
    found = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            found += [member for member in child if any(True for _ in member.parameters())]
        else:
            found += _listed(child)
    return found


def send_gradients(network: MultiCropNetwork, *, now: bool) -> None:
    """Whether the next backward pass sends gradients over the ranks, or adds them up here."""
    for part in _parts(network):
        part.set_requires_gradient_sync(now)  # type: ignore[operator]


def average_whole_gradients(network: MultiCropNetwork) -> None:
    """Mean over ranks of the gradients of what is not spread, which nobody else averages."""
    for parameter in network.parameters():
        if parameter.grad is not None and parameter.numel() > 0 and not distributed.is_sharded(parameter):
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(distributed.world_size())


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` has spread it."""
    return any(distributed.is_sharded(parameter) for parameter in network.parameters())


@contextlib.contextmanager
def whole(network: MultiCropNetwork, *, spare: MultiCropNetwork | None, device: torch.device) -> Iterator[MultiCropNetwork]:
    """`network` for evaluations, in which a rank has as many batches as it has: in shares it would wait in every block for the others.

    spare  a copy on the CPU, which takes the weights; None where `network` is whole. All ranks call it together
    """
    if spare is None:
        yield network
        return
    spare.load_state_dict(distributed.gathered(network.state_dict(), everywhere=True))
    yield spare.to(device)
    spare.cpu()


def _parts(network: MultiCropNetwork) -> list[nn.Module]:
    """What is called once in a forward pass of the network, and has no prototypes."""
    return [part for part in (network.backbone, network.view_head, network.region_head) if part is not None]


def _processes_of_a_machine(world_size: int) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
