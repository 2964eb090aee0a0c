"""Small real networks for the tests of the backbones."""

from typing import Any

import torch
from torch import Tensor, nn

from esvit.backbones.base import Backbone, Stage
from esvit.backbones.swin import Swin, SwinBlock

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
