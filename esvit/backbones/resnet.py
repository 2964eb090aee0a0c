"""ResNet (He et al. 2016) with bottleneck blocks, the paper's convolutional baseline: torchvision's network without its classifier.

Letters: B images, N cells of a map, d width.

Unusual: there is no final norm and no attention; regions are the cells of the last map. The first block of a stage halves the map
itself, so tokens[0] of a stage are those of the stage before, on its grid. Names in the state dict are torchvision's, so that its
weights load without renaming.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from esvit.backbones.base import Backbone, Stage
from esvit.errors import OptionError

STAGES = 4


class ResNet(Backbone):
    """Four stages of bottleneck blocks, of 256, 512, 1024 and 2048 channels, random at the start.

    in_channels  channels of the images
    depths       blocks of each stage; [3, 4, 6, 3] is ResNet-50

    Raises OptionError for other than four stages of at least one block.
    """

    def __init__(self, *, in_channels: int, depths: list[int]):
        super().__init__()
        if len(depths) != STAGES or min(depths) < 1:
            raise OptionError("backbone.depths", f"{depths}", "give four numbers of blocks, each at least 1, as in [3, 4, 6, 3]")
        network = TorchvisionResNet(Bottleneck, depths)
        stages = [network.layer1, network.layer2, network.layer3, network.layer4]
        self.block_dims = [_width(block) for stage in stages for block in stage]
        self.dim = self.block_dims[-1]
        self.conv1 = network.conv1 if in_channels == network.conv1.in_channels else _first_convolution(in_channels)
        self.bn1, self.relu, self.maxpool = network.bn1, network.relu, network.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.norm = nn.Identity()

    def all_blocks(self) -> list[nn.Module]:
        return [block for layer in self._layers() for block in layer]

    def encode(self, images: Tensor, *, last_only: bool = False) -> list[Stage]:
        if images.is_cuda and torch.is_autocast_enabled("cuda"):  # tensor cores want it, and all maps follow; weights stay as they are
            images = images.contiguous(memory_format=torch.channels_last)
        image_map = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        stages = []
        for layer in self._layers():
            tokens = [_tokens(image_map)]
            for block in layer:
                image_map = block(image_map)
                leaving = _tokens(image_map)
                tokens = [leaving] if last_only else [*tokens, leaving]
            stages.append(Stage(tokens, (image_map.shape[2], image_map.shape[3])))
        return stages[-1:] if last_only else stages

    def _layers(self) -> list[nn.Sequential]:
        return [cast(nn.Sequential, layer) for layer in (self.layer1, self.layer2, self.layer3, self.layer4)]


def _tokens(image_map: Tensor) -> Tensor:
    """(B, d, R, Q) -> (B, R * Q, d), a view."""
    return image_map.flatten(2).transpose(1, 2)


def _width(block: nn.Module) -> int:
    return cast(Bottleneck, block).conv3.out_channels


def _first_convolution(in_channels: int) -> nn.Conv2d:
    """torchvision's, for other than three channels, with its initialisation."""
    convolution = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
