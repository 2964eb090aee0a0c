"""The formats: each writes a backbone's weights (or program) into a folder, and loads them back in the library that they are for.

Letters: B images, C channels, S side in pixels, N regions, D backbone width.
Unusual: the libraries are imported where they are used; `require` says beforehand what to install.
"""

import copy
import importlib
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esvit.backbones.base import Backbone
from esvit.backbones.layouts import Layout, layout_of
from esvit.errors import OptionError

Outputs = tuple[Tensor, Tensor | None]  # pooled (B, D); regions (B, N, D), or None where the library's are something else


@dataclass(frozen=True)
class Export:
    """What a format function has written.

    outputs  images (B, C, S, S) -> pooled and regions as the files give them in their library; None where that library was not asked
    usage    Python that loads the files, for the model card
    note     what its user has to know
    """

    outputs: Callable[[Tensor], Outputs] | None
    usage: str
    note: str


@dataclass(frozen=True)
class Input:
    """What the exported network will see: mean and std are those that its images are normalised with."""

    images: Tensor
    mean: list[float]
    std: list[float]

    @property
    def size(self) -> int:
        return self.images.shape[-1]


def require(format: str) -> None:
    """Raise OptionError unless the packages of a format are installed."""
    for package in _FORMATS[format].packages:
        try:
            importlib.import_module(package)
        except ImportError:
            found = f"'{format}' needs the package {package}, which is not installed"
            raise OptionError("task.format", found, "pip install 'esvit[export]'") from None


def write(format: str, backbone: Backbone, example: Input, folder: Path) -> Export:
    """Write `backbone`, in eval mode, into `folder` (empty). Raises OptionError where the format has no such network."""
    return _FORMATS[format].write(backbone, example, folder)


def _plain(backbone: Backbone, example: Input, folder: Path) -> Export:
    torch.save(_tensors(backbone.state_dict()), folder / "backbone.pt")

    def load() -> dict[str, Tensor]:
        return torch.load(folder / "backbone.pt", weights_only=True)

    usage = 'backbone.load_state_dict(torch.load("backbone.pt", weights_only=True))'
    return Export(_with_weights(backbone, load), usage, "Names and values as this program has them.")


def _safetensors(backbone: Backbone, example: Input, folder: Path) -> Export:
    from safetensors.torch import load_file, save_file

    save_file(_tensors(backbone.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})

    def load() -> dict[str, Tensor]:
        return load_file(folder / "model.safetensors")

    usage = 'from safetensors.torch import load_file\n\nbackbone.load_state_dict(load_file("model.safetensors"))'
    return Export(_with_weights(backbone, load), usage, "Names and values as this program has them.")


def _onnx(backbone: Backbone, example: Input, folder: Path) -> Export:
    import onnxruntime

    file = folder / "model.onnx"
    batch = {"images": {0: torch.export.Dim("batch")}}
    with redirect_stdout(StringIO()):  # it tells its progress in emoji
        torch.onnx.export(
            _Program(backbone).eval(),
            (example.images,),
            file,
            input_names=["images"],
            output_names=["pooled", "regions"],
            dynamic_shapes=batch,
            dynamo=True,
            external_data=False,
            verbose=False,
        )

    def outputs(images: Tensor) -> Outputs:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        pooled, regions = session.run(["pooled", "regions"], {"images": images.numpy()})
        return torch.from_numpy(pooled), torch.from_numpy(regions)

    usage = (
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
        'pooled, regions = session.run(["pooled", "regions"], {"images": images})  # float32 (B, C, S, S)'
    )
    return Export(outputs, usage, f"Any number of images of {example.size} x {example.size} pixels.")


def _torch_export(backbone: Backbone, example: Input, folder: Path) -> Export:
    file = folder / "model.pt2"
    program = torch.export.export(_Program(backbone).eval(), (example.images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    torch.export.save(program, file)

    def outputs(images: Tensor) -> Outputs:
        pooled, regions = torch.export.load(file).module()(images)
        return pooled, regions

    usage = 'program = torch.export.load("model.pt2").module()\npooled, regions = program(images)'
    note = f"Any number of images of {example.size} x {example.size} pixels. It needs torch, and nothing of this program."
    return Export(outputs, usage, note)


def _timm(backbone: Backbone, example: Input, folder: Path) -> Export:
    import timm
    from safetensors.torch import save_file

    layout = layout_of(backbone, library="timm", image_size=example.size)
    file = folder / "model.safetensors"
    save_file(_tensors(layout.weights), file, metadata={"format": "pt"})
    _write_names(layout, folder)
    model, arguments, eps = layout.config["model"], layout.config["arguments"], layout.config["norm_eps"]
    norm: dict[str, Any] = {} if eps is None else {"norm_layer": partial(nn.LayerNorm, eps=eps)}

    def outputs(images: Tensor) -> Outputs:
        network: Any = timm.create_model(model, num_classes=0, checkpoint_path=str(file), **arguments, **norm).eval()
        final = network.forward_features(images)
        regions = _regions_of_timm(network, final) if layout.has_regions else None
        return network.forward_head(final, pre_logits=True), regions

    spelt = "".join(f", {name}={value}" for name, value in arguments.items())
    norm_argument = "" if eps is None else f", norm_layer=partial(nn.LayerNorm, eps={eps})"
    imports = "import timm\n" if eps is None else "from functools import partial\n\nimport timm\nfrom torch import nn\n"
    usage = f'{imports}\nnetwork = timm.create_model("{model}", num_classes=0, checkpoint_path="model.safetensors"{spelt}{norm_argument})'
    return Export(outputs, usage, layout.note)


def _huggingface(backbone: Backbone, example: Input, folder: Path) -> Export:
    import transformers
    from safetensors.torch import save_file

    layout = layout_of(backbone, library="hf", image_size=example.size)
    save_file(_tensors(layout.weights), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(layout.config, indent=2) + "\n")
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",  # short side, then a square from the middle: the evaluation crop
        "do_resize": True,
        "size": {"shortest_edge": round(example.size * 256 / 224)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": example.size, "width": example.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": example.mean,
        "image_std": example.std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")
    _write_names(layout, folder)

    def outputs(images: Tensor) -> Outputs:
        transformers.utils.logging.disable_progress_bar()
        network, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        misfits = {kind: names for kind, names in report.items() if names}
        assert not misfits, misfits
        with torch.no_grad():
            features = network.eval()(pixel_values=images)
        return features.pooler_output, features.last_hidden_state

    usage = (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        "processor, network = AutoImageProcessor.from_pretrained(FOLDER), AutoModel.from_pretrained(FOLDER)\n"
        'pooled = network(**processor(image, return_tensors="pt")).pooler_output'
    )
    return Export(outputs, usage, layout.note)


def _mmdet(backbone: Backbone, example: Input, folder: Path) -> Export:
    layout = layout_of(backbone, library="mmdet", image_size=example.size)
    torch.save({"state_dict": _tensors(layout.weights)}, folder / "backbone.pth")
    _write_names(layout, folder)
    return Export(None, "init_cfg=dict(type='Pretrained', checkpoint='backbone.pth')", layout.note)


def _detectron2(backbone: Backbone, example: Input, folder: Path) -> Export:
    layout = layout_of(backbone, library="detectron2", image_size=example.size)
    content = {"model": {f"backbone.bottom_up.{name}": weight for name, weight in _tensors(layout.weights).items()}, "__author__": "EsViT"}
    torch.save(content | {"matching_heuristics": True}, folder / "backbone.pth")
    _write_names(layout, folder)
    return Export(None, 'cfg.MODEL.WEIGHTS = "backbone.pth"', layout.note)


@dataclass(frozen=True)
class _Format:
    write: Callable[[Backbone, Input, Path], Export]
    packages: list[str]


_FORMATS = {
    "backbone": _Format(_plain, []),
    "safetensors": _Format(_safetensors, ["safetensors"]),
    "onnx": _Format(_onnx, ["onnx", "onnxscript", "onnxruntime"]),
    "torch_export": _Format(_torch_export, []),
    "timm": _Format(_timm, ["timm", "safetensors"]),
    "hf": _Format(_huggingface, ["transformers", "safetensors"]),
    "mmdet": _Format(_mmdet, []),
    "detectron2": _Format(_detectron2, []),
}


class _Program(nn.Module):
    """A backbone whose outputs are plain tensors."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, S, S) -> pooled (B, D), regions (B, N, D)."""
        features = self.backbone(images)
        return features.pooled, features.regions


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Each with memory of its own, so that any file format takes them."""
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def _with_weights(backbone: Backbone, load: Callable[[], dict[str, Tensor]]) -> Callable[[Tensor], Outputs]:
    """What the same network gives with the weights of a file."""

    def outputs(images: Tensor) -> Outputs:
        network = copy.deepcopy(backbone)
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        network.load_state_dict(load())
        features = network(images)
        return features.pooled, features.regions

    return outputs


def _regions_of_timm(network: Any, final: Tensor) -> Tensor:
    """timm's final features in any of its layouts -> (B, N, D)."""
    if final.dim() == 3:
        return final[:, getattr(network, "num_prefix_tokens", 0) :]
    return final.flatten(1, 2) if getattr(network, "output_fmt", "") == "NHWC" else final.flatten(2).transpose(1, 2)


def _write_names(layout: Layout, folder: Path) -> None:
    (folder / "names.json").write_text(json.dumps(layout.names, indent=1) + "\n")
