"""Ranks as submitit starts them, on its local executor: signals, requeue, failures. tests/slurm has the same on real daemons."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import submitit

from launchers.job import Job
from launchers.rank import EarlySignals, Rank
from launchers.submission import JobsFile, Main, claim_saved, prepare

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_SECONDS} s for {what}")
        time.sleep(0.02)
    return value


@pytest.fixture
def start(tmp_path, monkeypatch) -> Iterator[Callable[..., Path]]:
    """Starts a job of tests/launchers/jobs.py in two ranks, and returns its run folder."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    started = []

    def submit(function: str, *, max_requeues: int = 3, **config: Any) -> Path:
        folder = tmp_path / "run"
        job = Job(
            function=f"tests.launchers.jobs:{function}",
            config={"folder": str(folder), **config},
            folder=str(folder),
            root=str(ROOT),
            command=["run.py", "as=typed"],
        )
        file = JobsFile(folder)
        file.launch_folder.mkdir(parents=True)
        job.write(file.job_file("run"))
        executor = submitit.LocalExecutor(file.launch_folder)
        executor.update_parameters(tasks_per_node=2, timeout_min=5)
        started.append(executor.submit(Rank(folder=str(folder), name="run", max_requeues=max_requeues)))
        return folder

    yield submit
    for each in started:
        each._process.wait(timeout=PATIENCE_SECONDS)


def history(folder: Path) -> list[dict[str, Any]]:
    return lines(folder / "launch" / "run.history.jsonl")


def events(folder: Path) -> list[str]:
    return [event["event"] for event in history(folder)]


def send(folder: Path, number: int) -> None:
    """To both ranks, as SLURM does."""
    for path in folder.glob("pid_*"):
        os.kill(int(path.read_text()), number)


def test_a_signal_ends_every_rank_after_its_step_and_the_job_goes_on_from_there(start):
    folder = start("count", steps=60, seconds=0.05)  # so many that the signal finds it running on a busy machine too
    wait_until(lambda: len(lines(folder / "log.jsonl")) >= 3 and len(list(folder.glob("pid_*"))) == 2, "three steps")
    send(folder, signal.SIGUSR2)
    wait_until(lambda: "ended" in events(folder), "the end of the second attempt")
    assert events(folder) == ["started", "requeued", "started", "ended"]
    assert history(folder)[-1]["code"] == 0
    assert [record["step"] for record in lines(folder / "log.jsonl")] == list(range(1, 61))
    first, second = lines(folder / "attempts.jsonl")
    assert first["from"] == 0 and 3 <= second["from"] < 60
    assert first["command"] == ["run.py", "as=typed"]


def test_a_signal_before_the_run_has_handlers_waits_for_them(start):
    """As while torch is imported: nothing is lost, and the job stops at its first steps."""
    folder = start("count", steps=3, seconds=0.02, waits_to_go=True)
    wait_until(lambda: len(list(folder.glob("pid_*"))) == 2, "both ranks")
    send(folder, signal.SIGUSR2)
    (folder / "go").touch()
    wait_until(lambda: "ended" in events(folder), "the end of the second attempt")
    first, second = lines(folder / "attempts.jsonl")
    assert first["from"] == 0 and second["from"] >= 1
    assert events(folder) == ["started", "requeued", "started", "ended"]
    assert [record["step"] for record in lines(folder / "log.jsonl")] == [1, 2, 3]


def test_a_job_puts_itself_back_only_so_often_and_says_so(start):
    folder = start("count", steps=1000, seconds=0.02, max_requeues=0)
    wait_until(lambda: len(lines(folder / "log.jsonl")) >= 1 and len(list(folder.glob("pid_*"))) == 2, "the first step")
    send(folder, signal.SIGUSR2)
    wait_until(lambda: "ended" in events(folder), "the end")
    assert history(folder)[-1]["code"] == 128 + signal.SIGUSR2
    said = (folder / "errors" / "rank_0.txt").read_text()
    assert "SIGUSR2: put back into the queue 0 times already (launcher.max_requeues)" in said
    assert f"python -m launchers retry-failed {folder}" in said


def test_every_rank_that_fails_leaves_its_traceback(start):
    folder = start("fail")
    wait_until(lambda: "ended" in events(folder) and len(list(folder.glob("errors/*"))) == 2, "the end")
    assert history(folder)[-1]["code"] == 1
    for rank in (0, 1):
        text = (folder / "errors" / f"rank_{rank}.txt").read_text()
        assert "in fail" in text and text.endswith(f"RuntimeError: rank {rank} of {folder} fell\n")
    (log,) = (folder / "launch").glob("*_1_log.err")
    assert "rank 1" in log.read_text()


def test_early_signals_are_delivered_once_there_is_a_handler_and_late_ones_ignored():
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    received: list[int] = []
    try:
        EarlySignals().keep()
        quiet = signal.getsignal(signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR2)
        signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
        signal.signal(signal.SIGUSR2, lambda number, _: received.append(number))
        wait_until(lambda: received, "the kept signal")
        signal.signal(signal.SIGUSR2, quiet)  # as a run does when it ends
        os.kill(os.getpid(), signal.SIGUSR2)
        assert received == [signal.SIGUSR2]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_saved_teacher_gets_one_evaluation_with_its_path_and_step(tmp_path):
    folder = tmp_path / "run"
    (folder / "teachers").mkdir(parents=True)
    template = Job(
        function="x:y",
        config={"checkpoint": "{teacher}", "step": "{step}", "name": "of {step}", "list": ["{step}"]},
        folder=str(folder / "knn_{step}"),
        root=str(tmp_path),
    )
    main = Job(function="x:y", config={}, folder=str(folder), root=str(tmp_path))
    file = prepare(folder, [Main(name="run", job=main, saved=template)], launcher={"kind": "slurm"})
    for name in ("teacher_20.pt", "teacher_100.pt", "teacher_half.pt.tmp"):
        (folder / "teachers" / name).touch()
    assert [each.name for each in claim_saved(file, "run")] == ["knn_20", "knn_100"]
    (folder / "teachers" / "teacher_300.pt").touch()
    assert [each.name for each in claim_saved(file, "run")] == ["knn_300"]
    assert claim_saved(file, "run") == []
    job = Job.read(file.job_file("knn_300"))
    path = str(folder / "teachers" / "teacher_300.pt")
    assert job.config == {"checkpoint": path, "step": 300, "name": "of 300", "list": [300]}
    assert job.folder == str(folder / "knn_300") and job.root == str(folder / "code")
