"""Schedules, clipping, LARS and weight-decay groups against the original."""

import numpy as np
import pytest
import torch
from torch import nn

from esvit.optimizers import LARS, clip_each_, parameter_groups
from esvit.records import StepValues
from esvit.schedules import Schedules
from tests.golden import cases
from tests.golden.cases import Goldens, assert_close, original_layout

LAYOUTS = sorted(path.stem for path in (cases.DATA / "keys").glob("*.json"))


def schedules(*, epochs, steps_per_epoch, learning_rate, warmup_learning_rate=0.0, warmup_epochs, final_learning_rate=1e-6) -> Schedules:
    return Schedules(
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        learning_rate=learning_rate,
        warmup_learning_rate=warmup_learning_rate,
        final_learning_rate=final_learning_rate,
        warmup_epochs=warmup_epochs,
        weight_decay_start=0.04,
        weight_decay_end=0.4,
        teacher_momentum_start=0.996,
        teacher_momentum_end=1.0,
        teacher_temperature_start=0.04,
        teacher_temperature_end=0.04,
        teacher_temperature_warmup_epochs=0,
        freeze_last_layer_epochs=1,
    )


def test_schedules_equal_the_originals(goldens: Goldens):
    golden = goldens.case("schedules")
    ours = schedules(epochs=10, steps_per_epoch=7, learning_rate=0.001, warmup_epochs=3)
    steps = [ours.at(step) for step in range(ours.total_steps)]
    assert_close(np.array([now.learning_rate for now in steps]), golden["lr"], absolute=1e-12)
    assert_close(np.array([now.weight_decay for now in steps]), golden["wd"], absolute=1e-12)
    assert_close(np.array([now.momentum for now in steps]), golden["momentum"], absolute=1e-12)


def test_a_warmup_from_above_zero_equals_the_originals(goldens: Goldens):
    ours = schedules(epochs=5, steps_per_epoch=4, learning_rate=0.002, warmup_learning_rate=1e-5, final_learning_rate=1e-5, warmup_epochs=2)
    rates = np.array([ours.at(step).learning_rate for step in range(ours.total_steps)])
    assert_close(rates, goldens.case("schedules")["warm_from_1e-5"], absolute=1e-12)


def test_gradients_are_clipped_as_in_the_original(goldens: Goldens):
    golden = goldens.case("clip_gradients")
    names = ["a.weight", "b.weight", "b.bias"]
    gradients = [
        goldens.input("clip_a", (4, 5), scale=10),
        goldens.input("clip_bw", (3, 3), scale=0.1),
        goldens.input("clip_bb", (3,), scale=2),
    ]
    for name, gradient in zip(names, gradients, strict=True):
        assert_close(gradient, golden[f"before_{name}"], relative=1e-6)
    norms = clip_each_(gradients, 3.0)
    assert_close(norms, golden["returned_norms"], relative=1e-5)
    for name, gradient in zip(names, gradients, strict=True):
        assert_close(gradient, golden[f"after_{name}"], relative=1e-5)


def test_lars_moves_parameters_as_the_original(goldens: Goldens):
    golden = goldens.case("lars")
    network = nn.Module()
    network.w = nn.Parameter(goldens.input("lars_p_w", (4, 5)))
    network.zero_param = nn.Parameter(torch.zeros(3, 3))
    network.zero_grad_ = nn.Parameter(goldens.input("lars_p_zero_grad", (2, 3)))
    network.b = nn.Parameter(goldens.input("lars_p_b", (5,)))
    names = {"w": network.w, "zero_param": network.zero_param, "zero_grad": network.zero_grad_, "b": network.b}
    optimizer = LARS(learning_rate=0.2, momentum=0.9, eta=0.001, clip="none", clip_norm=0.0).build(
        network, precision="fp32", device=torch.device("cpu")
    )
    now = StepValues(epoch=0, learning_rate=0.2, weight_decay=0.1, momentum=0.9, temperature=0.04, last_layer_frozen=False)
    for step in range(2):
        for name, parameter in names.items():
            parameter.grad = torch.zeros(2, 3) if name == "zero_grad" else goldens.input(f"lars_g{step}_{name}", parameter.shape)
        optimizer.set(now)
        optimizer.step(torch.tensor(True))
        for name, parameter in names.items():
            assert_close(parameter, golden[f"step{step}_{name}"], relative=1e-5)


@pytest.mark.parametrize("model", LAYOUTS)
def test_as_many_parameters_decay_as_in_the_original(model):
    layout = original_layout(model)
    network = nn.Module()
    for name, shape in layout["state_dict"].items():
        if name in layout["buffers"] or name in layout.get("tied", {}):
            continue
        *path, last = name.split(".")
        owner = network
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        # the original's magnitudes of the view head were trained, those of the region head too: norm_last_layer False
        owner.register_parameter(last, nn.Parameter(torch.empty(shape, device="meta")))
    decayed, rest = parameter_groups(network)
    assert len(decayed.names) == layout["weight_decay_group_sizes"]["regularized"]
    assert len(rest.names) == layout["weight_decay_group_sizes"]["not_regularized"]
    assert set(layout["regularized_but_not_linear_or_conv_weight"]) <= set(decayed.names)
