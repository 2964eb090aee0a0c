"""Segmentation of regions: labels, votes, logits and intersection over union by hand, and masks cropped as their images are."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from esvit.augmentations.evaluation import EvaluationCrop
from esvit.data.masks import IGNORED
from esvit.evaluation.segmentation import (
    NeighbourVotes,
    confusion,
    crop_of_mask,
    enlarged,
    of_one_class,
    region_labels,
    sample,
    score,
    unfitted_linear,
)


def test_a_region_is_what_most_of_its_pixels_are():
    mask = torch.tensor(
        [
            [1, 1, 0, 2],
            [1, 0, 2, 0],  # equally many of 0 and 2 in the right region: the lower counts
            [-1, -1, 2, -1],
            [-1, 1, 2, -1],  # three of four pixels ignored: no label; half of them: still one
        ],
        dtype=torch.int16,
    )
    assert region_labels(mask[None], (2, 2), classes=3).tolist() == [[1, 0, IGNORED, 2]]


def test_pixels_belong_to_the_region_that_their_middle_is_in():
    """Five pixels in two regions: the third pixel's middle is where the second region begins."""
    mask = torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.int16)
    assert region_labels(mask[None], (1, 2), classes=2).tolist() == [[0, 1]]


def test_a_mask_is_cropped_where_its_image_is():
    """Every pixel's own number, so that nearest pixels can be told; at half the size the second of each two, whose middle is hit."""
    numbers = np.arange(12 * 16, dtype=np.int16).reshape(12, 16)
    assert np.array_equal(crop_of_mask(numbers, EvaluationCrop(resize=12, crop=8)), numbers[2:10, 4:12])
    assert np.array_equal(crop_of_mask(numbers, EvaluationCrop(resize=6, crop=6)), numbers[1::2, 3:15:2])


def test_mask_and_image_stay_together_at_every_size():
    """A black and white picture, whose own brightness is the mask."""
    truth = np.zeros((45, 61), dtype=np.uint8)
    truth[10:30, 20:40] = 1
    image = Image.fromarray(255 * truth).convert("RGB")
    for resize, crop in ((45, 40), (30, 24), (90, 64)):
        transform = EvaluationCrop(resize=resize, crop=crop)
        bright = transform(image)[0].numpy() > 127
        agreeing = (crop_of_mask(truth, transform).astype(bool) == bright).mean()
        assert agreeing > 0.98, (resize, crop)


def test_intersection_over_union_by_hand():
    """Class 2 is neither there nor predicted: it does not count."""
    truth = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, IGNORED])
    predicted = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0])
    counts = confusion(predicted, truth, classes=3)
    assert counts.tolist() == [[3, 1, 0], [2, 4, 0], [0, 0, 0]]
    found = score(counts)
    assert found.iou[:2] == pytest.approx([100 * 3 / 6, 100 * 4 / 7])
    assert math.isnan(found.iou[2])
    assert found.miou == pytest.approx((100 * 3 / 6 + 100 * 4 / 7) / 2)
    assert found.pixel_accuracy == pytest.approx(70)
    constant = score(of_one_class(counts))
    assert constant.iou[:2] == pytest.approx([0, 60])


def test_neighbours_vote_by_similarity():
    """Two of class 1 at a cosine of 0 against one of class 0 at a cosine of 1: e^(1/T) to 2."""
    votes = NeighbourVotes(
        features=torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]),
        labels=torch.tensor([0, 1, 1]),
        neighbours=3,
        temperature=1.0,
        classes=2,
        chunk_rows=1,
    )
    share = math.e / (math.e + 2)
    assert votes(torch.tensor([[5.0, 0, 0], [5.0, 0, 0]])).flatten().tolist() == pytest.approx(2 * [share, 1 - share])


def test_the_linear_classifier_tells_what_a_plane_divides():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 4, generator=generator) * torch.tensor([1.0, 1.0, 100.0, 0.0])  # one feature says nothing at all
    labels = (features[:, 0] > 0.3).long()
    linear = unfitted_linear(features, labels, classes=2, penalty=1e-6)
    linear.regression.advance(100)
    assert (linear(features).argmax(dim=1) == labels).float().mean() > 0.99


def test_scores_are_enlarged_bilinearly():
    """Between the middles of two regions, 1:0 and 0:3, the second class wins from a quarter of the way on."""
    scores = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
    assert enlarged(scores, (1, 2), 8)[0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_a_sample_is_drawn_by_its_seed_among_labelled_regions():
    labels = torch.arange(100) % 4 - 1
    some = sample(labels, 10, seed=0)
    assert len(some) == 10
    assert (labels[some] != IGNORED).all()
    assert some.equal(some.sort().values)
    assert some.equal(sample(labels, 10, seed=0))
    assert not some.equal(sample(labels, 10, seed=1))
    assert len(sample(labels, 1000, seed=0)) == 75
