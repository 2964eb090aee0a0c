"""Projection head and prototypes."""

import pytest
import torch
from torch import nn

from esvit.errors import OptionError
from esvit.heads import ProjectionHead, Prototypes


def projection(layers=3, batch_norm=False) -> ProjectionHead:
    torch.manual_seed(0)
    return ProjectionHead(dim=12, hidden_dim=20, bottleneck_dim=8, layers=layers, batch_norm=batch_norm)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_embeddings_are_unit_vectors_for_pooled_and_region_features(layers, batch_norm):
    head = projection(layers, batch_norm)
    for shape in [(5, 12), (3, 7, 12)]:
        embeddings = head(torch.randn(shape))
        assert embeddings.shape == (*shape[:-1], 8)
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(shape[:-1]))


@pytest.mark.parametrize(
    ("layers", "batch_norm", "names"),
    [
        (1, False, ["mlp"]),
        (1, True, ["mlp"]),
        (2, False, ["mlp.0", "mlp.2"]),
        (2, True, ["mlp.0", "mlp.1", "mlp.3"]),
        (3, False, ["mlp.0", "mlp.2", "mlp.4"]),
        (3, True, ["mlp.0", "mlp.1", "mlp.3", "mlp.4", "mlp.6"]),
    ],
)
def test_parameters_have_the_names_of_the_original(layers, batch_norm, names):
    parameters = [name for name, _ in projection(layers, batch_norm).named_parameters()]
    assert parameters == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def test_batch_norm_sees_all_regions_of_all_images_as_one_batch():
    head = projection(layers=2, batch_norm=True)
    features = torch.randn(3, 7, 12)
    torch.testing.assert_close(head(features), head(features.reshape(21, 12)).reshape(3, 7, 8))


def test_linear_layers_start_small_and_without_bias():
    head = ProjectionHead(dim=256, hidden_dim=512, bottleneck_dim=64, layers=3, batch_norm=False)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not module.bias.any()


def test_a_head_without_layers_is_refused_by_the_name_of_its_option():
    with pytest.raises(OptionError, match=r"head\.layers: 0 layers; use 1 or more"):
        projection(layers=0)


def test_embeddings_are_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = projection()(torch.randn(5, 12))
        prototypes = Prototypes(count=30, bottleneck_dim=8, norm_last_layer=True)()
    assert embeddings.dtype == prototypes.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(5))


def test_prototypes_equal_torchs_weight_norm_with_gradients():
    prototypes = Prototypes(count=30, bottleneck_dim=8, norm_last_layer=False).double()
    nn.init.uniform_(prototypes.weight_g, 0.5, 2)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(8, 30, bias=False).double())
    weights = reference.parametrizations["weight"]
    weights.original0.data.copy_(prototypes.weight_g.data)
    weights.original1.data.copy_(prototypes.weight_v.data)
    upstream = torch.randn(30, 8, dtype=torch.float64)

    matrix = prototypes()
    torch.testing.assert_close(matrix, reference.weight, rtol=1e-13, atol=1e-13)
    ours = torch.autograd.grad((matrix * upstream).sum(), [prototypes.weight_g, prototypes.weight_v])
    theirs = torch.autograd.grad((reference.weight * upstream).sum(), [weights.original0, weights.original1])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_norm_last_layer_keeps_unit_prototypes_and_freezes_their_norm():
    prototypes = Prototypes(count=30, bottleneck_dim=8, norm_last_layer=True)
    torch.testing.assert_close(prototypes().norm(dim=1), torch.ones(30))
    assert not prototypes.weight_g.requires_grad
    assert prototypes.weight_v.requires_grad
    assert Prototypes(count=30, bottleneck_dim=8, norm_last_layer=False).weight_g.requires_grad


def test_prototypes_keep_the_names_of_the_original_and_are_marked_as_last_layer():
    prototypes = Prototypes(count=30, bottleneck_dim=8, norm_last_layer=True)
    assert set(prototypes.state_dict()) == {"weight_g", "weight_v"}
    assert prototypes.is_last_layer


def test_prototype_directions_start_as_a_torch_linear_layer_does():
    weight = Prototypes(count=4096, bottleneck_dim=64, norm_last_layer=True).weight_v
    bound = 1 / 64**0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
