"""What the command line says of a folder, where there is a scheduler and where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launchers import scheduler, submission
from launchers.job import Job
from launchers.status import of_folder, states, table
from launchers.submission import JobsFile, Main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path) -> JobsFile:
    """A submitted run "7" with an evaluation "8"."""

    def job(folder: Path) -> Job:
        return Job(function="x:y", config={"tracking_run": {"run_id": "abc", "url": None}}, folder=str(folder), root=str(tmp_path))

    folder = tmp_path / "run"
    file = submission.prepare(folder, [Main(name="run", job=job(folder), then=[job(folder / "knn")])], launcher={"kind": "slurm"})
    with file.changing() as content:
        for entry, number in zip(content.jobs, ("7", "8"), strict=True):
            entry.id = number
            entry.log = str(file.launch_folder / f"{number}_%t_log.out")
    return file


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for squeue and sacct, that print what the test gives."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def answers(squeue: str, sacct: str) -> None:
        for name, text in (("squeue", squeue), ("sacct", sacct)):
            (programs / name).write_text(f"#!/bin/sh\nprintf '%s' '{text}'\n")
            (programs / name).chmod(0o755)

    return answers


def log(folder: Path, *records: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 9')


def test_states_come_from_the_queue_first_and_then_from_accounting(run, slurm):
    slurm("8|PENDING|Dependency\n", "7|CANCELLED by 1000|0:15\n8|PENDING|0:0\n")
    main, knn = states(run.folder)
    assert (main.state, main.detail, main.is_active) == ("CANCELLED", "signal 15", False)
    assert (knn.state, knn.detail, knn.is_active) == ("PENDING", "Dependency", True)


def test_accounting_that_lags_behind_the_queue_is_not_believed(run, slurm):
    slurm("", "7|RUNNING|0:0\n8|RUNNING|0:0\n")
    run.history("run").add("ended", id="7", code=0)
    main, knn = states(run.folder)
    assert (main.state, knn.state, knn.is_active) == ("COMPLETED", "COMPLETING", True)


def test_a_job_that_slurm_forgot_is_known_by_its_history(run, slurm):
    slurm("", "")
    run.history("run").add("started", id="7", launched=1.0)
    run.history("run").add("requeued", id="7", signal="SIGUSR2")
    run.history("run").add("started", id="7", launched=2.0)
    run.history("run").add("ended", id="7", code=0)
    main, knn = states(run.folder)
    assert (main.state, main.restarts) == ("COMPLETED", 1)
    assert knn.state == "UNKNOWN"


def test_the_line_of_a_job_says_how_far_it_is_and_what_went_wrong(run, slurm):
    slurm("", "7|FAILED|1:0\n8|COMPLETED|0:0\n")
    (run.folder / "knn").mkdir()
    (run.folder / "knn" / "metrics.json").write_text('{"step": 1, "knn/top1_k10": 61.25, "knn/top5_k10": 83, "knn/top1_k20": 60}')
    log(run.folder, {"step": 3, "epoch": 1, "loss/total": 2.34567}, {"step": 4, "epoch": 2, "loss/total": 2.5})
    (run.folder / "errors").mkdir()
    for rank, (text, age) in enumerate((("later", 0), ("Traceback\nRuntimeError: first", 5))):
        path = run.folder / "errors" / f"rank_{rank}.txt"
        path.write_text(text)
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    first, error, second = table(states(run.folder))
    assert first == "run  7  FAILED     (exit code 1)  step 4  epoch 2  loss 2.5"
    assert error == f"    RuntimeError: first ({run.folder / 'errors' / 'rank_1.txt'}, 1 more in {run.folder / 'errors'})"
    assert second == "knn  8  COMPLETED  knn/top1_k10 61.25  knn/top5_k10 83"


def test_errors_of_an_earlier_attempt_are_not_shown(run, slurm):
    slurm("7|RUNNING|None\n8|PENDING|Dependency\n", "")
    (run.folder / "errors").mkdir()
    path = run.folder / "errors" / "rank_0.txt"
    path.write_text("RuntimeError: of the first attempt")
    run.history("run").add("started", id="7", launched=path.stat().st_mtime + 60)
    assert states(run.folder)[0].error is None


def test_tasks_of_an_array_that_never_started_are_told_apart(slurm):
    slurm("", "12_[3-5,7%2]|CANCELLED by 0|0:0\n12_1|COMPLETED|0:0\n")
    ended = scheduler.ended_jobs(["12_1", "12_3"])
    assert sorted(ended) == ["12_1", "12_3", "12_4", "12_5", "12_7"]
    assert (ended["12_7"].state, ended["12_1"].state) == ("CANCELLED", "COMPLETED")


def test_where_a_job_cannot_be_requeued_the_reason_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert scheduler.requeue("7") == "there is no scontrol on this node"
    assert scheduler.state_of("7") is None and scheduler.active_jobs() == {}
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2; exit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert scheduler.requeue("7") == "Requested operation is presently disabled"


def test_a_run_without_a_submission_is_known_by_its_files(tmp_path):
    assert of_folder(tmp_path) is None
    (tmp_path / "config.yaml").touch()
    assert of_folder(tmp_path) == "not finished, no step logged yet"
    log(tmp_path, {"step": 7, "epoch": 3})
    assert of_folder(tmp_path) == "not finished, step 7  epoch 3"
    (tmp_path / "errors").mkdir()
    report = tmp_path / "errors" / "stall_rank_0.txt"
    report.write_text("no progress for 20 minutes (step 7)\nThread 0x1 (most recent call first):\n  File x\n")
    assert of_folder(tmp_path) == f"not finished, step 7  epoch 3, no progress for 20 minutes (step 7) ({report})"
    (tmp_path / "metrics.json").touch()
    assert of_folder(tmp_path) == "finished, step 7  epoch 3"


def test_mistakes_on_the_command_line_are_told_in_one_line(run, slurm):
    slurm("7|PENDING|Priority\n", "")

    def said(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-m", "launchers", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        return done.stderr

    nothing = run.folder / "nothing"
    assert said("status", str(nothing)) == f"error: {nothing}: no run; give a run folder or a sweep folder\n"
    assert said("logs", str(nothing)) == f"error: {nothing}: no jobs were submitted for it (no run); give a folder with a jobs.json\n"
    assert "run has no output yet, it is PENDING" in said("logs", str(run.folder))
    assert said("logs", str(run.folder), "--job", "knm") == "error: --job: there is no 'knm'; there are run, knn\n"


def test_the_command_line_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, launchers.__main__, launchers.slurm; print(sorted({'torch', 'numpy', 'mlflow', 'hydra', 'optuna'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
