"""The original's published layouts, as files: every entry finds its place, and the golden features come out.

A file is made from a layout (names and shapes), filled by the golden rule and wrapped as the original saves it; its prototypes are cut to
a few, since 65,536 of them twice over are hundreds of megabytes. With all 65,536, names and shapes are checked without memory.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from esvit.backbones.base import Backbone
from esvit.backbones.resnet import ResNet
from esvit.losses.combined import ViewRegionLoss
from esvit.networks import HeadOptions, MultiCropNetwork
from esvit.published import SavedNetworks, load_backbone, load_networks, read_networks, split
from tests.golden.cases import Goldens, assert_close, original_layout
from tests.golden.test_backbones import PUBLISHED as SWIN
from tests.golden.test_backbones import swin_without_values
from tests.golden.test_cvt import PUBLISHED as CVT
from tests.golden.test_cvt import cvt_without_values
from tests.golden.test_vil import PUBLISHED as VIL
from tests.golden.test_vil import vil_without_values
from tests.golden.test_vit import SIZES as VIT
from tests.golden.test_vit import WRAPPED, vit_without_values

PROTOTYPES = 65536
FEW = 16


def resnet_without_values(model: str) -> ResNet:
    with torch.device("meta"):
        return ResNet(in_channels=3, depths=[3, 4, 6, 3]).eval()


BUILDERS: dict[str, Callable[[str], Backbone]] = {
    **dict.fromkeys(SWIN, swin_without_values),
    **dict.fromkeys(CVT, cvt_without_values),
    **dict.fromkeys(VIL, vil_without_values),
    **dict.fromkeys(VIT, vit_without_values),
    "resnet50": resnet_without_values,
}


def network_without_values(model: str, *, prototypes: int) -> MultiCropNetwork:
    head = HeadOptions(hidden_dim=2048, bottleneck_dim=256, layers=3, batch_norm=False, prototypes=prototypes, norm_last_layer=False)
    with torch.device("meta"):
        return head.attach(BUILDERS[model](model), regions=True)


def make_loss(prototypes: int) -> ViewRegionLoss:
    loss = ViewRegionLoss(student_temperature=0.1, center_momentum=0.9, view_weight=0.5, region_weight=0.5, kernel="auto")
    loss.setup(prototypes=prototypes)
    return loss


def entries(layout: dict, make: Callable[[str, tuple[int, ...], str], Tensor]) -> dict[str, Tensor]:
    """One network in the original's layout; two names of one tensor stay one tensor."""
    state = {name: make(name, tuple(shape), layout["buffers"].get(name, "float32")) for name, shape in layout["state_dict"].items()}
    return state | {name: state[other] for name, other in layout["tied"].items()}


def original_file(goldens: Goldens, model: str, path: Path) -> Path:
    """As main_esvit.py saves it. The teacher has the golden values, every value of the student is 0.25."""
    layout = original_layout(model)

    def few(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (FEW, *shape[1:]) if "last_layer" in name else shape

    def golden(name: str, shape: tuple[int, ...], kind: str) -> Tensor:
        if kind != "float32":
            return torch.zeros(shape, dtype=getattr(torch, kind))
        return goldens.weight(name.removeprefix(WRAPPED), few(name, shape))

    def quarter(name: str, shape: tuple[int, ...], kind: str) -> Tensor:
        return torch.tensor(0.25).to(getattr(torch, kind)).expand(few(name, shape))  # one number in the file

    content = {
        "student": {layout["checkpoint_prefix_student"] + name: value for name, value in entries(layout, quarter).items()},
        "teacher": {layout["checkpoint_prefix_teacher"] + name: value for name, value in entries(layout, golden).items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-4), "weight_decay": np.float64(0.1)}]},
        "epoch": 300,
        "args": argparse.Namespace(arch=layout["original_arch_flag"], cfg=layout["original_cfg"], epochs=300),
        "dino_loss": {"center": torch.full((1, FEW), 2.0), "center_grid": torch.full((1, FEW), 3.0)},
        "fp16_scaler": {"scale": 65536.0},
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize("model", BUILDERS)
def test_every_entry_of_a_published_layout_finds_its_place(model):
    layout = original_layout(model)
    state = entries(layout, lambda name, shape, kind: torch.empty(shape, dtype=getattr(torch, kind), device="meta"))
    saved = SavedNetworks(
        origin="the original",
        student=split({layout["checkpoint_prefix_student"] + name: value for name, value in state.items()}),
        teacher=split({layout["checkpoint_prefix_teacher"] + name: value for name, value in state.items()}),
        centers=make_loss(PROTOTYPES).state_dict(),
        epoch=300,
        step=None,
    )
    student, teacher = (network_without_values(model, prototypes=PROTOTYPES) for _ in range(2))
    load_networks(saved, student=student, teacher=teacher, loss=make_loss(PROTOTYPES), fresh_heads="none", resize_positions=False)
    assert sum(parameter.numel() for parameter in student.parameters()) == layout["n_params_total"]


@pytest.mark.parametrize("model", BUILDERS)
def test_a_full_checkpoint_gives_the_golden_features(model, goldens, tmp_path):
    golden, path = goldens.case(f"arch_{model}"), original_file(goldens, model, tmp_path / "checkpoint.pth")
    student, teacher = (network_without_values(model, prototypes=FEW).to_empty(device="cpu") for _ in range(2))
    loss = make_loss(FEW)
    saved = read_networks(path)
    assert saved.epoch == 300
    load_networks(saved, student=student, teacher=teacher, loss=loss, fresh_heads="none", resize_positions=False)
    side = 96 if "pooled_96" in golden else 224  # one is enough: that the network is right at both, its own golden test says
    with torch.inference_mode():
        pooled = teacher.eval().backbone(goldens.input(f"img{side}", (2, 3, side, side))).pooled
    assert_close(pooled, golden[f"pooled_{side}"], absolute=2e-5, relative_l2=5e-6)
    assert all((parameter == 0.25).all() for parameter in student.parameters())
    for ours, theirs in (("region_head.mlp.4.weight", "head_dense.mlp.4.weight"), ("view_prototypes.weight_g", "head.last_layer.weight_g")):
        value = teacher.state_dict()[ours]
        assert torch.equal(value, goldens.weight(theirs, tuple(value.shape)))
    assert loss.center.unique().tolist() == [2.0] and loss.center_region.unique().tolist() == [3.0]

    alone = BUILDERS[model](model).to_empty(device="cpu")
    load_backbone(alone, path, which="teacher", resize_positions=False)
    torch.testing.assert_close(alone.state_dict(), teacher.backbone.state_dict(), rtol=0, atol=0)
