"""Correspondence of regions: planted features with answers by hand, views whose true places can be seen, and stereo photos made for it."""

import numpy as np
import pytest
import torch
from PIL import Image

from esvit.augmentations.evaluation import EvaluationCrop
from esvit.data.folder import FolderImages
from esvit.errors import OptionError
from esvit.evaluation.correspondence import (
    Cells,
    CroppedViews,
    FlippedViews,
    Matches,
    PairDraws,
    Score,
    match,
    mirrored,
    most_similar,
    moved,
    scores,
    tally,
)
from esvit.evaluation.stereo import StereoPhotos, StereoViews, seen_from_the_right

CELLS = Cells((4, 4), 32)


def features(*, seed: int = 0) -> torch.Tensor:
    """(1, 4, 4, 64): all different."""
    return torch.randn(1, 4, 4, 64, generator=torch.Generator().manual_seed(seed))


def scored(one: torch.Tensor, two: torch.Tensor, points: torch.Tensor, *, pairs: int = 3) -> dict[str, Score]:
    matches = match(one.flatten(1, 2), two.flatten(1, 2))
    return scores(tally(matches, points[None], torch.ones(1).double(), CELLS, pairs=pairs))


def test_the_mirror_image_of_distinct_features_is_matched_perfectly():
    one = features()
    found = scored(one, one.flip(2), mirrored(CELLS.centres(), 32))
    assert {kind: score.pairs for kind, score in found.items()} == {"top": 3, "all": 16, "mutual": 16}
    for score in found.values():
        assert (score.accuracy, score.error_pixels) == (100, 0)
        assert score.similarity == pytest.approx(1)


def test_features_one_region_too_low_are_wrong_by_one_region():
    """The last of the four rows comes out on top, three regions off."""
    one = features()
    found = scored(one, one.flip(2).roll(1, dims=1), mirrored(CELLS.centres(), 32))["all"]
    assert found.within == [0, 75, 75, 100]
    assert found.error_pixels == pytest.approx((3 * 8 + 24) / 4)


def test_an_error_across_a_corner_is_its_length():
    one = features()
    found = scored(one, one.roll((1, 1), dims=(1, 2)), CELLS.centres())["all"]
    assert found.within[1] == 0
    assert found.within[2] == pytest.approx(100 * 9 / 16)  # but for the 7 regions that came out on the other side


def test_regions_choose_each_other_or_not():
    """Both regions of the first view find region 1 of the second, which prefers the second of them."""
    one = torch.tensor([[[1.0, 0.2], [0.0, 1.0]]])
    two = torch.tensor([[[-1.0, 0.0], [0.1, 1.0]]])
    matches = match(one, two)
    assert matches.best.tolist() == [[1, 1]]
    assert matches.mutual.tolist() == [[False, True]]


def test_the_most_similar_pairs_are_taken_among_those_whose_place_is_known():
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.8]])
    known = torch.tensor([[False, True, True, True]])
    assert most_similar(similarity, known, 1).tolist() == [[False, True, False, False]]  # the first of equals
    assert most_similar(similarity, known, 2).tolist() == [[False, True, False, True]]
    assert most_similar(similarity, known, 9).tolist() == [[False, True, True, True]]


def test_what_is_not_in_the_second_view_counts_nowhere():
    points = torch.full((16, 2), torch.nan, dtype=torch.float64)
    points[5] = CELLS.centres()[5]
    found = scored(features(), features(), points)
    assert [score.pairs for score in found.values()] == [1, 1, 1]
    points[5, 0] = 32.0
    found = scored(features(), features(), points)
    assert [score.pairs for score in found.values()] == [0, 0, 0]
    assert np.isnan(found["all"].accuracy)


def test_tallies_of_images_add_up():
    one, points = torch.cat([features(seed=seed) for seed in range(3)]), CELLS.centres().expand(3, -1, -1)
    two = one + 2 * torch.randn(one.shape, generator=torch.Generator().manual_seed(9))
    both = [tensor.flatten(1, 2) for tensor in (one, two)]
    together = tally(match(*both), points, torch.ones(3).double(), CELLS, pairs=3)
    alone = [tally(match(*(each[i : i + 1] for each in both)), points[i : i + 1], torch.ones(1).double(), CELLS, pairs=3) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone))
    assert 0 < scores(together)["all"].accuracy < 100


def test_cells_are_numbered_row_by_row():
    cells = Cells((2, 3), 12)
    assert cells.centres().tolist() == [[2, 3], [6, 3], [10, 3], [2, 9], [6, 9], [10, 9]]
    assert cells.places(torch.tensor([1, 5])).tolist() == [[1, 0], [2, 1]]
    assert cells.containing(torch.tensor([[3.9, 6.0]]).double()).tolist() == [[0, 1]]


def test_a_place_moves_with_the_area_that_is_cut_out():
    points = torch.tensor([[0.0, 0.0], [16.0, 8.0]]).double()
    left_half, whole = (0, 0, 50, 100), (0, 0, 100, 100)
    assert moved(points, whole, left_half, 32).tolist() == [[0, 0], [32, 8]]
    assert moved(points, left_half, whole, 32).tolist() == [[0, 0], [8, 8]]


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> FolderImages:
    """Three pictures whose red is four times x and whose green is four times y, 60 pixels wide and 50 high."""
    root = tmp_path_factory.mktemp("gradients")
    y, x = np.mgrid[0:50, 0:60]
    for number in range(3):
        Image.fromarray(np.stack([4 * x, 4 * y, 0 * x + number], axis=2).astype(np.uint8)).save(root / f"{number}.png")
    return FolderImages(str(root), option="data.root", class_names=None)


def test_the_true_places_of_cropped_views_show_the_same_colour(gradients):
    side, seen, mirrored_views = 32, 0, 0
    for seed in range(6):
        pair = CroppedViews(gradients, Cells((8, 8), side), (0.3, 0.8), photometric=False, seed=seed)(0)
        mirrored_views += bool(pair.two[0, 0, 0] > pair.two[0, 0, -1])
        for (x, y), (x_there, y_there) in zip(Cells((8, 8), side).centres().tolist(), pair.points.tolist(), strict=True):
            if not np.isnan(x_there):
                here = pair.one[:2, int(y), int(x)].int()
                there = pair.two[:2, min(int(y_there), side - 1), min(int(x_there), side - 1)].int()
                assert (here - there).abs().max() <= 12  # a pixel of a view is up to two of the picture
                seen += 1
    assert 50 < seen < 6 * 64  # some places are outside of the second view
    assert 0 < mirrored_views < 6


def test_views_depend_on_the_seed_and_the_image_alone(gradients):
    def views(seed: int, numbers: list[int]) -> torch.Tensor:
        draw = CroppedViews(gradients, CELLS, (0.3, 0.8), photometric=True, seed=seed)
        return PairDraws(draw, np.arange(3), gradients.name).__getitems__(numbers).two

    together = views(0, [0, 1, 2])
    assert views(0, [2]).equal(together[2:])
    assert not views(1, [2]).equal(together[2:])
    assert not together[1].equal(together[2])


def test_the_published_second_view_is_the_mirror_image_in_grey(gradients):
    transform = EvaluationCrop(resize=50, crop=32)
    plain = FlippedViews(gradients, transform, CELLS, photometric=False, seed=0)(0)
    assert plain.two.equal(plain.one.flip(2))
    grey = FlippedViews(gradients, transform, CELLS, photometric=True, seed=0)(0).two
    assert grey[0].equal(grey[1]) and grey[0].equal(grey[2])


def test_unreadable_images_are_named_and_left_out(gradients, tmp_path):
    for number in range(2):
        gradients.read(number).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"damaged")
    images = FolderImages(str(tmp_path), option="data.root", class_names=None)
    pairs = PairDraws(FlippedViews(images, EvaluationCrop(resize=32, crop=32), CELLS, False, 0), np.arange(2), images.name)
    assert pairs.__getitems__([0, 1]).bad == ["1.png"]
    assert len(pairs.__getitems__([0, 1])) == 1
    assert len(pairs.__getitems__([1])) == 0


SHIFT = 8


@pytest.fixture
def stereo(tmp_path):
    """A left photo 64 pixels wide and 48 high, everything in the right one 8 pixels farther left."""
    scene = np.random.default_rng(0).integers(0, 256, (48, 64 + SHIFT, 3), dtype=np.uint8)
    for part in ("left", "right", "disparity"):
        (tmp_path / part).mkdir()
    Image.fromarray(scene[:, :64]).save(tmp_path / "left" / "a.png")
    Image.fromarray(scene[:, SHIFT:]).save(tmp_path / "right" / "a.png")
    np.save(tmp_path / "disparity" / "a.npy", np.full((48, 64), float(SHIFT)))
    return tmp_path


def test_disparity_says_where_a_region_is_in_the_right_photo(stereo):
    photos = StereoPhotos(str(stereo), option="data.root")
    cells = Cells((6, 6), 48)
    pair = StereoViews(photos, EvaluationCrop(resize=48, crop=48), cells)(0)
    assert pair.two[:, :, 0:40].equal(pair.one[:, :, SHIFT:])
    points = pair.points.view(6, 6, 2)
    assert points[0].tolist()[1:] == [[4, 4], [12, 4], [20, 4], [28, 4], [36, 4]]
    assert points[:, 0].isnan().all()  # left of the right photo's crop


def test_places_and_disparity_errors_are_those_of_the_resized_photo(stereo):
    photos = StereoPhotos(str(stereo), option="data.root")
    cells = Cells((3, 3), 24)
    pair = StereoViews(photos, EvaluationCrop(resize=24, crop=24), cells)(0)
    assert pair.scale == 0.5
    assert pair.points[1].tolist() == [12 - SHIFT / 2, 4]
    true_regions = Matches(torch.tensor([[0, 0, 1, 3, 3, 4, 6, 6, 7]]), torch.ones(1, 9), torch.ones(1, 9, dtype=torch.bool))
    score = scores(tally(true_regions, pair.points[None], torch.tensor([pair.scale]).double(), cells, pairs=1))["all"]
    # a place halfway between two regions belongs to the right one, 4 pixels from its middle, 8 of the photo's
    assert score.disparity_error_of_true_region == pytest.approx(8)
    assert score.disparity_error == pytest.approx(8)


def test_a_16_bit_png_says_the_same_as_an_array(stereo):
    array = StereoPhotos(str(stereo), option="data.root").read(0)[2]
    (stereo / "disparity" / "a.npy").unlink()
    numbers = np.full((48, 64), SHIFT * 256, dtype=np.uint16)
    numbers[0, 0] = 0
    Image.fromarray(numbers).save(stereo / "disparity" / "a.png")
    png = StereoPhotos(str(stereo), option="data.root").read(0)[2]
    assert np.isnan(png[0, 0])
    assert np.array_equal(png[1:], array[1:])


def test_a_point_behind_another_is_not_seen_from_the_right():
    """Columns 0 to 5 land on: outside, unknown, 1, 0, 1 (nearer than what was there), 4."""
    disparity = np.array([[1.0, np.nan, 1.0, 3.0, 3.0, 1.0]])
    assert seen_from_the_right(disparity).tolist() == [[False, False, False, True, True, True]]


def test_regions_that_the_right_camera_does_not_see_have_no_true_place(stereo):
    """The upper half of the left photo's columns 24 to 31 is hidden by what is 16 pixels nearer, farther right."""
    disparity = np.full((48, 64), float(SHIFT))
    disparity[:24, 40:48] = SHIFT + 16.0
    np.save(stereo / "disparity" / "a.npy", disparity)
    cells = Cells((6, 6), 48)
    points = StereoViews(StereoPhotos(str(stereo), option="data.root"), EvaluationCrop(resize=48, crop=48), cells)(0).points.view(6, 6, 2)
    assert points[:3, 2].isnan().all()  # the crop begins at column 8
    assert points[3:, 2, 0].tolist() == [12, 12, 12]
    assert points[:3, 4, 0].tolist() == [12, 12, 12]


def test_a_missing_or_ill_fitting_stereo_file_is_named(stereo):
    np.save(stereo / "disparity" / "a.npy", np.zeros((4, 4)))
    with pytest.raises(OptionError, match=r"^data\.root: the files 'a' differ in width and height"):
        StereoPhotos(str(stereo), option="data.root").read(0)
    (stereo / "right" / "a.png").unlink()
    with pytest.raises(OptionError, match=r"^data\.root: 1 of 1 left photos have no file in '.*right', 'a' for one"):
        StereoPhotos(str(stereo), option="data.root")
    with pytest.raises(OptionError, match=r"^data\.root: folder '.*left/left' does not exist"):
        StereoPhotos(str(stereo / "left"), option="data.root")
