"""ViT/DeiT and ResNet-50 against the original's recorded features and attention.

Limits are those of the goldens' README.
"""

import re
from typing import Any

import pytest
import torch

from esvit.backbones.base import Backbone
from esvit.backbones.resnet import ResNet
from esvit.backbones.vit import ViT
from tests.golden.cases import Goldens, assert_close, original_layout
from tests.golden.test_backbones import assert_attention_equals, original_backbone

SIZES: dict[str, dict[str, Any]] = {
    "deit_tiny": {"patch_size": 16, "dim": 192, "heads": 3},
    "deit_small": {"patch_size": 16, "dim": 384, "heads": 6},
    "deit_small_p8": {"patch_size": 8, "dim": 384, "heads": 6},
    "vit_base": {"patch_size": 16, "dim": 768, "heads": 12},
}
WRAPPED = "backbone.backbone."  # how the original names a torchvision network's entries, but not in the golden rule


def vit_without_values(model: str) -> ViT:
    """The network of a golden case, whose parameters have shapes but no memory yet."""
    with torch.device("meta"):
        network = ViT(in_channels=3, image_size=224, depth=12, mlp_ratio=4.0, drop_path_rate=0.1, **SIZES[model])
    return network.eval()


def filled(goldens: Goldens, model: str) -> ViT:
    network = vit_without_values(model).to_empty(device="cpu")
    goldens.fill(network)
    return network


@pytest.mark.parametrize("model", SIZES)
def test_names_and_shapes_are_the_originals(model):
    layout, network = original_layout(model), vit_without_values(model)
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == original_backbone(layout["state_dict"])
    assert sum(parameter.numel() for parameter in network.parameters()) == layout["n_params_backbone"]
    assert network.dim == layout["feature_dim"]


def test_probe_widths_are_the_originals(goldens):
    for model in SIZES:
        golden, network = goldens.json("linear_eval_dims")[model], vit_without_values(model)
        assert {str(count): sum(network.block_dims[-count:]) for count in (1, 2, 3, 4)} == {key: golden[key] for key in "1234"}
        assert network.dim == golden["avgpool_adds"]


def assert_features_equal(network: Backbone, golden: dict, goldens: Goldens) -> None:
    for side in (224, 96):
        features = network(goldens.input(f"img{side}", (2, 3, side, side)))
        assert list(features.regions.shape) == golden[f"region_{side}_shape"].tolist()
        assert_close(features.pooled, golden[f"pooled_{side}"], absolute=2e-5, relative_l2=5e-6)
        assert_close(features.regions[:, :, :8], golden[f"region_{side}_ch8"], absolute=5e-5, relative_l2=1e-5)
        assert_close(features.regions.norm(dim=-1), golden[f"region_{side}_norm"], absolute=5e-5, relative_l2=1e-5)


@pytest.mark.parametrize("model", SIZES)
def test_vit_features_and_attention_equal_the_originals(model, goldens):
    golden, network = goldens.case(f"arch_{model}"), filled(goldens, model)
    images = goldens.input("img224", (2, 3, 224, 224))
    with torch.inference_mode():
        assert_features_equal(network, golden, goldens)
        last_blocks = torch.cat(network.last_blocks(images, 4), dim=1)
        assert_close(last_blocks, golden["nlast4_224"], absolute=2e-5, relative_l2=5e-6)
        features = network(images)
        with_regions = torch.cat([*network.last_blocks(images, 1), features.regions.mean(dim=1)], dim=1)
        assert_close(with_regions, golden["nlast1_avgpool_224"], absolute=2e-5, relative_l2=5e-6)
        norms = torch.cat([features.pooled[:1, None], features.regions[:1]], dim=1).norm(dim=-1)
        assert_close(norms, golden["feature_maps_token_norm"], absolute=5e-5, relative_l2=1e-5)
        assert_attention_equals(network.window_attentions(images), golden)


def test_layer_norm_eps_is_the_originals(goldens):
    """With patches, position embeddings and branches 0.003 times as large, another eps changes the features by more than 15 %."""
    golden, network = goldens.case("layernorm_eps"), filled(goldens, "deit_small")
    state = network.state_dict()
    scaled = [name for name in state if re.match(r"(patch_embed\.proj|pos_embed|cls_token|blocks\.\d+\.(attn\.proj|mlp\.fc2)\.)", name)]
    assert len(scaled) == golden["deit_small_n_scaled"]
    with torch.inference_mode():
        for name in scaled:
            state[name].mul_(0.003)
        pooled = network(goldens.input("img96", (2, 3, 96, 96))).pooled
    assert_close(pooled, golden["deit_small_pooled_96"], absolute=1e-4)


def test_resnet_50_equals_the_originals_with_its_names_and_shapes(goldens):
    layout, network = original_layout("resnet50"), ResNet(in_channels=3, depths=[3, 4, 6, 3]).eval()
    original = {name.removeprefix(WRAPPED): shape for name, shape in layout["state_dict"].items() if name.startswith(WRAPPED)}
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == original
    assert sum(parameter.numel() for parameter in network.parameters()) == layout["n_params_backbone"]
    assert network.dim == layout["feature_dim"]
    goldens.fill(network)
    with torch.inference_mode():
        assert_features_equal(network, goldens.case("arch_resnet50"), goldens)
