"""MLflow gets a copy of the run folder, from a background thread that can fail, hang or lag without training noticing.

The thread follows `log.jsonl` and sends whole records, in step order. The metric `step` closes every record, so its latest value in the
store is the last step that the store has: at the start and after every failed send it is read back, and nothing at or below it is ever
sent. Together with the record's own time stamp (an SQL store ignores a point that it already has) this gives every step exactly once,
also when a killed run replays steps that were sent before, or when a send that timed out had arrived after all.

MLflow is imported by the thread, after the first record: the import takes seconds, and by then the loader's workers exist. A fork waits for
an import in progress, because a child would inherit the import's locks.
"""

import concurrent.futures.thread  # noqa: F401  # has fork hooks too; imported while a fork waits for us, they would run by halves
import fcntl
import logging
import math
import os
import posixpath
import re
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esvit.errors import OptionError
from esvit.tracking.base import (
    LOG_NAME,
    CreatedRun,
    LocalTracker,
    SilentTracker,
    Status,
    Tracker,
    evaluated_metrics,
    milliseconds_now,
    prepare_folder,
)
from esvit.tracking.files import FolderLock
from esvit.tracking.log import RESERVED, Record, read_records
from esvit.tracking.state import STATE_NAME, RunState, StateFile

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_POLL_SECONDS = 2.0  # how often the thread looks for something to send
_LONGEST_PAUSE_SECONDS = 60.0  # between attempts to reach a store that does not answer
_LAST_ATTEMPTS = 2  # after `close`
_READ_BYTES = 1_000_000
_METRICS_PER_CALL = 1000  # MLflow's limits, also the next four
_PARAMS_PER_CALL = 100
_NAME_LENGTH = 250
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_MOST_CHILDREN = 50_000
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # what MLflow says of a run that was deleted
PARENT_TAG = "mlflow.parentRunId"  # nests a run below another on MLflow's pages
CHILDREN_TAG = "sweep.children"  # how many there are, where each tells the parent's run of its beginning and end

_warnings = logging.getLogger(__name__)
_importing = threading.RLock()
os.register_at_fork(before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release)


def _set_mlflow_environment() -> None:
    """Short waits, no telemetry and no chatter; what the user has set stays."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }.items():
        os.environ.setdefault(name, value)


def _import_mlflow(uri: str) -> None:
    """Import everything that sending to `uri` needs, while no fork can happen."""
    with _importing:
        import mlflow.entities
        import mlflow.tracking  # noqa: F401

        if not uri.startswith("http"):
            import alembic.command  # noqa: F401
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line per retry; we say once what is wrong


def check_uri(uri: str) -> str:
    """The address with an absolute path. Raises OptionError for a store that MLflow no longer keeps in plain files."""
    remedy = "use a database ('sqlite:////data/outputs/mlflow.db') or a server ('http://host:5000')"
    if uri.startswith("file:") or not ("://" in uri or uri == "databricks"):
        raise OptionError("tracking.uri", f"{uri!r} is a folder of plain files, which MLflow no longer supports", remedy)
    if uri.startswith("sqlite:"):
        path = uri.removeprefix("sqlite:///")
        if path in ("", ":memory:", uri):
            raise OptionError("tracking.uri", f"{uri!r} names no database file", remedy)
        return f"sqlite:///{os.path.abspath(path)}"
    return uri.rstrip("/")


def _mlflow_program() -> str:
    """What to type for the `mlflow` of this environment, which need not be an active one."""
    beside_python = Path(sys.executable).with_name("mlflow")
    if shutil.which("mlflow") is not None or not beside_python.exists():
        return "mlflow"
    here = Path.cwd()
    return str(beside_python.relative_to(here) if beside_python.is_relative_to(here) else beside_python)


def _database(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@contextmanager
def _schema_lock(uri: str) -> Iterator[None]:
    """One process at a time may find a database without tables: two that create them leave it broken for good.

    `flock`, unlike the run folder's lock, also keeps apart two threads of one process.
    """
    database = _database(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            sqlite3.connect(database, timeout=5).close()  # fails at once where MLflow would retry for minutes
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _mlflow_name(name: str) -> str:
    """The nearest name that MLflow accepts."""
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).lstrip("/.")[:_NAME_LENGTH] or "_"


def one_line(error: BaseException) -> str:
    """What went wrong, in one line: the network's or the database's own words where it was theirs, else MLflow's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError | sqlite3.Error) and cause.__context__ is None:
            error = cause
        cause = cause.__context__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


class RunSender:
    """One run's way into one store. Every method talks to the store and raises whatever MLflow raises; `connect` comes first."""

    def __init__(self, state: StateFile):
        self._file = state
        self._folder = state.folder
        self._client: MlflowClient | None = None
        self._shown: dict[str, float] = {}  # latest value of each metric in the store when we connected

    def connect(self, *, is_live: bool) -> None:
        """Find the run or create it, tell its params and tags, and read the last step that the store has."""
        state = self._file.state
        assert state.uri is not None
        _import_mlflow(state.uri)
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        with _schema_lock(state.uri):
            client = MlflowClient(tracking_uri=state.uri, registry_uri=state.uri)
            experiment_id = state.experiment_id or self._experiment(client)
        run = self._run(client, experiment_id)
        run_id = run.info.run_id
        params = {_mlflow_name(key): value[:_PARAM_LENGTH] for key, value in state.params.items()}
        missing = [Param(key, value) for key, value in params.items() if key not in run.data.params]  # none can change
        for start in range(0, len(missing), _PARAMS_PER_CALL):
            client.log_batch(run_id, params=missing[start : start + _PARAMS_PER_CALL], synchronous=True)
        tags = {_mlflow_name(key): value[:_TAG_LENGTH] for key, value in state.tags.items()}
        if changed := [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]:
            client.log_batch(run_id, tags=changed, synchronous=True)
        if is_live and run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
        if is_live:
            self._tell_sweep(client, run.info.experiment_id)
        self._shown = dict(run.data.metrics)
        self._client = client
        self._file.update(
            run_id=run_id,
            experiment_id=run.info.experiment_id,
            status_sent="RUNNING" if is_live else run.info.status,
            last_step=int(self._shown.get("step", 0)),
        )

    def _experiment(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException

        state = self._file.state
        if (experiment := client.get_experiment_by_name(state.experiment_name)) is not None:
            return experiment.experiment_id
        database = _database(state.uri or "")
        location = (database.parent / "mlartifacts").as_uri() if database else None
        try:
            return client.create_experiment(state.experiment_name, artifact_location=location)
        except MlflowException:
            if (experiment := client.get_experiment_by_name(state.experiment_name)) is None:
                raise
            return experiment.experiment_id  # another run was faster

    def _run(self, client: "MlflowClient", experiment_id: str) -> "Run":
        from mlflow.exceptions import MlflowException

        state = self._file.state
        if state.run_id is not None:
            try:
                return client.get_run(state.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                _warnings.warning("tracking: %s no longer knows run %s; everything is sent to a new one", state.uri, state.run_id)
                self._file.update(run_id=None, experiment_id=None, artifacts_sent={path: [] for path in state.artifacts}, final_sent=False)
                experiment_id = self._experiment(client)
        # A process that died between the creation of its run and the note of it left a run that only its tag gives away.
        if found := client.search_runs([experiment_id], f"tags.run_folder_id = '{state.folder_id}'", max_results=1):
            return found[0]
        tags = {"run_folder_id": state.folder_id}
        created = client.create_run(experiment_id, start_time=state.start_time, tags=tags, run_name=state.run_name)
        self._file.update(run_id=created.info.run_id, experiment_id=experiment_id)
        return created

    def send_records(self, records: list[Record]) -> int:
        """Send those after the store's last step, as many whole records per call as fit; returns how many were sent."""
        from mlflow.entities import Metric

        sent = 0
        batch: list[Metric] = []
        batch_end = 0  # the step of the last record in the batch
        batch_records = 0
        for record in records:
            step = record["step"]
            if step <= self._file.state.last_step:
                continue
            milliseconds = int(record["time"] * 1000)
            values = {name: value for name, value in record.items() if name not in RESERVED}
            points = [Metric(_mlflow_name(name), value, milliseconds, step) for name, value in values.items()]
            points += [Metric("epoch", record["epoch"], milliseconds, step), Metric("step", step, milliseconds, step)]
            if batch and len(batch) + len(points) > _METRICS_PER_CALL:
                self._send_batch(batch, batch_end)
                sent += batch_records
                batch, batch_records = [], 0
            batch += points
            batch_end = step
            batch_records += 1
        if batch:
            self._send_batch(batch, batch_end)
        return sent + batch_records

    def _send_batch(self, batch: "list[Metric]", last_step: int) -> None:
        client, run_id = self._connected()
        for start in range(0, len(batch), _METRICS_PER_CALL):
            client.log_batch(run_id, metrics=batch[start : start + _METRICS_PER_CALL], synchronous=True)
        self._file.update(last_step=last_step)

    def send_files_and_final(self) -> None:
        """Upload new and changed artifacts, and the final metrics that the store does not show yet."""
        from mlflow.entities import Metric

        client, run_id = self._connected()
        state = self._file.state
        for name, folder in list(state.artifacts.items()):
            path = self._folder / name
            if not path.is_file():
                continue
            seen = path.stat()
            version = [seen.st_size, seen.st_mtime_ns]
            if state.artifacts_sent.get(name) != version:
                client.log_artifact(run_id, str(path), folder or None)
                self._file.update(artifacts_sent={name: version})
        if not state.final_sent:
            final, step, milliseconds = state.final, state.final_step, state.final_time
            values = {_mlflow_name(f"final/{name}"): float(value) for name, value in final.items()}
            points = [Metric(name, value, milliseconds, step) for name, value in values.items() if not self._shows(name, value)]
            for start in range(0, len(points), _METRICS_PER_CALL):
                client.log_batch(run_id, metrics=points[start : start + _METRICS_PER_CALL], synchronous=True)
            self._file.update(final_sent=final is state.final)
        self._send_to_host(client, run_id)

    def _send_to_host(self, client: "MlflowClient", run_id: str) -> None:
        """Final metrics into the run of the pre-training that was evaluated, at the step of the weights; this run becomes its child.

        A host that the store does not know yet is left for the next time, at the latest for `task=sync`.
        """
        from mlflow.entities import Metric

        state = self._file.state
        if state.host is None or state.host_run_id is not None or not state.final:
            return
        host = StateFile.open(Path(state.host), now_milliseconds=0).state
        if host.run_id is None or host.uri != state.uri:
            return
        metrics = evaluated_metrics(state.final)
        points = [Metric(_mlflow_name(name), float(value), state.final_time, state.host_step) for name, value in metrics.items()]
        for start in range(0, len(points), _METRICS_PER_CALL):
            client.log_batch(host.run_id, metrics=points[start : start + _METRICS_PER_CALL], synchronous=True)
        client.set_tag(run_id, PARENT_TAG, host.run_id)
        self._file.update(host_run_id=host.run_id)

    def _shows(self, name: str, value: float) -> bool:
        shown = self._shown.get(name)
        return shown is not None and (shown == value or (math.isnan(shown) and math.isnan(value)))

    def send_status(self) -> None:
        """Tell the store how the run ended."""
        client, run_id = self._connected()
        state = self._file.state
        if state.status == "SCHEDULED":
            client.update_run(run_id, status=state.status)
        elif state.status != state.status_sent:
            client.set_terminated(run_id, status=state.status, end_time=state.end_time)
            self._tell_sweep(client, str(state.experiment_id))
        if state.status != state.status_sent:
            self._file.update(status_sent=state.status)

    def _tell_sweep(self, client: "MlflowClient", experiment_id: str) -> None:
        """The parent of a sweep whose children start and end by themselves runs until the last has ended, and fails if one has."""
        from mlflow.exceptions import MlflowException

        parent, count = (self._file.state.tags.get(tag) for tag in (PARENT_TAG, CHILDREN_TAG))
        if parent is None or count is None:
            return
        children = client.search_runs([experiment_id], f"tags.`{PARENT_TAG}` = '{parent}'", max_results=_MOST_CHILDREN)
        ended = [child.info.status for child in children if child.info.status in ("FINISHED", "FAILED", "KILLED")]
        try:
            if len(ended) < int(count):
                client.update_run(parent, status="RUNNING")
            else:
                client.set_terminated(parent, status="FINISHED" if set(ended) == {"FINISHED"} else "FAILED")
        except MlflowException as error:
            if error.error_code not in _GONE:
                raise

    def _connected(self) -> "tuple[MlflowClient, str]":
        assert self._client is not None and self._file.state.run_id is not None, "connect() comes first"
        return self._client, self._file.state.run_id


class MlflowTracker(LocalTracker):
    """A LocalTracker whose folder is copied to an MLflow store by a background thread."""

    def __init__(self, *, run_folder: Path, lock: FolderLock, state: StateFile, close_timeout_seconds: float):
        super().__init__(run_folder=run_folder, lock=lock, state=state)
        self._close_timeout_seconds = close_timeout_seconds
        self._sender = RunSender(state)
        self._offset = 0  # everything before it in log.jsonl has arrived
        self._rewinds = 0  # how often the offset was set back
        self._offset_lock = threading.Lock()
        self._news = threading.Event()  # there is something to send; never set before the first record or the end
        self._closing = threading.Event()
        self._abandoned = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="esvit-tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:  # type: ignore[override]
        return self._state.state.run_id

    @property
    def run_url(self) -> str | None:  # type: ignore[override]
        return _page(self._state.state)

    @property
    def view_command(self) -> str | None:  # type: ignore[override]
        uri = self._state.state.uri or ""
        return None if uri.startswith("http") else f"{_mlflow_program()} ui --backend-store-uri {uri}"

    def resume(self, step: int) -> None:
        with self._offset_lock:
            super().resume(step)
            self._offset = 0
            self._rewinds += 1

    def log(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        super().log(step, epoch, metrics)
        self._news.set()

    def artifact(self, path: Path, folder: str = "") -> None:
        super().artifact(path, folder)
        if self._log.last_step > 0:
            self._news.set()

    def final(self, metrics: Mapping[str, float], step: int) -> None:
        super().final(metrics, step)
        self._news.set()

    def close(self, status: Status) -> None:
        if self._closing.is_set():
            return
        self._state.update(status=status, end_time=milliseconds_now())
        self._closing.set()
        self._thread.join(self._close_timeout_seconds)
        self._abandoned = True
        self._log.close()
        state = self._state.state
        if self._thread.is_alive() or state.status_sent != status:
            unsent = sum(record["step"] > state.last_step for record in self.records())
            message = "tracking: %d records are not in %s yet (%s); `python run.py task=sync output_dir=%s` sends what is missing"
            _warnings.warning(message, unsent, state.uri, self._failure or "it is too slow", self.run_folder)

    def _run(self) -> None:
        """The thread: send when there is news, pause longer and longer while the store fails, try twice more at the end."""
        pause, last_attempts, is_connected = _POLL_SECONDS, 0, False
        try:
            while not self._abandoned:
                closing = self._closing.wait(pause)
                if not closing and not self._news.is_set():
                    continue
                self._news.clear()
                try:
                    if not is_connected:
                        self._sender.connect(is_live=True)
                        is_connected = True
                        with self._offset_lock:
                            self._offset = 0  # the store says what it has; it may be less than it once confirmed
                    self._send(closing)
                except Exception as error:  # whatever a store or MLflow can raise: training must not hear of it
                    if self._failure is None and not self._abandoned:
                        message = "tracking: cannot send to %s (%s); training goes on, %s keeps everything, retrying"
                        _warnings.warning(message, self._state.state.uri, one_line(error), LOG_NAME)
                    self._failure, is_connected = one_line(error), False
                    self._news.set()
                    pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                    last_attempts += closing
                    if last_attempts == _LAST_ATTEMPTS:
                        return
                    if last_attempts:
                        time.sleep(1.0)
                else:
                    if self._failure is not None:
                        _warnings.warning("tracking: %s answers again, nothing was lost", self._state.state.uri)
                    self._failure, pause = None, _POLL_SECONDS
                    if closing:
                        return
        finally:
            self._lock.release()

    def _send(self, closing: bool) -> None:
        while not self._abandoned:
            with self._offset_lock:
                rewinds = self._rewinds
                records, offset = read_records(self._log.path, self._offset, _READ_BYTES)
            if offset == self._offset:
                break
            self._sender.send_records(records)
            with self._offset_lock:
                if rewinds == self._rewinds:
                    self._offset = offset
        if not self._abandoned:
            self._sender.send_files_and_final()
        if closing and not self._abandoned:
            self._sender.send_status()


def client_of(uri: str) -> "MlflowClient":
    """A client of the existing store at `uri`. Raises OptionError if there is none, or it does not answer."""
    uri = check_uri(uri)
    database = _database(uri)
    if database is not None and not database.exists():
        raise OptionError("tracking.uri", f"there is no store '{database}'", "name the store that the runs were tracked in")
    _set_mlflow_environment()
    _import_mlflow(uri)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        with _schema_lock(uri):
            client.search_experiments(max_results=1)
    except Exception as error:  # whatever MLflow, the network or the database can raise
        raise OptionError("tracking.uri", f"{uri} does not answer ({one_line(error)})", "name a store that can be reached") from None
    return client


def _page(state: RunState) -> str | None:
    if state.run_id is None or not (state.uri or "").startswith("http"):
        return None
    return f"{state.uri}/#/experiments/{state.experiment_id}/runs/{state.run_id}"


def find_runs(folder: Path) -> list[Path]:
    """The run folders at or below `folder`, sorted."""
    return sorted(path.parent for path in folder.rglob(STATE_NAME))


def send_missing(run_folder: Path, *, uri: str | None) -> str:
    """Send what a run's store lacks, from a run that no process writes to; says in words what happened.

    A run that never ended (its process was killed) is ended as KILLED at its last record; resuming it sets it back to RUNNING.
    `uri` overrides the run's own store. Raises OptionError when the run has no store, and whatever MLflow raises when it cannot be reached.
    """
    lock = FolderLock(run_folder)
    if not lock.acquire(wait_seconds=0):
        return f"left alone, because {lock.holder()} writes to it and sends it"
    try:
        file = StateFile.open(run_folder, now_milliseconds=milliseconds_now())
        file.point_to(check_uri(uri or file.state.uri or _no_store(run_folder)))
        records, _ = read_records(run_folder / LOG_NAME)
        if not file.state.experiment_name:  # the run was made with tracking=none
            file.update(experiment_name="esvit")
        if file.state.status == "RUNNING":
            end_time = int(records[-1]["time"] * 1000) if records else file.state.start_time
            file.update(status="KILLED", end_time=end_time)
        _set_mlflow_environment()
        before = file.state.status_sent, file.state.final_sent, file.state.host_run_id, dict(file.state.artifacts_sent)
        sender = RunSender(file)
        sender.connect(is_live=False)
        sent = sender.send_records(records)
        sender.send_files_and_final()
        sender.send_status()
        after = file.state.status_sent, file.state.final_sent, file.state.host_run_id, dict(file.state.artifacts_sent)
        return f"sent {sent} records" if sent else "sent files or status" if before != after else "up to date"
    finally:
        lock.release()


def _no_store(run_folder: Path) -> str:
    raise OptionError("task.uri", f"{run_folder} was tracked nowhere", "name the MLflow store that should get it")


@dataclass(kw_only=True)
class Mlflow:
    """`tracking=mlflow`.

    uri                    'sqlite:////folder/mlflow.db' (artifacts go to mlartifacts beside it), a server, or another database
    experiment_name        the experiment in the store, created when missing
    run_name               what the run is called in the store; only at its creation
    tags                   more tags of the run; 'mlflow.note.content' is the description on its page
    host                   folder of the run that this one evaluates, whose run in the store gets the final metrics too, or None
    close_timeout_seconds  how long the end of a run may wait for the store
    """

    uri: str
    experiment_name: str
    run_name: str
    tags: Mapping[str, str]
    host: str | None
    close_timeout_seconds: float

    def open(self, *, run_folder: Path, config: Mapping[str, Any], is_main: bool) -> Tracker:
        """The tracker of this rank. Raises OptionError for a file store, or if another process writes to the folder."""
        check_uri(self.uri)
        if not is_main:
            return SilentTracker()
        lock, state = self._prepare(run_folder, config)
        return MlflowTracker(run_folder=run_folder, lock=lock, state=state, close_timeout_seconds=self.close_timeout_seconds)

    def create(self, *, run_folder: Path, config: Mapping[str, Any]) -> CreatedRun | None:
        """Make the run of a job that will start later, and the store's tables if need be.

        None, with a warning, if the store cannot be reached: the job makes its run itself then. Raises OptionError as `open`.
        """
        check_uri(self.uri)
        lock, state = self._prepare(run_folder, config)
        try:
            state.update(status="SCHEDULED")
            sender = RunSender(state)
            sender.connect(is_live=False)
            sender.send_status()
        except Exception as error:  # whatever a store or MLflow can raise: the job must be submitted all the same
            _warnings.warning("tracking: cannot send to %s (%s); the job will try again", state.state.uri, one_line(error))
        finally:
            lock.release()
        run_id = state.state.run_id
        return CreatedRun(run_id, _page(state.state)) if run_id is not None else None

    def withdraw(self, *, run_folder: Path) -> None:
        """Take the run that `create` made out of the store again, since its job will not start; if need be with a warning instead."""
        state = StateFile.open(run_folder, now_milliseconds=0)
        if state.state.run_id is None:
            return
        try:
            client_of(self.uri).delete_run(state.state.run_id)
        except Exception as error:  # whatever a store or MLflow can raise
            _warnings.warning("tracking: run %s stays in %s (%s)", state.state.run_id, state.state.uri, one_line(error))

    def _prepare(self, run_folder: Path, config: Mapping[str, Any]) -> tuple[FolderLock, StateFile]:
        _set_mlflow_environment()
        return prepare_folder(
            run_folder=run_folder,
            config=config,
            uri=check_uri(self.uri),
            experiment_name=self.experiment_name,
            run_name=self.run_name,
            tags=self.tags,
            host=self.host,
        )
