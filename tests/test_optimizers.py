"""The student's update: groups, clipping, freezing, masking, accumulation, fp16 scaling, state."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esvit.errors import OptionError
from esvit.optimizers import LARS, SGD, AdamW, StudentOptimizer, clip_each_, clip_global_, parameter_groups
from esvit.records import StepValues

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


class Table(nn.Module):
    """A 2-D bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, 6))


class WeightNormed(nn.Module):
    """A direction and a trainable magnitude, as the prototypes have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(4, 1))
        self.weight_v = nn.Parameter(torch.randn(4, 6))


class Network(nn.Module):
    """A body, a 1-D scale, a 2-D bias, and prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.extra = Table()
        self.view_prototypes = WeightNormed()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x)) * self.scale + self.extra.bias.sum(0)
        return hidden @ (self.view_prototypes.weight_g * self.view_prototypes.weight_v).T


def make(kind: str, *, clip: str = "none", clip_norm: float = 3.0):
    shared: dict[str, Any] = {"learning_rate": 0.001, "clip": clip, "clip_norm": clip_norm}
    if kind == "adamw":
        return AdamW(**shared, betas=[0.9, 0.999], eps=1e-8)
    if kind == "sgd":
        return SGD(**shared, momentum=0.9)
    return LARS(**shared, momentum=0.9, eta=0.001)


def build(kind: str, *, precision: str = "fp32", seed: int = 0, **options) -> tuple[Network, StudentOptimizer]:
    torch.manual_seed(seed)
    network = Network()
    return network, make(kind, **options).build(network, precision=precision, device=CPU)


def values(*, learning_rate: float = 0.01, weight_decay: float = 0.1, frozen: bool = False) -> StepValues:
    return StepValues(
        epoch=0, learning_rate=learning_rate, weight_decay=weight_decay, momentum=0.9, temperature=0.04, last_layer_frozen=frozen
    )


def loss_of(network: nn.Module, seed: int) -> Tensor:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    return network(x).square().mean()


def train(network: nn.Module, optimizer: StudentOptimizer, seeds: list[int], *, frozen: bool = False) -> None:
    for seed in seeds:
        optimizer.set(values(frozen=frozen))
        optimizer.backward(loss_of(network, seed))
        optimizer.step(YES)


def bits(network: nn.Module, optimizer: StudentOptimizer) -> dict[str, Tensor]:
    """A copy of every number that a step may change, reinterpreted as integers."""
    numbers = {f"weight {name}": value for name, value in network.named_parameters()}
    for name, state in optimizer.state_dict()["parameters"].items():
        numbers |= {f"{key} {name}": value for key, value in state.items()}
    return {name: value.detach().clone().view(torch.int32) for name, value in numbers.items()}


def assert_same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


KINDS = pytest.mark.parametrize("kind", ["adamw", "sgd", "lars"])


def test_only_weights_that_are_not_one_dimensional_and_no_biases_decay():
    decayed, rest = parameter_groups(Network())
    assert decayed.decayed and not rest.decayed
    assert decayed.names == ["body.weight", "view_prototypes.weight_g", "view_prototypes.weight_v"]
    assert rest.names == ["scale", "body.bias", "extra.bias"]
    assert decayed.last_layer == [False, True, True]


def test_frozen_parameters_are_in_no_group():
    network = Network()
    network.view_prototypes.weight_g.requires_grad_(False)
    assert all("weight_g" not in name for group in parameter_groups(network) for name in group.names)


@KINDS
def test_weight_decay_moves_only_the_decayed_group(kind):
    network, optimizer = build(kind)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimizer.set(values(weight_decay=0.5))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(YES)
    moved = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"body.weight", "view_prototypes.weight_g", "view_prototypes.weight_v"}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_fused_and_masked_step_equals_torchs_plain_one(kind):
    """Also with parameters whose first gradient comes late, which torch's own fused SGD cannot take."""
    network, optimizer = build(kind)
    torch.manual_seed(0)
    plain_network = Network()
    groups = [{"params": group.parameters, "weight_decay": 0.1 * group.decayed} for group in parameter_groups(plain_network)]
    if kind == "adamw":
        plain: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=False)
    else:
        plain = torch.optim.SGD(groups, lr=0.01, momentum=0.9, foreach=False)
    for seed, frozen in enumerate([True, True, False, False, False]):
        train(network, optimizer, [seed], frozen=frozen)
        plain.zero_grad()
        loss_of(plain_network, seed).backward()
        if frozen:
            plain_network.view_prototypes.weight_g.grad = plain_network.view_prototypes.weight_v.grad = None
        plain.step()
    for ours, theirs in zip(network.parameters(), plain_network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@KINDS
def test_the_frozen_last_layer_keeps_its_bits_and_the_rest_moves(kind):
    network, optimizer = build(kind)
    before = bits(network, optimizer)
    train(network, optimizer, [0, 1], frozen=True)
    after = bits(network, optimizer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("prototypes" in name for name in changed)
    assert {"weight body.weight", "weight body.bias", "weight scale"} <= changed


@KINDS
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_is_not_finite_changes_no_bit(kind, steps_before):
    network, optimizer = build(kind, clip="parameter")
    train(network, optimizer, list(range(steps_before)))
    before = bits(network, optimizer)
    optimizer.set(values())
    optimizer.backward(loss_of(network, 7) * float("nan"))
    optimizer.step(NO)
    assert_same_bits(before, bits(network, optimizer))
    assert all(parameter.grad is None for parameter in network.parameters())


@KINDS
def test_training_after_a_masked_step_goes_on_as_if_it_had_not_been(kind):
    network, optimizer = build(kind)
    other_network, other_optimizer = build(kind)
    optimizer.set(values())
    optimizer.backward(loss_of(network, 7) * float("inf"))
    optimizer.step(NO)
    train(network, optimizer, [0, 1, 2])
    train(other_network, other_optimizer, [0, 1, 2])
    assert_same_bits(bits(other_network, other_optimizer), bits(network, optimizer))


@KINDS
def test_a_gradient_that_is_not_finite_masks_the_step_though_the_loss_was_finite(kind):
    network, optimizer = build(kind, clip="parameter")
    train(network, optimizer, [0])
    before = bits(network, optimizer)
    optimizer.set(values())
    optimizer.backward(loss_of(network, 1))
    assert network.scale.grad is not None
    network.scale.grad[2] = float("nan")
    norm = optimizer.step(YES)
    assert not norm.isfinite()
    assert_same_bits(before, bits(network, optimizer))


def test_each_gradient_is_clipped_by_itself():
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([[0.3, 0.4]])]
    norms = clip_each_(gradients, 1.0)
    torch.testing.assert_close(norms, torch.tensor([5.0, 0.5]))
    torch.testing.assert_close(gradients[0], torch.tensor([0.6, 0.8]))
    assert gradients[1].tolist() == torch.tensor([[0.3, 0.4]]).tolist()


def test_global_clipping_keeps_the_ratio_between_gradients():
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    norms = clip_global_(gradients, 1.0)
    torch.testing.assert_close(norms, torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(torch.cat([gradient.flatten() for gradient in gradients]), torch.tensor([0.6, 0.0, 0.8]))


@pytest.mark.parametrize("clip", ["parameter", "global", "none"])
def test_the_step_returns_the_norm_from_before_clipping_on_the_device_and_detached(clip):
    network, optimizer = build("sgd", clip=clip, clip_norm=1e-3)
    loss = loss_of(network, 0)
    gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    optimizer.set(values())
    optimizer.backward(loss)
    norm = optimizer.step(YES)
    assert norm.shape == () and not norm.requires_grad
    torch.testing.assert_close(norm, torch.cat([gradient.flatten() for gradient in gradients]).norm())


@pytest.mark.parametrize("clip", ["parameter", "global", "none"])
def test_the_way_of_clipping_decides_how_far_a_step_goes(clip):
    network, optimizer = build("sgd", clip=clip, clip_norm=0.01)
    before = [value.detach().clone() for value in network.parameters()]
    loss = loss_of(network, 0) * 100
    norms = [gradient.norm() for gradient in torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)]
    total = torch.stack(norms).norm()
    optimizer.set(values(learning_rate=1.0, weight_decay=0.0))
    optimizer.backward(loss)
    optimizer.step(YES)
    for old, new, norm in zip(before, network.parameters(), norms, strict=True):
        expected = {"parameter": norm.clamp(max=0.01), "global": norm * 0.01 / total, "none": norm}[clip]
        torch.testing.assert_close((new - old).norm(), expected, rtol=1e-3, atol=1e-6)


def test_two_backward_passes_of_halves_step_as_one_of_the_whole():
    network, optimizer = build("sgd")
    whole_network, whole_optimizer = build("sgd")
    for made in (optimizer, whole_optimizer):
        made.set(values())
    optimizer.backward(loss_of(network, 0) / 2)
    optimizer.backward(loss_of(network, 1) / 2)
    whole_optimizer.backward((loss_of(whole_network, 0) + loss_of(whole_network, 1)) / 2)
    torch.testing.assert_close(optimizer.step(YES), whole_optimizer.step(YES))
    for ours, theirs in zip(network.parameters(), whole_network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@KINDS
def test_the_fp16_scale_cancels_out_of_gradients_clipping_and_norm(kind):
    network, optimizer = build(kind, precision="fp16", clip="parameter", clip_norm=0.05)
    plain_network, plain_optimizer = build(kind, clip="parameter", clip_norm=0.05)
    for seed in range(3):
        for each_network, each in ((network, optimizer), (plain_network, plain_optimizer)):
            each.set(values())
            each.backward(loss_of(each_network, seed))
        torch.testing.assert_close(optimizer.step(YES), plain_optimizer.step(YES))
    for ours, theirs in zip(network.parameters(), plain_network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@KINDS
def test_an_fp16_overflow_masks_the_step_and_halves_the_scale(kind):
    network, optimizer = build(kind, precision="fp16", clip="parameter")
    assert optimizer.scaler is not None
    train(network, optimizer, [0])
    before, scale = bits(network, optimizer), optimizer.scaler.get_scale()
    optimizer.set(values())
    optimizer.backward(loss_of(network, 1))
    assert network.body.weight.grad is not None
    network.body.weight.grad[0, 0] = float("inf")
    optimizer.step(YES)
    assert optimizer.scaler.get_scale() == scale / 2
    assert_same_bits(before, bits(network, optimizer))
    train(network, optimizer, [2])
    assert not torch.equal(before["weight body.weight"], bits(network, optimizer)["weight body.weight"])


@KINDS
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_continued_from_saved_state_equals_the_uninterrupted_one(kind, precision, tmp_path):
    network, optimizer = build(kind, precision=precision, clip="parameter")
    train(network, optimizer, [0, 1], frozen=True)
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(network, optimizer, [2, 3])
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed_network, resumed_optimizer = build(kind, precision=precision, clip="parameter", seed=1)
    resumed_network.load_state_dict(saved["network"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    train(resumed_network, resumed_optimizer, [2, 3])
    assert_same_bits(bits(network, optimizer), bits(resumed_network, resumed_optimizer))


def other_shape(network: Network) -> None:
    network.body.weight = nn.Parameter(torch.zeros(6, 9))


def other_parameters(network: Network) -> None:
    network.another = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("change", [other_shape, other_parameters])
def test_state_of_another_network_is_refused_before_anything_is_loaded(change):
    network, optimizer = build("adamw")
    train(network, optimizer, [0])
    torch.manual_seed(0)
    other = Network()
    change(other)
    other_optimizer = make("adamw").build(other, precision="fp32", device=CPU)
    before = bits(other, other_optimizer)
    with pytest.raises(OptionError, match="^output_dir: "):
        other_optimizer.load_state_dict(optimizer.state_dict())
    assert_same_bits(before, bits(other, other_optimizer))


def test_state_of_another_optimizer_or_precision_or_decay_is_refused():
    _, adamw = build("adamw")
    _, sgd = build("sgd")
    _, half = build("adamw", precision="fp16")
    for made, state in ((sgd, adamw.state_dict()), (half, adamw.state_dict()), (adamw, half.state_dict())):
        with pytest.raises(OptionError, match="^output_dir: "):
            made.load_state_dict(state)
    with pytest.raises(OptionError, match="weight decay"):
        adamw.load_state_dict(adamw.state_dict() | {"decayed": ["body.weight"]})


@pytest.mark.parametrize("option, value", [("learning_rate", 0.0), ("clip", "each"), ("clip_norm", 0.0)])
def test_impossible_options_are_refused(option, value):
    options = {"learning_rate": 0.001, "clip": "parameter", "clip_norm": 3.0, "momentum": 0.9} | {option: value}
    with pytest.raises(OptionError, match=f"^optimizer.{option}: "):
        SGD(**options)


@pytest.mark.parametrize("betas", [[0.9], [0.9, 1.0], [0.9, 0.99, 0.999]])
def test_betas_that_are_not_two_decays_are_refused(betas):
    with pytest.raises(OptionError, match="^optimizer.betas: "):
        AdamW(learning_rate=0.001, clip="none", clip_norm=3.0, betas=betas, eps=1e-8)
