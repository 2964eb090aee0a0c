"""CvT against the original's recorded features, and four training steps of a small one.

Limits are those of the goldens' README. The recorded shift is the original's, which masks without moving windows, at 224 pixels only.
"""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from esvit.backbones.cvt import Cvt
from esvit.networks import HeadOptions
from esvit.runtime import Runtime
from esvit.tasks.distillation import Distillation
from tests.golden.cases import Goldens, assert_close, micro_layouts, original_layout
from tests.golden.test_training import (
    CROP_SIZES,
    IMAGES,
    LIMITS,
    OPTIMIZERS,
    PROTOTYPES,
    STEPS,
    GradientNorms,
    assert_centres_equal,
    assert_gradients_equal,
    assert_norms_equal,
    assert_schedules_equal,
    make_loss,
    make_schedules,
    original_name,
)

SIZES: dict[str, dict[str, Any]] = {
    "s1": {"dims": [64, 192, 384, 768], "depths": [2, 2, 6, 2], "heads": [1, 3, 6, 12], "drop_path_rate": 0.1},
    "s3": {"dims": [64, 128, 256, 512], "depths": [2, 2, 10, 4], "heads": [2, 4, 8, 16], "drop_path_rate": 0.2},
    "micro": {"dims": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "heads": [1, 2, 2, 4], "drop_path_rate": 0.0},
}
PUBLISHED = [
    *("cvt_tiny_s1", "cvt_s1_w14", "cvt_s1_shift", "cvt_s1_rpe", "cvt_s1_rpe_w14", "cvt_s1_rpe_shift"),
    *("cvt_s1_resstem_w14", "cvt_s1_resstem_rpe_w14", "cvt_s3", "cvt_s3_w14", "cvt_s3_rpe", "cvt_s3_resstem_w14"),
]
MODELS = [*PUBLISHED, "micro_cvt"]


def cvt_without_values(model: str) -> Cvt:
    """The network of a golden case ("cvt_s1_rpe_w14", "micro_cvt"), whose parameters have shapes but no memory yet."""
    words = model.split("_")
    size = next(word for word in words if word in SIZES)
    with torch.device("meta"):
        network = Cvt(
            in_channels=3,
            window_sizes=[14, 14, 14, 7] if "w14" in words else [7, 7, 7, 7],
            mlp_ratio=4.0,
            residual_stem="resstem" in words,
            relative_position="rpe" in words,
            shift="mask_only" if "shift" in words else "none",
            **SIZES[size],
        )
    return network.eval()


def filled(goldens: Goldens, model: str) -> Cvt:
    network = cvt_without_values(model).to_empty(device="cpu")
    goldens.fill(network)
    return network


def original_backbone(state_dict: dict[str, list[int]]) -> dict[str, list[int]]:
    """Names and shapes of the backbone's entries but for the relative-position index, an int64 buffer that we do not keep."""
    return {
        name: shape
        for name, shape in state_dict.items()
        if not name.startswith(("head.", "head_dense.")) and not name.endswith("rel_pos_idx")
    }


@pytest.mark.parametrize("model", MODELS)
def test_names_and_shapes_are_the_originals(model):
    layout = micro_layouts()[model] if model == "micro_cvt" else original_layout(model)
    network = cvt_without_values(model)
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == original_backbone(layout["state_dict"])
    if model != "micro_cvt":
        assert sum(parameter.numel() for parameter in network.parameters()) == layout["n_params_backbone"]
        assert network.dim == layout["feature_dim"]


def test_probe_widths_are_the_originals(goldens):
    for model in MODELS:
        widths = {int(count): width for count, width in goldens.json("linear_eval_dims")[model].items()}
        assert widths == {count: sum(cvt_without_values(model).block_dims[-count:]) for count in (1, 2, 3, 4)}


@pytest.mark.parametrize("model", PUBLISHED)
def test_features_equal_the_originals(model, goldens):
    golden = goldens.case(f"arch_{model}")
    network = filled(goldens, model)
    for note in golden.pop("notes", []):  # where the original crashed
        assert note.startswith("96 px")
        assert re.search("_(rpe|shift)", model)
    with torch.inference_mode():
        for side in (224, 96):
            if f"pooled_{side}" not in golden:
                continue
            features = network(goldens.input(f"img{side}", (2, 3, side, side)))
            assert list(features.regions.shape) == golden.pop(f"region_{side}_shape").tolist()
            assert_close(features.pooled, golden.pop(f"pooled_{side}"), absolute=2e-5, relative_l2=5e-6)
            assert_close(features.regions[:, :, :8], golden.pop(f"region_{side}_ch8"), absolute=5e-5, relative_l2=1e-5)
            assert_close(features.regions.norm(dim=-1), golden.pop(f"region_{side}_norm"), absolute=5e-5, relative_l2=1e-5)
        last_blocks = torch.cat(network.last_blocks(goldens.input("img224", (2, 3, 224, 224)), 4), dim=1)
        assert_close(last_blocks, golden.pop("nlast4_224"), absolute=2e-5, relative_l2=5e-6)
    assert not golden, f"arrays of the case that this test does not use: {sorted(golden)}"


def test_layer_norm_eps_is_the_originals(goldens):
    """With embeddings 0.003 times as large, another eps changes the features by more than 15 %."""
    golden = goldens.case("layernorm_eps")
    network = filled(goldens, "cvt_tiny_s1")
    state = network.state_dict()
    scaled = [name for name in state if re.match(r"stage\d\.0\.proj\.", name)]
    assert len(scaled) == golden["cvt_tiny_s1_n_scaled"]
    with torch.inference_mode():
        for name in scaled:
            state[name].mul_(0.003)
        pooled = network(goldens.input("img96", (2, 3, 96, 96))).pooled
    assert_close(pooled, golden["cvt_tiny_s1_pooled_96"], absolute=1e-4)


def test_four_training_steps_equal_the_originals(goldens: Goldens):
    """The batch norms are in train mode, the teacher's too, and neither's statistics are averaged into the other's."""
    golden = goldens.case("train_cvt_dense_adamw")
    limits = LIMITS["adamw"]
    loss = make_loss("dense")
    loss.setup(prototypes=PROTOTYPES)
    head = HeadOptions(hidden_dim=2048, bottleneck_dim=256, layers=3, batch_norm=False, prototypes=PROTOTYPES, norm_last_layer=False)
    network = head.attach(cvt_without_values("micro_cvt").to_empty(device="cpu"), regions=True).train()
    start_counters(network)
    goldens.fill(network, original_name)
    norms = GradientNorms()
    norms.network = network
    optimizer = OPTIMIZERS["adamw"].build(network, precision="fp32", device=torch.device("cpu"))
    runtime = Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1.0)
    distillation = Distillation(
        network=network, loss=loss, optimizer=optimizer, runtime=runtime, global_count=2, accumulation=1, mixing=None, phase=norms
    )
    names, buffer_names = golden.pop("param_names").tolist(), golden.pop("buffer_names").tolist()
    assert sorted(names) == sorted(original_name(name) for name, _ in network.named_parameters())
    assert [len(group.names) for group in optimizer.groups] == golden.pop("group_sizes").tolist()

    schedules = make_schedules()
    assert_schedules_equal(schedules, golden)
    key_biases = key_bias_limits(network)
    losses = []
    for step in range(STEPS):
        now = schedules.at(step)
        crops = [goldens.input(f"step{step}_crop{index}", (IMAGES, 3, size, size)) for index, size in enumerate(CROP_SIZES)]
        result = distillation.step([crops], now, sound=torch.tensor(True), rng=np.random.default_rng(0))
        losses.append(result.terms.total)
        assert bool(result.finite)

        assert_gradients_equal(norms, golden, step)
        assert_centres_equal(loss, golden, step)
        for who, whose, relative in (("student", network, limits.student_norm), ("teacher", distillation.teacher.network, 1e-4)):
            state = {original_name(name): value.detach() for name, value in whose.state_dict().items()}
            what = f"{who} after step {step}"
            theirs = golden.pop(f"step{step}_{who}_norms")
            assert_norms_equal(norms_of(state, names), theirs, names, relative=relative, absolute=key_biases, what=what)
            values = np.stack([np.resize(state[name].flatten()[:4].numpy(), 4) for name in names])
            assert_close(values, golden.pop(f"step{step}_{who}_first4"), absolute=limits.first_values)
            theirs = golden.pop(f"step{step}_{who}_buffer_norms")
            assert_norms_equal(norms_of(state, buffer_names), theirs, buffer_names, relative=1e-4, absolute={}, what=f"buffers of {what}")
    golden_losses = golden.pop("losses")
    assert_close(torch.stack(losses)[:1], golden_losses[:1], relative=limits.first_loss)
    assert_close(torch.stack(losses), golden_losses, relative=limits.loss)
    assert not golden, f"arrays of the case that this test does not use: {sorted(golden)}"


def start_counters(network: nn.Module) -> None:
    """The rule gives floats only, and memory fresh from `to_empty` holds anything: counters of batch norms start at 0."""
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()


def norms_of(state: dict[str, torch.Tensor], names: list[str]) -> np.ndarray:
    return np.array([float(torch.linalg.vector_norm(state[name], dtype=torch.float64)) for name in names])


def key_bias_limits(network: nn.Module) -> dict[str, float]:
    """For each projection's bias, 4 * lr * sqrt(elements of its key third): what four steps of AdamW make of rounding noise."""
    biases = {original_name(name): bias for name, bias in network.named_parameters() if name.endswith("qkv.pw.bias")}
    return {name: 4 * 1e-3 * (bias.numel() / 3) ** 0.5 for name, bias in biases.items()}
