"""Files of other programs: recognised by their keys, loaded strictly under our names, and never run."""

import argparse
import os
import re
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from esvit.backbones.base import Backbone
from esvit.backbones.resnet import ResNet
from esvit.backbones.swin import Swin
from esvit.backbones.timm import Timm
from esvit.backbones.vil import Vil
from esvit.backbones.vit import ViT
from esvit.checkpoints import load_checkpoint_file
from esvit.errors import OptionError
from esvit.losses.combined import ViewRegionLoss
from esvit.losses.view import ViewLoss
from esvit.networks import HeadOptions, MultiCropNetwork
from esvit.published import load_backbone, load_networks, read_networks
from tests.golden.steps import original_name

M = TypeVar("M", bound=nn.Module)

PROTOTYPES = 12


def swin(**changes) -> Swin:
    options: dict[str, Any] = {"patch_size": 4, "dim": 8, "depths": [2, 2], "heads": [2, 4], "window_size": 4, "image_size": 32}
    return Swin(in_channels=3, mlp_ratio=4.0, drop_path_rate=0.0, **(options | changes))


def vit(**changes) -> ViT:
    options: dict[str, Any] = {"image_size": 32, "patch_size": 8, "dim": 16, "depth": 2, "heads": 2}
    return ViT(in_channels=3, mlp_ratio=4.0, drop_path_rate=0.0, **(options | changes))


def vil(**changes) -> Vil:
    options: dict[str, Any] = {"image_size": 32, "window_sizes": [4, 4], "absolute_positions": [False, False]}
    stages: dict[str, Any] = {"dims": [8, 16], "depths": [1, 1], "heads": [2, 2], "global_tokens": [1, 0], "sliding": [True, False]}
    fixed: dict[str, Any] = {"in_channels": 3, "neighbours": "all", "all_neighbours_from": 1.0, "reach": "chunks", "drop_path_rate": 0.0}
    return Vil(patch_sizes=[4, 2], mlp_ratio=2.0, **stages, **fixed, **(options | changes))


def with_heads(backbone: Backbone, *, regions: bool = True) -> MultiCropNetwork:
    head = HeadOptions(hidden_dim=16, bottleneck_dim=6, layers=3, batch_norm=True, prototypes=PROTOTYPES, norm_last_layer=False)
    return scrambled(head.attach(backbone, regions=regions))


def scrambled(module: M) -> M:
    """Random values everywhere, also where networks begin with zeros, ones or small numbers."""
    for value in module.state_dict().values():
        value.copy_(torch.randn_like(value) * 0.3 if value.is_floating_point() else torch.randint_like(value, 100))
    return module


def centers(*, regions: bool = True) -> ViewLoss | ViewRegionLoss:
    if not regions:
        loss: ViewLoss | ViewRegionLoss = ViewLoss(student_temperature=0.1, center_momentum=0.9, kernel="auto")
    else:
        loss = ViewRegionLoss(student_temperature=0.1, center_momentum=0.9, view_weight=0.5, region_weight=0.5, kernel="auto")
    loss.setup(prototypes=PROTOTYPES)
    return loss


def original_content(student: MultiCropNetwork, teacher: MultiCropNetwork, loss: nn.Module, *, wrapped: bool = False) -> dict[str, Any]:
    """What the original's main_esvit.py saves; a torchvision network is `wrapped`, and a teacher with batch norm has `module.` too."""

    def renamed(network: MultiCropNetwork, prefix: str) -> dict[str, Tensor]:
        state = network.state_dict()
        inner = {name: "backbone.backbone." if wrapped and name.startswith("backbone.") else "" for name in state}
        return {prefix + inner[name] + original_name(name): value for name, value in state.items()}

    of_numpy = {"lr": np.float64(0.25), "weight_decay": np.float64(0.5)}
    options = {"arch": "swin_tiny", "cfg": "experiments/some.yaml", "lr": 0.0005, "local_crops_number": (8,), "opts": [], "sampler": None}

    return {
        "student": renamed(student, "module."),
        "teacher": renamed(teacher, "module." if wrapped else ""),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [of_numpy]},
        "epoch": 200,
        "args": argparse.Namespace(**options),
        "dino_loss": {name.replace("center_region", "center_grid"): value for name, value in loss.state_dict().items()},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }


def saved(folder: Path, content: object, name: str = "some.pth", **options) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def load(path: Path, *, regions: bool = True, fresh_heads: str = "none", resize_positions: bool = False, backbone=swin) -> tuple:
    """(student, teacher, loss) of fresh networks into which a file was loaded."""
    student, teacher, loss = with_heads(backbone(), regions=regions), with_heads(backbone(), regions=regions), centers(regions=regions)
    teacher.load_state_dict(student.state_dict())
    load_networks(
        read_networks(path), student=student, teacher=teacher, loss=loss, fresh_heads=fresh_heads, resize_positions=resize_positions
    )
    return student, teacher, loss


# ------------------------------------------------------------------------------------------- full checkpoints of the original


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_originals_checkpoint_gives_student_teacher_heads_and_centres(tmp_path, wrapped, zipped):
    build = partial(ResNet, in_channels=3, depths=[1, 1, 1, 1]) if wrapped else swin
    student, teacher, loss = with_heads(build()), with_heads(build()), scrambled(centers())
    content = original_content(student, teacher, loss, wrapped=wrapped)
    path = saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
    for ours, theirs in zip(load(path, backbone=build), (student, teacher, loss), strict=True):
        assert_same_state(ours, theirs)
    networks = read_networks(path)
    assert networks.epoch == 200
    assert networks.origin == "the original (--arch swin_tiny --cfg experiments/some.yaml)"


def test_numbers_of_the_originals_optimizer_are_read_without_numpy(tmp_path):
    numbers = [np.float64(0.25), np.float32(-1.5), np.int64(-7), np.dtype(">f8").type(3.5)]
    content = load_checkpoint_file(saved(tmp_path, {"numbers": numbers, "args": argparse.Namespace(lr=1)}))
    assert content["numbers"] == [0.25, -1.5, -7, 3.5]
    assert all(type(number) in (float, int) for number in content["numbers"])


def test_our_own_checkpoint_and_a_single_network_are_read_too(tmp_path):
    student, teacher, loss = with_heads(swin()), with_heads(swin()), scrambled(centers())
    networks = {"student": student.state_dict(), "teacher": teacher.state_dict(), "loss": loss.state_dict()}
    path = saved(tmp_path, networks | {"step": 8, "sampler": {"epoch": 2}})
    for ours, theirs in zip(load(path), (student, teacher, loss), strict=True):
        assert_same_state(ours, theirs)
    assert read_networks(path).epoch == 2
    for which, theirs in (("student", student), ("teacher", teacher)):
        backbone = swin()
        load_backbone(backbone, path, which=which, resize_positions=False)
        assert_same_state(backbone, theirs.backbone)
    alone = swin()
    load_backbone(alone, saved(tmp_path, teacher.state_dict(), "alone.pth"), which="student", resize_positions=False)
    assert_same_state(alone, teacher.backbone)


def test_tied_projections_are_taken_once_and_untied_ones_refused(tmp_path):
    network = scrambled(vil())
    state = network.state_dict()
    second_names = {name: re.sub(r"\.(query|kv)\.", r".\1_global.", name) for name in state if ".query." in name or ".kv." in name}
    assert second_names
    tied = state | {second: state[name].clone() for name, second in second_names.items()}
    loaded = vil()
    load_backbone(loaded, saved(tmp_path, tied), which="teacher", resize_positions=False)
    assert_same_state(loaded, network)
    name, second = next(iter(second_names.items()))
    with pytest.raises(OptionError, match=f"1 unexpected \\({second}\\)"):
        load_backbone(loaded, saved(tmp_path, tied | {second: state[name] + 1}), which="teacher", resize_positions=False)


# ------------------------------------------------------------------------------------------- plain weights of other programs

IMAGES = torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)
NORM = partial(nn.LayerNorm, eps=1e-6)  # theirs is 1e-5
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 5, "norm_layer": NORM}


def pooled_before_classifier(network: nn.Module, classifier: str) -> Tensor:
    """What enters the classifier."""
    entering: list[Tensor] = []
    network.get_submodule(classifier).register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    with torch.inference_mode():
        network.eval()(IMAGES)
    return entering[0]


def timm_swin() -> nn.Module:
    return timm.models.swin_transformer.SwinTransformer(img_size=32, patch_size=4, window_size=4, **SWIN)


def torchvision_swin() -> nn.Module:
    return torchvision.models.swin_transformer.SwinTransformer(patch_size=[4, 4], window_size=[4, 4], stochastic_depth_prob=0.0, **SWIN)


def timm_vit() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)


def torchvision_vit() -> nn.Module:
    return torchvision.models.vision_transformer.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=64, num_classes=5
    )


def timm_resnet() -> nn.Module:
    bottleneck: Any = timm.models.resnet.Bottleneck
    return timm.models.resnet.ResNet(block=bottleneck, layers=(1, 1, 1, 1), num_classes=5)


def torchvision_resnet() -> nn.Module:
    return torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5)


def timm_by_name() -> nn.Module:
    return timm.create_model("convnext_atto", num_classes=5)


resnet = partial(ResNet, in_channels=3, depths=[1, 1, 1, 1])
convnext = partial(Timm, name="convnext_atto", pretrained=False, in_channels=3, image_size=None, drop_path_rate=0.0)
OTHERS: dict[str, tuple] = {
    "timm Swin": (timm_swin, "head.fc", swin),
    "torchvision Swin": (torchvision_swin, "head", swin),
    "timm ViT": (timm_vit, "head", vit),
    "torchvision ViT": (torchvision_vit, "heads.head", vit),
    "timm ResNet": (timm_resnet, "fc", resnet),
    "torchvision ResNet": (torchvision_resnet, "fc", resnet),
    "timm": (timm_by_name, "head.fc", convnext),
}


@pytest.mark.parametrize("other", OTHERS)
def test_weights_of_another_program_give_its_features(tmp_path, other):
    build, classifier, build_ours = OTHERS[other]
    torch.manual_seed(0)
    theirs = build()
    for name, parameter in theirs.named_parameters():  # biases of positions and norms begin at values that hide mistakes
        if parameter.dim() == 1 or "table" in name or "pos" in name:
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    ours = build_ours().eval()
    load_backbone(ours, saved(tmp_path, theirs.state_dict()), which="teacher", resize_positions=False)
    with torch.inference_mode():
        features = ours(IMAGES).pooled
    torch.testing.assert_close(features, pooled_before_classifier(theirs, classifier), rtol=1e-4, atol=1e-5)


def test_official_swin_has_masks_indices_and_a_classifier_under_model(tmp_path):
    network = scrambled(swin())
    extra = {
        "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
        "head.weight": torch.zeros(5, 16),
        "head.bias": torch.zeros(5),
    }
    loaded = swin()
    load_backbone(loaded, saved(tmp_path, {"model": network.state_dict() | extra}), which="teacher", resize_positions=False)
    assert_same_state(loaded, network)


def test_dinos_checkpoint_wraps_the_backbone_once(tmp_path):
    network = with_heads(vit(), regions=False)
    state = network.state_dict()
    renamed = {name.replace("view_head.", "head.").replace("view_prototypes.", "head.last_layer."): value for name, value in state.items()}
    content = {
        "student": {f"module.{name}": value for name, value in renamed.items()},
        "teacher": renamed,
        "dino_loss": {"center": torch.full((1, PROTOTYPES), 2.0)},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small"),
    }
    student, teacher, loss = load(saved(tmp_path, content), regions=False, backbone=vit)
    assert_same_state(student, network)
    assert_same_state(teacher, network)
    assert loss.center.unique().tolist() == [2.0]


def test_safetensors_are_read(tmp_path):
    network = scrambled(vit())
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    loaded = vit()
    load_backbone(loaded, tmp_path / "weights.safetensors", which="teacher", resize_positions=False)
    assert_same_state(loaded, network)


# ------------------------------------------------------------------------------------------- what does not fit


def assert_refused(path: Path, *parts: str, **options) -> None:
    with pytest.raises(OptionError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.fixture
def view_file(tmp_path) -> Path:
    """The original's checkpoint without a region head."""
    student, teacher, loss = with_heads(swin(), regions=False), with_heads(swin(), regions=False), scrambled(centers(regions=False))
    return saved(tmp_path, original_content(student, teacher, loss))


@pytest.fixture
def region_file(tmp_path) -> Path:
    return saved(tmp_path, original_content(with_heads(swin()), with_heads(swin()), scrambled(centers())), "region.pth")


def test_another_architecture_lists_what_is_missing_unexpected_and_mis_shaped(view_file):
    build = partial(swin, depths=[2, 1], dim=16)
    assert_refused(
        view_file,
        "checkpoint: the file holds a Swin with dim=8 depths=[2,2] heads=[2,4] window_size=4 patch_size=4, and ",
        "the weights of the student of the original (--arch swin_tiny --cfg experiments/some.yaml) do not fit: ",
        "13 unexpected (backbone.layers.1.blocks.1.",
        "of another shape (backbone.patch_embed.proj.weight (8, 3, 4, 4) instead of (16, 3, 4, 4), ",
        "use the backbone, head and loss that the checkpoint was made with",
        regions=False,
        backbone=build,
    )


def test_the_error_names_the_backbone_of_the_file_only_where_the_backbone_does_not_fit(view_file, tmp_path):
    plain = saved(tmp_path, {"model": vit().state_dict()}, "plain.pth")
    with pytest.raises(OptionError) as caught:
        load_backbone(swin(), plain, which="teacher", resize_positions=False)
    assert str(caught.value).startswith(
        "checkpoint: the file holds a ViT with dim=16 depth=2 patch_size=8 image_size=32, and the weights of "
    )
    unknown = saved(tmp_path, timm_by_name().state_dict(), "unknown.pth")
    for path in (view_file, unknown):  # the first lacks a region head only
        with pytest.raises(OptionError) as caught:
            load(path)
        assert str(caught.value).startswith("checkpoint: the weights of the student")


def test_a_head_that_is_missing_or_too_much_is_refused_with_the_remedy(view_file, region_file, tmp_path):
    assert_refused(view_file, "missing (region_head.", "or fresh_heads=region to begin with a fresh region head")
    assert_refused(region_file, "unexpected (region_head.", regions=False)
    plain = saved(tmp_path, {"model": swin().state_dict()}, "plain.pth")
    assert_refused(plain, "student of another program", "missing (view_head.", "or fresh_heads=all to begin with fresh heads")
    assert_refused(plain, "missing (view_head.", "fresh_heads=all", fresh_heads="region")


def test_a_fresh_region_head_is_refused_where_there_is_one_or_none_is_wanted(view_file, region_file):
    assert_refused(region_file, "fresh_heads: 'region', but the checkpoint has a region head", fresh_heads="region")
    assert_refused(view_file, "fresh_heads: 'region', but the loss asks for no region head", fresh_heads="region", regions=False)


def test_files_without_known_weights_are_refused_by_their_entries(tmp_path):
    with pytest.raises(OptionError, match=r"holds no weights in a form known here \(but epoch, args\); give a checkpoint"):
        read_networks(saved(tmp_path, {"epoch": 3, "args": argparse.Namespace()}))


class Intruder:
    """Makes a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, path: Path, call: str):
        self.path, self.call = path, call

    def __reduce__(self):
        return {"system": (os.system, (f"touch {self.path}",)), "open": (open, (str(self.path), "w"))}[self.call]


@pytest.mark.parametrize("call", ["system", "open"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path, call, zipped):
    trap = tmp_path / "trap"
    content = {"teacher": swin().state_dict(), "args": argparse.Namespace(arch=Intruder(trap, call))}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(OptionError) as caught:
        read_networks(path)
    assert not trap.exists()
    assert "which could run any code, so it was not loaded" in str(caught.value) and "\n" not in str(caught.value)
    assert zipped == zipfile.is_zipfile(path)
    torch.load(path, weights_only=False)
    assert trap.exists()  # else this test would show nothing


def test_nothing_but_the_originals_classes_is_let_through_and_only_while_reading(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    load_checkpoint_file(saved(tmp_path, {"args": argparse.Namespace(lr=1)}))
    assert set(torch.serialization.get_safe_globals()) == before
    for stranger in (Path("x"), argparse.Action([], "x"), np.zeros(3)):
        with pytest.raises(OptionError, match="could run any code"):
            load_checkpoint_file(saved(tmp_path, {"stranger": stranger}))


# ------------------------------------------------------------------------------------------- fresh heads, other windows


def test_a_fresh_region_head_stays_as_it_was_and_all_else_comes_from_the_file(view_file):
    torch.manual_seed(1)
    student, teacher, loss = with_heads(swin()), with_heads(swin()), centers()
    teacher.load_state_dict(student.state_dict())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    networks = read_networks(view_file)
    load_networks(networks, student=student, teacher=teacher, loss=loss, fresh_heads="region", resize_positions=False)
    for network, weights in ((student, networks.student), (teacher, networks.teacher)):
        for name, value in network.state_dict().items():
            if name.startswith("region_"):
                assert torch.equal(value, before[name])
            else:
                kept = weights.backbone[name.removeprefix("backbone.")] if name.startswith("backbone.") else weights.heads[name]
                assert torch.equal(value, kept)
    assert torch.equal(loss.center, networks.centers["center"])
    assert not loss.state_dict()["center_region"].any()


def test_all_heads_fresh_takes_backbones_only(region_file, tmp_path):
    student, teacher, loss = load(region_file, fresh_heads="all")
    networks = read_networks(region_file)
    for network, weights in ((student, networks.student), (teacher, networks.teacher)):
        torch.testing.assert_close(dict(network.backbone.state_dict()), weights.backbone, rtol=0, atol=0)
    assert_same_state(student.view_head, teacher.view_head)
    assert_same_state(student.region_prototypes, teacher.region_prototypes)
    assert loss.center.count_nonzero() == 0
    plain = saved(tmp_path, {"model": swin().state_dict()}, "plain.pth")
    student, teacher, _ = load(plain, fresh_heads="all")
    assert_same_state(student, teacher)


wide_swin = partial(swin, window_size=8)
RESIZED: dict[str, tuple] = {
    "windows of Swin": (swin, wide_swin, "layers.0.blocks.0.attn.relative_position_bias_table"),
    "image size of Swin": (wide_swin, partial(wide_swin, image_size=16), "layers.1.blocks.0.attn.relative_position_bias_table"),
    "image size of ViT": (vit, partial(vit, image_size=64), "pos_embed"),
    "chunks of ViL": (vil, partial(vil, window_sizes=[2, 2]), "layer1.1.attn.local_relative_position_bias_table"),
    "image size of ViL": (
        partial(vil, absolute_positions=[True, True]), partial(vil, absolute_positions=[True, True], image_size=64), "layer1.0.x_pos_embed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", RESIZED)
def test_tables_of_positions_are_resized_when_asked_and_only_then(tmp_path, change):
    build, build_other, table = RESIZED[change]
    network = scrambled(build())
    path = saved(tmp_path, network.state_dict())
    with pytest.raises(OptionError, match=r"of another shape .*, or resize_positions=true to resize the \d+ tables of positions"):
        load_backbone(build_other(), path, which="teacher", resize_positions=False)
    other = build_other()
    load_backbone(other, path, which="teacher", resize_positions=True)
    here, there = network.state_dict(), other.state_dict()
    assert here[table].shape != there[table].shape
    for name, value in here.items():
        if value.shape == there[name].shape:
            assert torch.equal(value, there[name])
        else:  # a smooth resampling keeps the level and the spread of a table, if not its noise
            assert there[name].isfinite().all() and there[name].std() > 0.3 * value.std()


def test_a_bias_that_rises_evenly_is_resized_to_one_that_rises_evenly():
    """Rows run with rows, columns with columns, and opposite offsets stay opposite."""
    offsets = torch.arange(7.0) - 3
    table = (10 * offsets[:, None] + offsets[None, :]).flatten().unsqueeze(1)  # y counts ten times x
    resized = swin().resize_positions("a.relative_position_bias_table", table, torch.Size([13 * 13, 1]))
    assert resized is not None
    grid = resized.view(13, 13)
    torch.testing.assert_close(grid, -grid.flip(0, 1), rtol=0, atol=1e-4)
    down, right = grid.diff(dim=0), grid.diff(dim=1)
    assert (right > 0).all() and (down > 0).all()
    torch.testing.assert_close(down.T, 10 * right, rtol=1e-3, atol=0)


def test_tables_of_other_heads_are_not_resized():
    assert swin().resize_positions("a.relative_position_bias_table", torch.zeros(49, 2), torch.Size([25, 4])) is None
    assert swin().resize_positions("a.qkv.weight", torch.zeros(49, 2), torch.Size([25, 2])) is None
    assert vit().resize_positions("pos_embed", torch.zeros(1, 17, 8), torch.Size([1, 5, 16])) is None
