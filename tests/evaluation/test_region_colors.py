"""Colours of regions, on planted features."""

import torch

from esvit.evaluation.region_colors import color_map, principal_components

AXES = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q


def planted(count: int = 200) -> torch.Tensor:
    """(count, 5): uncorrelated along AXES, with variances near 16, 9, 4, 1 and 0."""
    generator = torch.Generator().manual_seed(1)
    along = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    along = torch.linalg.qr(along - along.mean(dim=0)).Q * count**0.5
    return along * torch.tensor([4.0, 3, 2, 1, 0], dtype=torch.float64) @ AXES.T + 7


def test_components_are_the_directions_of_largest_variance() -> None:
    found = principal_components(planted())
    torch.testing.assert_close((found.axes * AXES[:, :3]).sum(dim=0).abs(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found.shares, torch.tensor([16, 9, 4], dtype=torch.float64) / 30)
    torch.testing.assert_close(found.mean, torch.full((5,), 7, dtype=torch.float64))


def test_signs_do_not_depend_on_the_order_of_the_regions() -> None:
    features = planted()
    found, again = principal_components(features), principal_components(features.flip(0))
    torch.testing.assert_close(found.axes, again.axes)
    assert (found.axes.gather(0, found.axes.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_like_regions_of_different_images_have_like_colours() -> None:
    red, blue = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0, 1.0, 1])
    one, two = torch.stack([red, red, blue, blue]).view(2, 2, 4), torch.stack([blue, red, red, red]).view(2, 2, 4)
    colors = color_map([one, two], only_foreground=False)
    first, second = colors.colors(one), colors.colors(two)
    assert torch.equal(first[0, 0], second[1, 1]) and torch.equal(first[1, 1], second[0, 0])
    assert (first[0, 0] - first[1, 1]).abs().max() > 0.9
    assert first.min() >= 0 and first.max() <= 1


def test_the_foreground_is_the_side_that_the_borders_are_not_on() -> None:
    """A square of one kind, of two halves, in the middle of another kind; both ways round."""
    for sign in (1, -1):
        regions = torch.zeros(6, 6, 4)
        regions[..., 0] = -sign
        regions[2:4, 2:4, 0] = sign
        regions[2:4, 3, 1] = 0.1
        colors = color_map([regions], only_foreground=True).colors(regions)
        background = colors.isnan().any(dim=2)
        assert background.sum() == 32 and not background[2:4, 2:4].any()
        assert (colors[2, 2] - colors[2, 3]).abs().max() > 0.9  # the background's variance has no say in the colours
