"""Swin against the original's recorded features and attention, all sizes and both windows.

Limits are those of the goldens' README: twenty to fifty times less than what a missing shift mask or another GELU changes.
"""

import re
from typing import Any

import pytest
import torch

from esvit.backbones.base import AttentionWindows
from esvit.backbones.swin import Swin
from tests.golden.cases import Goldens, assert_close, micro_layouts, original_layout

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 96, "depths": [2, 2, 6, 2], "heads": [3, 6, 12, 24]},
    "small": {"dim": 96, "depths": [2, 2, 18, 2], "heads": [3, 6, 12, 24]},
    "base": {"dim": 128, "depths": [2, 2, 18, 2], "heads": [4, 8, 16, 32]},
    "large": {"dim": 192, "depths": [2, 2, 18, 2], "heads": [6, 12, 24, 48]},
    "micro": {"dim": 24, "depths": [2, 1, 2, 1], "heads": [2, 4, 8, 16]},
}
PUBLISHED = ["swin_tiny_w7", "swin_tiny_w14", "swin_small_w7", "swin_small_w14", "swin_base_w7", "swin_base_w14", "swin_large_w7"]


def swin_without_values(model: str) -> Swin:
    """The network of a golden case ("swin_tiny_w7", "micro_swin"), whose parameters have shapes but no memory yet."""
    size = "micro" if model == "micro_swin" else model.split("_")[1]
    window = int(model.rsplit("_w", 1)[1]) if "_w" in model else 7
    with torch.device("meta"):
        network = Swin(in_channels=3, patch_size=4, window_size=window, mlp_ratio=4.0, drop_path_rate=0.1, image_size=224, **SIZES[size])
    return network.eval()


def filled(goldens: Goldens, model: str) -> Swin:
    network = swin_without_values(model).to_empty(device="cpu")
    goldens.fill(network)
    return network


def original_backbone(state_dict: dict[str, list[int]]) -> dict[str, list[int]]:
    """Names and shapes of the backbone's floating-point entries; the relative-position index is an int64 buffer."""
    return {
        name: shape
        for name, shape in state_dict.items()
        if not name.startswith(("head.", "head_dense.")) and not name.endswith("relative_position_index")
    }


@pytest.mark.parametrize("model", [*PUBLISHED, "micro_swin"])
def test_names_and_shapes_are_the_originals(model):
    layout = micro_layouts()[model] if model == "micro_swin" else original_layout(model)
    network = swin_without_values(model)
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == original_backbone(layout["state_dict"])
    if model != "micro_swin":
        assert sum(parameter.numel() for parameter in network.parameters()) == layout["n_params_backbone"]
        assert network.dim == layout["feature_dim"]


def test_probe_widths_are_the_originals(goldens):
    for model in [*PUBLISHED, "micro_swin"]:
        widths = {int(count): width for count, width in goldens.json("linear_eval_dims")[model].items()}
        assert widths == {count: sum(swin_without_values(model).block_dims[-count:]) for count in (1, 2, 3, 4)}


@pytest.mark.parametrize("model", PUBLISHED)
def test_features_and_attention_equal_the_originals(model, goldens):
    golden = goldens.case(f"arch_{model}")
    network = filled(goldens, model)
    with torch.inference_mode():
        for side in (224, 96):
            features = network(goldens.input(f"img{side}", (2, 3, side, side)))
            assert list(features.regions.shape) == golden[f"region_{side}_shape"].tolist()
            assert_close(features.pooled, golden[f"pooled_{side}"], absolute=2e-5, relative_l2=5e-6)
            assert_close(features.regions[:, :, :8], golden[f"region_{side}_ch8"], absolute=5e-5, relative_l2=1e-5)
            assert_close(features.regions.norm(dim=-1), golden[f"region_{side}_norm"], absolute=5e-5, relative_l2=1e-5)

        images = goldens.input("img224", (2, 3, 224, 224))
        last_blocks = torch.cat(network.last_blocks(images, 4), dim=1)
        assert_close(last_blocks, golden["nlast4_224"], absolute=2e-5, relative_l2=5e-6)
        assert_attention_equals(network.window_attentions(images), golden)


def assert_attention_equals(attentions: list[AttentionWindows], golden: dict) -> None:
    """The original joins images and windows, images first. All blocks were recorded for image 0, entropies for its window 0."""
    assert [list(block.weights[0].shape) for block in attentions] == golden["attn_all_shapes"].tolist()
    for index, block in enumerate(attentions):
        weights = block.weights[0, 0]
        entropy_bits = -torch.xlogy(weights, weights).sum(dim=-1).mean(dim=-1) / torch.log(torch.tensor(2.0))
        assert_close(entropy_bits, golden[f"attn_entropy_win0_layer{index:02d}"], absolute=1e-5)
    last = attentions[-1].weights.flatten(0, 1)
    assert list(last.shape) == golden["attn_last_shape"].tolist()
    assert_close(last[:, :4, :8], golden["attn_last_sub"], absolute=1e-5)
    assert_close(last.mean(dim=2), golden["attn_last_mean_over_queries"], absolute=1e-5)


def test_layer_norm_eps_is_the_originals(goldens):
    """With a patch embedding 0.003 times as large, another eps changes the features by more than 15 %."""
    golden = goldens.case("layernorm_eps")
    network = filled(goldens, "swin_tiny_w7")
    state = network.state_dict()
    scaled = [name for name in state if re.match(r"patch_embed\.proj\.", name)]
    assert len(scaled) == golden["swin_tiny_w7_n_scaled"]
    with torch.inference_mode():
        for name in scaled:
            state[name].mul_(0.003)
        pooled = network(goldens.input("img96", (2, 3, 96, 96))).pooled
    assert_close(pooled, golden["swin_tiny_w7_pooled_96"], absolute=1e-4)
