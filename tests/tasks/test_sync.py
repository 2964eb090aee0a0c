"""task=sync: what a store lacks is sent once, from every run folder that it is pointed to."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esvit.errors import OptionError
from esvit.tasks.sync import Sync
from esvit.tracking.base import NoTracking
from esvit.tracking.mlflow import Mlflow

_KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from esvit.tracking.mlflow import Mlflow
tracking = Mlflow(uri=sys.argv[1], experiment_name="sync", run_name="killed", tags={}, host=None, close_timeout_seconds=60)
tracker = tracking.open(run_folder=Path(sys.argv[2]), config={"seed": 1}, is_main=True)
for step in range(1, 31):
    tracker.log(step, 0, {"loss/total": step / 2})
os.write(tracker._log._file.fileno(), b'{"step": 31, "lo')
print("logged", flush=True)
if sys.argv[3] == "live":
    sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def steps_of(uri: str, folder: Path) -> list[int]:
    run_id = json.loads((folder / "tracking.json").read_text())["run_id"]
    return sorted(point.step for point in client_of(uri).get_metric_history(run_id, "loss/total"))


@pytest.fixture(scope="module")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for this file: each test has runs of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def killed_run(uri: str, folder: Path) -> None:
    program = [sys.executable, "-c", _KILLED_RUN, uri, str(folder), "killed"]
    assert subprocess.run(program, capture_output=True).returncode == -9


def test_every_run_below_the_folder_is_sent_once(store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed_run(store_uri, tmp_path / "pretrain" / "a")
    killed_run(store_uri, tmp_path / "b")
    Sync(folder=str(tmp_path), uri=None).run()
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'b'}: sent 30 records",
        f"{tmp_path / 'pretrain' / 'a'}: sent 30 records",
    ]
    Sync(folder=str(tmp_path / "b"), uri=None).run()
    assert capsys.readouterr().out == f"{tmp_path / 'b'}: up to date\n"
    assert steps_of(store_uri, tmp_path / "b") == list(range(1, 31))
    run_id = json.loads((tmp_path / "b" / "tracking.json").read_text())["run_id"]
    run = client_of(store_uri).get_run(run_id)
    assert (run.info.status, run.data.params) == ("KILLED", {"seed": "1"})


def test_a_synced_run_resumes_under_the_same_id(store_uri: str, tmp_path: Path) -> None:
    killed_run(store_uri, tmp_path)
    Sync(folder=str(tmp_path), uri=None).run()
    run_id = json.loads((tmp_path / "tracking.json").read_text())["run_id"]
    tracking = Mlflow(uri=store_uri, experiment_name="sync", run_name="killed", tags={}, host=None, close_timeout_seconds=60)
    tracker = tracking.open(run_folder=tmp_path, config={"seed": 1}, is_main=True)
    tracker.resume(20)
    for step in range(21, 41):
        tracker.log(step, 0, {"loss/total": step / 2})
    tracker.close("FINISHED")
    assert tracker.run_id == run_id
    assert steps_of(store_uri, tmp_path) == list(range(1, 41))
    assert client_of(store_uri).get_run(run_id).info.status == "FINISHED"


def test_a_run_that_was_tracked_nowhere_can_be_given_a_store(store_uri: str, tmp_path: Path) -> None:
    tracker = NoTracking(host=None).open(run_folder=tmp_path, config={"seed": 2}, is_main=True)
    tracker.log(1, 0, {"loss/total": 3.0})
    tracker.final({"knn/teacher": 60.0}, step=1)
    tracker.close("FINISHED")
    with pytest.raises(OptionError, match="1 of 1 runs could not be sent"):
        Sync(folder=str(tmp_path), uri=None).run()
    Sync(folder=str(tmp_path), uri=store_uri).run()
    assert steps_of(store_uri, tmp_path) == [1]


def test_a_live_run_is_left_to_its_own_process(store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unreachable = "http://127.0.0.1:9"
    program = [sys.executable, "-c", _KILLED_RUN, unreachable, str(tmp_path), "live"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.readline() == b"logged\n"
        Sync(folder=str(tmp_path), uri=store_uri).run()
        process.kill()
    assert f"left alone, because process {process.pid}" in capsys.readouterr().out
    Sync(folder=str(tmp_path), uri=store_uri).run()
    assert steps_of(store_uri, tmp_path) == list(range(1, 31))


def test_an_unreachable_server_is_named_and_fails_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed_run("http://127.0.0.1:9", tmp_path)
    with pytest.raises(OptionError, match="tracking.uri: 1 of 1 runs could not be sent"):
        Sync(folder=str(tmp_path), uri=None).run()
    assert "failed: " in capsys.readouterr().out


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="output_dir: no run in"):
        Sync(folder=str(tmp_path), uri=None).run()
    with pytest.raises(OptionError, match="output_dir: folder .* does not exist"):
        Sync(folder=str(tmp_path / "missing"), uri=None).run()
