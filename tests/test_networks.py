"""Networks over crops of several sizes, and the step that trains them: on one process, on two, and with micro-batches.

The two-process answers come from one pair of gloo processes, started once for this module.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from esvit.backbones.swin import Swin
from esvit.losses.combined import ViewRegionLoss
from esvit.networks import HeadOptions, MultiCropNetwork
from esvit.optimizers import SGD, AdamW
from esvit.records import StepValues
from esvit.runtime import Runtime
from esvit.tasks.distillation import Distillation, StepResult
from esvit.tasks.meter import Meter

RANKS = 2
CROP_SIZES = [32, 32, 16, 16, 16]
PROTOTYPES = 29
NOW = StepValues(epoch=1, learning_rate=1e-3, weight_decay=0.1, momentum=0.9, temperature=0.05, last_layer_frozen=False)
YES = torch.tensor(True)
ADAMW = AdamW(learning_rate=1e-3, betas=[0.9, 0.999], eps=1e-8, clip="parameter", clip_norm=3.0)
GRADIENT_DESCENT = SGD(learning_rate=1e-3, momentum=0.9, clip="parameter", clip_norm=3.0)

State = dict[str, Tensor]


def make_network(*, regions: bool = True, batch_norm: bool = False, prototypes: int = PROTOTYPES) -> MultiCropNetwork:
    """Two small stages, with the same weights every time."""
    torch.manual_seed(0)
    backbone = Swin(
        in_channels=3,
        patch_size=4,
        dim=8,
        depths=[2, 1],
        heads=[2, 2],
        window_size=4,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        image_size=32,
    )
    head = HeadOptions(hidden_dim=16, bottleneck_dim=12, layers=2, batch_norm=batch_norm, prototypes=prototypes, norm_last_layer=False)
    return head.attach(backbone, regions=regions)


def make_crops(*, images: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3, size, size, generator=generator) for size in CROP_SIZES]


def part(crops: list[Tensor], number: int, count: int) -> list[Tensor]:
    """The images of rank (or micro-batch) `number` out of `count`."""
    return [crop.chunk(count)[number] for crop in crops]


# ---------------------------------------------------------------------------------------------------- crops of several sizes


def test_crops_in_groups_give_what_each_crop_gives_alone():
    network, crops = make_network(), make_crops(images=3)
    together = network(crops)
    assert len(together) == len(crops)
    for output, crop in zip(together, crops, strict=True):
        (alone,) = network([crop])
        for ours, theirs in ((output.view, alone.view), (output.region, alone.region), (output.features, alone.features)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(output.pooled, alone.pooled, rtol=1e-5, atol=1e-6)


def test_adjacent_crops_of_one_size_pass_the_backbone_together():
    network, (large, other_large, small, *_) = make_network(), make_crops(images=3)
    batches: list[tuple[int, ...]] = []
    network.backbone.register_forward_hook(lambda module, inputs, output: batches.append(tuple(inputs[0].shape)))
    outputs = network([large, other_large, small, large])
    assert batches == [(6, 3, 32, 32), (3, 3, 16, 16), (3, 3, 32, 32)]
    torch.testing.assert_close(outputs[0].view, outputs[3].view)
    assert [None if output.region is None else output.region.shape[1] for output in outputs] == [16, 16, 4, 16]


def test_batch_norm_of_the_heads_sees_all_crops_at_once():
    network, crops = make_network(batch_norm=True), make_crops(images=3)
    features = [network.backbone(crop) for crop in crops]
    views = network.view_head(torch.cat([each.pooled for each in features]))
    assert network.region_head is not None
    regions = network.region_head(torch.cat([each.regions.flatten(0, 1) for each in features]))
    network = make_network(batch_norm=True)
    outputs = network(crops)
    torch.testing.assert_close(torch.cat([output.view for output in outputs]), views)
    torch.testing.assert_close(torch.cat([output.region.flatten(0, 1) for output in outputs if output.region is not None]), regions)
    counters = [value for name, value in network.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters and all(counter == 1 for counter in counters)


def test_a_network_without_region_head_has_no_regions():
    network = make_network(regions=False)
    outputs = network(make_crops(images=2))
    assert network.prototypes().region is None
    assert all(output.region is None and output.features is None for output in outputs)
    assert not any("region" in name for name in network.state_dict())


def test_features_and_pooled_carry_no_gradient_and_the_embeddings_do():
    for output in make_network()(make_crops(images=2)):
        assert output.region is not None and output.features is not None
        assert output.view.requires_grad and output.region.requires_grad
        assert not output.features.requires_grad and not output.pooled.requires_grad


# ---------------------------------------------------------------------------------------------------- the step


class Gradients:
    """The phase hook of `Distillation`: the student's gradients as the optimizer finds them, of the latest step."""

    def __init__(self, network: MultiCropNetwork):
        self.network = network
        self.found: State = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase == "optimizer":
            self.found = {name: each.grad.clone() for name, each in self.network.named_parameters() if each.grad is not None}
        yield


class Trial:
    """A student, its teacher and what a step needs; the same at every start, on every rank."""

    def __init__(self, *, accumulation: int = 1, optimizer: AdamW | SGD = ADAMW):
        self.runtime = Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1.0, stall_minutes=0)
        self.network = make_network()
        self.gradients = Gradients(self.network)
        self.loss = ViewRegionLoss(student_temperature=0.1, center_momentum=0.9, view_weight=0.5, region_weight=0.5, kernel="auto")
        self.loss.setup(prototypes=PROTOTYPES)
        self.distillation = Distillation(
            network=self.network,
            loss=self.loss,
            optimizer=optimizer.build(self.network, precision="fp32", device=torch.device("cpu")),
            runtime=self.runtime,
            global_count=2,
            accumulation=accumulation,
            parts=2,
            mixing=None,
            phase=self.gradients,
        )

    def step(self, *micro_batches: list[Tensor], sound: Tensor = YES) -> StepResult:
        return self.distillation.step(list(micro_batches), NOW, sound=sound, rng=np.random.default_rng(0))

    def centres(self) -> State:
        return {name: value.clone() for name, value in self.loss.named_buffers()}

    def everything(self) -> State:
        """All that training changes: student, teacher, centres, moments."""
        state = self.distillation.state_dict()
        return flat(state | {"optimizer": state["optimizer"]["parameters"]})


def flat(tree: dict[str, Any], prefix: str = "") -> State:
    """Copies of the tensors in nested dictionaries, by path."""
    found: State = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value.detach().clone()}
    return found


def assert_same_answer(gradients: State, centres: State, expected: Trial) -> None:
    """The same float32 gradients and centres but for rounding: the whole gradient to 1e-6, and none of its parts lost in the whole."""
    theirs = expected.gradients.found
    assert gradients.keys() == theirs.keys() == dict(expected.network.named_parameters()).keys()
    for name, gradient in theirs.items():
        assert relative_distance([gradients[name]], [gradient]) < 1e-5, name
    assert relative_distance([gradients[name] for name in theirs], list(theirs.values())) < 1e-6
    assert centres.keys() == {"center", "center_region"}
    for name, centre in expected.centres().items():
        assert relative_distance([centres[name]], [centre]) < 1e-6, name


def relative_distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """L2 norm of the difference over that of `theirs`."""
    a, b = (torch.cat([each.flatten().double() for each in tensors]) for tensors in (ours, theirs))
    return float((a - b).norm() / b.norm())


def assert_bits_equal(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} differ: {different[:5]}"


@pytest.fixture(scope="module")
def one_process() -> Trial:
    """One step on the joined batch."""
    trial = Trial()
    trial.step(make_crops(images=4))
    return trial


def test_teacher_receives_no_gradient():
    trial = Trial()
    seen: list[bool] = []

    @contextlib.contextmanager
    def after_backward(phase: str) -> Iterator[None]:
        if phase == "optimizer":
            seen.extend(each.grad is not None for each in trial.distillation.teacher.parameters())
            assert any(each.grad is not None for each in trial.network.parameters())
        yield

    trial.distillation.phase = after_backward
    trial.step(make_crops(images=2))
    assert seen and not any(seen)
    assert not any(each.requires_grad for each in trial.distillation.teacher.parameters())


def test_the_phases_of_a_step_are_announced_in_order():
    trial, phases = Trial(), []

    @contextlib.contextmanager
    def note(phase: str) -> Iterator[None]:
        phases.append(phase)
        yield

    trial.distillation.phase = note
    trial.step(make_crops(images=2))
    group = ["student", "loss", "backward"]
    assert phases == ["teacher", "loss", *(4 * group), "loss", "backward", "optimizer", "centre", "EMA"]


def test_two_micro_batches_give_the_answer_of_the_joined_batch(one_process: Trial):
    crops, trial = make_crops(images=4), Trial(accumulation=2)
    result = trial.step(part(crops, 0, 2), part(crops, 1, 2))
    assert_same_answer(trial.gradients.found, trial.centres(), one_process)
    expected = Trial().step(crops)
    torch.testing.assert_close(result.terms.total, expected.terms.total, rtol=1e-6, atol=1e-6)


def test_a_step_after_an_unsound_one_changes_no_bit():
    trial = Trial()
    trial.step(make_crops(images=2))
    before = trial.everything()
    trial.step(make_crops(images=2, seed=1), sound=torch.tensor(False))
    assert_bits_equal(trial.everything(), before)


# ---------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found; see `run_rank`."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, args=(port, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def run_rank(rank: int, port: int, folder: Path) -> None:
    """One of two processes, each with its half of the batch; writes `<rank>.pt`."""
    environment = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    found: dict[str, Any] = {}
    with Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1.0, stall_minutes=0):
        mine = part(make_crops(images=4), rank, RANKS)

        trial = Trial()
        trial.step(mine)
        found["gradients"], found["centres"] = trial.gradients.found, trial.centres()
        trial.step(part(make_crops(images=4, seed=1), rank, RANKS))
        found["after two steps"] = trial.everything()

        trial = Trial(accumulation=2)
        trial.step(part(mine, 0, 2), part(mine, 1, 2))
        found["accumulated gradients"], found["accumulated centres"] = trial.gradients.found, trial.centres()

        trial = Trial(optimizer=GRADIENT_DESCENT)
        for seed in range(2):
            trial.step(part(make_crops(images=4, seed=seed), rank, RANKS))
        found["after two steps of gradient descent"] = trial.everything()

        found |= run_into_a_bad_step(rank)
    torch.save(found, folder / f"{rank}.pt")


def run_into_a_bad_step(rank: int) -> dict[str, Any]:
    """Three steps, the second with an infinite pixel on rank 1 alone; the loop's meter hands on the flag."""
    trial, meter, states = Trial(), Meter(torch.device("cpu")), []
    for step in range(3):
        crops = part(make_crops(images=4, seed=step), rank, RANKS)
        if step == 1 and rank == 1:
            crops[0][0, 0, 0, 0] = float("inf")
        meter.add(trial.step(crops, sound=meter.finite), step=step, images=4)
        states.append(trial.everything())
    return {"states": states, "first bad step": meter.first_bad_step(), "was bad here": meter.was_bad_here()}


def test_two_processes_give_the_gradients_and_centres_of_the_joined_batch(one_process: Trial, two_ranks: list[dict[str, Any]]):
    for found in two_ranks:
        assert_same_answer(found["gradients"], found["centres"], one_process)


def test_two_processes_with_two_micro_batches_each_give_the_same(one_process: Trial, two_ranks: list[dict[str, Any]]):
    for found in two_ranks:
        assert_same_answer(found["accumulated gradients"], found["accumulated centres"], one_process)


def test_ranks_stay_identical(two_ranks: list[dict[str, Any]]):
    first, second = (found["after two steps"] for found in two_ranks)
    assert_bits_equal(first, second)


def test_two_processes_take_the_steps_of_one(two_ranks: list[dict[str, Any]]):
    """By gradient descent, for AdamW makes whole steps of the rounding in a gradient that is zero."""
    trial = Trial(optimizer=GRADIENT_DESCENT)
    for seed in range(2):
        trial.step(make_crops(images=4, seed=seed))
    after = two_ranks[0]["after two steps of gradient descent"]
    for name, value in trial.everything().items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_a_loss_that_is_not_finite_on_one_rank_masks_the_step_on_all(two_ranks: list[dict[str, Any]]):
    for found in two_ranks:
        good, bad, later = found["states"]
        assert_bits_equal(bad, good)
        assert_bits_equal(later, good)
        assert all(value.isfinite().all() for value in good.values())


def test_the_meter_names_the_first_bad_step_on_every_rank(two_ranks: list[dict[str, Any]]):
    assert [found["first bad step"] for found in two_ranks] == [1, 1]
    assert [found["was bad here"] for found in two_ranks] == [False, True]
