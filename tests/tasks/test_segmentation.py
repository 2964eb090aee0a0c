"""task=segmentation: objects that their colour gives away, the same numbers for two processes, what it leaves, and mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from esvit.errors import OptionError
from esvit.evaluation.protocol import protocol_differences, read_protocol
from esvit.tasks.segmentation import Segmentation
from tests.tasks.colours import Task, evaluate, evaluate_in_ranks, frozen, images
from tests.tasks.patches import PatchColours, write_masked
from tests.tasks.test_correspondence import correspondence


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_masked(tmp_path_factory.mktemp("masked"), train=6, val=5)


def segmentation(folder: Path, **changes: Any) -> Segmentation:
    options: dict[str, Any] = {
        "masks": str(folder / "masks"),
        "val_masks": None,
        "classes": None,
        "class_names": ["background", "object"],
        "mask_values": [0, 255],
        "ignore": None,
        "train_regions": 1000,
        "neighbours": 3,
        "temperature": 0.07,
        "penalty": 1e-4,
        "iterations": 50,
        "pictures": 0,
        "frozen": frozen(backbone=PatchColours(), resize=16, crop=16),
        "data": images(folder / "images"),
    }
    return Segmentation(**(options | changes))


@pytest.fixture(scope="module")
def metrics(folder, tmp_path_factory) -> dict[str, float]:
    return evaluate(segmentation(folder), tmp_path_factory.mktemp("run"))


def test_regions_that_differ_in_colour_are_told_apart(metrics):
    for name in ("knn", "linear"):
        assert metrics[f"segmentation/{name}_region_miou"] == 100


def test_no_more_than_the_edges_between_regions_is_lost_to_their_size(metrics):
    """Pixels are enlarged bilinearly, which rounds corners: as good as regions can be is what the k-NN's votes come to here."""
    assert 80 < metrics["segmentation/true_regions_miou"] < 100
    assert metrics["segmentation/knn_miou"] == pytest.approx(metrics["segmentation/true_regions_miou"], abs=0.01)
    assert metrics["segmentation/linear_miou"] == pytest.approx(metrics["segmentation/true_regions_miou"], abs=10)
    assert metrics["segmentation/constant_miou"] < 50
    of_classes = [metrics[f"segmentation/knn_iou_{name}"] for name in ("background", "object")]
    assert sum(of_classes) / 2 == pytest.approx(metrics["segmentation/knn_miou"])


def test_two_processes_and_loading_processes_give_the_numbers_of_one(folder, tmp_path, metrics):
    """Correspondence in the same pair of processes, for its cost."""
    matched = {"views": "crops", "pairs": 5, "photometric": True, "data": images(folder / "images")}

    def tasks() -> dict[str, Task]:
        data = images(folder / "images")
        data.workers = 1
        return {"segmentation": segmentation(folder, data=data), "correspondence": correspondence(folder, **matched)}

    alone = {"segmentation": metrics, "correspondence": evaluate(correspondence(folder, **matched), tmp_path / "alone")}
    assert evaluate_in_ranks(tasks, tmp_path, ranks=2) == alone


def test_fewer_regions_to_learn_from_are_drawn_by_the_seed(folder, tmp_path):
    results = [evaluate(segmentation(folder, train_regions=4, neighbours=1), tmp_path / name, seed=0) for name in ("a", "b")]
    assert results[0] == results[1]


def test_a_picture_a_table_and_the_protocol_are_left(folder, tmp_path, capsys):
    for name, changes in {"one": {"pictures": 2}, "other": {"train_regions": 50}}.items():
        evaluate(segmentation(folder, **changes), tmp_path / name)
    Image.open(tmp_path / "one" / "segmentation.png").verify()
    assert not (tmp_path / "other" / "segmentation.png").exists()
    artifacts = set(json.loads((tmp_path / "one" / "tracking.json").read_text())["artifacts"])
    assert {"protocol.json", "metrics.json", "segmentation.png"} <= artifacts
    one, other = (read_protocol(tmp_path / name) or {} for name in ("one", "other"))
    assert one["images"] == {"train": 6, "validation": 5}
    assert sum(one["masks"]["validation_pixels"]) == 5 * 16 * 16
    assert set(protocol_differences(one, other)) == {"train_regions"}
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert "5 validation images, 4 x 4 regions each, learned from 96 regions of 6 training images" in title
    assert [row.split("  ")[0] for row in rows[:4]] == ["k-NN, k=3", "linear", "true classes of the regions", "commonest class everywhere"]
    assert [row.split()[0] for row in rows[5:7]] == ["background", "object"]


def test_an_image_that_cannot_be_read_is_as_if_it_were_not_there(folder, tmp_path):
    for name in ("damaged", "without"):
        shutil.copytree(folder, tmp_path / name)
    for place in ("train/scene/2", "val/scene/1"):
        (tmp_path / "damaged" / "images" / f"{place}.png").write_bytes(b"damaged")
        (tmp_path / "without" / "images" / f"{place}.png").unlink()
    damaged, without = (evaluate(segmentation(tmp_path / name), tmp_path / f"run_{name}") for name in ("damaged", "without"))
    assert damaged == without


def test_ignored_pixels_count_nowhere(folder, tmp_path):
    """Only the objects are left: whatever is called an object is right."""
    ignoring = {"class_names": ["object", "other"], "mask_values": [255, 7], "ignore": 0}
    metrics = evaluate(segmentation(folder, **ignoring), tmp_path / "run")
    assert metrics["segmentation/knn_iou_object"] == 100
    assert metrics["segmentation/knn_iou_other"] == "NaN"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"masks": None}, "task.masks: has no value"),
        ({"masks": "nowhere"}, "task.masks: folder 'nowhere' does not exist"),
        ({"val_masks": "nowhere"}, "task.val_masks: folder 'nowhere' does not exist"),
        ({"classes": 3}, "task.class_names: 2 classes, but task.classes says 3"),
        ({"mask_values": [0, 0]}, "task.mask_values: .* holds a number twice"),
        ({"mask_values": [0, -1]}, "task.mask_values: "),
        ({"ignore": 255}, "task.ignore: 255 is the number of a class too"),
        ({"class_names": None, "mask_values": None}, "task.classes: has no value"),
        ({"class_names": ["a"], "mask_values": [0]}, "task.class_names: 1 class"),
        ({"class_names": ["a", "a"]}, "task.class_names: .* holds a name twice"),
        ({"neighbours": 2000}, "task.neighbours: "),
        ({"temperature": 0.0}, "task.temperature: "),
        ({"penalty": -1.0}, "task.penalty: "),
    ],
)
def test_an_impossible_option_is_named_before_anything_is_written(folder, tmp_path, changes, problem):
    with pytest.raises(OptionError, match=f"^{problem}"):
        evaluate(segmentation(folder, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_masks_without_the_folders_train_and_val_need_two_options(folder, tmp_path):
    with pytest.raises(OptionError, match=r"^task\.masks: '.*' has no folders train and val; give task\.val_masks too"):
        evaluate(segmentation(folder, masks=str(folder / "masks" / "train")), tmp_path / "run")
    both = {"masks": str(folder / "masks" / "train"), "val_masks": str(folder / "masks" / "val")}
    assert evaluate(segmentation(folder, **both), tmp_path / "run")["segmentation/knn_region_miou"] == 100
