import pytest
import torch
from torch import Tensor

from esvit.backbones.layers import DropPath, drop_path_rates, relative_position_bias


def lookup(table: Tensor, window: int) -> Tensor:
    """The bias as Swin writes it: a lookup in the table with the flattened difference of two slots' coordinates."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    index = (y[:, None] - y[None] + window - 1) * (2 * window - 1) + x[:, None] - x[None] + window - 1
    return table[index].permute(2, 0, 1)


@pytest.mark.parametrize("window", [1, 2, 4, 7])
def test_relative_position_bias_equals_the_lookup_in_the_table(window):
    table = torch.randn((2 * window - 1) ** 2, 3)
    assert torch.equal(relative_position_bias(table, window), lookup(table, window))


@pytest.mark.parametrize("window", [1, 4, 14])
def test_gradient_of_the_bias_equals_that_of_the_lookup(window):
    table = torch.randn((2 * window - 1) ** 2, 3, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(3, window**2, window**2, dtype=torch.float64)
    (ours,) = torch.autograd.grad(relative_position_bias(table, window), table, cotangent)
    (plain,) = torch.autograd.grad(lookup(table, window), table, cotangent)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def test_gradient_of_the_bias_has_the_same_bits_every_time_with_two_threads(two_threads):
    table = torch.randn(27**2, 3, requires_grad=True)
    cotangent = torch.randn(3, 196, 196)
    gradients = [torch.autograd.grad(relative_position_bias(table, 14), table, cotangent)[0] for _ in range(20)]
    assert all(torch.equal(gradients[0], again) for again in gradients[1:])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    branch = torch.ones(4000, 3, 2)
    dropped = DropPath(rate=0.25).train()(branch)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(dropped.amax(dim=(1, 2)), dropped.amin(dim=(1, 2)))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)


def test_drop_path_is_the_identity_in_evaluation():
    branch = torch.randn(8, 3)
    assert DropPath(rate=0.9).eval()(branch) is branch


def test_drop_path_rates_rise_over_all_stages():
    assert drop_path_rates(0.4, [2, 1, 2]) == [pytest.approx([0.0, 0.1]), pytest.approx([0.2]), pytest.approx([0.3, 0.4])]
    assert drop_path_rates(0.4, [1]) == [[0.0]]
