"""The launcher of several processes: what ranks are told, how failures are reported, and that nothing outlives its end."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from launchers.gpus import Gpus
from launchers.job import Job
from launchers.local import Local

ROOT = Path(__file__).parents[2]


def job(function: str, folder: Path) -> Job:
    return Job(
        function=f"tests.launchers.jobs:{function}", config={"folder": str(folder), "number": 0.1}, folder=str(folder), root=str(ROOT)
    )


def told(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("told_*.json"))]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def sigterm_once_ready():
    """Sends this process SIGTERM as soon as both ranks have told; the launcher must pass it on."""

    def start(folder: Path) -> None:
        def send() -> None:
            while len(list(folder.glob("told_*.json"))) < 2:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=send, daemon=True).start()

    return start


def test_every_rank_gets_its_number_and_the_same_config(tmp_path):
    Gpus(processes=2, grace_seconds=1, parallel=1).launch(job("tell", tmp_path))
    ranks = told(tmp_path)
    assert [(rank["RANK"], rank["LOCAL_RANK"]) for rank in ranks] == [("0", "0"), ("1", "1")]
    assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"], rank["MASTER_ADDR"]) for rank in ranks} == {("2", "2", "127.0.0.1")}
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
    assert ranks[0]["config"] == ranks[1]["config"] == {"folder": str(tmp_path), "number": 0.1}


def test_a_rank_that_raises_ends_the_others_and_leaves_its_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        Gpus(processes=2, grace_seconds=60, parallel=1).launch(job("fail_in_rank_1", tmp_path))  # jobs' 60 s would be noticed
    assert end.value.code == 1
    assert capsys.readouterr().err == f"error: RuntimeError: the second rank fell (traceback in {tmp_path / 'errors'})\n"
    text = (tmp_path / "errors" / "rank_1.txt").read_text()
    assert "fail_in_rank_1" in text and text.endswith("RuntimeError: the second rank fell\n")
    assert [path.name for path in (tmp_path / "errors").iterdir()] == ["rank_1.txt"]


def test_a_users_mistake_is_told_once_for_all_ranks(tmp_path, capsys):
    folder = tmp_path / "never_made"
    with pytest.raises(SystemExit) as end:
        Gpus(processes=2, grace_seconds=1, parallel=1).launch(job("mistake", folder))
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: data.root: is missing; give one\n"
    assert not folder.exists()


def test_a_rank_killed_from_outside_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("launchers.gpus._SECONDS_AFTER_FAILURE", 0.2)
    with pytest.raises(SystemExit) as end:
        Gpus(processes=2, grace_seconds=60, parallel=1).launch(job("end_in_rank_0", tmp_path))
    assert end.value.code == 128 + signal.SIGKILL
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a process was killed by SIGKILL")


def test_signals_reach_every_rank_and_their_exit_code_comes_back(tmp_path, capsys, sigterm_once_ready):
    before = signal.getsignal(signal.SIGTERM)
    sigterm_once_ready(tmp_path)
    with pytest.raises(SystemExit) as end:
        Gpus(processes=2, grace_seconds=60, parallel=1).launch(job("exit_on_signal", tmp_path))
    assert end.value.code == 143
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_rank_that_stays_after_a_signal_is_killed_after_the_grace_time(tmp_path, sigterm_once_ready):
    sigterm_once_ready(tmp_path)
    with pytest.raises(SystemExit) as end:
        Gpus(processes=2, grace_seconds=0.2, parallel=1).launch(job("ignore_signals", tmp_path))
    assert end.value.code == 143
    assert not any(is_alive(rank["pid"]) for rank in told(tmp_path))


def test_the_local_launcher_stays_in_this_process(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    Local(parallel=1).launch(job("tell", tmp_path))
    assert [rank["pid"] for rank in told(tmp_path)] == [os.getpid()]


def test_a_job_survives_being_written_and_read(tmp_path):
    before = Job(function="run:execute", config={"a": [1, 0.1, None, True, "ü"], "b": {}}, folder="/x", root="/y")
    before.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == before
