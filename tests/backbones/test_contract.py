"""What every backbone promises, asked of each of them alike."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from esvit.backbones.base import Backbone
from esvit.errors import OptionError
from tests.backbones.networks import micro_cvt, micro_resnet, micro_vil, micro_vit, swin, timm_network


@dataclass(frozen=True)
class Case:
    """One backbone.

    make            the network with options, e.g. in_channels
    stride          pixels of a region's side
    attention       whether it has any
    drop_path       whether it has stochastic depth
    without_effect  pattern of parameters that take part in the forward, but change no feature
    """

    make: Callable[..., Backbone]
    stride: int
    attention: bool = True
    drop_path: bool = True
    without_effect: str = "$^"


CASES = {
    "swin": Case(swin, stride=32),
    "cvt": Case(micro_cvt, stride=32),
    "cvt_stem_relative_position_rolled": Case(
        partial(micro_cvt, residual_stem=True, relative_position=True, shift="rolled", depths=[2, 1, 1, 1]), stride=32
    ),
    "vil": Case(micro_vil, stride=32, without_effect=r"layer\d\.1\.attn\.g2g_"),  # a stage's last block: its global tokens end there
    "vit": Case(micro_vit, stride=16),
    "resnet": Case(micro_resnet, stride=32, attention=False, drop_path=False),
    "timm_vit": Case(partial(timm_network, "test_vit"), stride=16),
    "timm_convnext": Case(partial(timm_network, "test_convnext"), stride=32, attention=False),
    "timm_mobilenet": Case(partial(timm_network, "mobilenetv3_small_050"), stride=32, attention=False),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def pictures(height: int, width: int, *, count: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(height + width))


def pooled_twice(network: Backbone, images: Tensor) -> list[Tensor]:
    """Pooled features of two passes that begin with the same seed."""
    answers = []
    for _ in range(2):
        torch.manual_seed(1)
        answers.append(network(images).pooled)
    return answers


@pytest.mark.parametrize(("height", "width"), [(96, 96), (224, 224), (64, 160)])
def test_features_of_any_image_lie_on_its_own_grid(case, height, width):
    network = case.make().eval()
    with torch.no_grad():
        features = network(pictures(height, width))
    rows, columns = height // case.stride, width // case.stride
    assert features.grid == (rows, columns)
    assert features.pooled.shape == (2, network.dim)
    assert features.regions.shape == (2, rows * columns, network.dim)
    assert features.regions.std() > 0 and features.regions.isfinite().all() and features.pooled.isfinite().all()


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_images_may_have_other_than_three_channels(case, channels):
    network = case.make(in_channels=channels).eval()
    assert network(pictures(64, 64, channels=channels)).pooled.shape == (2, network.dim)


def test_last_blocks_have_the_widths_that_block_dims_tells(case):
    network, images = case.make().eval(), pictures(96, 64)
    with torch.no_grad():
        for count in (1, 2, len(network.block_dims)):
            widths = [tuple(block.shape) for block in network.last_blocks(images, count)]
            assert widths == [(2, width) for width in network.block_dims[-count:]]


def test_the_mean_of_the_regions_comes_with_the_last_blocks_from_one_pass(case):
    network, images = case.make().eval(), pictures(96, 64)
    with torch.no_grad():
        blocks, mean = network.last_blocks_and_regions(images, 2)
        torch.testing.assert_close(mean, network(images).regions.mean(dim=1))
        for block, same in zip(blocks, network.last_blocks(images, 2), strict=True):
            assert torch.equal(block, same)


def test_more_last_blocks_than_there_are_are_refused(case):
    network = case.make()
    for count in (0, len(network.block_dims) + 1):
        with pytest.raises(ValueError, match=f"from 1 to {len(network.block_dims)}"):
            network.last_blocks(pictures(64, 64), count)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (64, 160)])
def test_attention_rows_sum_to_one_on_the_whole_grid_or_are_refused(case, height, width):
    network, images = case.make().eval(), pictures(height, width)
    if not case.attention:
        with pytest.raises(OptionError, match="^backbone: .* has no .*attention"):
            network.attentions(images)
        return
    with torch.no_grad():
        attentions = network.attentions(images)
        features = network(images)
    assert len(attentions) == len(network.block_dims)
    assert attentions[-1].shape[2:] == (features.regions.shape[1],) * 2
    for weights in attentions:
        assert weights.dim() == 4 and len(weights) == 2 and weights.shape[2] == weights.shape[3]
        assert weights.min() >= 0
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:3]))


def test_gradient_of_pooled_features_reaches_every_parameter(case):
    """Pooled features alone: a loss without regions must leave no parameter out, or DistributedDataParallel waits for it forever."""
    network = case.make()
    torch.manual_seed(1)
    for images in (pictures(64, 64), pictures(96, 96)):
        pooled = network(images).pooled
        pooled.backward(torch.randn_like(pooled))
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or re.match(case.without_effect, name), name


def test_parameters_are_listed_once_each_from_the_first_layer_to_the_final_norm(case):
    """What the layer-wise learning rates of fine-tuning go by."""
    network = case.make()
    layers = network.parameters_by_depth()
    names = [name for name, _ in network.named_parameters()]
    assert sorted(name for layer in layers for name in layer) == sorted(names)
    depth_of = {name: depth for depth, layer in enumerate(layers) for name in layer}
    in_order = [depth_of[name] for name in names if not name.startswith("norm.")]
    assert in_order == sorted(in_order) and in_order[0] == 0
    assert set(range(len(layers) - 1)) <= set(depth_of.values()) and len(layers) >= len(network.block_dims) + 2
    of_norm = {name for name in names if name.startswith("norm.")}
    assert set(layers[-1]) == of_norm


def test_network_compiles_as_one_graph(case):
    torch._dynamo.reset()
    network, images = case.make(), pictures(64, 96)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    features, expected = compiled(images), network(images)
    torch.testing.assert_close(features.pooled, expected.pooled)
    torch.testing.assert_close(features.regions, expected.regions)
    features.pooled.sum().backward()
    assert next(network.parameters()).grad is not None


def test_state_survives_a_round_trip(case):
    network, other, images = case.make().eval(), case.make().eval(), pictures(64, 64)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(images).pooled, other(images).pooled)


def test_the_same_seed_gives_the_same_features_in_training(case):
    network = case.make(drop_path_rate=0.5) if case.drop_path else case.make()
    first, second = pooled_twice(network.train(), pictures(64, 64, count=8))
    assert torch.equal(first, second)


def test_nothing_is_left_to_chance_once_drop_path_is_disabled(case):
    network, images = (case.make(drop_path_rate=0.5) if case.drop_path else case.make()).train(), pictures(64, 64, count=8)
    assert torch.equal(network(images).pooled, network(images).pooled) is not case.drop_path
    network.disable_drop_path()
    assert torch.equal(network(images).pooled, network(images).pooled)


def test_a_copy_is_equal_and_apart(case):
    """Made after a forward, as whatever a network keeps from one must be copied too."""
    network, images = case.make().eval(), pictures(64, 64)
    before = network(images).pooled
    twin = copy.deepcopy(network)
    assert torch.equal(twin(images).pooled, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(network(images).pooled, before)
