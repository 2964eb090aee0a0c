"""How a train_* case is held against the product's own loop body: losses, centres, gradients, parameters, buffers, schedules.

Limits are those of the goldens' README. AdamW divides a gradient by its own size, so that where the true gradient is zero
rounding noise decides over steps of a full learning rate; that is so for biases of keys, which shift all scores of a query alike.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esvit.backbones.base import Backbone
from esvit.losses.combined import ViewRegionLoss
from esvit.losses.view import ViewLoss
from esvit.networks import HeadOptions, MultiCropNetwork
from esvit.optimizers import LARS, SGD, AdamW
from esvit.runtime import Runtime
from esvit.schedules import Schedules
from esvit.tasks.distillation import Distillation
from tests.golden.cases import Goldens, assert_close

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


def make_loss(kind: str) -> ViewLoss | ViewRegionLoss:
    if kind == "view":
        return ViewLoss(student_temperature=0.1, center_momentum=0.9, kernel="auto")
    return ViewRegionLoss(student_temperature=0.1, center_momentum=0.9, view_weight=0.5, region_weight=0.5, kernel="auto")


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


def assert_four_steps_equal(
    goldens: Goldens,
    case: str,
    backbone: Backbone,
    *,
    key_biases: dict[str, int],
    set_aside: Callable[[GradientNorms, dict[str, np.ndarray], int], None] | None = None,
) -> None:
    """Four steps of `Distillation` on the case `case`, every array of which must be used.

    backbone    of the original's layout; the rule fills it
    key_biases  endings of the names of biases that hold a key's, and one part of how many the key's is
    set_aside   takes out of the gradients (and out of the case) what is exactly zero in theory and noise in practice
    """
    golden = goldens.case(case)
    kind, optimizer_name = case.split("_")[-2:]
    limits = LIMITS[optimizer_name]
    loss = make_loss(kind)
    loss.setup(prototypes=PROTOTYPES)
    head = HeadOptions(hidden_dim=2048, bottleneck_dim=256, layers=3, batch_norm=False, prototypes=PROTOTYPES, norm_last_layer=False)
    network = head.attach(backbone, regions=loss.needs_regions).train()
    goldens.fill(network, original_name)
    norms = GradientNorms()
    norms.network = network
    optimizer = OPTIMIZERS[optimizer_name].build(network, precision="fp32", device=torch.device("cpu"))
    runtime = Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1.0, stall_minutes=0)
    distillation = Distillation(
        network=network, loss=loss, optimizer=optimizer, runtime=runtime, global_count=2, accumulation=1, parts=2, mixing=None, phase=norms
    )
    names = golden.pop("param_names").tolist()
    buffer_names = golden.pop("buffer_names").tolist() if "buffer_names" in golden else []
    assert sorted(names) == sorted(original_name(name) for name, _ in network.named_parameters())
    assert [len(group.names) for group in optimizer.groups] == golden.pop("group_sizes").tolist()

    schedules = make_schedules()
    assert_schedules_equal(schedules, golden)
    exceptions = key_bias_limits(network, key_biases) if optimizer_name == "adamw" else {}
    losses = []
    for step in range(STEPS):
        crops = [goldens.input(f"step{step}_crop{index}", (IMAGES, 3, size, size)) for index, size in enumerate(CROP_SIZES)]
        result = distillation.step([crops], schedules.at(step), sound=torch.tensor(True), rng=np.random.default_rng(0))
        losses.append(result.terms.total)
        assert bool(result.finite)
        whole = np.linalg.norm(list(norms.before.values()))
        assert_close(result.gradient_norm, whole, relative=1e-3)  # torch's float32 norm against one in float64

        if set_aside is not None:
            set_aside(norms, golden, step)
        assert_gradients_equal(norms, golden, step)
        assert_centres_equal(loss, golden, step)
        for who, whose, relative in (("student", network, limits.student_norm), ("teacher", distillation.teacher.network, 1e-4)):
            state = {original_name(name): value for name, value in whose.state_dict().items()}
            what = f"{who} after step {step}"
            theirs = golden.pop(f"step{step}_{who}_norms")
            assert_norms_equal(_norms(state, names), theirs, names, relative=relative, absolute=exceptions, what=what)
            values = np.stack([_first_four(state[name]) for name in names])
            assert_close(values, golden.pop(f"step{step}_{who}_first4"), absolute=limits.first_values)
            if buffer_names:
                theirs = golden.pop(f"step{step}_{who}_buffer_norms")
                assert_norms_equal(_norms(state, buffer_names), theirs, buffer_names, relative=1e-4, absolute={}, what=f"buffers of {what}")
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


def key_bias_limits(network: MultiCropNetwork, key_biases: dict[str, int]) -> dict[str, float]:
    """For each bias that holds a key's, 4 * lr * sqrt(elements of the key's part): what four steps of AdamW make of rounding noise."""
    biases = {original_name(name): parameter.numel() for name, parameter in network.named_parameters() if parameter.ndim == 1}
    parts = {name: part for name in biases for ending, part in key_biases.items() if name.endswith(ending)}
    return {name: 4 * 1e-3 * (biases[name] / part) ** 0.5 for name, part in parts.items()}


def _norms(state: dict[str, Tensor], names: list[str]) -> np.ndarray:
    return np.array([_norm(state[name]) for name in names])


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))


def _first_four(tensor: Tensor) -> np.ndarray:
    """The first four values, repeated where there are fewer."""
    return np.resize(tensor.detach().flatten()[:4].numpy(), 4)
