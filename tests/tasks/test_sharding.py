"""Student and teacher in shares, on two and on four processes, against one process; and what goes over the wire.

The processes are forked from one that has imported everything, started once for this module.
"""

import contextlib
import multiprocessing
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.fsdp  # imported once, by the process that the others are forked from
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esvit import distributed
from esvit.checkpoint_writing import CheckpointWriter
from esvit.checkpoints import LATEST, CheckpointFolder, has_checkpoint, load_checkpoint_file, strict_load
from esvit.errors import OptionError
from esvit.losses.combined import ViewRegionLoss
from esvit.optimizers import SGD, AdamW
from esvit.runtime import Runtime
from esvit.tasks import sharding
from esvit.tasks.distillation import Distillation
from esvit.tasks.plan_ranks import Traffic
from esvit.teacher import Teacher
from tests.test_networks import NOW, PROTOTYPES, State, flat, make_crops, make_network, part

# A large eps: AdamW would else make whole steps of the rounding in a gradient that is zero, and of a clipped gradient what it was before.
EACH_CLIPPED = AdamW(learning_rate=1e-2, betas=[0.9, 0.999], eps=1e-2, clip="parameter", clip_norm=0.05)
ALL_CLIPPED = AdamW(learning_rate=1e-2, betas=[0.9, 0.999], eps=1e-2, clip="global", clip_norm=0.05)
OPTIMIZERS = {2: EACH_CLIPPED, 4: ALL_CLIPPED}  # by the number of processes
KINDS = {2: ("none", "fsdp"), 4: ("none", "fsdp", "hsdp")}
COMBINED: list[dict[str, Any]] = [  # of two processes
    {"kind": "none", "recompute": "blocks"},
    {"kind": "none", "recompute": "mlp", "compiled": True},
    {"kind": "fsdp", "recompute": "attention"},
    {"kind": "fsdp", "recompute": "blocks", "compiled": True},
]
STEPS = 2
IMAGES = 4
HEADS, EMBEDDING = 2, 12
TABLE = torch.arange(29 * 3.0).view(29, 3)


class Trial:
    """A student in shares, or not, with all that a step needs; the same weights at every start.

    loss_values, norms  of this rank, and of the gradients, in each step
    gradients           whole, as the optimizer found them in the first step
    """

    def __init__(
        self,
        *,
        kind: str = "none",
        shard_prototypes: bool = False,
        prototypes: int = PROTOTYPES,
        accumulation: int = 1,
        optimizer: AdamW = EACH_CLIPPED,
        recompute: str = "none",
        compiled: bool = False,
    ):
        runtime = Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1.0, stall_minutes=0)
        self.network = make_network(prototypes=prototypes)
        teacher = Teacher(self.network)
        sharding.shard(self.network, teacher, sharding=kind, device=torch.device("cpu"))
        if shard_prototypes:
            sharding.shard_prototypes(self.network, teacher, device=torch.device("cpu"))
        self.loss = ViewRegionLoss(student_temperature=0.1, center_momentum=0.9, view_weight=0.5, region_weight=0.5, kernel="auto")
        self.loss.setup(prototypes=prototypes)
        self.distillation = Distillation(
            network=self.network,
            loss=self.loss,
            optimizer=optimizer.build(self.network, precision="fp32", device=torch.device("cpu")),
            runtime=runtime,
            global_count=2,
            accumulation=accumulation,
            parts=2,
            mixing=None,
            teacher=teacher,
            phase=self._phase,
        )
        self.network.backbone.recompute(recompute)
        if compiled:
            for each in (self.network, teacher.network):
                each.backbone.compile_blocks("eager")
        self.loss_values: list[float] = []
        self.norms: list[float] = []
        self.gradients: State = {}

    def steps(
        self, *, rank: int = 0, ranks: int = 1, micro_batches: int = 1, sound: bool = True, count: int = STEPS, frozen: int = 0
    ) -> "Trial":
        """frozen: in how many of the first steps the prototypes stay."""
        for seed in range(count):
            now = replace(NOW, last_layer_frozen=seed < frozen)
            mine = part(make_crops(images=IMAGES, seed=seed), rank, ranks)
            batches = [part(mine, number, micro_batches) for number in range(micro_batches)]
            result = self.distillation.step(batches, now, sound=torch.tensor(sound), rng=np.random.default_rng(0))
            self.loss_values.append(float(result.terms.total))
            self.norms.append(float(result.gradient_norm))
        return self

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        if name == "optimizer" and not self.gradients:
            found = {name: each.grad for name, each in self.network.named_parameters() if each.grad is not None}
            self.gradients = {name: distributed.whole(gradient).clone() for name, gradient in found.items()}
        yield

    def everything(self) -> State:
        """All that training changes: student, teacher, centres, moments; and the gradients' norms. Whole on rank 0."""
        state = distributed.gathered(self.distillation.state_dict(), everywhere=False)
        return flat(state | {"optimizer": state["optimizer"]["parameters"]}) | {"norms": torch.tensor(self.norms)}


class Wire(TorchDispatchMode):
    """Bytes that collectives work on, by their name: what comes out of a gathering, what goes into a scattering."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            sizes = [sum(each.nbytes for each in tree_leaves(arg) if isinstance(each, Tensor)) for arg in args]
            self.bytes[name] = self.bytes.get(name, 0) + max(sizes)
        return func(*args, **(kwargs or {}))


def run_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    """One of the processes, with its part of the batch; writes `<rank>_of_<ranks>.pt`."""
    environment = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    found: dict[str, Any] = {}
    with Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1.0, stall_minutes=0):
        trials = {kind: Trial(kind=kind, optimizer=OPTIMIZERS[ranks]) for kind in KINDS[ranks]}
        for kind, trial in trials.items():
            found[f"{kind} share"] = sum(each.numel() for each in distributed.shares(list(trial.network.parameters())))
            with Wire() as wire:
                trial.steps(rank=rank, ranks=ranks)
            found[f"{kind} wire"] = wire.bytes
            found[kind] = trial.everything()
        if ranks == 2:
            found["accumulated"] = Trial(kind="fsdp", accumulation=2).steps(rank=rank, ranks=2, micro_batches=2).everything()
            for number, way in enumerate(COMBINED):
                found[f"combined {number}"] = Trial(**way).steps(rank=rank, ranks=2).everything()
            spare = make_network()
            with sharding.whole(trials["fsdp"].network, spare=spare, device=torch.device("cpu")) as whole:
                found["whole"] = flat(whole.state_dict(), "student/")
            found["masked"] = [Trial(kind="fsdp").everything(), Trial(kind="fsdp").steps(rank=rank, ranks=2, sound=False).everything()]
            found["resumed"] = {
                f"{before} to {after}": resumed(trials[before], kind=after, folder=folder / f"{before}_{after}")
                for before, after in (("fsdp", "fsdp"), ("fsdp", "none"), ("none", "fsdp"))
            }
            found |= written_in_shares(trials["fsdp"], kind="fsdp", folder=folder / "shares_of_2")
            found["after damage"] = fallen_back(folder / "shares_of_2")
            found["after an error"] = failed(folder / "failing")
        else:
            found |= written_in_shares(trials["hsdp"], kind="hsdp", folder=folder / "shares_of_4")
    torch.save(found, folder / f"{rank}_of_{ranks}.pt")


def resumed(trial: Trial, *, folder: Path, **kind: Any) -> State:
    """All that a fresh trial of that kind has that took a checkpoint of `trial`, which rank 0 wrote."""
    state = distributed.gathered(trial.distillation.state_dict(), everywhere=False)
    if distributed.rank() == 0:
        CheckpointFolder(folder, keep=1).save(state, STEPS)
    distributed.barrier()
    return with_state(Trial(**kind), load_checkpoint_file(folder / LATEST), norms=trial.norms)


def with_state(fresh: Trial, loaded: dict[str, Any], *, norms: list[float]) -> State:
    """All that `fresh` has when it goes on from a checkpoint."""
    strict_load(fresh.network, loaded["student"], option="output_dir", what="student")
    strict_load(fresh.distillation.teacher.network, loaded["teacher"], option="output_dir", what="teacher")
    strict_load(fresh.loss, loaded["loss"], option="output_dir", what="loss")
    fresh.distillation.optimizer.load_state_dict(loaded["optimizer"])
    fresh.norms = norms
    return fresh.everything()


def written_in_shares(trial: Trial, *, kind: str, folder: Path) -> dict[str, Any]:
    """Checkpoints in shares, written at once (step 1) and in the background (step 2); what a fresh trial has that resumes from the last.

    Part of the state is a table of 29 rows in shares over all ranks, on a mesh of its own.
    """
    ranks = distributed.world_size()
    table = distribute_tensor(TABLE.clone(), init_device_mesh("cpu", (ranks,)), [Shard(0)])
    for step, background in enumerate((False, True), start=1):
        writer = CheckpointWriter(CheckpointFolder(folder, keep=2), background=background)
        with writer.writing():
            writer.save(trial.distillation.state_dict() | {"table": table, "step": step}, step, in_shares=True)
            if background:
                table.add_(1)  # too late to be in it
    loaded = CheckpointFolder(folder, keep=2).load()
    assert loaded is not None
    begin, share = distributed.begin_of_share(table), table.to_local()
    return {
        "table": [distributed.shared_like(loaded["table"], table).to_local(), TABLE[begin[0] : begin[0] + len(share)].clone()],
        "from shares": with_state(Trial(kind=kind), loaded, norms=trial.norms),
    }


def fallen_back(folder: Path) -> tuple[int, int]:
    """The step that is loaded when the other rank finds its file of step 2 damaged, and the warnings."""
    if distributed.rank() == 0:
        shutil.copytree(folder, damaged := folder.with_name("damaged"))
        share = damaged / "checkpoint_2" / "share_1_of_2.pt"
        share.write_bytes(share.read_bytes()[:-100])
    distributed.barrier()
    with warnings.catch_warnings(record=True) as caught:
        loaded = CheckpointFolder(folder.with_name("damaged"), keep=2).load()
    return -1 if loaded is None else loaded["step"], len(caught)


def failed(folder: Path) -> str:
    """What this rank is told when the other cannot write its share in the background."""
    table = distribute_tensor(TABLE.clone(), init_device_mesh("cpu", (2,)), [Shard(0)])
    writer = CheckpointWriter(CheckpointFolder(folder, keep=1), background=True)
    told = "nothing"
    with pytest.MonkeyPatch.context() as patch:
        if distributed.rank() == 1:
            patch.setattr(torch, "save", full_disk)
        try:
            with writer.writing():
                writer.save({"table": table}, 1, in_shares=True)
        except OSError as error:
            told = str(error)
    return told


def full_disk(*_: Any) -> None:
    raise OSError("No space left on device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What each process of two, and of four, found; see `run_rank`."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    answers = {}
    for ranks in OPTIMIZERS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.start_processes(run_rank, args=(ranks, port, folder), nprocs=ranks, start_method="forkserver")
        answers[ranks] = [torch.load(folder / f"{rank}_of_{ranks}.pt", weights_only=True) for rank in range(ranks)]
    return answers


def assert_close(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("ranks", "kind"), [(ranks, kind) for ranks, kinds in KINDS.items() for kind in kinds])
def test_several_processes_take_the_steps_of_one(ranks: int, kind: str, found: dict[int, list[dict[str, Any]]]):
    """Student, teacher, centres, moments and the gradient's norm after two clipped steps."""
    expected = Trial(optimizer=OPTIMIZERS[ranks]).steps().everything()
    assert_close(found[ranks][0][kind], expected)
    for rank in found[ranks]:
        torch.testing.assert_close(rank[kind]["norms"], expected["norms"], rtol=1e-5, atol=0)


def test_micro_batches_in_shares_are_one_step(found: dict[int, list[dict[str, Any]]]):
    assert_close(found[2][0]["accumulated"], Trial().steps().everything())


@pytest.mark.parametrize("number", range(len(COMBINED)))
def test_recomputing_and_graphs_change_nothing_on_several_processes(number: int, found: dict[int, list[dict[str, Any]]]):
    assert_close(found[2][0][f"combined {number}"], Trial().steps().everything())


def test_a_masked_step_changes_no_bit_of_a_share(found: dict[int, list[dict[str, Any]]]):
    before, after = found[2][0]["masked"]
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "norms")


@pytest.mark.parametrize("way", ["fsdp to fsdp", "fsdp to none", "none to fsdp"])
def test_checkpoints_know_nothing_of_shares(way: str, found: dict[int, list[dict[str, Any]]]):
    before, ours = found[2][0][way.split()[0]], found[2][0]["resumed"][way]
    assert ours.keys() == before.keys()
    assert all(torch.equal(ours[name], value) for name, value in before.items())


IN_SHARES = pytest.mark.parametrize(("ranks", "kind"), [(2, "fsdp"), (4, "hsdp")])


@IN_SHARES
def test_shares_put_together_are_what_one_file_would_hold(ranks: int, kind: str, found: dict[int, list[dict[str, Any]]], folder: Path):
    """Written at once and in the background; the table of another mesh too, as it was at the step."""
    for step in (1, 2):
        loaded = load_checkpoint_file(folder / f"shares_of_{ranks}" / f"checkpoint_{step}")
        assert loaded.pop("step") == step and torch.equal(loaded.pop("table"), TABLE)
        ours, expected = flat(loaded | {"optimizer": loaded["optimizer"]["parameters"]}), found[ranks][0][kind]
        assert ours.keys() == expected.keys() - {"norms"}
        assert all(torch.equal(value, expected[name]) for name, value in ours.items())


@IN_SHARES
def test_ranks_go_on_from_their_shares(ranks: int, kind: str, found: dict[int, list[dict[str, Any]]]):
    before, ours = found[ranks][0][kind], found[ranks][0]["from shares"]
    assert ours.keys() == before.keys()
    assert all(torch.equal(ours[name], value) for name, value in before.items())
    for rank in found[ranks]:
        assert torch.equal(*rank["table"])


def test_one_process_goes_on_from_shares_of_four(found: dict[int, list[dict[str, Any]]], folder: Path):
    loaded = CheckpointFolder(folder / "shares_of_4", keep=2).load()
    assert loaded is not None
    ours = with_state(Trial(), loaded, norms=[])
    assert all(torch.equal(ours[name], value) for name, value in found[4][0]["hsdp"].items() if name != "norms")


def test_of_copies_only_the_first_is_written(found: dict[int, list[dict[str, Any]]], folder: Path):
    """Two machines of two processes: the second machine writes its rows of the table alone, rank 0 also what is whole everywhere."""
    files = [folder / "shares_of_4" / "checkpoint_2" / f"share_{rank}_of_4.pt" for rank in range(4)]
    held = [set(torch.load(file, weights_only=True)["shares"]) for file in files]
    assert held[0] > held[1] > held[2] == held[3] == {"table"}
    assert {name.split("/")[-1] for name in held[0] - held[1]} >= {"center", "step"}
    whole = sum(file.stat().st_size for file in (folder / "shares_of_2" / "checkpoint_2").iterdir())
    shares = sum(file.stat().st_size for file in (folder / "shares_of_4" / "checkpoint_2").iterdir())
    assert shares < 1.2 * whole


def test_what_one_rank_finds_damaged_all_ranks_leave(found: dict[int, list[dict[str, Any]]]):
    assert [rank["after damage"] for rank in found[2]] == [(1, 1), (1, 0)]  # one warning is enough


def test_when_one_rank_cannot_write_all_are_told_and_nothing_is_published(found: dict[int, list[dict[str, Any]]], folder: Path):
    assert [rank["after an error"] for rank in found[2]] == ["No space left on device"] * 2
    assert not has_checkpoint(folder / "failing")


def test_an_evaluation_has_the_whole_network_on_every_rank(found: dict[int, list[dict[str, Any]]]):
    for rank in found[2]:
        assert all(torch.equal(found[2][0]["fsdp"][name], value) for name, value in rank["whole"].items())


def test_blocks_of_a_network_that_lists_none_are_those_of_its_outermost_lists():
    backbone = make_network().backbone
    assert sharding.blocks(backbone) == backbone.all_blocks()
    backbone.all_blocks = list  # type: ignore[method-assign]
    backbone.layers = nn.ModuleDict(
        {"stages": nn.ModuleList(stages := [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))]), "act": nn.ReLU()}
    )
    assert sharding.blocks(backbone)[-2:] == stages


def test_a_rank_holds_its_share_and_the_prototypes(found: dict[int, list[dict[str, Any]]]):
    whole = sum(each.numel() for each in make_network().parameters())
    prototypes = HEADS * PROTOTYPES * (EMBEDDING + 1)
    assert found[4][0]["none share"] == whole
    for ranks, kind, parts in ((2, "fsdp", 2), (4, "fsdp", 4), (4, "hsdp", 2)):
        shares = [rank[f"{kind} share"] - prototypes for rank in found[ranks]]
        assert sum(shares) == (whole - prototypes) * ranks / parts
        assert max(shares) < 1.3 * (whole - prototypes) / parts  # the first rank has more of what cannot be divided


def test_the_bytes_on_the_wire_are_those_of_the_model(found: dict[int, list[dict[str, Any]]]):
    network = make_network()
    prototypes = 4 * HEADS * PROTOTYPES * (EMBEDDING + 1)
    spread = 4 * sum(each.numel() for each in network.parameters()) - prototypes
    traffic = Traffic(gradients=spread, prototypes=prototypes, centres=HEADS * (4 * EMBEDDING,))
    assert found[2][0]["none wire"]["allreduce"] == STEPS * traffic.total
    in_rank_order = found[4][0]["none wire"]  # a deterministic run of more than two gathers gradients instead, from each rank
    assert in_rank_order["allgather"] == STEPS * 4 * (spread + prototypes)
    assert in_rank_order["allreduce"] == STEPS * (sum(traffic.centres) + traffic.flag)
    blocks = 4 * sum(each.numel() for block in network.backbone.all_blocks() for each in block.parameters())
    passes = 4  # of the student: each gathers everything forward, and the blocks once more backward; the teacher has one
    for ranks in (2, 4):
        wire = found[ranks][0]["fsdp wire"]
        assert wire["reduce_scatter_base"] == pytest.approx(STEPS * spread, rel=0.03)  # shares are filled up to equal length
        assert wire["allgather_base"] == pytest.approx(STEPS * (spread + passes * (spread + blocks)), rel=0.03)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"precision": "fp16"}, "precision"),
        ({"optimizer": SGD(learning_rate=0.1, momentum=0.9, clip="none", clip_norm=0.0)}, "optimizer"),
        ({"network": make_network(batch_norm=True)}, "task.sharding"),
        ({"sharding": "hsdp", "world_size": 3}, "task.sharding"),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes: dict[str, Any], option: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    possible = {"network": make_network(), "optimizer": EACH_CLIPPED, "sharding": "fsdp", "precision": "bf16", "world_size": 4}
    sharding.check(**possible)
    with pytest.raises(OptionError) as caught:
        sharding.check(**(possible | changes))
    assert caught.value.option == option
    sharding.check(**(possible | changes | {"sharding": "none"}))


def test_one_process_has_nothing_to_share():
    network = make_network()
    sharding.shard(network, Teacher(network), sharding="fsdp", device=torch.device("cpu"))
    assert not sharding.is_sharded(network)
