"""Small real networks for the tests of the backbones."""

from typing import Any

import torch
from torch import Tensor, nn

from esvit.backbones.base import Backbone, Stage
from esvit.backbones.cvt import Cvt
from esvit.backbones.resnet import ResNet
from esvit.backbones.swin import Swin, SwinBlock
from esvit.backbones.timm import Timm
from esvit.backbones.vil import Vil
from esvit.backbones.vit import ViT

MICRO: dict[str, Any] = {
    "in_channels": 3,
    "patch_size": 4,
    "dim": 24,
    "depths": [2, 1, 2, 1],
    "heads": [2, 4, 8, 16],
    "window_size": 7,
    "mlp_ratio": 4.0,
    "drop_path_rate": 0.0,
    "image_size": 224,
}
DEMO = MICRO | {"dim": 32, "depths": [2, 2], "heads": [2, 4], "window_size": 4, "image_size": 32}


def swin(**changes) -> Swin:
    """The micro Swin of the golden train cases, with other options where given; biases large enough to matter."""
    torch.manual_seed(0)
    network = Swin(**(MICRO | changes))
    for name, parameter in network.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.5)
    return network


def blocks_of(network: Swin) -> list[SwinBlock]:
    return [module for module in network.modules() if isinstance(module, SwinBlock)]


MICRO_CVT: dict[str, Any] = {
    "in_channels": 3,
    "dims": [16, 24, 32, 48],
    "depths": [1, 1, 1, 1],
    "heads": [1, 2, 2, 4],
    "window_sizes": [7, 7, 7, 7],
    "mlp_ratio": 4.0,
    "drop_path_rate": 0.0,
    "residual_stem": False,
    "relative_position": False,
    "shift": "none",
}


def micro_cvt(**changes) -> Cvt:
    """The micro CvT of the golden train cases, with other options where given; weights and biases large enough to matter."""
    torch.manual_seed(0)
    network = Cvt(**(MICRO_CVT | changes))
    for name, parameter in network.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() == 4:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return network


MICRO_VIT: dict[str, Any] = {
    "in_channels": 3,
    "image_size": 64,
    "patch_size": 16,
    "dim": 24,
    "depth": 3,
    "heads": 2,
    "mlp_ratio": 4.0,
    "drop_path_rate": 0.0,
}


def micro_vit(**changes) -> ViT:
    """Three blocks of width 24 for images of 64 pixels, with other options where given; weights large enough to matter."""
    torch.manual_seed(0)
    network = ViT(**(MICRO_VIT | changes))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.dim() == 1 else 0.2)
    return network


def micro_resnet(**changes) -> ResNet:
    """One block in each stage, with other options where given."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"in_channels": 3, "depths": [1, 1, 1, 1]}
    return ResNet(**(options | changes))


def timm_network(name: str, **changes) -> Timm:
    """A small network of timm with random weights, with other options where given."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"name": name, "pretrained": False, "in_channels": 3, "image_size": None, "drop_path_rate": 0.0}
    return Timm(**(options | changes))


MICRO_VIL: dict[str, Any] = {
    "in_channels": 3,
    "image_size": 224,
    "patch_sizes": [4, 2, 2, 2],
    "dims": [16, 24, 32, 48],
    "depths": [1, 1, 1, 1],
    "heads": [2, 2, 4, 4],
    "window_sizes": [7, 7, 7, 7],
    "sliding": [True, True, False, False],
    "global_tokens": [1, 1, 1, 0],
    "absolute_positions": [False, False, False, False],
    "neighbours": "all",
    "all_neighbours_from": 1.0,
    "reach": "chunks",
    "mlp_ratio": 4.0,
    "drop_path_rate": 0.0,
}


def micro_vil(**changes) -> Vil:
    """The micro ViL of the golden train cases, with other options where given; weights, biases and positions large enough to matter."""
    torch.manual_seed(0)
    network = Vil(**(MICRO_VIL | changes))
    for name, parameter in network.named_parameters():
        if parameter.numel() and ("bias" in name or name.endswith(("cls_token", "pos_embed"))):
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return network


class Convolutions(Backbone):
    """A network without attention: one stage of two blocks, and a class token on request."""

    def __init__(self, class_token: bool):
        super().__init__()
        self.dim = 6
        self.block_dims = [6, 6]
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.class_token = nn.Parameter(torch.randn(1, 1, 6)) if class_token else None

    def encode(self, images: Tensor, *, last_only: bool = False) -> list[Stage]:
        cells = self.stem(images)
        tokens = [cells.flatten(2).transpose(1, 2)]
        if self.class_token is not None:
            tokens = [torch.cat([self.class_token.expand(len(images), -1, -1), tokens[0]], dim=1)]
        for block in self.blocks:
            tokens.append(block(tokens[-1]))
        return [Stage(tokens[-1:] if last_only else tokens, (cells.shape[2], cells.shape[3]))]
