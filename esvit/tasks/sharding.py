"""Student and teacher spread over the ranks, block by block: for backbones that with gradients and moments fill a GPU (FSDP2).

Each rank keeps a share of every weight, its gradient, moments and average, and borrows the rest of a block while the block works.
Unusual: the prototypes are apart, because the loss uses them outside of the network's forward pass. They stay whole on every rank, and
their gradient is averaged here, or by an option of their own each rank keeps some of them for good and never sees the others. Gradients
go over the ranks once a step, in the last pass, as without sharding; until then they are whole on each rank.
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
PROTOTYPES_OPTION = "task.shard_prototypes"


def is_on(sharding: str) -> bool:
    """Whether anything is spread: there is nothing to spread over with one process."""
    return sharding != NONE and distributed.world_size() > 1


def check(*, network: MultiCropNetwork, optimizer: object, sharding: str, precision: str, world_size: int) -> None:
    """Raises OptionError for what cannot be combined with sharding."""
    if sharding == NONE:
        return
    _check_that_shares_are_taken(f"{OPTION}={sharding}", optimizer, precision)
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules()):
        raise OptionError(OPTION, f"'{sharding}' needs a network without batch norm", f"use {OPTION}=none, or another backbone or head")
    machine = _processes_of_a_machine(world_size)
    if sharding == HSDP and world_size % machine:
        found = f"'hsdp' needs as many processes on every machine, there are {world_size} with {machine} on this one"
        raise OptionError(OPTION, found, f"use {OPTION}=fsdp, or the same number everywhere")


def check_prototypes(*, prototypes: int, optimizer: object, precision: str, world_size: int) -> None:
    """Raises OptionError for what cannot be combined with prototypes in shares."""
    _check_that_shares_are_taken(f"{PROTOTYPES_OPTION}=true", optimizer, precision)
    if prototypes % world_size:
        found = f"{prototypes} cannot be divided among {world_size} processes, as {PROTOTYPES_OPTION}=true asks"
        raise OptionError("head.prototypes", found, f"use {prototypes - prototypes % world_size or world_size} for example")


def _check_that_shares_are_taken(made_by: str, optimizer: object, precision: str) -> None:
    if precision == "fp16":
        raise OptionError("precision", f"the loss scale of fp16 knows no gradients in shares, which {made_by} makes", "use bf16")
    if not isinstance(optimizer, AdamW):
        raise OptionError("optimizer", f"only AdamW takes weights in shares, which {made_by} makes", "use optimizer=adamw")


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


def shard_prototypes(student: MultiCropNetwork, teacher: Teacher, *, device: torch.device) -> None:
    """Give each rank K / n rows of all prototypes: their weights, hence their gradient, moments and average. The loss (losses/sharded.py)
    sends the embeddings of all ranks to them.

    To be called before the optimizer is made, and with the same weights on every rank. With one process nothing is done.
    """
    if distributed.world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh(device.type, (distributed.world_size(),), mesh_dim_names=("prototypes",))
    for network in (student, teacher.network):
        for prototypes in [each for each in (network.view_prototypes, network.region_prototypes) if each is not None]:
            for name, parameter in list(prototypes.named_parameters()):
                own = distributed.own_part(parameter.detach(), dim=0).clone()  # a part would keep the whole alive
                spread = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
                prototypes.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))


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


def is_sharded(network: MultiCropNetwork) -> bool:
    """Whether `shard` has spread it."""
    return any(distributed.is_sharded(parameter) for part in _parts(network) for parameter in part.parameters())


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
