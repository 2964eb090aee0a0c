"""The step benchmark runs and reports, and the plain step it compares with is the same mathematics as the product's."""

import contextlib
import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.plain import losses as formula
from benchmarks.plain.attention import use_plain_attention
from benchmarks.plain.step import PlainDistillation, PlainLoss, logits_of
from esvit.backbones.swin import Swin
from esvit.losses.combined import ViewRegionLoss
from esvit.losses.view import ViewLoss
from esvit.networks import HeadOptions, MultiCropNetwork
from esvit.optimizers import AdamW
from esvit.records import StepValues
from esvit.runtime import Runtime
from esvit.tasks.distillation import Distillation

ROOT = Path(__file__).parents[1]
PHASES = {"data", "teacher", "student", "loss", "backward", "optimizer", "EMA", "centre", "other", "step", "cpu"}
RATIOS = ["speed_ratio", "cpu_ratio", "memory_ratio", "loss_time_ratio", "loss_memory_ratio", "region_over_view"]
PROTOTYPES = 41
ADAMW = AdamW(learning_rate=1e-3, betas=[0.9, 0.999], eps=1e-8, clip="parameter", clip_norm=3.0)
NOW = StepValues(epoch=1, learning_rate=1e-3, weight_decay=0.1, momentum=0.9, temperature=0.05, last_layer_frozen=False)

# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a small comparison prints, and what it writes."""
    file = tmp_path_factory.mktemp("benchmark") / "step.json"
    options = ["--backbone", "swin_micro", "--batch-size", "2", "--prototypes", "64", "--local-crops", "1", "--threads", "1"]
    command = [sys.executable, "benchmarks/pretrain_step.py", *options, "--steps", "1", "--compare", "plain", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def test_the_table_names_every_phase_and_the_machine(run: tuple[str, dict[str, Any]]):
    printed, report = run
    for phase in PHASES:
        assert f"\n{phase} (s) " in printed
    for needed in ("images/s", "peak memory (MB)", "1 threads", f"torch {torch.__version__}", "waits for one loading process", *RATIOS):
        assert needed in printed
    assert f"{report['images_per_second']:.3f}" in printed


def test_the_json_holds_time_and_memory_of_both_steps(run: tuple[str, dict[str, Any]]):
    _, report = run
    for measured in (report, report["plain"]):
        assert measured["seconds"].keys() == PHASES
        parts = sum(seconds for phase, seconds in measured["seconds"].items() if phase not in ("step", "cpu"))
        assert parts == pytest.approx(measured["seconds"]["step"])  # of a single step, so medians add up
        assert measured["seconds"]["cpu"] > 0
        assert measured["images_per_second"] == pytest.approx(2 / measured["seconds"]["step"])
        assert measured["peak_memory_bytes"] > 1e6
    assert report["options"] | {"backbone": "swin_micro", "loss": "view_region", "batch_size": 2, "prototypes": 64} == report["options"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["cores"] >= 1


def test_the_json_holds_every_ratio(run: tuple[str, dict[str, Any]]):
    _, report = run
    for name in ("speed_ratio", "cpu_ratio", "memory_ratio", "loss_time_ratio", "region_over_view"):
        assert report[name] > 0
    assert "loss_memory_ratio" in report  # null where so small a loss moves no page
    assert report["memory_ratio"] == pytest.approx(report["peak_memory_bytes"] / report["plain"]["peak_memory_bytes"])


# ---------------------------------------------------------------------------------------------------- the plain step


class Gradients:
    """Keeps the student's gradients as the optimizer finds them."""

    def __init__(self, network: MultiCropNetwork):
        self.network = network
        self.found: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase == "optimizer":
            self.found = {name: each.grad.clone() for name, each in self.network.named_parameters() if each.grad is not None}
        yield


def make_network(*, regions: bool) -> MultiCropNetwork:
    """Two stages, with a shifted block, maps that need padding at both sizes, and biases large enough to matter."""
    torch.manual_seed(0)
    backbone = Swin(
        in_channels=3,
        patch_size=4,
        dim=8,
        depths=[2, 2],
        heads=[2, 4],
        window_size=3,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        image_size=64,
    )
    head = HeadOptions(hidden_dim=16, bottleneck_dim=12, layers=3, batch_norm=False, prototypes=PROTOTYPES, norm_last_layer=False)
    network = head.attach(backbone, regions=regions)
    for name, parameter in network.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def make_crops(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 3, size, size, generator=generator) for size in (40, 40, 28, 28)]


def make_loss(kind: str) -> ViewLoss | ViewRegionLoss:
    if kind == "view":
        return ViewLoss(student_temperature=0.1, center_momentum=0.9, kernel="auto")
    return ViewRegionLoss(student_temperature=0.1, center_momentum=0.9, view_weight=0.3, region_weight=0.7, kernel="auto")


def assert_relatively_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """To 1e-5 of the whole tensor."""
    distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert distance < 1e-5, f"{what}: {distance:.2g}"


@pytest.mark.parametrize("kind", ["view", "view_region"])
def test_the_plain_step_is_the_products_mathematics(kind: str):
    """Two steps: losses and gradients of both, centres and teacher after them. The second step meets the first one's centres."""
    runtime = Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1.0, stall_minutes=0)
    loss = make_loss(kind)
    loss.setup(prototypes=PROTOTYPES)
    networks = [make_network(regions=loss.needs_regions) for _ in range(2)]
    ours, plain = (Gradients(network) for network in networks)
    distillation = Distillation(
        network=networks[0],
        loss=loss,
        optimizer=ADAMW.build(networks[0], precision="fp32", device=torch.device("cpu")),
        runtime=runtime,
        global_count=2,
        accumulation=1,
        parts=2,
        mixing=None,
        phase=ours,
    )
    plain_distillation = PlainDistillation(
        network=networks[1],
        loss=loss,
        prototypes=PROTOTYPES,
        optimizer=ADAMW,
        device=torch.device("cpu"),
        precision="fp32",
        global_count=2,
        phase=plain,
    )
    for seed in range(2):
        terms = distillation.step([make_crops(seed)], NOW, sound=torch.tensor(True), rng=np.random.default_rng(0)).terms
        value = plain_distillation.step(make_crops(seed), NOW)
        assert value == pytest.approx(float(terms.total), rel=1e-5)
        assert plain.found.keys() == ours.found.keys() == dict(networks[0].named_parameters()).keys()
        for name, gradient in ours.found.items():
            assert_relatively_close(plain.found[name], gradient, f"gradient of {name} in step {seed}")
        assert_relatively_close(plain_distillation.loss.center, loss.center, "centre")
        if isinstance(loss, ViewRegionLoss):
            assert_relatively_close(plain_distillation.loss.center_region, loss.center_region, "region centre")
        for name, parameter in distillation.teacher.network.named_parameters():
            assert_relatively_close(plain_distillation.teacher.network.get_parameter(name), parameter, f"teacher's {name}")
        networks[1].load_state_dict(networks[0].state_dict())  # AdamW makes whole steps of the rounding of a zero gradient


def test_the_plain_loss_is_the_formula():
    """The loss as published computes each logit once; the formula for readers computes them for every pair."""
    loss = make_loss("view_region")
    assert isinstance(loss, ViewRegionLoss)
    network, teacher = (make_network(regions=True).double() for _ in range(2))
    crops = [crop.double() for crop in make_crops(0)]
    outputs, targets = network(crops), teacher(crops[:2])
    plain = PlainLoss(loss, prototypes=PROTOTYPES, device=torch.device("cpu"))
    plain.center, plain.center_region = torch.randn(1, PROTOTYPES).double(), torch.randn(1, PROTOTYPES).double()
    weights, teacher_weights = network.prototypes(), teacher.prototypes()
    total = plain(logits_of(outputs, weights), logits_of(targets, teacher_weights), crops=4, global_count=2, temperature=0.05)
    view = formula.view_loss(
        outputs, targets, weights.view, teacher_weights.view, plain.center, student_temperature=0.1, teacher_temperature=0.05
    )
    assert weights.region is not None and teacher_weights.region is not None
    region = formula.region_loss(
        outputs, targets, weights.region, teacher_weights.region, plain.center_region, student_temperature=0.1, teacher_temperature=0.05
    )
    torch.testing.assert_close(total, 0.3 * view + 0.7 * region)


@pytest.mark.parametrize("size", [(40, 40), (24, 36), (12, 12)])
def test_plain_attention_is_the_products(size: tuple[int, int]):
    backbone = make_network(regions=False).backbone.double()
    plain = copy.deepcopy(backbone)
    use_plain_attention(plain)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(plain(images).regions, backbone(images).regions)
    assert plain.state_dict().keys() == backbone.state_dict().keys()
