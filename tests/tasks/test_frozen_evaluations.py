"""What holds for every evaluation of frozen features: two processes give the numbers of one to the last digit, and a signal ends it."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esvit.errors import Stopped
from esvit.run_folder import RunFolder
from esvit.tasks.fewshot import FewShot
from esvit.tasks.knn import Knn
from esvit.tasks.logistic import Logistic
from esvit.tracking.base import NoTracking
from tests.tasks.colours import Task, evaluate, evaluate_in_ranks, frozen, images, one_process, paint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of colours that overlap."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 11)):
        colours = {
            name: [
                tuple(int(value) for value in rng.integers(0, [256 - 60 * (each == channel) for each in range(3)])) for _ in range(count)
            ]
            for channel, name in enumerate("abc")
        }
        paint(root / split, colours)
    return root


def tasks(folder: Path, cache: Path | None = None) -> dict[str, Task]:
    parts: dict[str, Any] = {"frozen": frozen(cache), "data": images(folder)}
    return {
        "knn": Knn(neighbours=[1, 5, 60], temperature=0.07, baselines=True, **parts),
        "logistic": Logistic(
            scaling="standardize", penalties=[1e-3, 0.1, 10.0], held_out=0.2, label_fraction=0.7, max_iterations=50, **parts
        ),
        "fewshot": FewShot(ways=3, shots=[1, 5], queries=5, episodes=7, classifier="nearest_mean", penalty=1.0, center=True, **parts),
    }


def test_two_processes_give_the_numbers_of_one(folder, tmp_path):
    alone = {name: evaluate(task, tmp_path / "alone" / name) for name, task in tasks(folder).items()}
    assert evaluate_in_ranks(lambda: tasks(folder), tmp_path, ranks=2) == alone


@pytest.mark.parametrize("name", ["knn", "logistic", "fewshot"])
def test_a_signal_after_the_features_were_made_stops_the_rest(name, folder, tmp_path):
    evaluate(tasks(folder, tmp_path / "cache")[name], tmp_path / "whole")
    with one_process() as runtime:
        runtime.records_to(RunFolder(tmp_path / "stopped"), tracking=NoTracking(host=None), config={"epochs": 1, "max_steps": None})
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped by SIGTERM, nothing measured"):
            tasks(folder, tmp_path / "cache")[name].run(runtime)
    assert not (tmp_path / "stopped" / "metrics.json").exists()
