"""The copy of a run in MLflow: every point once and in order, whatever dies, hangs or comes back."""

import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esvit.errors import OptionError
from esvit.tracking.base import SilentTracker, Tracker
from esvit.tracking.log import read_records
from esvit.tracking.mlflow import Mlflow, send_missing
from tests.tracking.conftest import FirstUse, mlflow_tracking


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def steps_of(uri: str, run_id: str | None, metric: str = "loss/total") -> list[int]:
    return sorted(point.step for point in client_of(uri).get_metric_history(run_id, metric))


def log_steps(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log(step, step // 10, {"loss/total": 1 / step, "schedule/learning_rate": 0.1})


def start(uri: str, folder: Path, **options: Any) -> Tracker:
    return mlflow_tracking(uri, **options).open(run_folder=folder, config={"seed": 1, "data": {"root": "/data"}}, is_main=True)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def hold() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=hold, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    for connection in held:
        connection.close()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_two_processes_may_find_a_store_empty_at_the_same_time(first_use: FirstUse) -> None:
    client = client_of(first_use.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'first use'")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted((run.info.run_name, run.info.status) for run in runs) == [("ended", "FINISHED"), ("killed", "RUNNING")]
    for run in runs:
        assert steps_of(first_use.uri, run.info.run_id) == list(range(1, 21))


def test_a_killed_run_that_replays_sent_steps_has_each_step_once_under_one_run_id(first_use: FirstUse) -> None:
    folder = first_use.folder / "killed"
    before = start(first_use.uri, folder)
    run_id = before.run_id
    before.resume(10)
    assert [record["step"] for record in before.records()] == list(range(1, 11))
    log_steps(before, range(11, 31))
    before.close("FINISHED")
    assert before.run_id == run_id
    history = client_of(first_use.uri).get_metric_history(run_id, "loss/total")
    assert [point.step for point in sorted(history, key=lambda point: point.step)] == list(range(1, 31))
    assert steps_of(first_use.uri, run_id, "step") == list(range(1, 31))
    assert [record["step"] for record in before.records()] == list(range(1, 31))
    assert client_of(first_use.uri).get_run(run_id).info.status == "FINISHED"


def test_a_run_tells_its_options_origin_files_and_numbers(store_uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tracker = start(store_uri, folder, tags={"mlflow.note.content": "a test"})
    (folder / "git.diff").write_text("+one")
    (folder / "grid.png").write_bytes(b"picture")
    tracker.artifact(folder / "git.diff")
    tracker.artifact(folder / "grid.png", "pictures")
    tracker.resume(0)
    tracker.log(1, 0.5, {"loss/total": math.nan, "loss/view": 2.0, "odd name ?": 1})
    tracker.final({"knn/teacher": 61.5}, step=1)
    tracker.close("FINISHED")

    client = client_of(store_uri)
    run = client.get_run(tracker.run_id)
    assert run.info.run_name == "a run" and run.info.status == "FINISHED"
    assert run.data.params == {"seed": "1", "data.root": "/data"}
    assert {"git.commit", "git.dirty", "host", "command", "version.torch", "version.mlflow", "mlflow.note.content"} <= set(run.data.tags)
    assert math.isnan(run.data.metrics["loss/total"]) and run.data.metrics["odd name _"] == 1
    assert run.data.metrics["final/knn/teacher"] == 61.5
    (record,) = tracker.records()
    assert client.get_metric_history(run.info.run_id, "loss/view")[0].timestamp == int(record["time"] * 1000)
    assert {"git.diff", "metrics.json", "pictures"} <= {item.path for item in client.list_artifacts(run.info.run_id)}
    assert [item.path for item in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/grid.png"]
    assert run.info.artifact_uri.startswith(f"file://{tmp_path}/store/mlartifacts/")
    assert tracker.view_command.endswith(f"mlflow ui --backend-store-uri {store_uri}") and tracker.run_url is None


def test_a_resumed_run_runs_again_keeps_its_id_and_sends_changed_files_and_final_metrics_once(store_uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = start(store_uri, folder)
    (folder / "report.html").write_text("old")
    first.artifact(folder / "report.html")
    first.resume(0)
    log_steps(first, range(1, 6))
    first.final({"knn/teacher": 50.0}, step=5)
    first.close("KILLED")
    client = client_of(store_uri)
    assert client.get_run(first.run_id).info.status == "KILLED"

    second = start(store_uri, folder)
    second.resume(5)
    (folder / "report.html").write_text("newer")
    second.artifact(folder / "report.html")
    second.final({"knn/teacher": 50.0}, step=5)
    second.close("KILLED")
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "KILLED"
    assert Path(client.download_artifacts(first.run_id, "report.html")).read_text() == "newer"
    assert steps_of(store_uri, first.run_id, "final/knn/teacher") == [5]
    assert steps_of(store_uri, first.run_id) == [1, 2, 3, 4, 5]


def test_a_run_whose_id_was_never_noted_is_found_again_by_its_tag(store_uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = start(store_uri, folder)
    log_steps(first, range(1, 6))
    first.close("FINISHED")
    run_id = first.run_id
    first._state.update(run_id=None, experiment_id=None, last_step=0)  # type: ignore[attr-defined]
    second = start(store_uri, folder)
    log_steps(second, range(6, 11))
    second.close("FINISHED")
    assert second.run_id == run_id
    assert steps_of(store_uri, run_id) == list(range(1, 11))


def test_more_points_than_one_call_may_carry_arrive_as_whole_records(store_uri: str, tmp_path: Path) -> None:
    tracker = start(store_uri, tmp_path / "run")
    names = [f"many/{number}" for number in range(700)]
    for step in (1, 2, 3):
        tracker.log(step, 0, dict.fromkeys(names, float(step)))
    tracker.log(4, 0, {f"wide/{number}": 4.0 for number in range(1500)})
    tracker.close("FINISHED")
    assert steps_of(store_uri, tracker.run_id, "many/699") == [1, 2, 3]
    assert steps_of(store_uri, tracker.run_id, "wide/1499") == [4]
    assert steps_of(store_uri, tracker.run_id, "step") == [1, 2, 3, 4]


def test_a_dead_server_neither_blocks_nor_fails_a_run_and_nothing_is_lost(
    store_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    tracker = start(f"http://127.0.0.1:{closed_port()}", folder)
    tracker.resume(0)
    log_steps(tracker, range(1, 101))
    tracker.close("FINISHED")
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("esvit")]
    assert len(messages) == 2 and "training goes on" in messages[0]
    assert "100 records are not in" in messages[1] and f"task=sync output_dir={folder}" in messages[1]
    assert [record["step"] for record in read_records(folder / "log.jsonl")[0]] == list(range(1, 101))

    assert send_missing(folder, uri=store_uri) == "sent 100 records"
    assert send_missing(folder, uri=store_uri) == "up to date"
    resumed = start(store_uri, folder)
    resumed.resume(100)
    log_steps(resumed, range(101, 103))
    resumed.close("FINISHED")
    assert steps_of(store_uri, resumed.run_id) == list(range(1, 103))


def test_a_hung_server_holds_the_end_of_a_run_no_longer_than_allowed(silent_server: str, tmp_path: Path) -> None:
    import mlflow  # noqa: F401  # so that the thread is waiting for the server, not for the import

    tracker = start(silent_server, tmp_path / "run", close_timeout_seconds=1.0)
    log_steps(tracker, range(1, 101))
    tracker.close("FINISHED")
    assert "esvit-tracking" in [thread.name for thread in threading.enumerate()]  # close did not wait for the 5 s of an HTTP time-out
    assert [record["step"] for record in tracker.records()] == list(range(1, 101))


def test_a_store_that_comes_back_gets_everything_while_the_run_goes_on(
    store_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = Path(store_uri.removeprefix("sqlite:///"))
    hidden = database.rename(tmp_path / "hidden.db")
    database.mkdir()  # where the database should be is something that cannot be opened
    tracker = start(store_uri, tmp_path / "run")
    log_steps(tracker, range(1, 11))
    while not caplog.records:
        time.sleep(0.05)
    database.rmdir()
    hidden.rename(database)
    log_steps(tracker, range(11, 21))
    while len(caplog.records) < 2:
        time.sleep(0.05)
    tracker.close("FINISHED")
    assert "answers again" in caplog.records[1].getMessage()
    assert steps_of(store_uri, tracker.run_id) == list(range(1, 21))


def test_a_store_that_forgot_the_run_gets_all_of_it_again(store_uri: str, tmp_path: Path) -> None:
    database = Path(store_uri.removeprefix("sqlite:///"))
    empty = database.read_bytes()
    first = start(store_uri, tmp_path / "run")
    log_steps(first, range(1, 6))
    first.close("FINISHED")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mlflow.db").write_bytes(empty)
    uri = f"sqlite:///{tmp_path}/other/mlflow.db"
    first._state.update(uri=uri)  # type: ignore[attr-defined]  # the same address, as far as the run knows
    second = start(uri, tmp_path / "run")
    second.resume(5)
    log_steps(second, range(6, 8))
    second.close("FINISHED")
    assert second.run_id != first.run_id
    assert steps_of(uri, second.run_id) == list(range(1, 8))


def test_a_file_store_is_refused_with_what_to_use_instead(tmp_path: Path) -> None:
    for uri in (f"file://{tmp_path}/mlruns", str(tmp_path / "mlruns"), "./mlruns"):
        with pytest.raises(OptionError, match=r"tracking.uri: .*plain files.*sqlite:////.*http://"):
            start(uri, tmp_path / "run")
    with pytest.raises(OptionError, match="names no database file"):
        start("sqlite://", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ranks_but_the_first_stay_silent(tmp_path: Path) -> None:
    tracking: Mlflow = mlflow_tracking(f"sqlite:///{tmp_path}/mlflow.db")
    assert isinstance(tracking.open(run_folder=tmp_path / "run", config={}, is_main=False), SilentTracker)
    assert os.listdir(tmp_path) == []


def test_a_sweep_runs_until_its_last_child_ends_and_fails_if_one_does(store_uri, tmp_path):
    parent = mlflow_tracking(store_uri).create(run_folder=tmp_path / "sweep", config={})
    assert parent is not None
    tags = {"mlflow.parentRunId": parent.run_id, "sweep.children": "2"}

    def child(name: str, status: str) -> str:
        tracker = start(store_uri, tmp_path / name, tags=tags)
        tracker.resume(0)
        log_steps(tracker, range(1, 3))
        tracker.close(status)
        return client_of(store_uri).get_run(parent.run_id).info.status

    assert client_of(store_uri).get_run(parent.run_id).info.status == "SCHEDULED"
    assert child("0", "FAILED") == "RUNNING"
    assert child("1", "FINISHED") == "FAILED"
    assert child("0", "FINISHED") == "FINISHED"  # tried again


def test_a_child_is_sent_though_somebody_has_deleted_the_run_of_its_sweep(store_uri, tmp_path):
    parent = mlflow_tracking(store_uri).create(run_folder=tmp_path / "sweep", config={})
    client_of(store_uri).delete_run(parent.run_id)
    tracker = start(store_uri, tmp_path / "child", tags={"mlflow.parentRunId": parent.run_id, "sweep.children": "1"})
    log_steps(tracker, range(1, 4))
    tracker.close("FINISHED")
    assert steps_of(store_uri, tracker.run_id) == [1, 2, 3]
    assert client_of(store_uri).get_run(tracker.run_id).info.status == "FINISHED"
