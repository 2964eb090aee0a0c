"""task=logistic: planted colours, a penalty that has to be chosen, fewer labels, what it leaves, and mistakes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esvit.errors import OptionError
from esvit.evaluation.protocol import read_protocol
from esvit.tasks.logistic import Logistic
from tests.tasks.colours import evaluate, frozen, images, paint


def noisy(channel: int, count: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Grey, with 80 more in one channel, and noise."""
    return [tuple(int(value) for value in rng.normal([60 + 80 * (each == channel) for each in range(3)], 8)) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of 20 training and 4 validation images; one blue image is labelled red."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    paint(root / "train", {name: noisy(channel, 20, rng) for channel, name in enumerate(("a_red", "b_green", "c_blue"))})
    colours = {name: noisy(channel, 4, rng) for channel, name in enumerate(("a_red", "b_green", "c_blue"))}
    paint(root / "val", colours | {"a_red": [*colours["a_red"][:3], (60, 60, 140)]})
    return root


def logistic(folder: Path, **changes: Any) -> Logistic:
    options: dict[str, Any] = {
        "scaling": "standardize",
        "penalties": [1e-3, 0.1, 100.0],
        "held_out": 0.2,
        "label_fraction": 1.0,
        "max_iterations": 100,
        "frozen": frozen(),
        "data": images(folder),
    }
    return Logistic(**(options | changes))


@pytest.mark.parametrize("scaling", ["standardize", "unit_length"])
def test_every_image_but_the_mislabelled_one_is_right(scaling, folder, tmp_path):
    metrics = evaluate(logistic(folder, scaling=scaling), tmp_path / "run")
    assert metrics["logistic/top1"] == pytest.approx(1100 / 12)
    assert metrics["logistic/top5"] == 100
    assert metrics["logistic/held_out_top1"] == 100


def test_of_equally_good_penalties_the_largest_is_chosen(folder, tmp_path):
    """Planes through separate clusters are right whatever their slope, so even 100 is."""
    assert evaluate(logistic(folder), tmp_path / "run")["logistic/penalty"] == 100


def test_every_penalty_is_logged_with_its_held_out_accuracy(folder, tmp_path, capsys):
    evaluate(logistic(folder), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(record["step"], record["logistic/penalty"]) for record in records] == [(1, 1e-3), (2, 0.1), (3, 100)]
    assert all(record["logistic/held_out_top1"] == 100 for record in records)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:4]] == ["0.001", "0.1", "100"]
    assert "60 training images" in printed[4]
    assert "top-1 91.67 %" in printed[5]
    assert "the largest of task.penalties" in printed[6]


def test_a_single_penalty_is_used_without_holding_images_out(folder, tmp_path, capsys):
    metrics = evaluate(logistic(folder, penalties=[0.1]), tmp_path / "run")
    assert metrics == {"logistic/top1": pytest.approx(1100 / 12), "logistic/top5": 100, "logistic/penalty": 0.1}
    assert "held-out" not in capsys.readouterr().out


def test_a_fraction_of_the_labels_is_a_fraction_of_every_class(folder, tmp_path):
    assert evaluate(logistic(folder, label_fraction=0.1, held_out=0.5), tmp_path / "run")["logistic/top1"] == pytest.approx(1100 / 12)
    protocol = read_protocol(tmp_path / "run")
    assert protocol is not None
    assert (protocol["images"], protocol["label_fraction"], protocol["seed"]) == ({"train": 6, "validation": 12}, 0.1, 0)


def test_the_same_seed_gives_the_same_numbers(folder, tmp_path):
    options: dict[str, Any] = {"label_fraction": 0.5, "penalties": [1e-6, 1e-4]}
    assert evaluate(logistic(folder, **options), tmp_path / "one") == evaluate(logistic(folder, **options), tmp_path / "two")


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("task.penalties", {"penalties": []}),
        ("task.penalties", {"penalties": [0.1, 0.0]}),
        ("task.held_out", {"held_out": 1.0}),
        ("task.label_fraction", {"label_fraction": 0.0}),
        ("task.max_iterations", {"max_iterations": 0}),
    ],
)
def test_an_impossible_option_is_named_before_anything_is_written(option, changes, folder, tmp_path):
    with pytest.raises(OptionError, match=f"^{option}: "):
        evaluate(logistic(folder, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_penalty_cannot_be_chosen_by_classes_of_one_image(folder, tmp_path):
    with pytest.raises(OptionError, match=r"^task.held_out: .* no class has two of the 3 labelled training images"):
        evaluate(logistic(folder, label_fraction=0.01), tmp_path / "run")
    assert evaluate(logistic(folder, label_fraction=0.01, penalties=[0.1]), tmp_path / "other")["logistic/top1"] > 80
