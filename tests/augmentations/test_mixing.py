"""Mixing: the matrix says what the pixels are, teacher crops stay clean, probabilities and modes are kept."""

from typing import Any

import numpy as np
import pytest
import torch

from esvit.augmentations.mixing import Mixing
from esvit.errors import OptionError

OPTIONS: dict[str, Any] = {
    "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "probability": 1.0, "switch_probability": 0.5, "mode": "batch", "crops": 10,
    "cutmix_minmax": None,
}  # fmt: skip
MODES = ["batch", "pair", "elem"]


def flat_crops(count: int) -> list[torch.Tensor]:
    """Two sizes of crops whose image i has the value 10^i all over: sums of pixels can be read back as shares."""
    values = 10.0 ** torch.arange(count).view(-1, 1, 1, 1)
    return [values.expand(count, 3, size, size).clone() for size in (16, 16, 8)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("switch_probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [4, 5])
def test_the_matrix_gives_each_mixed_image_as_a_weighted_sum(mode, switch_probability, count):
    if mode == "pair" and count % 2:
        return
    mixing, rng = Mixing(**{**OPTIONS, "mode": mode, "switch_probability": switch_probability}), np.random.default_rng(1)
    crops = flat_crops(count)
    for _ in range(20):
        mixed, matrix = mixing(crops, rng)
        assert matrix.shape == (3, count, count)
        assert matrix.dtype == torch.float32
        torch.testing.assert_close(matrix.sum(2), torch.ones(3, count))
        for v, crop in enumerate(crops):
            # flat images: the mean pixel of a mixture is the weighted sum, for mixup and for CutMix
            torch.testing.assert_close(mixed[v].mean((2, 3)), matrix[v] @ crop[:, :, 0, 0], rtol=1e-5, atol=1e-4)


def test_mixup_is_the_weighted_sum_of_every_pixel():
    crops = [torch.randn(4, 3, 6, 6) for _ in range(2)]
    mixed, matrix = Mixing(**{**OPTIONS, "cutmix_alpha": 0.0, "mode": "elem"})(crops, np.random.default_rng(0))
    for v in range(2):
        torch.testing.assert_close(mixed[v], torch.einsum("ij,jchw->ichw", matrix[v], crops[v]))


def test_cutmix_pastes_a_box_of_the_partner_and_keeps_the_rest_bit_for_bit():
    crops = [torch.randn(4, 3, 16, 16)]
    mixing, rng = Mixing(**{**OPTIONS, "mixup_alpha": 0.0}), np.random.default_rng(2)
    for _ in range(20):
        (mixed,), matrix = mixing(crops, rng)
        pasted = (mixed == crops[0].flip(0)).all(1) & ~(mixed == crops[0]).all(1)
        kept = (mixed == crops[0]).all(1)
        assert (pasted | kept).all()
        rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
        assert pasted[0].sum() == rows * columns  # a rectangle
        torch.testing.assert_close(matrix[0].diagonal(), kept.float().mean((1, 2)))


@pytest.mark.parametrize("mode", MODES)
def test_the_crops_handed_in_are_left_clean(mode):
    crops = flat_crops(4)
    before = [crop.clone() for crop in crops]
    mixed, _ = Mixing(**{**OPTIONS, "mode": mode})(crops, np.random.default_rng(0))
    assert all(crop.equal(copy) for crop, copy in zip(crops, before, strict=True))
    assert all(new.data_ptr() != crop.data_ptr() for new, crop in zip(mixed, crops, strict=True))


def test_crops_beyond_the_first_n_are_unmixed_with_the_identity():
    crops = flat_crops(4)
    mixed, matrix = Mixing(**{**OPTIONS, "crops": 1})(crops, np.random.default_rng(0))
    assert not mixed[0].equal(crops[0])
    for v in (1, 2):
        assert mixed[v].equal(crops[v])
        assert matrix[v].equal(torch.eye(4))


def test_modes_share_their_draw_as_they_say():
    crops, rng = flat_crops(6), np.random.default_rng(0)
    shares = {mode: Mixing(**{**OPTIONS, "mode": mode})(crops, rng)[1].diagonal(dim1=1, dim2=2) for mode in MODES}
    assert (shares["batch"] == shares["batch"][:, :1]).all()
    assert shares["batch"][0, 0] != shares["batch"][1, 0]  # every crop has a draw of its own
    assert shares["pair"].equal(shares["pair"].flip(1))
    assert len(set(shares["pair"][0].tolist())) == 3
    assert len(set(shares["elem"][0].tolist())) == 6


def test_elem_matrices_need_not_be_symmetric():
    matrix = Mixing(**{**OPTIONS, "mode": "elem", "switch_probability": 0.0})(flat_crops(4), np.random.default_rng(0))[1]
    assert not matrix[0].equal(matrix[0].T)


def test_probabilities_of_mixing_and_of_cutmix_are_kept():
    rng, draws = np.random.default_rng(0), 2000
    mixing = Mixing(**{**OPTIONS, "probability": 0.6, "switch_probability": 0.3, "mode": "elem"})
    crop = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 16, 16) + 1
    kinds = []
    for _ in range(draws // 2):
        (mixed,), _ = mixing([crop], rng)
        for image, own in zip(mixed, crop, strict=True):
            kinds.append("none" if image.equal(own) else "cutmix" if image.unique().numel() == 2 else "other")
    cut = kinds.count("cutmix") / draws  # whole-image and empty boxes are not seen as such: a few per cent of CutMix's draws
    other = kinds.count("other") / draws
    assert 0.6 * 0.3 * 0.85 - 0.04 < cut < 0.6 * 0.3 + 0.04
    assert 0.6 * 0.7 - 0.04 < other < 0.6 * 0.7 + 0.6 * 0.3 * 0.15 + 0.04


def test_shares_follow_their_beta_distribution():
    mixing, rng = Mixing(**{**OPTIONS, "cutmix_alpha": 0.0, "mode": "elem", "crops": 1}), np.random.default_rng(0)
    shares = torch.cat([mixing([torch.zeros(40, 1, 2, 2)], rng)[1][0].diagonal() for _ in range(50)])
    assert abs(shares.mean() - 0.5) < 0.03
    assert abs(shares.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # Beta(a, a) has variance 1 / (4 (2a + 1))


def test_boxes_by_minmax_lie_inside_with_sides_in_their_limits():
    """As timm: each side from int(smallest * length) up to, but not including, int(largest * length), whatever cutmix_alpha is."""
    mixing = Mixing(**{**OPTIONS, "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "cutmix_minmax": [0.2, 0.8], "mode": "elem"})
    crop, rng, sides = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 20, 30), np.random.default_rng(0), set()
    for _ in range(300):
        (mixed,), matrix = mixing([crop], rng)
        pasted = mixed[0, 0] == 1
        height, width = int(pasted.any(1).sum()), int(pasted.any(0).sum())
        assert pasted.sum() == height * width
        assert matrix[0, 0, 1] == pytest.approx(height * width / 600)
        sides.add((height, width))
    heights, widths = ({side[axis] for side in sides} for axis in (0, 1))
    assert heights == set(range(4, 16)) and widths == set(range(6, 24))


def test_an_odd_batch_in_pairs_is_refused():
    with pytest.raises(OptionError, match=r"^data\.batch_size: 5 images cannot be mixed in pairs; [^\n]+$"):
        Mixing(**{**OPTIONS, "mode": "pair"})(flat_crops(5), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mixup_alpha", -1),
        ("cutmix_alpha", -0.1),
        ("probability", 1.2),
        ("switch_probability", -1),
        ("mode", "row"),
        ("crops", -1),
        ("cutmix_minmax", [0.5]),
        ("cutmix_minmax", [0.8, 0.2]),
    ],
)
def test_an_impossible_value_is_one_line_that_names_the_option(option, value):
    with pytest.raises(OptionError, match=rf"^task\.mixing\.{option}: [^\n]+; [^\n]+$"):
        Mixing(**{**OPTIONS, option: value})


def test_mixing_with_nothing_to_mix_is_refused():
    with pytest.raises(OptionError, match="both mixup_alpha and cutmix_alpha are 0"):
        Mixing(**{**OPTIONS, "mixup_alpha": 0.0, "cutmix_alpha": 0.0})
