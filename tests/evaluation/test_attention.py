"""Maps, masks and entropies of attention, on weights planted by hand and on every architecture."""

import pytest
import torch

from esvit.backbones.base import AttentionWindows, BlockAttention
from esvit.evaluation.attention import (
    Query,
    attention_map,
    entropy_bits,
    entropy_row,
    head_entropy,
    heads_per_block,
    mass_mask,
    summarise_entropy,
)
from tests.backbones.networks import micro_cvt, micro_vil, micro_vit, swin

# Two windows of two slots on a grid of one row and three columns; the second window holds cell 2, and padding.
PLANTED = BlockAttention(
    AttentionWindows(
        weights=torch.tensor([[[0.75, 0.25], [0.5, 0.5]], [[0.25, 0.75], [0.5, 0.5]]]).view(1, 2, 1, 2, 2),
        places=torch.tensor([[0, 1], [2, -1]]),
    ),
    grid=(1, 3),
    class_tokens=0,
)


def test_without_a_query_a_cell_has_the_mean_of_what_it_receives_and_padding_takes_no_part() -> None:
    received = attention_map(PLANTED, None)[0, 0]
    torch.testing.assert_close(received, torch.tensor([[1.25 / 3, 0.75 / 3, 1 / 3]]))


@pytest.mark.parametrize(("column", "row"), [(0.0, [0.75, 0.25, 0]), (0.5, [0.5, 0.5, 0]), (0.7, [0, 0, 1.0]), (1.0, [0, 0, 1.0])])
def test_a_query_by_position_gives_the_attention_of_its_cell(column: float, row: list[float]) -> None:
    torch.testing.assert_close(attention_map(PLANTED, Query(0.9, column))[0, 0], torch.tensor([row]))


def test_a_class_token_is_asked_where_there_is_one() -> None:
    weights = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.3, 0.5], [0.2, 0.5, 0.3]]).view(1, 1, 1, 3, 3)
    block = BlockAttention(AttentionWindows(weights, torch.tensor([[-1, 0, 1]])), grid=(1, 2), class_tokens=1)
    torch.testing.assert_close(attention_map(block, None)[0, 0], torch.tensor([[0.8, 0.2]]))


def test_maps_keep_their_precision_in_a_network_of_less() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(attention_map(PLANTED, None).sum(), torch.tensor(1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [swin, micro_cvt, micro_vil, micro_vit], ids=lambda make: make.__name__)
@torch.no_grad()
def test_maps_are_those_of_the_attention_on_the_whole_grid(make) -> None:
    network, query = make().eval(), Query(0.4, 0.7)
    images = torch.randn(2, 3, 64, 64 if make is micro_vit else 80)
    for block, whole in zip(network.looks(images), network.attentions(images), strict=True):
        row, column = query.cell(block.grid)
        torch.testing.assert_close(attention_map(block, query).flatten(2), whole[:, :, row * block.grid[1] + column])
        pooled = attention_map(block, None).flatten(2)
        torch.testing.assert_close(pooled.sum(dim=2), torch.ones(pooled.shape[:2]))
        if block.class_tokens == 0:
            torch.testing.assert_close(pooled, whole.mean(dim=2))
        else:
            given = block.windows.weights[:, 0, :, 0, block.class_tokens :]
            torch.testing.assert_close(pooled, given / given.sum(dim=2, keepdim=True))


@pytest.mark.parametrize(("threshold", "lit"), [(0.3, [0, 1, 0, 0]), (0.5, [0, 1, 0, 0]), (0.6, [0, 1, 1, 0]), (0.95, [1, 1, 1, 1])])
def test_a_mask_is_the_smallest_set_of_cells_that_holds_the_mass(threshold: float, lit: list[int]) -> None:
    attention = torch.tensor([[0.1, 0.5], [0.3, 0.1]])
    assert mass_mask(attention, threshold).int().flatten().tolist() == lit


def test_masks_of_several_heads_are_their_own() -> None:
    heads = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]])
    assert mass_mask(heads, 0.6).tolist() == [[[True, False]], [[False, True]]]


def test_entropy_is_in_bits_and_a_weight_of_zero_adds_nothing() -> None:
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.25, 0.25, 0]])
    assert entropy_bits(weights).tolist() == [2, 0, 1.5]


def test_the_share_is_of_what_a_query_sees_and_padding_asks_nothing() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]).view(1, 1, 1, 3, 3)
    found = head_entropy(AttentionWindows(weights, torch.tensor([[0, 1, -1]])))
    assert found.bits.tolist() == [[0.5]]  # 1 bit and 0 bits
    assert found.shares.tolist() == [[1.0]]  # both are all that was possible


@torch.no_grad()
def test_entropies_of_an_image_do_not_depend_on_its_batch() -> None:
    network, images = swin(depths=[1, 1], heads=[2, 4]).eval(), torch.randn(2, 3, 32, 32)
    rows = entropy_row(network, images)
    assert rows.shape == (2, 2 * 6) and heads_per_block(network, images[:1]) == [2, 4]
    torch.testing.assert_close(rows[1:], entropy_row(network, images[1:]))
    first = head_entropy(network.window_attentions(images)[0])
    torch.testing.assert_close(rows[:, :2], first.bits)
    torch.testing.assert_close(rows[:, 6:8], first.shares)


def test_a_summary_has_mean_and_spread_of_each_head_over_the_images() -> None:
    rows = torch.tensor([[1.0, 2, 4, 0.1, 0.2, 0.4], [3.0, 2, 6, 0.3, 0.2, 0.6]])  # bits of heads 1 | 2 and 3, then their shares
    one, two = summarise_entropy(rows, [1, 2])
    assert (one.bits.tolist(), one.bits_spread.tolist(), one.mean_bits) == ([2], [1], 2)
    assert (two.bits.tolist(), two.bits_spread.tolist(), two.mean_bits) == ([2, 5], [0, 1], 3.5)
    assert two.mean_share == pytest.approx(0.35)
