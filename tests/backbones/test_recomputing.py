"""Blocks that compute activations again, and blocks that are compiled: the same numbers, under the same names."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

from esvit.backbones.base import Backbone
from esvit.errors import OptionError
from esvit.tasks.throughput import LiveTensors
from tests.backbones.networks import Convolutions, micro_cvt, micro_resnet, micro_vil, micro_vit, swin, timm_network

DROP = {"drop_path_rate": 0.5}
NETWORKS = {
    "swin": partial(swin, **DROP),
    "cvt": partial(micro_cvt, **DROP),
    "vil": partial(micro_vil, neighbours="random", **DROP),
    "vit": partial(micro_vit, **DROP),
    "resnet": micro_resnet,
    "timm_vit": partial(timm_network, "test_vit", **DROP),
}
CASES = [(name, what) for name in ("swin", "cvt", "vil", "vit") for what in ("mlp", "attention", "blocks")]


def trained(network: Backbone, images: Tensor) -> list[Tensor]:
    """Features, gradients and buffers after one pass that begins with the same seed."""
    torch.manual_seed(1)
    features = network.train()(images)
    (features.pooled.square().sum() + features.regions.sum()).backward()
    return [features.pooled, *(each.grad for each in network.parameters() if each.grad is not None), *network.buffers()]


def pictures() -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "what"), [*CASES, ("resnet", "blocks"), ("timm_vit", "blocks")])
def test_recomputed_gradients_are_those_of_kept_activations_bit_for_bit(name, what):
    network, images = NETWORKS[name](), pictures()
    other = copy.deepcopy(network)
    other.recompute(what)
    for kept, recomputed in zip(trained(network, images), trained(other, images), strict=True):
        assert torch.equal(kept, recomputed)
    assert list(other.state_dict()) == list(network.state_dict())


def test_recomputing_more_needs_less_memory():
    peaks = {}
    for what in ("none", "attention", "mlp", "blocks"):
        network = swin()
        network.recompute(what)
        with LiveTensors([]) as live:
            network(pictures()).pooled.sum().backward()
        peaks[what] = live.peak
    assert peaks["blocks"] < min(peaks["mlp"], peaks["attention"]) and max(peaks["mlp"], peaks["attention"]) < peaks["none"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_recomputes_with_its_own_weights(compiled):
    network = swin()
    network.recompute("blocks")
    if compiled:
        network.compile_blocks("eager")
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert other(pictures()).pooled.std() > 0.1


def test_what_a_network_does_not_have_is_refused():
    with pytest.raises(OptionError, match=r"^task\.recompute: attention, of which ResNet has none"):
        micro_resnet().recompute("attention")
    with pytest.raises(OptionError, match=r"^task\.compile: Convolutions has no blocks"):
        Convolutions(class_token=False).compile_blocks()
    with pytest.raises(OptionError, match=r"^task\.compile: a graph cannot hold the draws"):
        micro_vil(neighbours="random").compile_blocks()


@pytest.mark.parametrize(("name", "what"), [("swin", "none"), ("swin", "blocks"), ("cvt", "attention"), ("vil", "none"), ("vit", "mlp")])
def test_compiled_blocks_have_no_graph_break_and_give_the_same(name, what):
    torch._dynamo.reset()
    network = NETWORKS[name](**({"neighbours": "all"} if name == "vil" else {}))
    other, images = copy.deepcopy(network), pictures()
    other.recompute(what)
    backend = "eager" if what == "none" else "aot_eager"  # what "eager" recomputes has other random draws
    other.compile_blocks(backend)  # each block is one graph, or torch raises
    for plain, compiled in zip(trained(network, images), trained(other, images), strict=True):
        torch.testing.assert_close(plain, compiled)
    assert list(other.state_dict()) == list(network.state_dict())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_graphs_keep_as_little_as_what_they_recompute_allows():
    torch._dynamo.reset()
    kept = {}
    for what in ("none", "blocks"):
        network = swin()
        network.recompute(what)
        network.compile_blocks("aot_eager")
        kept[what] = bytes_kept(network)
    assert kept["blocks"] < kept["none"] / 2  # torch 2.15 keeps a ninth, 2.11 a third


def bytes_kept(network: Backbone) -> int:
    """For the backward pass, parameters apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    sizes: dict[int, int] = {}

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        loss = network.train()(pictures()).pooled.sum()
    assert loss.requires_grad
    return sum(sizes.values())
