"""What a file holds is told in our options: those of every published layout, and of other programs' networks, by their shapes alone."""

import ast
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor

from esvit.backbones.recognise import recognise
from esvit.backbones.swin import Swin
from esvit.backbones.vil import Vil
from esvit.published import split
from tests.backbones.networks import MICRO_VIL, micro_cvt, micro_resnet, micro_vil, swin
from tests.golden.cases import DATA, original_layout

# From the original's experiment files and model definitions, at the 224 pixels of its recipes.
SWIN_T = "a Swin with dim=96 depths=[2,2,6,2] heads=[3,6,12,24]"
SWIN_S = "a Swin with dim=96 depths=[2,2,18,2] heads=[3,6,12,24]"
SWIN_B = "a Swin with dim=128 depths=[2,2,18,2] heads=[4,8,16,32]"
SWIN_L = "a Swin with dim=192 depths=[2,2,18,2] heads=[6,12,24,48]"
W7 = "window_size=7 patch_size=4"
W14 = "window_size=14 patch_size=4 image_size=224"
CVT_S1 = "a CvT with dims=[64,192,384,768] depths=[2,2,6,2]"
CVT_S3 = "a CvT with dims=[64,128,256,512] depths=[2,2,10,4]"
PLAIN = "residual_stem=false relative_position=false"
STEM = "residual_stem=true relative_position=false"
BIAS = "residual_stem=false relative_position=true"
STEM_BIAS = "residual_stem=true relative_position=true"
S1_HEADS = "heads=[1,3,6,12] window_sizes"
S3_HEADS = "heads=[2,4,8,16] window_sizes"
VIL_STAGES = "patch_sizes=[4,2,2,2] sliding=[true,true,false,false] global_tokens=[1,1,1,0]"
PUBLISHED = {
    "swin_tiny_w7": f"{SWIN_T} {W7}",
    "swin_tiny_w14": f"{SWIN_T} {W14}",
    "swin_small_w7": f"{SWIN_S} {W7}",
    "swin_small_w14": f"{SWIN_S} {W14}",
    "swin_base_w7": f"{SWIN_B} {W7}",
    "swin_base_w14": f"{SWIN_B} {W14}",
    "swin_large_w7": f"{SWIN_L} {W7}",
    "cvt_tiny_s1": f"{CVT_S1} {PLAIN}",
    "cvt_s1_w14": f"{CVT_S1} {PLAIN}",
    "cvt_s1_shift": f"{CVT_S1} {PLAIN}",
    "cvt_s1_rpe": f"{CVT_S1} {S1_HEADS}=[7,7,7,7] {BIAS}",
    "cvt_s1_rpe_w14": f"{CVT_S1} {S1_HEADS}=[14,14,14,7] {BIAS}",
    "cvt_s1_rpe_shift": f"{CVT_S1} {S1_HEADS}=[7,7,7,7] {BIAS}",
    "cvt_s1_resstem_w14": f"{CVT_S1} {STEM}",
    "cvt_s1_resstem_rpe_w14": f"{CVT_S1} {S1_HEADS}=[14,14,14,7] {STEM_BIAS}",
    "cvt_s3": f"{CVT_S3} {PLAIN}",
    "cvt_s3_w14": f"{CVT_S3} {PLAIN}",
    "cvt_s3_rpe": f"{CVT_S3} {S3_HEADS}=[7,7,7,7] {BIAS}",
    "cvt_s3_resstem_w14": f"{CVT_S3} {STEM}",
    "vil_2262": (
        f"a ViL with dims=[96,192,384,768] depths=[2,2,6,2] {VIL_STAGES} absolute_positions=[false,false,false,false] "
        "heads=[3,6,12,24] window_sizes=[7,7,7,7] image_size=224"
    ),
    "vil_small_default": (
        f"a ViL with dims=[96,192,384,768] depths=[1,2,8,1] {VIL_STAGES} absolute_positions=[true,true,true,true] image_size=224"
    ),
    "deit_tiny": "a ViT with dim=192 depth=12 patch_size=16 image_size=224",
    "deit_small": "a ViT with dim=384 depth=12 patch_size=16 image_size=224",
    "deit_small_p8": "a ViT with dim=384 depth=12 patch_size=8 image_size=224",
    "vit_base": "a ViT with dim=768 depth=12 patch_size=16 image_size=224",
    "resnet50": "a ResNet with depths=[3,4,6,3]",
}


def of_shapes(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_published_layout_is_recognised(model):
    assert recognise(split(of_shapes(original_layout(model)["state_dict"])).backbone) == PUBLISHED[model]


def test_the_table_above_leaves_no_published_layout_out():
    assert set(PUBLISHED) == {path.stem for path in (DATA / "keys").glob("*.json")}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), PUBLISHED["swin_tiny_w7"]),
        (lambda: torchvision.models.swin_b(), PUBLISHED["swin_base_w7"]),
        (lambda: timm.create_model("vit_base_patch16_224"), PUBLISHED["vit_base"]),
        (lambda: torchvision.models.vit_b_16(), PUBLISHED["vit_base"]),
        (lambda: timm.create_model("resnet50"), PUBLISHED["resnet50"]),
        (lambda: torchvision.models.resnet101(), "a ResNet with depths=[3,4,23,3]"),
    ],
    ids=["timm Swin", "torchvision Swin", "timm ViT", "torchvision ViT", "timm ResNet", "torchvision ResNet"],
)
def test_networks_of_other_programs_are_recognised(build, expected):
    with torch.device("meta"):
        assert recognise(build().state_dict()) == expected


# ------------------------------------------------------------------------------------------- options give the same shapes


def options_in(told: str | None) -> dict[str, Any]:
    """The options of an answer, as values."""
    assert told is not None
    words = told.replace("true", "True").replace("false", "False").split(" with ")[1].split()
    return {name: ast.literal_eval(value) for name, value in (word.split("=") for word in words)}


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window_size": 14},
        {"window_size": 7, "image_size": 191},  # maps of 47, 23, 11 and 5
        {"window_size": 5, "image_size": 130, "patch_size": 2, "dim": 32, "depths": [1, 3, 1], "heads": [1, 2, 4]},
        {"window_size": 12, "image_size": 32, "depths": [1, 2], "heads": [2, 4]},
    ],
)
def test_a_swin_built_from_the_answer_has_the_same_shapes(changes):
    with torch.device("meta"):
        network = swin(**changes)
        told = options_in(recognise(network.state_dict()))
        again = Swin(**({"in_channels": 3, "mlp_ratio": 4.0, "drop_path_rate": 0.0, "image_size": 1024} | told))
    assert shapes_of(again) == shapes_of(network)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window_sizes": [3, 5, 7, 9], "image_size": 160},
        {"sliding": [False, True, False, True], "global_tokens": [0, 2, 1, 1]},
        {"patch_sizes": [2, 2, 3, 1], "image_size": 100},
    ],
)
def test_a_vil_built_from_the_answer_has_the_same_shapes(changes):
    network = micro_vil(**changes)
    again = Vil(**(MICRO_VIL | {"image_size": None} | options_in(recognise(network.state_dict()))))
    assert shapes_of(again) == shapes_of(network)


def test_options_that_leave_no_trace_are_left_out():
    mixed = micro_vil(absolute_positions=[True, False, False, True])
    assert not {"heads", "window_sizes"} & options_in(recognise(mixed.state_dict())).keys()
    assert "heads" not in options_in(recognise(micro_cvt().state_dict()))
    assert options_in(recognise(micro_resnet(depths=[1, 2, 1, 3]).state_dict())) == {"depths": [1, 2, 1, 3]}


# ------------------------------------------------------------------------------------------- what is none of ours


@pytest.mark.parametrize(
    "name", ["convnext_atto", "resnet18", "wide_resnet50_2", "resnext50_32x4d", "swinv2_tiny_window8_256", "swin_s3_tiny_224"]
)
def test_another_architecture_is_not_recognised(name):
    with torch.device("meta"):
        assert recognise(timm.create_model(name).state_dict()) is None


def test_entries_of_no_network_or_of_unusual_axes_are_not_recognised():
    network = swin().state_dict()
    for name in ("patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table"):
        for odd in (torch.zeros(()), torch.zeros(4), "no tensor"):
            assert recognise(network | {name: odd}) is None
    assert recognise({}) is None
    assert recognise({"view_head.mlp.0.weight": torch.zeros(4, 4)}) is None
