import pytest
import torch

from esvit.backbones.base import AttentionWindows
from esvit.errors import OptionError
from tests.backbones.networks import Convolutions, swin


def test_forward_last_blocks_and_encode_tell_the_same():
    network, images = swin().eval(), torch.randn(2, 3, 96, 96)
    features, stages = network(images), network.encode(images)
    regions = network.norm(stages[-1].tokens[-1])
    assert torch.equal(features.regions, regions)
    assert torch.equal(features.pooled, regions.mean(dim=1))
    assert torch.equal(network.last_blocks(images, 1)[0], features.pooled)
    assert [len(stage.tokens) - 1 for stage in stages] == [2, 1, 2, 1]
    assert [stage.grid for stage in stages] == [(24, 24), (12, 12), (6, 6), (3, 3)]


def test_training_forward_keeps_the_last_tokens_only():
    network = swin()
    (stage,) = network.encode(torch.randn(1, 3, 64, 64), last_only=True)
    assert len(stage.tokens) == 1 and stage.tokens[0].shape == (1, 4, 192) and stage.grid == (2, 2)


def test_last_blocks_are_normed_in_the_last_stage_only():
    network, images = swin().eval(), torch.randn(2, 3, 64, 64)
    stages = network.encode(images)
    raw = [tokens.mean(dim=1) for stage in stages[:-1] for tokens in stage.tokens[1:]]
    last = network.norm(stages[-1].tokens[1]).mean(dim=1)
    for count in (1, 2, 6):
        blocks = network.last_blocks(images, count)
        assert [block.shape[1] for block in blocks] == network.block_dims[-count:]
        for block, expected in zip(blocks, [*raw, last][-count:], strict=True):
            torch.testing.assert_close(block, expected)


def test_a_class_token_stands_for_the_image_and_is_no_region():
    network, images = Convolutions(class_token=True), torch.randn(2, 3, 16, 20)
    features = network(images)
    (stage,) = network.encode(images)
    normed = network.norm(stage.tokens[-1])
    assert features.grid == (4, 5)
    assert torch.equal(features.regions, normed[:, 1:])
    assert torch.equal(features.pooled, normed[:, 0])


def test_a_network_without_attention_says_so():
    network, images = Convolutions(class_token=False), torch.randn(1, 3, 16, 16)
    for ask in (network.attentions, network.window_attentions):
        with pytest.raises(OptionError, match="backbone: Convolutions has no attention; choose a transformer"):
            ask(images)


def test_attention_to_padding_is_left_out_and_the_rest_fills_the_row():
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.3, 0.6], [0.2, 0.2, 0.6]]).view(1, 1, 1, 3, 3)
    on_grid = AttentionWindows(weights, torch.tensor([[1, -1, 0]])).on_grid((1, 2))
    torch.testing.assert_close(on_grid[0, 0], torch.tensor([[0.6 / 0.8, 0.2 / 0.8], [0.25 / 0.75, 0.5 / 0.75]]))
