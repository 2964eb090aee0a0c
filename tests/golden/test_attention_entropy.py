"""The attention entropies of the original code on planted softmax weights."""

import pytest
import torch

from esvit.evaluation.attention import entropy_bits
from tests.golden.cases import Goldens, assert_close


@pytest.fixture(scope="module")
def bits(goldens: Goldens) -> torch.Tensor:
    """(heads, queries) of image 0."""
    return entropy_bits((2 * goldens.input("attn_logits", (2, 3, 49, 49))).softmax(dim=-1))[0]


@pytest.mark.parametrize("query", [0, 9, 48])
def test_entropy_of_each_head_equals_the_original(goldens: Goldens, bits: torch.Tensor, query: int) -> None:
    assert_close(bits[:, query], goldens.case("attn_entropy")[f"per_head_query{query}"], absolute=1e-5)


def test_heads_from_wide_to_narrow_are_in_the_order_of_the_original(goldens: Goldens, bits: torch.Tensor) -> None:
    assert_close(bits[:, 9].sort(descending=True).values, goldens.case("attn_entropy")["sorted_query9"], absolute=1e-5)
