import pytest
import torch
import torchvision

from esvit.backbones.resnet import ResNet
from esvit.errors import OptionError
from tests.backbones.networks import micro_resnet


def test_state_and_features_are_torchvisions():
    theirs = torchvision.models.resnet50().eval()
    ours = ResNet(in_channels=3, depths=[3, 4, 6, 3]).eval()
    theirs.fc = torch.nn.Identity()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = ours(images)
        torch.testing.assert_close(features.pooled, theirs(images))
    torch.testing.assert_close(features.regions.mean(dim=1), features.pooled)


def test_every_block_of_resnet_50_counts_for_last_blocks():
    network = ResNet(in_channels=3, depths=[3, 4, 6, 3])
    assert network.block_dims == [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3


def test_last_blocks_are_the_means_of_the_blocks_maps():
    network, images, maps = micro_resnet().eval(), torch.randn(2, 3, 64, 96), []
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        layer[0].register_forward_hook(lambda _, __, leaving: maps.append(leaving))
    for block, image_map in zip(network.last_blocks(images, 4), maps, strict=True):
        torch.testing.assert_close(block, image_map.mean(dim=(2, 3)))


def test_maps_stay_channels_last_where_images_are():
    network, images = micro_resnet().eval(), torch.randn(2, 3, 64, 96)
    last = network(images.contiguous(memory_format=torch.channels_last))
    assert last.regions.is_contiguous()
    torch.testing.assert_close(last.regions, network(images).regions)


@pytest.mark.parametrize("depths", [[3, 4, 6], [3, 4, 6, 0], []])
def test_other_than_four_stages_are_refused(depths):
    with pytest.raises(OptionError, match="^backbone.depths"):
        ResNet(in_channels=3, depths=depths)
