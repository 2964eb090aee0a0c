from typing import Any, cast

import pytest
import timm
import torch
from timm.layers import DropPath

from esvit.backbones.timm import Timm
from esvit.errors import OptionError
from tests.backbones.networks import timm_network

SMALL = ["test_vit", "test_convnext", "test_resnet", "test_efficientnet", "mobilenetv3_small_050"]


def without_weights() -> str:
    """A network of which timm has no published weights: no download is tried."""
    return next(name for name in timm.list_models() if not cast(Any, timm.get_pretrained_cfg(name)).has_weights)


@pytest.mark.parametrize("name", SMALL)
def test_pooled_features_are_timms_own(name):
    network, images = timm_network(name).eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(network(images).pooled, network.model(images))


def test_regions_of_a_network_that_averages_are_the_cells_of_its_last_map():
    network, images = timm_network("test_resnet").eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features, last_map = network(images), network.model.forward_features(images)
    assert features.grid == (2, 3)
    torch.testing.assert_close(features.regions, last_map.flatten(2).transpose(1, 2))
    torch.testing.assert_close(features.regions.mean(dim=1), features.pooled)


@pytest.mark.parametrize("name", ["test_convnext", "mobilenetv3_small_050", "test_vit"])
def test_a_region_is_what_timm_makes_of_it_alone(name):
    """A map of copies of the third cell is pooled to the third region: what timm applies after pooling is applied to regions too."""
    network, images = timm_network(name).eval(), torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        final = network.model.forward_features(images)
        all_like_third = final[:, 3:4].expand_as(final) if final.dim() == 3 else final[:, :, 1:2, :1].expand_as(final)
        torch.testing.assert_close(network(images).regions[:, 2], network.model.forward_head(all_like_third, pre_logits=True))


def test_regions_of_a_transformer_are_its_normed_tokens_without_the_class_token():
    network, images = timm_network("test_vit").eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features, tokens = network(images), network.model.forward_features(images)
    assert features.grid == (4, 6) and tokens.shape == (2, 25, 64)
    torch.testing.assert_close(features.pooled, tokens[:, 0])
    torch.testing.assert_close(features.regions, tokens[:, 1:])


def test_last_blocks_of_a_transformer_are_normed_class_tokens():
    network, images = timm_network("test_vit").eval(), torch.randn(2, 3, 64, 64)
    leaving = []
    for block in network.model.blocks:
        block.register_forward_hook(lambda _, __, tokens: leaving.append(tokens))
    with torch.no_grad():
        blocks = network.last_blocks(images, 6)
        for block, tokens in zip(blocks, leaving, strict=True):
            torch.testing.assert_close(block, network.model.norm(tokens)[:, 0])


def test_last_blocks_of_other_networks_are_the_means_of_timms_maps():
    network, images = timm_network("test_convnext").eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = network.model.forward_intermediates(images, intermediates_only=True)
        for block, stage in zip(network.last_blocks(images, 4), maps, strict=True):
            torch.testing.assert_close(block, stage.mean(dim=(2, 3)))


def test_attention_is_what_the_blocks_computed_and_fused_attention_comes_back():
    network, images = timm_network("test_vit").eval(), torch.randn(2, 3, 64, 96)
    layer, entering = network.model.blocks[2].attn, []
    layer.register_forward_pre_hook(lambda _, tokens: entering.append(tokens[0]))
    with torch.no_grad():
        before, windows = network(images).pooled, network.window_attentions(images)
        query, key, _ = layer.qkv(entering[0]).view(2, 25, 3, 2, 32).permute(2, 0, 3, 1, 4)
        after = network(images).pooled
    expected = (layer.q_norm(query) @ layer.k_norm(key).transpose(-2, -1) * 32**-0.5).softmax(dim=-1)
    assert len(windows) == 6 and windows[2].places.tolist() == [list(range(-1, 24))]
    torch.testing.assert_close(windows[2].weights, expected.unsqueeze(1))
    assert torch.equal(before, after) and layer.fused_attn


def test_windows_of_timms_swin_take_local_crops_but_tell_no_attention():
    network, images = timm_network("swin_tiny_patch4_window7_224").eval(), torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        features = network(images)
        assert features.grid == (3, 2) and features.regions.shape == (1, 6, 768)
        assert [block.shape[1] for block in network.last_blocks(images, 4)] == [96, 192, 384, 768]
        torch.testing.assert_close(features.pooled, features.regions.mean(dim=1))
        with pytest.raises(OptionError, match="^backbone: swin_tiny_patch4_window7_224 has no blocks of attention over the whole image"):
            network.attentions(images)


def test_an_image_that_a_network_cannot_take_is_named_with_its_size():
    network = timm_network("test_vit_relpos").eval()
    assert network(torch.randn(1, 3, 160, 160)).grid == (10, 10)
    with pytest.raises(OptionError, match="^backbone.name: test_vit_relpos cannot take images of 64 x 96 pixels .*use images of 160 x 160"):
        network(torch.randn(1, 3, 64, 96))


def test_nominal_image_size_fits_the_network_to_the_images():
    assert timm_network("test_vit_relpos", image_size=64)(torch.randn(2, 3, 64, 64)).grid == (4, 4)
    assert timm_network("test_vit", image_size=64).model.pos_embed.shape == (1, 17, 64)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_drop_path_of_timm_is_set_and_disabled(name):
    network = timm_network(name, drop_path_rate=0.5)
    drops = [module for module in network.modules() if isinstance(module, DropPath)]
    assert max(drop.drop_prob for drop in drops) == pytest.approx(0.5)
    network.disable_drop_path()
    assert all(drop.drop_prob == 0 for drop in drops)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "convnextv2_tin"}, "backbone.name: timm has no 'convnextv2_tin'; did you mean convnextv2_tiny"),
        ({"name": "resnet18.nowhere"}, "backbone.name: timm has no 'resnet18.nowhere'; did you mean resnet18"),
        ({"name": "§§"}, "backbone.name: timm has no '§§'; choose from"),
        ({"name": "ghostnet_050", "drop_path_rate": 0.1}, "backbone.drop_path_rate: ghostnet_050 has no stochastic depth; give 0"),
        ({"name": "test_resnet", "drop_path_rate": 1.0}, "backbone.drop_path_rate: 1.0; choose"),
        ({"name": "test_resnet", "image_size": 96}, "backbone.image_size: test_resnet has no nominal size; leave this option out"),
        ({"name": without_weights(), "pretrained": True}, f"backbone.pretrained: timm has none for {without_weights()}; choose"),
    ],
)
def test_what_timm_does_not_have_is_refused_by_name(changes, message):
    options = {"pretrained": False, "in_channels": 3, "image_size": None, "drop_path_rate": 0.0} | changes
    with pytest.raises(OptionError) as error:
        Timm(**options)
    assert str(error.value).startswith(message)
