"""Sweeps on this machine: so many children at once, failures, what follows a child, and the command line that looks after them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launchers import children
from launchers.gpus import Gpus
from launchers.job import Job
from launchers.local import Local
from launchers.status import states

ROOT = Path(__file__).parents[2]


def job(function: str, folder: Path, **config) -> Job:
    return Job(function=f"tests.launchers.jobs:{function}", config={"folder": str(folder), **config}, folder=str(folder), root=str(ROOT))


def launchers(command: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`python -m launchers COMMAND FOLDER`."""
    return subprocess.run([sys.executable, "-m", "launchers", command, str(folder), *options], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Children of Local are one rank each; the tests' jobs ask for their rank."""
    for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANK", "0")


def test_children_run_two_at_once_and_one_that_fails_stops_no_other(tmp_path, capsys):
    """Then what failed is mended and retried, from the command line."""
    sweep = tmp_path / "sweep"
    folders = [sweep / name for name in "abcd"]
    for folder in folders:
        (folder / "knn").mkdir(parents=True)
        if folder.name != "b":
            (folder / "mended").touch()
    with pytest.raises(SystemExit) as end:
        Local(parallel=2).launch_array(
            [job("fail_once", folder) for folder in folders],
            names=list("abcd"),
            folder=sweep,
            then=[[job("tell", folder / "knn")] for folder in folders],
        )
    assert end.value.code == f"error: 1 of 4 failed; python -m launchers retry-failed {sweep} starts them again"
    found = {each.entry.name: each for each in states(sweep)}
    assert {name: each.state for name, each in found.items()} == {
        **{name: "COMPLETED" for name in ("a", "c", "d", "a.knn", "c.knn", "d.knn")},
        "b": "FAILED",
        "b.knn": "CANCELLED",
    }
    assert "RuntimeError: not mended yet" in str(found["b"].error)
    assert "b      " in capsys.readouterr().out
    pids = {json.loads((folder / "told_0.json").read_text())["pid"] for folder in folders if folder.name != "b"}
    assert len(pids) == 3 and os.getpid() not in pids

    assert "not mended yet" in launchers("status", folders[1]).stdout
    assert "not mended yet" in launchers("logs", folders[1]).stdout
    (folders[1] / "mended").touch()
    retried = launchers("retry-failed", sweep)
    assert retried.returncode == 0, retried.stderr
    assert all(each.has_finished for each in states(sweep))
    assert (folders[1] / "knn" / "told_0.json").exists()
    assert launchers("retry-failed", sweep).stdout == "nothing failed\n"


def test_a_signal_ends_the_children_and_begins_no_more(tmp_path):
    """Ctrl-C twice as late would be as good; the children write their states, and a second attempt goes on from there."""
    sweep = tmp_path / "sweep"
    threading.Thread(target=_interrupt_once, args=(sweep / "a" / "log.jsonl",), daemon=True).start()
    with pytest.raises(SystemExit) as end:
        Local(parallel=1).launch_array(
            [job("count", sweep / name, steps=1000, seconds=0.02) for name in "ab"], names=["a", "b"], folder=sweep
        )
    assert end.value.code == 128 + signal.SIGTERM
    first, second = states(sweep)
    assert (first.state, first.detail) == ("CANCELLED", "by SIGTERM")
    assert (second.state, second.detail) == ("CANCELLED", "never started")
    assert json.loads((sweep / "a" / "state.json").read_text())["step"] == first.step


def _interrupt_once(log: Path) -> None:
    while not log.exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_saved_teachers_are_evaluated_after_the_training_and_then_what_follows(tmp_path):
    folder = tmp_path / "run"
    (folder / "knn").mkdir(parents=True)
    training = job("count", folder, steps=5, seconds=0, teacher_every=2)
    saved = job("look_at_teacher", folder / "teacher_{step}", teacher="{teacher}", step="{step}")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        Local(parallel=1).launch(training, then=[job("tell", folder / "knn")], saved=saved)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert json.loads((folder / "teacher_4" / "metrics.json").read_text()) == {"step": 4, "teacher": "teacher of step 4"}
    assert (folder / "teacher_2" / "metrics.json").exists()
    assert (folder / "knn" / "told_0.json").exists()


def test_nothing_follows_a_training_that_fails(tmp_path):
    with pytest.raises(RuntimeError, match="fell"):
        Local(parallel=1).launch(job("fail", tmp_path), then=[job("tell", tmp_path)])
    assert not (tmp_path / "told_0.json").exists()


def test_children_of_several_processes_share_the_gpus_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    assert children.slots(2, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,5"}]
    assert Gpus(processes=0, grace_seconds=1, parallel=1).gpus_each() == 4
    with pytest.raises(SystemExit, match="launcher.parallel: 3 runs of 2 GPUs at once need 6, there are 4; use 2, or fewer processes"):
        children.slots(3, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert children.slots(3, 2) == [{}, {}, {}]


def test_names_that_do_not_tell_children_apart_are_a_programming_error(tmp_path):
    with pytest.raises(ValueError, match="as many different names"):
        Local(parallel=1).launch_array([job("tell", tmp_path / name) for name in "ab"], names=["a", "a"], folder=tmp_path)
