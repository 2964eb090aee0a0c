"""Prototypes in shares, on two and on four processes, against one process that has them all; and what goes over the wire.

The processes are forked from one that has imported everything, started once for this module.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from esvit import distributed
from esvit.errors import OptionError
from esvit.losses import chunked
from esvit.losses.base import MatchingLoss
from esvit.losses.combined import ViewRegionLoss
from esvit.losses.view import ViewLoss
from esvit.optimizers import SGD
from esvit.records import NetworkOutput, PrototypeWeights
from esvit.runtime import Runtime
from esvit.tasks import sharding
from esvit.tasks.plan_ranks import HeadRows, Traffic, rows_of_step
from esvit.teacher import Teacher
from tests.losses.outputs import Batch
from tests.losses.test_losses import view_loss, view_region_loss
from tests.tasks.test_sharding import ALL_CLIPPED, EACH_CLIPPED, EMBEDDING, HEADS, IMAGES, Trial, Wire, assert_close, resumed
from tests.test_networks import NOW, State, make_crops, make_network, part, relative_distance

PROTOTYPES = 32
STEPS = 3
LAYOUT = [6, 6, 2], [6, 6]
LOSSES: dict[str, Callable[[Batch], ViewLoss | ViewRegionLoss]] = {"view": view_loss, "view_region": view_region_loss}
TRIALS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "none": {"kind": "none", "optimizer": EACH_CLIPPED},
        "fsdp": {"kind": "fsdp", "optimizer": EACH_CLIPPED},
        "accumulated": {"kind": "none", "optimizer": EACH_CLIPPED, "accumulation": 2},
        "accumulated fsdp": {"kind": "fsdp", "optimizer": EACH_CLIPPED, "accumulation": 2},
    },
    4: {"none": {"kind": "none", "optimizer": ALL_CLIPPED}, "hsdp": {"kind": "hsdp", "optimizer": ALL_CLIPPED}},
}


def trial(**changes: Any) -> Trial:
    return Trial(prototypes=PROTOTYPES, **changes)


def run_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    """One of the processes, with its part of the batch; writes `<rank>_of_<ranks>.pt`."""
    environment = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    found: dict[str, Any] = {}
    with Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1.0, stall_minutes=0):
        for name in LOSSES:
            for mixed in (False, True):
                found[f"{name} {mixed}"] = loss_of_rank(name, mixed=mixed, rank=rank, ranks=ranks)
        found["bf16"] = loss_of_rank("view_region", mixed=False, rank=rank, ranks=ranks, dtype=torch.float32)
        trials = {}
        for name, options in TRIALS[ranks].items():
            made = trials[name] = trial(shard_prototypes=True, **options)
            found[f"{name} share"] = sum(each.numel() for each in distributed.shares(list(made.network.view_prototypes.parameters())))
            with Wire() as wire:
                made.steps(rank=rank, ranks=ranks, micro_batches=options.get("accumulation", 1), count=STEPS, frozen=1)
            found[f"{name} wire"] = wire.bytes
            found[name] = answer(made)
        if ranks == 2:
            before = trial(shard_prototypes=True)
            masked = trial(shard_prototypes=True).steps(rank=rank, ranks=ranks, sound=False)
            found["masked"] = [before.everything(), masked.everything()]
            found["bad"] = run_into_a_bad_pixel(rank)
            whole = trial().steps(rank=rank, ranks=ranks)
            found["whole"] = whole.everything()
            found["from shares"] = resumed(trials["none"], folder=folder / "from", prototypes=PROTOTYPES)
            found["to shares"] = resumed(whole, folder=folder / "to", prototypes=PROTOTYPES, shard_prototypes=True)
            found["to all shares"] = resumed(whole, folder=folder / "all", prototypes=PROTOTYPES, shard_prototypes=True, kind="fsdp")
    torch.save(found, folder / f"{rank}_of_{ranks}.pt")


def run_into_a_bad_pixel(rank: int) -> dict[str, Any]:
    """A step with an infinite pixel on rank 1 alone."""
    crops, made = part(make_crops(images=IMAGES), rank, 2), trial(shard_prototypes=True)
    if rank == 1:
        crops[0][0, 0, 0, 0] = float("inf")
    result = made.distillation.step([crops], NOW, sound=torch.tensor(True), rng=np.random.default_rng(0))
    return {"state": made.everything(), "finite": bool(result.finite), "finite here": bool(result.finite_here)}


def answer(made: Trial) -> dict[str, Any]:
    return {"state": made.everything(), "gradients": made.gradients, "losses": made.loss_values}


def loss_of_rank(name: str, *, mixed: bool, rank: int, ranks: int, dtype: torch.dtype = torch.float64) -> State:
    """Total, gradients and centre by the images of a rank, in chunks of a few rows; with one rank by all of them.

    In float32 under bfloat16's autocast.
    """
    budget, chunked.CPU_CHUNK_BYTES = chunked.CPU_CHUNK_BYTES, 10 * PROTOTYPES // ranks * 4
    batch = Batch(LAYOUT, images=2 * 4, prototypes=PROTOTYPES, dtype=dtype)
    mixing = blocks_of(batch.mixing, 4) if mixed else None
    loss = LOSSES[name](batch)
    own = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    students, teachers = ([part_of(output, own) for output in outputs] for outputs in (batch.student, batch.teacher))
    prototypes, teacher_prototypes = (in_shares(weights, ranks) for weights in (batch.student_prototypes, batch.teacher_prototypes))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        total = taken_together(loss, students, teachers, prototypes, teacher_prototypes, None if mixing is None else mixing[:, own, own])
    chunked.CPU_CHUNK_BYTES = budget
    loss.update_center(teachers, teacher_prototypes)
    gradients = {
        f"{crop} {level}": getattr(output, level).grad / ranks
        for crop, output in enumerate(students)
        for level in ("view", "region")
        if getattr(output, level).grad is not None
    }
    for level in ("view", "region"):
        gradient = getattr(prototypes, level).grad
        if gradient is not None:
            gradients[f"{level} prototypes"] = distributed.whole(gradient)
    return gradients | {"total": total.detach()} | {name: value.clone() for name, value in loss.named_buffers()}


def taken_together(
    loss: MatchingLoss,
    students: list[NetworkOutput],
    teachers: list[NetworkOutput],
    prototypes: PrototypeWeights,
    teacher_prototypes: PrototypeWeights,
    mixing: Tensor | None,
) -> Tensor:
    """The total, whose gradients are in the students and in the prototypes afterwards; two groups of crops."""
    against = loss.against(teachers, prototypes, teacher_prototypes, 0.05, crops=len(students))
    groups = [against.terms(students[group], group, mixing).total for group in (slice(0, 2), slice(2, 3))]
    total = torch.stack(groups).sum()
    total.backward()
    for weights, gradient in against.prototype_gradients().with_weights(prototypes):
        weights.grad = gradient
    return total


def part_of(output: NetworkOutput, images: slice) -> NetworkOutput:
    assert output.region is not None and output.features is not None
    return NetworkOutput(
        view=output.view.detach()[images].requires_grad_(),
        region=output.region.detach()[images].requires_grad_(),
        features=output.features.detach()[images],
        pooled=output.pooled[images],
    )


def blocks_of(mixing: Tensor, count: int) -> Tensor:
    """(V, B, B) without what mixes images of different ranks, of which there are at most so many."""
    size = mixing.shape[1] // count
    place = torch.arange(mixing.shape[1]) // size
    return mixing * (place[:, None] == place)


def in_shares(weights: PrototypeWeights, ranks: int) -> PrototypeWeights:
    if ranks == 1:
        return weights
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    assert weights.region is not None
    view, region = (distribute_tensor(each.detach(), mesh, [Shard(0)]).requires_grad_() for each in (weights.view, weights.region))
    return PrototypeWeights(view=view, region=region)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process of two, and of four, found; see `run_rank`."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    answers = {}
    for ranks in TRIALS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.start_processes(run_rank, args=(ranks, port, folder), nprocs=ranks, start_method="forkserver")
        answers[ranks] = [torch.load(folder / f"{rank}_of_{ranks}.pt", weights_only=True) for rank in range(ranks)]
    return answers


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_shares_of_the_prototypes_find_the_loss_of_one_process(
    ranks: int, name: str, mixed: bool, found: dict[int, list[dict[str, Any]]]
):
    """In float64: the mean of the totals, the gradients of every embedding and prototype, the centres."""
    expected = loss_of_rank(name, mixed=mixed, rank=0, ranks=1)
    everyone = [rank[f"{name} {mixed}"] for rank in found[ranks]]
    torch.testing.assert_close(sum(each["total"] for each in everyone) / ranks, expected["total"], rtol=1e-13, atol=0)
    for entry, value in expected.items():
        if entry[0].isdigit():
            torch.testing.assert_close(torch.cat([each[entry] for each in everyone]), value, rtol=1e-11, atol=1e-14)
        elif entry != "total":
            for each in everyone:
                torch.testing.assert_close(each[entry], value, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("ranks", [2, 4])
def test_in_bfloat16_shares_round_as_the_whole_does(ranks: int, found: dict[int, list[dict[str, Any]]]):
    exact = loss_of_rank("view_region", mixed=False, rank=0, ranks=1)
    whole = loss_of_rank("view_region", mixed=False, rank=0, ranks=1, dtype=torch.float32)
    for entry in ("total", "view prototypes", "region prototypes"):
        ours = sum(rank["bf16"][entry] for rank in found[ranks]) / ranks
        ours_off, whole_off = ((value.double() - exact[entry]).norm() / exact[entry].norm() for value in (ours, whole[entry]))
        assert ours_off < max(2 * whole_off, 2**-8)


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, trials in TRIALS.items() for name in trials])
def test_several_processes_take_the_steps_of_one(ranks: int, name: str, found: dict[int, list[dict[str, Any]]]):
    """Student, teacher, centres, moments, norms of gradients after three clipped steps, the first with frozen prototypes; its gradients."""
    made = trial(optimizer=TRIALS[ranks][name]["optimizer"]).steps(count=STEPS, frozen=1)
    expected = answer(made)
    first, *_ = everyone = [rank[name] for rank in found[ranks]]
    assert_close(first["state"], expected["state"])
    assert first["gradients"].keys() == expected["gradients"].keys() == dict(made.network.named_parameters()).keys()
    for parameter, gradient in expected["gradients"].items():
        assert relative_distance([first["gradients"][parameter]], [gradient]) < 1e-5, parameter
    losses = torch.tensor([each["losses"] for each in everyone]).mean(dim=0)
    torch.testing.assert_close(losses, torch.tensor(expected["losses"]), rtol=1e-5, atol=0)
    for each in everyone:
        torch.testing.assert_close(each["state"]["norms"], expected["state"]["norms"], rtol=1e-5, atol=0)


def test_a_masked_step_changes_no_bit_of_a_share(found: dict[int, list[dict[str, Any]]]):
    before, after = found[2][0]["masked"]
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "norms")


def test_a_loss_that_is_not_finite_on_one_rank_masks_the_step_on_all_and_is_found_there(found: dict[int, list[dict[str, Any]]]):
    before, _ = found[2][0]["masked"]
    after = found[2][0]["bad"]["state"]
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "norms")
    assert [(rank["bad"]["finite"], rank["bad"]["finite here"]) for rank in found[2]] == [(False, True), (False, False)]


@pytest.mark.parametrize(("way", "before"), [("from shares", "none"), ("to shares", "whole"), ("to all shares", "whole")])
def test_checkpoints_know_nothing_of_shares(way: str, before: str, found: dict[int, list[dict[str, Any]]]):
    saved, ours = found[2][0][before], found[2][0][way]
    saved = saved.get("state", saved)
    assert ours.keys() == saved.keys()
    assert all(torch.equal(ours[name], value) for name, value in saved.items())


def test_a_rank_holds_its_share(found: dict[int, list[dict[str, Any]]]):
    for ranks, trials in TRIALS.items():
        for name in trials:
            assert {rank[f"{name} share"] for rank in found[ranks]} == {PROTOTYPES // ranks * (EMBEDDING + 1)}


@pytest.mark.parametrize(("ranks", "name"), [(2, "none"), (2, "accumulated"), (4, "none")])
def test_the_bytes_on_the_wire_are_those_of_the_model(ranks: int, name: str, found: dict[int, list[dict[str, Any]]]):
    """Crops of 32 and 16 pixels have 16 and 4 regions; two of five are the teacher's."""
    images = IMAGES // ranks
    views, regions = HeadRows(students=5 * images, teachers=2 * images), HeadRows(students=44 * images, teachers=32 * images)
    rows = sum(rows_of_step(each, width=EMBEDDING, product_bytes=4) for each in (views, regions))
    prototypes = 4 * HEADS * PROTOTYPES * (EMBEDDING + 1)
    gradients = 4 * sum(each.numel() for each in make_network(prototypes=PROTOTYPES).parameters()) - prototypes
    traffic = Traffic(
        gradients=gradients if ranks == 2 else 0,  # a deterministic run of more than two gathers them instead
        prototypes=0,
        centres=HEADS * (4 * EMBEDDING,),
        rows=rows,
        logsumexps=4 * sum(each.students + each.teachers for each in (views, regions)),
        norms=4 * 2 * HEADS,
        logits=4 * HEADS * PROTOTYPES,
    )
    wire = found[ranks][0][f"{name} wire"]
    assert wire["allreduce"] == STEPS * traffic.total
    assert wire["allgather_base"] + wire["reduce_scatter_base"] == STEPS * (
        ranks * (traffic.rows + ranks * traffic.logsumexps) + traffic.logits
    )


@pytest.mark.parametrize(
    ("changes", "option", "says"),
    [
        ({"precision": "fp16"}, "precision", "bf16"),
        ({"optimizer": SGD(learning_rate=0.1, momentum=0.9, clip="none", clip_norm=0.0)}, "optimizer", "optimizer=adamw"),
        ({"world_size": 3}, "head.prototypes", "32 cannot be divided among 3 processes"),
    ],
)
def test_prototypes_that_cannot_be_shared_are_refused(changes: dict[str, Any], option: str, says: str):
    possible = {"prototypes": PROTOTYPES, "optimizer": EACH_CLIPPED, "precision": "bf16", "world_size": 4}
    sharding.check_prototypes(**possible)
    with pytest.raises(OptionError) as caught:
        sharding.check_prototypes(**(possible | changes))
    assert caught.value.option == option
    assert says in str(caught.value)


def test_one_process_has_all_prototypes():
    network = make_network()
    before = list(network.parameters())
    sharding.shard_prototypes(network, Teacher(network), device=torch.device("cpu"))
    assert all(ours is theirs for ours, theirs in zip(network.parameters(), before, strict=True))
