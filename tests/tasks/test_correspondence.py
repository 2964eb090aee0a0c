"""task=correspondence: pictures of patches whose matches are known, the same numbers however it is run, what it leaves, and mistakes."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from esvit.errors import OptionError
from esvit.evaluation.protocol import protocol_differences, read_protocol
from esvit.tasks.correspondence import Correspondence
from tests.tasks.colours import evaluate, frozen, images
from tests.tasks.patches import PatchColours, colours, of_patches


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Seven validation images of 4 x 4 patches; neither split has labels."""
    root = tmp_path_factory.mktemp("patches")
    for split, count in (("train", 1), ("val", 7)):
        (root / split).mkdir()
        for number in range(count):
            of_patches(colours(number)).save(root / split / f"{number}.png")
    return root


def correspondence(folder: Path, **changes: Any) -> Correspondence:
    options: dict[str, Any] = {
        "views": "flip",
        "pairs": 5,
        "photometric": False,
        "crops_scale": [0.3, 1.0],
        "max_images": None,
        "pictures": 0,
        "frozen": frozen(backbone=PatchColours(), resize=16, crop=16),
        "data": images(folder),
    }
    return Correspondence(**(options | changes))


def test_distinct_patches_find_themselves_in_the_mirror_image(folder, tmp_path):
    metrics = evaluate(correspondence(folder), tmp_path / "run")
    assert metrics["correspondence/images"] == 7
    for kind, pairs in (("", 35), ("all_", 112), ("mutual_", 112)):
        assert metrics[f"correspondence/{kind}pairs"] == pairs
        assert metrics[f"correspondence/{kind}accuracy"] == metrics[f"correspondence/{kind}within_1"] == 100
        assert metrics[f"correspondence/{kind}error_pixels"] == 0
    assert metrics["correspondence/mutual_share"] == 100
    assert metrics["correspondence/similarity"] == pytest.approx(1)


def test_grey_views_are_hardly_found_by_their_colour(folder, tmp_path):
    metrics = evaluate(correspondence(folder, photometric=True), tmp_path / "run")
    assert metrics["correspondence/all_accuracy"] < 50
    assert metrics["correspondence/all_accuracy"] <= metrics["correspondence/all_within_1"] <= metrics["correspondence/all_within_2"]


def test_loading_processes_and_batches_change_nothing(folder, tmp_path):
    data = images(folder)
    data.workers, data.batch_size = 2, 3
    ours = evaluate(correspondence(folder, views="crops", photometric=True, data=data), tmp_path / "ours")
    theirs = evaluate(correspondence(folder, views="crops", photometric=True), tmp_path / "theirs")
    assert ours == theirs
    assert 0 < ours["correspondence/all_pairs"] < 7 * 16


def test_other_seeds_cut_out_other_views(folder, tmp_path):
    ours, theirs = (evaluate(correspondence(folder, views="crops"), tmp_path / f"{seed}", seed=seed) for seed in (0, 1))
    assert ours["correspondence/all_pairs"] != theirs["correspondence/all_pairs"]


def test_some_images_are_evenly_spaced_and_have_the_views_that_they_always_have(folder, tmp_path):
    metrics = evaluate(correspondence(folder, max_images=3), tmp_path / "run")
    assert metrics["correspondence/images"] == 3


def test_stereo_photos_are_judged_by_their_disparity(tmp_path):
    """Everything is one patch farther left in the right photo; the first column has no place there."""
    scene = np.concatenate([colours(0), colours(1)[:, :1]], axis=1)
    for part, picture in (("left", of_patches(scene[:, :4])), ("right", of_patches(scene[:, 1:]))):
        (tmp_path / "stereo" / part).mkdir(parents=True)
        picture.save(tmp_path / "stereo" / part / "a.png")
    (tmp_path / "stereo" / "disparity").mkdir()
    Image.fromarray(np.full((16, 16), 4 * 256, dtype=np.uint16)).save(tmp_path / "stereo" / "disparity" / "a.png")
    data = images(tmp_path)
    data.root, data.val_root = str(tmp_path / "stereo"), None
    metrics = evaluate(correspondence(tmp_path, views="stereo", data=data), tmp_path / "run")
    assert metrics["correspondence/all_pairs"] == 12
    for name, value in {"accuracy": 100, "error_pixels": 0, "disparity_error": 0, "disparity_error_of_true_region": 0}.items():
        assert metrics[f"correspondence/all_{name}"] == value


def test_curves_pictures_and_a_table_are_left(folder, tmp_path, capsys):
    evaluate(correspondence(folder, pictures=2), tmp_path / "run")
    rows = list(csv.reader((tmp_path / "run" / "offsets.csv").open()))
    assert rows[:2] == [["cells", "pixels", "top", "all", "mutual"], ["0", "0", "100.0000", "100.0000", "100.0000"]]
    assert len(rows) == 1 + 4
    for name in ("offsets.png", "pairs.png"):
        Image.open(tmp_path / "run" / name).verify()
    printed = capsys.readouterr().out
    assert "7 pairs of views, 4 x 4 regions of 4 pixels" in printed
    assert [line.split("  ")[0] for line in printed.splitlines()[2:]] == ["5 most similar", "all regions", "mutual nearest"]
    artifacts = set(json.loads((tmp_path / "run" / "tracking.json").read_text())["artifacts"])
    assert {"protocol.json", "metrics.json", "offsets.csv", "offsets.png", "pairs.png"} <= artifacts


def test_the_protocol_pins_what_changes_the_numbers(folder, tmp_path):
    for name, changes in {"one": {"pictures": 1}, "two": {}, "three": {"views": "crops", "pairs": 3}}.items():
        evaluate(correspondence(folder, **changes), tmp_path / name)
    one, two, three = (read_protocol(tmp_path / name) or {} for name in ("one", "two", "three"))
    assert not protocol_differences(one, two)
    assert set(protocol_differences(one, three)) == {"views", "pairs", "crops_scale"}
    assert not (tmp_path / "two" / "pairs.png").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pairs": 0}, "task.pairs: 0"),
        ({"pairs": 17}, "task.pairs: 17 pairs, but a view of 16 pixels has 16 regions"),
        ({"crops_scale": [0.5]}, "task.crops_scale: "),
        ({"crops_scale": [0.5, 0.1]}, "task.crops_scale: "),
        ({"max_images": 0}, "task.max_images: 0"),
        ({"pictures": -1}, "task.pictures: -1"),
        ({"views": "stereo"}, "data.val_root: folder '.*left' does not exist"),
    ],
)
def test_an_impossible_option_is_named_before_anything_is_written(folder, tmp_path, changes, problem):
    with pytest.raises(OptionError, match=f"^{problem}"):
        evaluate(correspondence(folder, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
