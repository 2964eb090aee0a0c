"""Searches with Optuna over runs that need no torch, through the launchers' own jobs."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launchers import search as search_module
from launchers.command import Command
from launchers.job import Job
from launchers.local import Local
from launchers.search import SearchOptions, search
from launchers.space import Dimension
from launchers.submission import Main

X = Dimension(name="x", low=0.0, high=1.0)


def options(**changes: Any) -> SearchOptions:
    given = {
        "trials": 4,
        "metric": "knn/teacher",
        "direction": "maximize",
        "sampler": "random",
        "startup_trials": 3,
        "seed": 0,
        "at_once": 2,
        "prune": False,
        "prune_startup_trials": 1,
        "prune_from_epoch": 0,
    }
    return SearchOptions(**(given | changes))


Make = Callable[[int, dict[str, str]], Main]


@pytest.fixture
def maker(tmp_path, program) -> Callable[..., Make]:
    """Makes trials in tmp_path, with further entries of their config, or functions of the trial's number that make these."""

    def with_config(**more: Any) -> Make:
        def make(number: int, typed: dict[str, str]) -> Main:
            folder = tmp_path / f"{number:02d}"
            config = {"folder": str(folder), "x": float(typed["x"]), "seconds": 0.01}
            config |= {key: value(number) if callable(value) else value for key, value in more.items()}
            return Main(name=folder.name, job=Job(function="run:train", config=config, folder=str(folder), root=str(program)))

        return make

    return with_config


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def checkpoint(folder: Path) -> int:
    """Epochs that its checkpoint has."""
    path = folder / "state.json"
    return json.loads(path.read_text()) if path.exists() else 0


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    monkeypatch.setattr(search_module, "_SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(search_module, "_SECONDS_BETWEEN_QUESTIONS", 0.2)


def test_the_best_of_all_trials_is_found_and_written_down(maker, tmp_path, capsys):
    result = search(launcher=Local(parallel=2), folder=tmp_path, space=[X], make=maker(), options=options(at_once=None))
    assert [trial["state"] for trial in result["trials"]] == ["COMPLETE"] * 4
    values = [trial["value"] for trial in result["trials"]]
    assert values == sorted(values, reverse=True)
    assert result["best"]["value"] == pytest.approx(103 - 100 * abs(float(result["best"]["options"]["x"]) - 0.5))
    assert json.loads((tmp_path / "search.json").read_text()) == result
    assert f"* {values[0]:>14.6g}" in capsys.readouterr().out
    assert len(list(tmp_path.glob("code*"))) == 1  # all trials have the code of the first
    assert lines(tmp_path / "00" / "attempts.jsonl") == [0]


def test_what_does_not_go_together_is_one_line(maker, tmp_path):
    """A folder of another search, and a metric that no run has."""
    quick = {"launcher": Local(parallel=1), "folder": tmp_path, "make": maker()}
    search(space=[X], options=options(trials=1), **quick)
    with pytest.raises(SystemExit, match=r"another search \(x differ\)"):
        search(space=[Dimension(name="x", low=0.0, high=2.0)], options=options(trials=1), **quick)
    with pytest.raises(SystemExit, match="search.metric: 'knn/top1' is not in .*01/metrics.json; there are knn/teacher"):
        search(space=[X], options=options(trials=2, metric="knn/top1"), **quick)


def test_a_poor_trial_is_stopped_by_its_log(maker, tmp_path, capsys):
    make = maker(x=lambda number: [0.5, 0.9][number], hangs_at=lambda number: [None, 1][number])
    given = options(trials=2, at_once=1, prune=True, prune_from_epoch=1)
    result = search(launcher=Local(parallel=1), folder=tmp_path, space=[X], make=make, options=given)
    (stopped,) = (trial for trial in result["trials"] if trial["state"] == "PRUNED")
    assert (stopped["name"], stopped["last_epoch"], stopped["value"]) == ("01", 1, None)
    assert "01: worse than the median, stopped" in capsys.readouterr().out


def test_a_search_goes_on_after_its_process_was_killed(maker, tmp_path):
    """The first trial ends, the second hangs when the process is killed, and ends after its last checkpoint, as trial 1."""
    arguments = {"launcher": Local(parallel=1), "folder": tmp_path, "space": [X], "options": options(trials=2, at_once=1)}
    make = maker(hangs_at=lambda number: 2 if number == 1 else None)
    parent = os.fork()
    if parent == 0:
        try:
            search(make=make, **arguments)
        finally:
            os._exit(1)
    wait_for(lambda: checkpoint(tmp_path / "01") == 3)
    with pytest.raises(SystemExit, match="searches in"):
        search(make=make, **arguments)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    (tmp_path / "01" / "go_on").touch()
    result = search(make=make, **arguments)
    assert sorted((trial["name"], trial["state"]) for trial in result["trials"]) == [("00", "COMPLETE"), ("01", "COMPLETE")]
    assert [lines(tmp_path / name / "attempts.jsonl") for name in ("00", "01")] == [[0], [0, 3]]
    again = search(make=make, **arguments)  # nothing is left to do
    assert again == result


def test_a_signal_ends_trials_at_their_checkpoints_and_leaves_them_to_the_next_process(maker, tmp_path):
    make = maker(hangs_at=1)
    parent = os.fork()
    if parent == 0:
        code = 1
        try:
            search(launcher=Local(parallel=2), folder=tmp_path, space=[X], make=make, options=options(trials=2))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(code)
    wait_for(lambda: all(checkpoint(tmp_path / name) == 2 for name in ("00", "01")))
    os.kill(parent, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 128 + signal.SIGTERM
    result = search(launcher=Local(parallel=2), folder=tmp_path, space=[X], make=maker(), options=options(trials=2))
    assert [trial["state"] for trial in result["trials"]] == ["COMPLETE", "COMPLETE"]
    assert lines(tmp_path / "00" / "attempts.jsonl") == [0, 2]


def test_failures_are_told_and_three_in_a_row_end_the_search(maker, tmp_path, capsys):
    def make(number: int, typed: dict[str, str]) -> Main:
        if number == 1:
            raise ValueError("01: schedule.warmup_epochs: a warm-up is longer than the training; use at most 2")
        return maker(fails=number > 1)(number, typed)

    with pytest.raises(SystemExit, match="3 runs in a row failed"):
        search(launcher=Local(parallel=1), folder=tmp_path, space=[X], make=make, options=options(trials=9, at_once=1))
    result = json.loads((tmp_path / "search.json").read_text())
    assert sorted(trial["state"] for trial in result["trials"]) == ["COMPLETE"] + ["FAIL"] * 3
    err = capsys.readouterr().err
    assert "a warm-up is longer" in err and "02: failed: error: optimizer.learning_rate: too high; lower it" in err


def test_trials_on_a_scheduler_outlive_the_search(maker, tmp_path):
    """`launcher=command` stands for one: the killed search finds one trial ended and one still at work."""
    launcher = Command(template="setsid {command} >/dev/null 2>&1 & echo $!", cancel="kill {id}", processes=1, grace_seconds=5, python=None)
    make = maker(hangs_at=lambda number: 1 if number == 0 else None)
    arguments = {"launcher": launcher, "folder": tmp_path, "space": [X], "options": options(trials=2), "make": make}
    parent = os.fork()
    if parent == 0:
        try:
            search(**arguments)
        finally:
            os._exit(1)
    wait_for(lambda: checkpoint(tmp_path / "00") == 2 and (tmp_path / "01" / "attempts.jsonl").exists())
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_for((tmp_path / "01" / "metrics.json").exists)
    (tmp_path / "00" / "go_on").touch()
    result = search(**arguments)
    assert [trial["state"] for trial in result["trials"]] == ["COMPLETE", "COMPLETE"]
    assert [lines(tmp_path / name / "attempts.jsonl") for name in ("00", "01")] == [[0], [0]]
