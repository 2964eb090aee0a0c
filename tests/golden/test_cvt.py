"""CvT against the original's recorded features, and four training steps of a small one.

Limits are those of the goldens' README. The recorded shift is the original's, which masks without moving windows, at 224 pixels only.
"""

import re
from typing import Any

import pytest
import torch
from torch import nn

from esvit.backbones.cvt import Cvt
from tests.golden.cases import Goldens, assert_close, micro_layouts, original_layout
from tests.golden.steps import assert_four_steps_equal

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
    backbone = cvt_without_values("micro_cvt").to_empty(device="cpu")
    start_counters(backbone)
    assert_four_steps_equal(goldens, "train_cvt_dense_adamw", backbone, key_biases={".qkv.pw.bias": 3})


def start_counters(network: nn.Module) -> None:
    """The rule gives floats only, and memory fresh from `to_empty` holds anything: counters of batch norms start at 0."""
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
