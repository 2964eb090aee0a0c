"""A pre-training of 2 nodes x 2 ranks that is preempted and then requeued without a word ends as if nothing had been.

The only test of the suite that imports torch in ranks: four imports at once take most of a minute on two cores, once per attempt.
"""

import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line.commands import TINY, assert_same_training, environment
from tests.data.pictures import write_classes
from tests.slurm.cluster import ROOT, Cluster, state, steps, wait_for_state, wait_until

STEPS = 24


def submit_or_run(tmp_path: Path, name: str, *arguments: str) -> str:
    """What the command printed."""
    shared = (*TINY, "data.batch_size=1", "data.workers=1", "epochs=12", "checkpoint_every=5", f"data.root={tmp_path / 'images' / 'train'}")
    tracking = ("tracking=mlflow", f"tracking.uri=sqlite:///{tmp_path / name}.db")
    command = [sys.executable, str(ROOT / "run.py"), *shared, *tracking, f"output_dir={tmp_path / name}", *arguments]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("cluster")
def test_a_training_that_was_preempted_and_requeued_equals_one_that_was_not(cluster: Cluster, tmp_path):
    on_slurm = ("launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=0", "launcher.tasks_per_node=2", "launcher.cpus_per_task=1")
    folder = tmp_path / "interrupted"
    write_classes(tmp_path / "images" / "train", {"cat": 4, "dog": 4})
    printed = submit_or_run(tmp_path, "interrupted", *on_slurm, "launcher.memory=3G")
    assert not state(folder).has_finished
    job_id = str(state(folder).entry.id)
    assert f"job {job_id} (2 x 2 processes)" in printed
    assert f"python -m launchers cancel {folder.relative_to(tmp_path)}" in printed

    wait_until(lambda: len(steps(folder)) >= 3, "three steps")
    cluster.occupy(seconds=0)
    cluster.nudge(job_id)
    wait_until(lambda: state(folder).restarts == 1 and len(steps(folder)) >= 12, "twelve steps")
    cluster.requeue(job_id)
    cluster.nudge(job_id)
    wait_until(lambda: state(folder).restarts == 2, "the third attempt")
    submit_or_run(tmp_path, "uninterrupted", "launcher=gpus", "launcher.processes=4")
    ended = wait_for_state(folder, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    assert (ended.state, ended.restarts, ended.step) == ("COMPLETED", 2, STEPS), ended

    first, second, _ = printed_steps(folder)
    assert first + second == list(range(1, second[-1] + 1))  # it was preempted between two steps, and went on with the next
    assert_same_training(folder, tmp_path / "uninterrupted")
    assert points(tmp_path / "interrupted.db") == [(step, 1) for step in range(1, STEPS + 1)]
    assert list(folder.glob("errors/*")) == []


def printed_steps(folder: Path) -> list[list[int]]:
    """The steps that each attempt told of."""
    (log,) = (folder / "launch").glob("*_0_log.out")
    attempts = log.read_text().split("---- job ")[1:]
    return [[int(number) for number in re.findall(r"^step (\d+)/", attempt, re.MULTILINE)] for attempt in attempts]


def points(database: Path) -> list[tuple[int, int]]:
    """Each step of the loss in the MLflow store, and how often it is there, over all runs."""
    with sqlite3.connect(database) as connection:
        return connection.execute("SELECT step, COUNT(*) FROM metrics WHERE key = 'loss/total' GROUP BY step ORDER BY step").fetchall()
