"""Four training steps of the product's own loop body against the original's: losses, centres, gradients, parameters, schedules.

Limits are those of the goldens' README. AdamW divides a gradient by its own size, so that where the true gradient is zero
rounding noise decides over steps of a full learning rate; that is so for the key third of the qkv biases, which shift all
scores of a query alike.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from esvit.backbones.swin import Swin
from esvit.losses.combined import ViewRegionLoss
from esvit.losses.view import ViewLoss
from esvit.networks import HeadOptions, MultiCropNetwork
from esvit.optimizers import LARS, SGD, AdamW
from esvit.runtime import Runtime
from esvit.schedules import Schedules
from esvit.tasks.distillation import Distillation
from tests.golden.cases import Goldens, assert_close, micro_layouts

STEPS = 4
CROP_SIZES = [224, 224, 96, 96]
IMAGES = 2
PROTOTYPES = 64
OPTIMIZERS: dict[str, AdamW | SGD | LARS] = {
    "adamw": AdamW(learning_rate=0.001, betas=[0.9, 0.999], eps=1e-8, clip="parameter", clip_norm=3.0),
    "sgd": SGD(learning_rate=0.001, momentum=0.9, clip="parameter", clip_norm=3.0),
    "lars": LARS(learning_rate=0.001, momentum=0.9, eta=0.001, clip="parameter", clip_norm=3.0),
}
ORIGINAL_PREFIXES = {
    "backbone.": "",
    "view_head.": "head.",
    "view_prototypes.": "head.last_layer.",
    "region_head.": "head_dense.",
    "region_prototypes.": "head_dense.last_layer.",
}


@dataclass(frozen=True)
class Limits:
    """Largest relative differences, and the largest absolute one of the first four values of each parameter."""

    first_loss: float
    loss: float
    student_norm: float
    first_values: float


LIMITS = {
    "adamw": Limits(first_loss=1e-5, loss=1e-3, student_norm=5e-4, first_values=2e-4),
    "sgd": Limits(first_loss=1e-5, loss=1e-4, student_norm=1e-5, first_values=1e-5),
    "lars": Limits(first_loss=1e-5, loss=1e-4, student_norm=1e-5, first_values=1e-5),
}


class GradientNorms:
    """The phase hook of `Distillation`: norms of all gradients, by the original's names, as clipping finds and leaves them.

    The optimizer clips in place and forgets the gradients afterwards, so those held here are the clipped ones.
    """

    def __init__(self) -> None:
        self.network: MultiCropNetwork | None = None
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase != "optimizer":
            yield
            return
        assert self.network is not None
        parameters = self.network.named_parameters()
        gradients = {original_name(name): parameter.grad for name, parameter in parameters if parameter.grad is not None}
        self.before = {name: _norm(gradient) for name, gradient in gradients.items()}
        yield
        self.after = {name: _norm(gradient) for name, gradient in gradients.items()}


def original_name(name: str) -> str:
    """What the original calls the entry `name` of our network."""
    ours = next(prefix for prefix in ORIGINAL_PREFIXES if name.startswith(prefix))
    return ORIGINAL_PREFIXES[ours] + name.removeprefix(ours)


def micro_swin() -> Swin:
    return Swin(
        in_channels=3,
        patch_size=4,
        dim=24,
        depths=[2, 1, 2, 1],
        heads=[2, 4, 8, 16],
        window_size=7,
        mlp_ratio=4.0,
        drop_path_rate=0.0,
        image_size=224,
    )


def make_loss(kind: str) -> ViewLoss | ViewRegionLoss:
    if kind == "view":
        return ViewLoss(student_temperature=0.1, center_momentum=0.9)
    return ViewRegionLoss(student_temperature=0.1, center_momentum=0.9, view_weight=0.5, region_weight=0.5)


def make_network(goldens: Goldens, *, regions: bool) -> MultiCropNetwork:
    head = HeadOptions(hidden_dim=2048, bottleneck_dim=256, layers=3, batch_norm=False, prototypes=PROTOTYPES, norm_last_layer=False)
    network = head.attach(micro_swin(), regions=regions)
    goldens.fill(network, original_name)
    return network


def make_schedules() -> Schedules:
    return Schedules(
        epochs=2,
        steps_per_epoch=2,
        learning_rate=1e-3,
        warmup_learning_rate=0.0,
        final_learning_rate=1e-6,
        warmup_epochs=0,
        weight_decay_start=0.04,
        weight_decay_end=0.4,
        teacher_momentum_start=0.9,
        teacher_momentum_end=1.0,
        teacher_temperature_start=0.04,
        teacher_temperature_end=0.07,
        teacher_temperature_warmup_epochs=1,
        freeze_last_layer_epochs=1,
    )


@pytest.mark.parametrize("case", ["view_adamw", "dense_adamw", "dense_sgd", "dense_lars"])
def test_four_training_steps_equal_the_originals(case: str, goldens: Goldens):
    golden = goldens.case(f"train_swin_{case}")
    kind, optimizer_name = case.split("_")
    limits = LIMITS[optimizer_name]
    loss = make_loss(kind)
    loss.setup(prototypes=PROTOTYPES)
    network = make_network(goldens, regions=loss.needs_regions)
    norms = GradientNorms()
    norms.network = network
    optimizer = OPTIMIZERS[optimizer_name].build(network, precision="fp32", device=torch.device("cpu"))
    runtime = Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1.0)
    distillation = Distillation(
        network=network, loss=loss, optimizer=optimizer, runtime=runtime, global_count=2, accumulation=1, mixing=None, phase=norms
    )
    names = golden.pop("param_names").tolist()
    assert sorted(names) == sorted(original_name(name) for name, _ in network.named_parameters())
    assert [len(group.names) for group in optimizer.groups] == golden.pop("group_sizes").tolist()

    schedules = make_schedules()
    assert_schedules_equal(schedules, golden)
    losses = []
    for step in range(STEPS):
        now = schedules.at(step)
        crops = [goldens.input(f"step{step}_crop{index}", (IMAGES, 3, size, size)) for index, size in enumerate(CROP_SIZES)]
        result = distillation.step([crops], now, sound=torch.tensor(True), rng=np.random.default_rng(0))
        losses.append(result.terms.total)
        assert bool(result.finite)

        assert_gradients_equal(norms, golden, step)
        whole = np.linalg.norm(list(norms.before.values()))
        assert_close(result.gradient_norm, whole, relative=1e-3)  # torch's float32 norm against one in float64
        assert_centres_equal(loss, golden, step)
        exceptions = key_bias_limits(names) if optimizer_name == "adamw" else {}
        for who, whose, relative in (("student", network, limits.student_norm), ("teacher", distillation.teacher.network, 1e-4)):
            parameters = {original_name(name): parameter for name, parameter in whose.named_parameters()}
            ours = np.array([_norm(parameters[name]) for name in names])
            theirs = golden.pop(f"step{step}_{who}_norms")
            assert_norms_equal(ours, theirs, names, relative=relative, absolute=exceptions, what=f"{who} after step {step}")
            values = np.stack([_first_four(parameters[name]) for name in names])
            assert_close(values, golden.pop(f"step{step}_{who}_first4"), absolute=limits.first_values)
    golden_losses = golden.pop("losses")
    assert_close(torch.stack(losses)[:1], golden_losses[:1], relative=limits.first_loss)
    assert_close(torch.stack(losses), golden_losses, relative=limits.loss)
    assert not golden, f"arrays of the case that this test does not use: {sorted(golden)}"


def assert_schedules_equal(schedules: Schedules, golden: dict[str, np.ndarray]) -> None:
    """The arrays, and what the README says of temperature and last layer: warm-up of 1 epoch (linspace of one value), frozen for 1."""
    steps = [schedules.at(step) for step in range(STEPS)]
    assert schedules.total_steps == STEPS
    assert_close(np.array([now.learning_rate for now in steps]), golden.pop("lr"), absolute=1e-12)
    assert_close(np.array([now.weight_decay for now in steps]), golden.pop("wd"), absolute=1e-12)
    assert_close(np.array([now.momentum for now in steps]), golden.pop("momentum"), absolute=1e-12)
    assert [now.temperature for now in steps] == [0.04, 0.04, 0.07, 0.07]
    assert [now.last_layer_frozen for now in steps] == [True, True, False, False]


def assert_gradients_equal(norms: GradientNorms, golden: dict[str, np.ndarray], step: int) -> None:
    names = [name.removeprefix("module.") for name in golden.pop(f"step{step}_grad_names")]
    assert sorted(names) == sorted(norms.before)
    for when, ours in (("before", norms.before), ("after", norms.after)):
        theirs = golden.pop(f"step{step}_grad_norms_{when}_clip")
        assert_norms_equal(
            np.array([ours[name] for name in names]), theirs, names, relative=2e-3, absolute={}, what=f"gradients {when} clip, step {step}"
        )


def assert_centres_equal(loss: ViewLoss | ViewRegionLoss, golden: dict[str, np.ndarray], step: int) -> None:
    assert_close(loss.center, golden.pop(f"step{step}_center"), relative_l2=1e-4)
    if isinstance(loss, ViewRegionLoss):
        assert_close(loss.center_region, golden.pop(f"step{step}_center_grid"), relative_l2=1e-4)


def assert_norms_equal(
    ours: np.ndarray, theirs: np.ndarray, names: list[str], *, relative: float, absolute: dict[str, float], what: str
) -> None:
    """Each norm within `relative`, or within its `absolute` limit where it has one; the message names the worst."""
    limits = np.array([absolute.get(name, relative * norm) for name, norm in zip(names, theirs.astype(np.float64), strict=True)])
    excess = np.abs(ours - theirs.astype(np.float64)) / limits
    worst = int(excess.argmax())
    assert excess[worst] <= 1, f"{what}: {names[worst]} has norm {ours[worst]:.7g}, golden {theirs[worst]:.7g}"


def key_bias_limits(names: list[str]) -> dict[str, float]:
    """For each qkv bias, 4 * lr * sqrt(elements of its key third): what four steps of AdamW make of rounding noise."""
    shapes = micro_layouts()["micro_swin"]["state_dict"]
    return {name: 4 * 1e-3 * (shapes[name][0] / 3) ** 0.5 for name in names if name.endswith("qkv.bias")}


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))


def _first_four(tensor: Tensor) -> np.ndarray:
    """The first four values, repeated where there are fewer."""
    return np.resize(tensor.detach().flatten()[:4].numpy(), 4)
