"""Stratified parts of labelled images: shares of every class, the same for a seed, smaller ones inside of larger ones."""

import numpy as np
import pytest

from esvit.data.subsets import held_out, stratified_fraction

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [100, 30, 10, 1]))


def counts(indices: np.ndarray) -> list[int]:
    return np.bincount(LABELS[indices], minlength=4).tolist()


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.01, [1, 1, 1, 1]), (0.1, [10, 3, 1, 1]), (0.5, [50, 15, 5, 1]), (1, [100, 30, 10, 1])]
)
def test_every_class_gives_its_share_and_at_least_one_image(fraction, expected):
    indices = stratified_fraction(LABELS, fraction, seed=0)
    assert counts(indices) == expected
    assert np.array_equal(indices, np.unique(indices))


def test_a_seed_tells_the_images_and_a_smaller_fraction_is_part_of_a_larger_one():
    small, large = (stratified_fraction(LABELS, fraction, seed=5) for fraction in (0.1, 0.3))
    assert set(small) < set(large)
    assert np.array_equal(small, stratified_fraction(LABELS, 0.1, seed=5))
    assert not np.array_equal(small, stratified_fraction(LABELS, 0.1, seed=6))


@pytest.mark.parametrize(("fraction", "expected"), [(0, [0, 0, 0, 0]), (0.01, [1, 1, 1, 0]), (0.1, [10, 3, 1, 0]), (0.99, [99, 29, 9, 0])])
def test_what_is_held_out_leaves_an_image_of_every_class(fraction, expected):
    kept, out = held_out(LABELS, fraction, seed=0)
    assert counts(out) == expected
    assert np.array_equal(np.sort(np.concatenate([kept, out])), np.arange(len(LABELS)))


def test_shares_that_are_none_are_refused():
    for fraction in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match="no share"):
            stratified_fraction(LABELS, fraction, seed=0)
    with pytest.raises(ValueError, match="cannot be held out"):
        held_out(LABELS, 1.0, seed=0)
