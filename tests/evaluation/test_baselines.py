"""Trivial features of planted images."""

import torch

from esvit.evaluation.baselines import color_histogram, raw_pixels


def test_histogram_of_one_colour_has_one_cell() -> None:
    image = torch.tensor([255, 0, 40], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 4, 6)
    histogram = color_histogram(image)
    assert histogram.shape == (1, 512)
    assert histogram[0, (7 * 8 + 0) * 8 + 1] == 1 and histogram.sum() == 1


def test_histogram_is_the_root_of_shares_and_blind_to_places() -> None:
    images = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    histogram = color_histogram(images)
    torch.testing.assert_close(histogram.square().sum(dim=1), torch.ones(3))
    torch.testing.assert_close(color_histogram(images.flip(2, 3)), histogram)


def test_raw_pixels_keep_places_and_forget_brightness() -> None:
    images = torch.randint(0, 200, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert raw_pixels(images).shape == (2, 48)
    torch.testing.assert_close(raw_pixels(images + 50), raw_pixels(images))
    assert not torch.allclose(raw_pixels(images.flip(3)), raw_pixels(images))
