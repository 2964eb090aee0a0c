"""task=fewshot: planted colours, numbers that do not depend on what else is asked for, what it leaves, and mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esvit.errors import OptionError
from esvit.evaluation.protocol import read_protocol
from esvit.tasks.fewshot import FewShot
from tests.tasks.colours import evaluate, frozen, images, paint

COLOURS = {"a_red": (200, 0, 0), "b_green": (0, 200, 0), "c_blue": (0, 0, 200), "d_grey": (130, 130, 130)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four classes of six validation images with little noise; a class without any, which no episode has."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    drawn = {
        name: [tuple(int(value) for value in np.clip(rng.normal(colour, 4), 0, 255)) for _ in range(6)] for name, colour in COLOURS.items()
    }
    paint(root / "train", {name: colours[:2] for name, colours in drawn.items()} | {"e_none": [(1, 2, 3)]})
    paint(root / "val", drawn)
    return root


def fewshot(folder: Path, **changes: Any) -> FewShot:
    options: dict[str, Any] = {
        "ways": 3,
        "shots": [1, 2],
        "queries": 4,
        "episodes": 10,
        "classifier": "nearest_mean",
        "penalty": 1.0,
        "center": True,
        "frozen": frozen(),
        "data": images(folder),
    }
    return FewShot(**(options | changes))


@pytest.mark.parametrize("classifier", ["nearest_mean", "logistic"])
def test_colours_far_apart_are_told_apart_by_one_image_each(classifier, folder, tmp_path, capsys):
    metrics = evaluate(fewshot(folder, classifier=classifier), tmp_path / "run")
    assert metrics == {
        "fewshot/3way_1shot": 100, "fewshot/3way_1shot_interval": 0, "fewshot/3way_2shot": 100, "fewshot/3way_2shot_interval": 0,
    }  # fmt: skip
    title, *rows, where = capsys.readouterr().out.splitlines()
    assert "mean over 10 episodes" in title
    assert where == f"results in {tmp_path / 'run'}"
    assert [row.split() for row in rows] == [["3-way", shots, "100.00", "+-", "0.00"] for shots in ("1-shot", "2-shot")]


def test_images_of_one_kind_are_told_apart_by_chance_alone(tmp_path):
    """Two classes of the same images: whichever of them a query is nearer to is right as often as wrong."""
    colours = [(10 * number, 250 - 12 * number, 40 + 9 * (number % 5)) for number in range(20)]
    paint(tmp_path / "images" / "train", {"a": colours, "b": colours})
    paint(tmp_path / "images" / "val", {"a": colours, "b": colours})
    metrics = evaluate(fewshot(tmp_path / "images", ways=2, shots=[1], queries=10, episodes=200), tmp_path / "run")
    assert metrics["fewshot/2way_1shot"] == pytest.approx(50, abs=2 * metrics["fewshot/2way_1shot_interval"])
    assert 0 < metrics["fewshot/2way_1shot_interval"] < 5


def test_one_accuracy_does_not_depend_on_the_others_asked_for(folder, tmp_path):
    options: dict[str, Any] = {"ways": 4, "queries": 2, "center": False}  # grey has no colour to compare by
    both = evaluate(fewshot(folder, shots=[1, 3], **options), tmp_path / "both")
    one = evaluate(fewshot(folder, shots=[1], **options), tmp_path / "one")
    assert one == {name: both[name] for name in one}


def test_the_protocol_pins_episodes_and_data(folder, tmp_path):
    evaluate(fewshot(folder, center=False), tmp_path / "run", seed=3)
    protocol = read_protocol(tmp_path / "run")
    assert protocol is not None
    assert (protocol["episodes"], protocol["seed"], protocol["penalty"], protocol["center"]) == (10, 3, None, False)
    assert protocol["data"]["train"] is None, "nothing of the training images was used"


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("task.ways", {"ways": 5}),
        ("task.ways", {"ways": 1}),
        ("task.shots", {"shots": [1, 3]}),
        ("task.shots", {"shots": []}),
        ("task.shots", {"shots": [0, 5]}),
        ("task.queries", {"queries": 0}),
        ("task.episodes", {"episodes": 1}),
        ("task.penalty", {"penalty": 0.0}),
    ],
)
def test_an_impossible_option_is_named_before_anything_is_written(option, changes, folder, tmp_path):
    with pytest.raises(OptionError, match=f"^{option}: "):
        evaluate(fewshot(folder, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_many_images_for_a_class_names_the_class_and_its_images(folder, tmp_path):
    with pytest.raises(OptionError, match="an episode takes 3 shots and 4 queries of a class, but 'a_red' has 6 validation images"):
        evaluate(fewshot(folder, shots=[3]), tmp_path / "run")
