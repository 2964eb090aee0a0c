"""A backbone's weights under the names of another library, and what that library must be told to build the same network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from esvit.backbones.base import Backbone
from esvit.errors import OptionError


@dataclass(frozen=True)
class Layout:
    """weights      by the library's names
    names        ours -> the library's, several where one weight becomes several
    config       what the library must be told, as plain data. timm: model, norm_eps (or None for its own), arguments of create_model.
                 hf: its config.json. mmdet, detectron2: nothing
    note         what its user has to know, one sentence or more
    has_regions  whether the cells of the library's last map are our regions
    """

    weights: dict[str, Tensor]
    names: dict[str, list[str]]
    config: dict[str, Any]
    note: str
    has_regions: bool = True


def layout_of(backbone: Backbone, *, library: str, image_size: int) -> Layout:
    """The layout of `library` ("timm", "hf", "mmdet" or "detectron2") for images of `image_size` pixels.

    Raises OptionError where that library has no such network, or none for this image size.
    """
    for kind, layout in _layouts()[library].items():
        if isinstance(backbone, kind):
            return layout(backbone, image_size)
    known = ", ".join(kind.__name__ for kind in _layouts()[library])
    found = f"'{library}' is written for {known} only, not for {type(backbone).__name__}"
    raise OptionError("task.format", found, "use backbone, safetensors, onnx or torch_export")


def _layouts() -> dict[str, dict[type[Backbone], Callable[[Any, int], Layout]]]:
    from esvit.backbones import swin_layouts, timm_layouts  # here, because they make a Layout
    from esvit.backbones.resnet import ResNet
    from esvit.backbones.swin import Swin
    from esvit.backbones.timm import Timm
    from esvit.backbones.vit import ViT

    return {
        "timm": {
            Swin: swin_layouts.to_timm,
            ViT: timm_layouts.of_vit,
            ResNet: timm_layouts.of_resnet,
            Timm: timm_layouts.of_timm,
        },
        "hf": {Swin: swin_layouts.to_huggingface},
        "mmdet": {Swin: swin_layouts.to_mmdet},
        "detectron2": {Swin: swin_layouts.to_detectron2},
    }
