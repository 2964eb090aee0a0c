"""task=export: each format loads in the library that it is for, and gives the features that the checkpoint gives here."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from esvit.backbones.base import Backbone
from esvit.backbones.resnet import ResNet
from esvit.backbones.swin import Swin
from esvit.backbones.timm import Timm
from esvit.backbones.vit import ViT
from esvit.checkpoint_writing import CheckpointWriter
from esvit.checkpoints import CheckpointFolder
from esvit.errors import OptionError
from esvit.export.formats import require
from esvit.networks import HeadOptions
from esvit.records import Features
from esvit.tasks.export import Export
from tests.backbones.networks import DEMO, MICRO, micro_cvt, swin
from tests.command_line.commands import differences

FORMATS = ("backbone", "safetensors", "onnx", "torch_export", "timm", "hf", "mmdet", "detectron2")
DIFFERENCE = 2e-5  # of features whose largest is about 4
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HEADS = HeadOptions(hidden_dim=8, bottleneck_dim=4, layers=2, batch_norm=False, prototypes=6, norm_last_layer=True)


def saved(student: Backbone, teacher: Backbone, folder: Path) -> Path:
    """A checkpoint as pre-training writes it."""
    networks = {name: HEADS.attach(backbone, regions=True).state_dict() for name, backbone in (("student", student), ("teacher", teacher))}
    CheckpointFolder(folder, keep=1).save({**networks, "loss": {"center": torch.zeros(1, 6)}, "step": 1}, 1)
    return folder / "checkpoint.pt"


def perturbed(backbone: Backbone) -> Backbone:
    """With batch statistics that are not those of the start, ready to be compared."""
    for name, buffer in backbone.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return backbone.eval()


def export(backbone: Backbone, checkpoint: Path, folder: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {"network": "teacher", "format": "backbone", "image_size": 224, "mean": MEAN, "std": STD, "name": "micro"}
    Export(backbone=backbone, checkpoint=str(checkpoint), folder=str(folder), **(options | changes)).run()
    return folder


@pytest.fixture(scope="module")
def teacher() -> Swin:
    return swin().eval()


@pytest.fixture(scope="module")
def checkpoint(teacher: Swin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return saved(Swin(**MICRO), teacher, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def expected(teacher: Swin, images: Tensor) -> Features:
    with torch.no_grad():
        return teacher(images)


def assert_equal(expected: Features, pooled: Tensor, regions: Tensor) -> None:
    torch.testing.assert_close(pooled, expected.pooled, atol=DIFFERENCE, rtol=0)
    torch.testing.assert_close(regions, expected.regions, atol=DIFFERENCE, rtol=0)


def fresh() -> Swin:
    torch.manual_seed(2)
    return Swin(**MICRO)


def test_backbone_weights_load_into_the_same_network(checkpoint: Path, teacher: Swin, tmp_path: Path) -> None:
    weights = torch.load(export(fresh(), checkpoint, tmp_path / "out") / "backbone.pt", weights_only=True)
    assert weights.keys() == teacher.state_dict().keys()
    assert all(value.equal(teacher.state_dict()[name]) for name, value in weights.items())


def test_the_students_backbone_can_be_chosen(checkpoint: Path, tmp_path: Path) -> None:
    weights = torch.load(export(fresh(), checkpoint, tmp_path / "out", network="student") / "backbone.pt", weights_only=True)
    student = torch.load(checkpoint, weights_only=True)["student"]
    assert all(weights[name].equal(student[f"backbone.{name}"]) for name in weights)


def test_safetensors_load_into_the_same_network(checkpoint: Path, teacher: Swin, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(export(fresh(), checkpoint, tmp_path / "out", format="safetensors") / "model.safetensors")
    assert weights.keys() == teacher.state_dict().keys()
    assert all(value.equal(teacher.state_dict()[name]) for name, value in weights.items())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Swin, Path, Tensor]:
    """Two stages, for the formats that take long to write: network, checkpoint and images."""
    network = swin(**DEMO).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return network, saved(network, network, tmp_path_factory.mktemp("small")), images


def originals(network: Swin, path: Path) -> Path:
    """A full checkpoint of `network` as the original saves it."""
    backbone = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    head = {
        "head.mlp.0.weight": torch.zeros(4, network.dim),
        "head.last_layer.weight_g": torch.ones(6, 1),
        "head.last_layer.weight_v": torch.ones(6, 4),
    }
    index = {"backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64)}
    state = backbone | head | index
    content = {"student": {f"module.{name}": value for name, value in state.items()}, "teacher": state, "epoch": 300}
    content |= {"dino_loss": {"center": torch.zeros(1, 6)}, "args": argparse.Namespace(arch="swin_tiny")}
    torch.save(content, path)
    return path


def test_onnx_of_an_original_checkpoint_runs_in_onnxruntime_for_any_number_of_images(
    small: tuple[Swin, Path, Tensor], tmp_path: Path
) -> None:
    import onnxruntime

    network, _, images = small
    checkpoint = originals(network, tmp_path / "checkpoint.pth")
    file = export(Swin(**DEMO), checkpoint, tmp_path / "out", format="onnx", image_size=32) / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for some in (images, images[:1]):
        pooled, regions = session.run(["pooled", "regions"], {"images": some.numpy()})
        with torch.no_grad():
            assert_equal(network(some), torch.from_numpy(pooled), torch.from_numpy(regions))


def test_the_torch_program_runs_for_any_number_of_images(small: tuple[Swin, Path, Tensor], tmp_path: Path) -> None:
    network, checkpoint, images = small
    folder = export(Swin(**DEMO), checkpoint, tmp_path / "out", format="torch_export", image_size=32)
    program = torch.export.load(folder / "model.pt2").module()
    for some in (images, images[:1]):
        with torch.no_grad():
            assert_equal(network(some), *program(some))


def by_the_card(folder: Path, names: dict[str, Any]) -> dict[str, Any]:
    """What its user gets from typing the card's example in that folder."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('"model.safetensors"', repr(str(folder / "model.safetensors"))).replace("FOLDER", repr(str(folder))), names)
    return names


def test_timm_builds_the_network_as_the_card_says(checkpoint: Path, images: Tensor, expected: Features, tmp_path: Path) -> None:
    folder = export(fresh(), checkpoint, tmp_path / "out", format="timm")
    network = by_the_card(folder, {})["network"].eval()
    assert isinstance(network, timm.models.SwinTransformer)
    with torch.no_grad():
        assert_equal(expected, network(images), network.forward_features(images).flatten(1, 2))


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"dim": 96, "depths": [2, 2, 6, 2], "heads": [3, 6, 12, 24]}, "swin_tiny_patch4_window7_224"),
        ({"dim": 128, "depths": [2, 2, 18, 2], "heads": [4, 8, 16, 32]}, "swin_base_patch4_window7_224"),
        ({"dim": 96, "depths": [2, 2, 18, 2], "heads": [3, 6, 12, 24], "window_size": 14}, "swin_small_patch4_window7_224"),
    ],
)
def test_published_sizes_fit_timms_models_of_these_names(options: dict[str, Any], model: str) -> None:
    from esvit.backbones.layouts import layout_of

    with torch.device("meta"):
        layout = layout_of(Swin(**(MICRO | options)), library="timm", image_size=224)
        network = timm.create_model(layout.config["model"], num_classes=0, **layout.config["arguments"])
    assert layout.config["model"] == model
    assert layout.config["arguments"] == ({"window_size": 14} if "window_size" in options else {})
    shapes = {name: value.shape for name, value in layout.weights.items()}
    assert {name: value.shape for name, value in network.state_dict().items()} == shapes


def test_hugging_face_loads_the_folder(checkpoint: Path, images: Tensor, expected: Features, tmp_path: Path) -> None:
    network = transformers.SwinModel.from_pretrained(export(fresh(), checkpoint, tmp_path / "out", format="hf")).eval()
    with torch.no_grad():
        features = network(pixel_values=images)
    assert_equal(expected, features.pooler_output, features.last_hidden_state)


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_the_originals_checkpoints_are_exported_too(teacher: Swin, images: Tensor, expected: Features, tmp_path: Path, format: str) -> None:
    folder = export(fresh(), originals(teacher, tmp_path / "checkpoint.pth"), tmp_path / "out", format=format)
    with torch.no_grad():
        if format == "timm":
            loaded = by_the_card(folder, {})["network"].eval()
            assert_equal(expected, loaded(images), loaded.forward_features(images).flatten(1, 2))
        else:
            features = transformers.AutoModel.from_pretrained(folder).eval()(images)
            assert_equal(expected, features.pooler_output, features.last_hidden_state)
    assert "checkpoint.pth, made by the original (--arch swin_tiny)" in (folder / "README.md").read_text()


def test_hugging_faces_processor_makes_the_evaluation_crop(checkpoint: Path, tmp_path: Path) -> None:
    from PIL import Image

    from esvit.augmentations.evaluation import EvaluationCrop, Normalize
    from esvit.data.patches import PACKAGED_PHOTOS

    folder = export(fresh(), checkpoint, tmp_path / "out", format="hf")
    image = Image.open(sorted(PACKAGED_PHOTOS.glob("*.jpg"))[0]).convert("RGB")
    theirs = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    ours = Normalize(mean=MEAN, std=STD)(EvaluationCrop(resize=256, crop=224)(image).unsqueeze(0))
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 0.02


@pytest.mark.parametrize(
    "backbone",
    [
        ViT(in_channels=3, image_size=32, patch_size=8, dim=24, depth=2, heads=2, mlp_ratio=4.0, drop_path_rate=0.0),
        ResNet(in_channels=3, depths=[1, 1, 1, 1]),
        Timm(name="convnextv2_atto", pretrained=False, in_channels=3, image_size=None, drop_path_rate=0.0),
    ],
    ids=["vit", "resnet", "timm"],
)
def test_other_backbones_load_in_timm_too(backbone: Backbone, tmp_path: Path) -> None:
    perturbed(backbone)
    folder = export(backbone, saved(backbone, backbone, tmp_path / "run"), tmp_path / "out", format="timm", image_size=32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        pooled = by_the_card(folder, {})["network"].eval()(images)
        torch.testing.assert_close(pooled, backbone.eval()(images).pooled, atol=DIFFERENCE, rtol=1e-5)


class UnfoldMerging(nn.Module):
    """Merging as mmdet does it: torch's own unfold, which puts channels outermost, then norm and reduction."""

    def __init__(self, weights: dict[str, Tensor], place: str):
        super().__init__()
        self.weights = {name.removeprefix(place): value for name, value in weights.items() if name.startswith(place)}

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        maps = tokens.transpose(1, 2).unflatten(2, grid)
        quads = F.unfold(maps, kernel_size=2, stride=2).transpose(1, 2)
        norm = F.layer_norm(quads, quads.shape[2:], self.weights["norm.weight"], self.weights["norm.bias"], eps=1e-6)
        return F.linear(norm, self.weights["reduction.weight"]), (grid[0] // 2, grid[1] // 2)


def test_mmdet_weights_suit_a_merging_that_unfolds(checkpoint: Path, images: Tensor, expected: Features, tmp_path: Path) -> None:
    folder = export(fresh(), checkpoint, tmp_path / "out", format="mmdet")
    weights = torch.load(folder / "backbone.pth", weights_only=True)["state_dict"]
    network = swin().eval()
    for stage in range(3):
        network.layers[stage].downsample = UnfoldMerging(weights, f"stages.{stage}.downsample.")
    with torch.no_grad():
        features = network(images)
    assert_equal(expected, features.pooled, features.regions)
    names = json.loads((folder / "names.json").read_text())
    assert names["layers.0.blocks.1.mlp.fc1.weight"] == ["stages.0.blocks.1.ffn.layers.0.0.weight"]
    assert names["layers.2.blocks.0.attn.qkv.bias"] == ["stages.2.blocks.0.attn.w_msa.qkv.bias"]
    assert names["norm.weight"] == ["norm3.weight"]
    assert sorted(weights) == sorted(each for new in names.values() for each in new)


def test_detectron2_weights_have_our_names_below_the_pyramid(checkpoint: Path, teacher: Swin, tmp_path: Path) -> None:
    folder = export(fresh(), checkpoint, tmp_path / "out", format="detectron2")
    weights = torch.load(folder / "backbone.pth", weights_only=True)["model"]
    assert weights["backbone.bottom_up.norm3.weight"].equal(teacher.norm.weight)
    assert weights["backbone.bottom_up.layers.1.downsample.norm.bias"].equal(teacher.state_dict()["layers.1.downsample.norm.bias"])
    assert len(weights) == len(teacher.state_dict())


def test_the_card_tells_source_difference_config_and_metrics(checkpoint: Path, tmp_path: Path) -> None:
    import hashlib
    import shutil

    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(checkpoint, run / "checkpoint.pt")
    (run / "config.yaml").write_text("backbone: {dim: 24}\ndata: {root: /secret/place, batch_size: 4}\noutput_dir: /secret/run\n")
    (run / "metrics.json").write_text('{"knn/teacher": 61.5, "step": 8}')
    text = (export(fresh(), run / "checkpoint.pt", tmp_path / "out", format="timm") / "README.md").read_text()
    assert hashlib.sha256(checkpoint.read_bytes()).hexdigest() in text
    assert "| max difference to eager | " in text and "not measured" not in text
    assert "| knn/teacher | 61.5 |" in text
    assert "dim: 24" in text and "batch_size: 4" in text
    assert "secret" not in text


def test_a_card_without_a_run_folder_says_that_nothing_is_known(checkpoint: Path, tmp_path: Path) -> None:
    text = (export(fresh(), checkpoint, tmp_path / "out") / "README.md").read_text()
    assert text.count("Not known") == 2


def test_a_network_that_the_library_lacks_is_told_in_one_line(tmp_path: Path) -> None:
    backbone = micro_cvt()
    checkpoint = saved(backbone, backbone, tmp_path / "run")
    for format in ("timm", "hf", "mmdet", "detectron2"):
        with pytest.raises(OptionError, match=f"task.format: '{format}' is written for .*Swin.* only, not for Cvt; use backbone, safe"):
            export(micro_cvt(), checkpoint, tmp_path / "out", format=format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_image_size_with_other_windows_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="task.image_size: at 96 pixels timm would use windows of 6 .* in stage 3, the backbone has 7"):
        export(fresh(), checkpoint, tmp_path / "out", format="timm", image_size=96)


def test_windows_larger_than_a_stage_are_beyond_hugging_face(tmp_path: Path) -> None:
    backbone = swin(window_size=14)
    checkpoint = saved(backbone, backbone, tmp_path / "run")
    with pytest.raises(OptionError, match="cannot have windows of 14 where the map of stage 4 is 7 tokens wide; use task.format=timm"):
        export(swin(window_size=14), checkpoint, tmp_path / "out", format="hf")


def test_features_that_differ_are_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    """timm rolls before it pads: at 64 pixels the maps of 16 tokens are padded to 21."""
    backbone = swin(depths=[2], heads=[2], image_size=64)
    with pytest.raises(OptionError, match="'timm' at 64 pixels gives features that differ by"):
        export(backbone, saved(backbone, backbone, tmp_path / "run"), tmp_path / "out", format="timm", image_size=64)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_network_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="checkpoint: .*do not fit"):
        export(Swin(**(MICRO | {"dim": 48})), checkpoint, tmp_path / "out")


def test_a_folder_with_files_in_it_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(OptionError, match="output_dir: .* is not empty"):
        export(fresh(), checkpoint, tmp_path)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(OptionError, match=r"'onnx' needs the package onnxruntime, which is not installed; pip install 'esvit\[export\]'"):
        require("onnx")
    for format in FORMATS:
        if format != "onnx":
            require(format)


def test_a_checkpoint_in_shares_becomes_the_file_that_training_would_have_written(teacher: Swin, tmp_path: Path) -> None:
    one_file = torch.load(saved(swin(), teacher, tmp_path / "files"), weights_only=True)
    writer = CheckpointWriter(CheckpointFolder(tmp_path / "run", keep=1), background=False)
    writer.save(one_file, 1, in_shares=True)
    for number, source in enumerate(("checkpoint_1", "checkpoint.pt")):  # which stands for the latest
        written = torch.load(export(fresh(), tmp_path / "run" / source, tmp_path / f"out_{number}", format="checkpoint") / "checkpoint.pt")
        assert differences(written, one_file) == []
    with pytest.raises(OptionError, match="^checkpoint: [^\n]* is no folder of shares"):
        export(fresh(), tmp_path / "out_0" / "checkpoint.pt", tmp_path / "again", format="checkpoint")
    with pytest.raises(OptionError, match="^checkpoint: there is no file"):
        export(fresh(), tmp_path / "none", tmp_path / "again", format="checkpoint")


def test_a_backbone_can_be_exported_out_of_shares(teacher: Swin, tmp_path: Path) -> None:
    one_file = torch.load(saved(swin(), teacher, tmp_path / "files"), weights_only=True)
    CheckpointWriter(CheckpointFolder(tmp_path / "run", keep=1), background=False).save(one_file, 1, in_shares=True)
    folder = export(fresh(), tmp_path / "run" / "checkpoint_1", tmp_path / "out")
    assert differences(torch.load(folder / "backbone.pt", weights_only=True), dict(teacher.state_dict())) == []
    assert "| source checkpoint | checkpoint_1, made by" in (folder / "README.md").read_text()
