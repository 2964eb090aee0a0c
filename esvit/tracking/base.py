"""What a task may do with its results, and the two trackers that need no server.

A run folder gets `log.jsonl` (every record), `metrics.json` (final metrics), `git.diff` (uncommitted changes, if any) and `tracking.json`
(what an MLflow store must be told). Only rank 0 writes; the other ranks hold a `SilentTracker`, so no task ever asks for its rank.

A run that evaluates another one (its host) also adds its final metrics to the host's `evaluations.jsonl`, at the step of the weights that
it evaluated, and to the host's run in the store.

A task calls `resume` once with the step that it starts from (0 for a new run), then `log` with growing steps, and `close` at the end.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from esvit.errors import OptionError
from esvit.tracking.environment import SourceState, environment_tags, flatten, source_state
from esvit.tracking.files import FolderLock, replace_file
from esvit.tracking.log import LogFile, Record, encode_number, read_records
from esvit.tracking.state import StateFile

Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]  # of a run that ends, or waits for jobs
LOG_NAME = "log.jsonl"
METRICS_NAME = "metrics.json"
DIFF_NAME = "git.diff"
EVALUATIONS_NAME = "evaluations.jsonl"  # one object per evaluation: {"step", "task", "time", "folder", metric: value, ...}
EVALUATED_STEP = "evaluated_step"  # the final metric that says which step's weights an evaluation saw
_LOCK_SECONDS = 10.0  # how long the previous process of a killed and restarted run may take to disappear


class Tracker(Protocol):
    @property
    def run_id(self) -> str | None:
        """The run's id in its store, once the store gave one."""

    @property
    def run_url(self) -> str | None:
        """The run's page, once there is one (http stores only)."""

    @property
    def view_command(self) -> str | None:
        """The command that shows the store in a browser; None where there is no store or the store is a server."""

    def resume(self, step: int) -> None:
        """Forget the records after `step`: they will be logged again."""

    def log(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Record flat "group/name" metrics after `step` completed optimizer steps. ValueError if the step does not grow."""

    def records(self) -> list[Record]:
        """Every record so far, in step order: {"step", "epoch", "time", metric: value, ...}."""

    def sync_to_disk(self) -> None:
        """Make the log survive a loss of power. Called before a checkpoint is renamed, so that no checkpoint is ahead of the log."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Remember a file of the run folder, to be stored under `folder`; call again after changing it."""

    def final(self, metrics: Mapping[str, float], step: int) -> None:
        """Write `metrics.json`; a store shows the values as metrics `final/<name>` at `step`."""

    def close(self, status: Status) -> None:
        """End the run. Waits a bounded time for a store, and never fails because of one."""


@dataclass(frozen=True)
class CreatedRun:
    """A run in a store that a job will fill later; `url` is its page where the store has one."""

    run_id: str
    url: str | None


class SilentTracker:
    """Does nothing: every rank but 0."""

    run_id: str | None = None
    run_url: str | None = None
    view_command: str | None = None

    def resume(self, step: int) -> None:
        pass

    def log(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        pass

    def records(self) -> list[Record]:
        return []

    def sync_to_disk(self) -> None:
        pass

    def artifact(self, path: Path, folder: str = "") -> None:
        pass

    def final(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def close(self, status: Status) -> None:
        pass


class LocalTracker:
    """Keeps everything in the run folder and sends nothing; `task=sync task.uri=...` can still send it later."""

    run_id: str | None = None
    run_url: str | None = None
    view_command: str | None = None

    def __init__(self, *, run_folder: Path, lock: FolderLock, state: StateFile):
        self.run_folder = run_folder
        self._lock = lock
        self._state = state
        self._log = LogFile(run_folder / LOG_NAME)

    def resume(self, step: int) -> None:
        self._log.keep_up_to(step)

    def log(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        self._log.append(step=step, epoch=epoch, time=round(time.time(), 3), metrics=metrics)

    def records(self) -> list[Record]:
        return read_records(self._log.path)[0]

    def sync_to_disk(self) -> None:
        self._log.sync_to_disk()

    def artifact(self, path: Path, folder: str = "") -> None:
        relative = path.absolute().relative_to(self.run_folder.absolute())
        self._state.update(artifacts={str(relative): folder})

    def final(self, metrics: Mapping[str, float], step: int) -> None:
        encoded = {name: encode_number(value) for name, value in metrics.items()}
        replace_file(self.run_folder / METRICS_NAME, json.dumps(encoded, indent=1).encode() + b"\n")
        if (encoded, step) != (self._state.state.final, self._state.state.final_step):
            self._state.update(final=encoded, final_step=step, final_time=milliseconds_now(), final_sent=False)
            self._tell_host(encoded)
        self.artifact(self.run_folder / METRICS_NAME)

    def _tell_host(self, metrics: dict[str, Any]) -> None:
        """A line in the host's folder; a reader takes the last one of each evaluation's folder."""
        state = self._state.state
        if state.host is None:
            return
        step = int(metrics.get(EVALUATED_STEP, 0))
        self._state.update(host_step=step, host_run_id=None)
        task = state.params.get("choices.task", "")
        record = {"step": step, "task": task, "time": state.final_time / 1000, "folder": str(self.run_folder)}
        with (Path(state.host) / EVALUATIONS_NAME).open("ab", buffering=0) as file:  # one write: appended whole
            file.write(json.dumps(record | evaluated_metrics(metrics)).encode() + b"\n")

    def close(self, status: Status) -> None:
        self._state.update(status=status, end_time=milliseconds_now())
        self._log.close()
        self._lock.release()


def evaluated_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The final metrics that say something of the evaluated weights: those with a group in their name."""
    return {name: value for name, value in metrics.items() if "/" in name}


def _where_from(source: SourceState | None, before: Mapping[str, str]) -> dict[str, str]:
    """Tags of the environment; a job that runs from a copy of the code keeps the commit that was noted when it was submitted."""
    tags = environment_tags(source)
    return tags if source else tags | {name: value for name, value in before.items() if name.startswith("git.")}


def milliseconds_now() -> int:
    return int(time.time() * 1000)


def prepare_folder(
    *,
    run_folder: Path,
    config: Mapping[str, Any],
    uri: str | None,
    experiment_name: str,
    run_name: str,
    tags: Mapping[str, str],
    host: str | None,
) -> tuple[FolderLock, StateFile]:
    """Lock a run folder and write down what a store must be told. Raises OptionError if another process writes to the folder."""
    run_folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(run_folder)
    if not lock.acquire(wait_seconds=_LOCK_SECONDS):
        raise OptionError("output_dir", f"{lock.holder()} is writing to {run_folder}", "wait until it has ended, or choose another folder")
    state = StateFile.open(run_folder, now_milliseconds=milliseconds_now())
    source = source_state(Path(__file__))
    state.point_to(uri)
    state.update(
        experiment_name=experiment_name,
        run_name=run_name,
        params=flatten(config),
        tags={
            **_where_from(source, state.state.tags),
            **tags,
            "run_folder": str(run_folder.absolute()),
            "run_folder_id": state.state.folder_id,
        },
        host=str(Path(host).absolute()) if host else None,
        status="RUNNING",
        end_time=None,
    )
    if source and source.dirty:
        replace_file(run_folder / DIFF_NAME, source.diff)
        state.update(artifacts={DIFF_NAME: ""})
    return lock, state


@dataclass(kw_only=True)
class NoTracking:
    """`tracking=none`: the run folder only, and that of the run that is evaluated (`host`), if any."""

    host: str | None

    def open(self, *, run_folder: Path, config: Mapping[str, Any], is_main: bool) -> Tracker:
        """The tracker of this rank. Raises OptionError if another process writes to the folder."""
        if not is_main:
            return SilentTracker()
        lock, state = prepare_folder(
            run_folder=run_folder, config=config, uri=None, experiment_name="", run_name=run_folder.name, tags={}, host=self.host
        )
        return LocalTracker(run_folder=run_folder, lock=lock, state=state)

    def create(self, *, run_folder: Path, config: Mapping[str, Any]) -> None:
        """There is no store to tell of a job that will start later."""

    def withdraw(self, *, run_folder: Path) -> None:
        """Nor of one that will not start."""
