"""ViL against the original's recorded features, its sliding chunks by themselves, and four training steps of a small one.

Limits are those of the goldens' README. The original names the projections of global tokens twice, though they are the local ones.
"""

import re
from typing import Any

import numpy as np
import pytest
import torch

from esvit.backbones.sliding_chunks import ALL, NEIGHBOURS, OWN
from esvit.backbones.vil import SlidingChunkAttention, Vil
from tests.golden.cases import Goldens, assert_close, micro_layouts, original_layout
from tests.golden.steps import GradientNorms, assert_four_steps_equal

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vil_2262": {"dims": [96, 192, 384, 768], "depths": [2, 2, 6, 2], "heads": [3, 6, 12, 24], "absolute_positions": [False] * 4},
    "vil_small_default": {"dims": [96, 192, 384, 768], "depths": [1, 2, 8, 1], "heads": [3, 3, 6, 12], "absolute_positions": [True] * 4},
    "micro_vil": {"dims": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "heads": [2, 2, 4, 4], "absolute_positions": [False] * 4},
}
PUBLISHED = ["vil_2262", "vil_small_default"]
REACHES = {0: "chunks", 1: "window", -1: "wrapped"}


def vil_without_values(model: str) -> Vil:
    """The network of a golden case, whose parameters have shapes but no memory yet."""
    with torch.device("meta"):
        network = Vil(
            in_channels=3,
            image_size=224,
            patch_sizes=[4, 2, 2, 2],
            window_sizes=[7, 7, 7, 7],
            sliding=[True, True, False, False],
            global_tokens=[1, 1, 1, 0],
            neighbours="all" if model == "micro_vil" else "random",
            all_neighbours_from=1.0,
            reach="chunks",
            mlp_ratio=4.0,
            drop_path_rate=0.0 if model == "micro_vil" else 0.1,
            **ARCHITECTURES[model],
        )
    return network.eval()


def filled(goldens: Goldens, model: str) -> Vil:
    network = vil_without_values(model).to_empty(device="cpu")
    goldens.fill(network)
    return network


def original_backbone(layout: dict) -> dict[str, list[int]]:
    """Names and shapes of the backbone's entries but for second names of one tensor, and for the relative-position index, a buffer."""
    return {
        name: shape
        for name, shape in layout["state_dict"].items()
        if not name.startswith(("head.", "head_dense."))
        and not name.endswith("relative_position_index")
        and not re.search(r"\.(query|kv|proj)_global\.", name)
    }


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_names_and_shapes_are_the_originals(model):
    layout = micro_layouts()[model] if model == "micro_vil" else original_layout(model)
    network = vil_without_values(model)
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == original_backbone(layout)
    if model != "micro_vil":
        assert sum(parameter.numel() for parameter in network.parameters()) == layout["n_params_backbone"]
        assert network.dim == layout["feature_dim"]
        assert layout["tied"].keys() == {name for name in layout["state_dict"] if "_global." in name}  # what we have under one name only
        assert set(layout["tied"].values()) <= network.state_dict().keys()


def test_probe_widths_are_the_originals(goldens):
    for model in ARCHITECTURES:
        widths = {int(count): width for count, width in goldens.json("linear_eval_dims")[model].items()}
        assert widths == {count: sum(vil_without_values(model).block_dims[-count:]) for count in (1, 2, 3, 4)}


@pytest.mark.parametrize("model", PUBLISHED)
def test_features_equal_the_originals(model, goldens):
    golden = goldens.case(f"arch_{model}")
    network = filled(goldens, model)
    with torch.inference_mode():
        for side in (224, 96):
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
    network = filled(goldens, "vil_2262")
    state = network.state_dict()
    scaled = [name for name in state if re.match(r"layer\d\.0\.proj\.", name)]
    assert len(scaled) == golden["vil_2262_n_scaled"]
    with torch.inference_mode():
        for name in scaled:
            state[name].mul_(0.003)
        pooled = network(goldens.input("img96", (2, 3, 96, 96))).pooled
    assert_close(pooled, golden["vil_2262_pooled_96"], absolute=1e-4)


@pytest.mark.parametrize("gradients", [False, True])
def test_sliding_chunks_equal_the_originals_in_every_mode(gradients, goldens):
    """Modes 1 to 8 are the own chunk and one neighbour, in the order of the 3 x 3; with gradients the product takes another path."""
    golden = goldens.case("vil_sliding_chunk_attention")
    for name in list(golden):
        match = re.fullmatch(r"nglo(\d)_(\d+)x(\d+)_rpe(\d)_mode(-?\d)(?:_exact(-?1))?", name)
        if match is None:
            continue
        global_tokens, rows, columns, relative, mode, exact = (int(group or 0) for group in match.groups())
        attention = SlidingChunkAttention(
            dim=24,
            heads=3,
            global_tokens=global_tokens,
            window=4,
            relative_positions=bool(relative),
            neighbours="own" if mode == -1 else "all",
            reach=REACHES[exact],
        )
        goldens.fill(attention, lambda ours: f"vilattn.{ours}")
        count = global_tokens + rows * columns
        tokens = goldens.input(f"vilattn_x_{rows}_{columns}_{global_tokens}", (2, count, 24))
        places = (*OWN, NEIGHBOURS[mode - 1]) if mode > 0 else attention._draw_places()
        assert len(places) == {-1: 1, 0: 9}.get(mode, 2)
        with torch.set_grad_enabled(gradients):
            mixed = attention.attend(tokens, (rows, columns), places)
        assert_close(mixed[:, :, :6], golden.pop(name), absolute=2e-5)
        if exact == 0:
            assert_close(mixed.norm(dim=-1), golden.pop(f"{name}_norm"), absolute=2e-5)
    assert not golden, f"arrays of the case that this test does not use: {sorted(golden)}"
    assert len(ALL) == 9


def test_four_training_steps_equal_the_originals(goldens: Goldens):
    backbone = vil_without_values("micro_vil").to_empty(device="cpu")
    key_biases = {".qkv.bias": 3, ".kv.bias": 2}
    assert_four_steps_equal(goldens, "train_vil_dense_adamw", backbone, key_biases=key_biases, set_aside=set_aside_idle_biases)


def set_aside_idle_biases(norms: GradientNorms, golden: dict[str, np.ndarray], step: int) -> None:
    """Global tokens leave a stage unused, so that in its last block the biases between them get a gradient of exactly zero."""
    names = golden[f"step{step}_grad_names"]
    idle = golden[f"step{step}_grad_norms_before_clip"] == 0
    idle_names = {name.removeprefix("module.") for name in names[idle]}
    assert idle_names == {f"layer{stage}.1.attn.g2g_relative_position_bias" for stage in (1, 2, 3)}
    assert {name for name, norm in norms.before.items() if norm == 0} == idle_names
    for array in ("grad_names", "grad_norms_before_clip", "grad_norms_after_clip"):
        golden[f"step{step}_{array}"] = golden[f"step{step}_{array}"][~idle]
    norms.before = {name: norm for name, norm in norms.before.items() if name not in idle_names}
    norms.after = {name: norm for name, norm in norms.after.items() if name not in idle_names}
