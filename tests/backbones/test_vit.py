import pytest
import torch
import torch.nn.functional as F

from esvit.backbones.vit import ViT, ViTBlock
from esvit.errors import OptionError
from tests.backbones.networks import MICRO_VIT, micro_vit


def blocks_of(network: ViT) -> list[ViTBlock]:
    return [module for module in network.modules() if isinstance(module, ViTBlock)]


@pytest.mark.parametrize(("image", "grid"), [((100, 37), (6, 2)), ((16, 16), (1, 1)), ((64, 64), (4, 4))])
def test_images_are_cut_down_to_whole_patches(image, grid):
    network, images = micro_vit().eval(), torch.randn(2, 3, *image)
    features, whole = network(images), images[:, :, : grid[0] * 16, : grid[1] * 16]
    assert features.grid == grid and features.regions.shape == (2, grid[0] * grid[1], 24)
    assert torch.equal(features.regions, network(whole).regions)


@pytest.mark.parametrize("grid", [(6, 6), (3, 9), (1, 14), (5, 4)])
def test_position_embeddings_are_interpolated_as_torch_does_with_the_same_gradient(grid):
    network = micro_vit().double()
    nominal = network.pos_embed[:, 1:].view(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(nominal, size=grid, mode="bicubic").flatten(2).transpose(1, 2)
    ours = network.position_embeddings(grid)
    cotangent = torch.randn_like(expected)
    assert torch.equal(ours[:, 0], network.pos_embed[:, 0])
    torch.testing.assert_close(ours[:, 1:], expected, rtol=0, atol=1e-6)  # torch makes float32 of the interpolation's weights
    gradients = [torch.autograd.grad(each, network.pos_embed, cotangent)[0] for each in (ours[:, 1:], expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def test_position_embeddings_of_the_nominal_grid_stay_as_they_are():
    network = micro_vit()
    assert network.position_embeddings((4, 4)) is network.pos_embed
    assert network.position_embeddings((2, 8)).shape == network.pos_embed.shape
    assert not torch.equal(network.position_embeddings((2, 8)), network.pos_embed)


def test_position_embeddings_keep_full_precision_under_autocast():
    network = micro_vit()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network.position_embeddings((6, 3)), network.position_embeddings((6, 3)).float())
        low = network.position_embeddings((6, 3))
    assert torch.equal(low, network.position_embeddings((6, 3)))


def test_the_class_token_is_pooled_and_every_one_of_the_last_blocks_is_normed():
    network, images = micro_vit().eval(), torch.randn(2, 3, 48, 32)
    (stage,) = network.encode(images)
    features, blocks = network(images), network.last_blocks(images, 3)
    assert stage.grid == (3, 2) and [tokens.shape for tokens in stage.tokens] == [(2, 7, 24)] * 4
    assert torch.equal(features.pooled, network.norm(stage.tokens[-1])[:, 0])
    assert torch.equal(features.regions, network.norm(stage.tokens[-1])[:, 1:])
    for block, tokens in zip(blocks, stage.tokens[1:], strict=True):
        assert torch.equal(block, network.norm(tokens)[:, 0])


def test_attention_weights_are_those_of_the_fused_attention():
    network, images = micro_vit().double().eval(), torch.randn(2, 3, 48, 32, dtype=torch.float64)
    (stage,) = network.encode(images)
    block = blocks_of(network)[1]
    tokens = block.norm1(stage.tokens[1])
    values = block.attn.qkv(tokens)[:, :, 48:].view(2, 7, 2, 12).transpose(1, 2)
    (windows, *_), (on_grid, *_) = network.window_attentions(images)[1:], network.attentions(images)[1:]
    attended = block.attn.proj((windows.weights[:, 0] @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attended, block.attn(tokens), rtol=0, atol=1e-10)
    assert windows.weights.shape == (2, 1, 2, 7, 7) and windows.places.tolist() == [[-1, 0, 1, 2, 3, 4, 5]]
    among_cells = windows.weights[:, 0, :, 1:, 1:]
    torch.testing.assert_close(on_grid, among_cells / among_cells.sum(dim=-1, keepdim=True))


def test_stochastic_depth_rises_over_the_blocks():
    assert [block.drop_path.rate for block in blocks_of(micro_vit(drop_path_rate=0.5))] == pytest.approx([0, 0.25, 0.5])


def test_layer_norms_use_the_eps_of_the_original():
    norms = [module for module in micro_vit().modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 7 and all(norm.eps == 1e-6 for norm in norms)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"depth": 0}, "backbone.depth"),
        ({"heads": 5}, "backbone.heads"),
        ({"heads": 0}, "backbone.heads"),
        ({"drop_path_rate": 1.0}, "backbone.drop_path_rate"),
        ({"image_size": 15}, "backbone.image_size"),
        ({"patch_size": 0}, "backbone.image_size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes, option):
    with pytest.raises(OptionError) as error:
        ViT(**(MICRO_VIT | changes))
    assert error.value.option == option
