"""How the jobs of a run or a sweep are: their states by the scheduler or by their own history, how far they are, and what they failed with.

Answers within a second or two: squeue and sacct are asked once each, logs are read from their ends, nothing heavy is imported.
"""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers import scheduler
from launchers.history import History, is_alive, this_process
from launchers.scheduler import JobState
from launchers.submission import Entry, JobsFile, Submission, find

_ACTIVE = {
    "PENDING",
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "SIGNALING",
    "STAGE_OUT",
}
_ACTIVE |= {"RESIZING", "STOPPED", "RESV_DEL_HOLD", "REQUEUE_FED"}
_STOPPED = {128 + number: number.name for number in (signal.SIGINT, signal.SIGTERM)}
_TAIL_BYTES = 100_000
_METRICS_SHOWN = 2  # of an evaluation


@dataclass(frozen=True)
class JobStatus:
    """state     in SLURM's words: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ...
    detail    why it waits, or how it ended
    restarts  how often the job was started again: preemption, time limit, node failure
    record    the last line of its log.jsonl, or None
    error     the last line of what the first rank to fail said, or None
    """

    entry: Entry
    state: str
    detail: str
    restarts: int
    record: dict[str, Any] | None
    error: str | None

    @property
    def step(self) -> int | None:
        return None if self.record is None else int(self.record["step"])

    @property
    def is_active(self) -> bool:
        """Waiting or running."""
        return self.state in _ACTIVE

    @property
    def has_finished(self) -> bool:
        return self.state == "COMPLETED"


def states(folder: str | Path) -> list[JobStatus]:
    """Every job of a run folder or sweep folder; empty if none was submitted for it."""
    selection = find(folder)
    if selection is None:
        return []
    content = selection.file.read()
    entries = selection.entries()
    is_slurm = content.launcher["kind"] == "slurm"
    found = _by_scheduler(selection.file, entries) if is_slurm else _by_history(selection.file, content, entries)
    return [_status(selection.file, entry, found[entry.name]) for entry in entries]


def of_folder(folder: Path) -> str | None:
    """One line about a run that was started without a submission; None if there is none."""
    if not (folder / "config.yaml").exists():
        return None
    record = _last_record(folder)
    how_far = "no step logged yet" if record is None else _describe(record)
    if (folder / "metrics.json").exists():
        return f"finished, {how_far}"
    error = _error(folder, None)
    return f"not finished, {how_far}" + (f", {error}" if error else "")


def table(found: Sequence[JobStatus]) -> list[str]:
    """One line per job, errors below it."""
    rows = [(each.entry.name, each.entry.id or "-", each.state, _remarks(each)) for each in found]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = []
    for each, row in zip(found, rows, strict=True):
        lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip())
        if each.error is not None:
            lines.append(f"    {each.error}")
    return lines


def summary(found: Sequence[JobStatus]) -> str:
    """How many jobs are in which state: "3 COMPLETED, 1 RUNNING"."""
    names = [each.state for each in found]
    return ", ".join(f"{names.count(state)} {state}" for state in dict.fromkeys(names))


def _by_scheduler(file: JobsFile, entries: Sequence[Entry]) -> dict[str, JobState]:
    active = scheduler.active_jobs()
    ended = scheduler.ended_jobs(entry.id for entry in entries if entry.id and entry.id not in active)
    return {entry.name: active.get(entry.id or "") or _outside_of_the_queue(file, entry, ended.get(entry.id or "")) for entry in entries}


def _outside_of_the_queue(file: JobsFile, entry: Entry, accounted: JobState | None) -> JobState:
    """What is known of a job that squeue does not show; accounting may not have heard of its end yet, or know nothing of it."""
    if entry.id is None:
        return JobState("NOT SUBMITTED", "")
    if accounted is not None and accounted.state not in _ACTIVE:
        return accounted
    events = file.history(entry.name).of(entry.id)
    has_ended = bool(events) and events[-1]["event"] == "ended"
    if has_ended and (accounted is None or events[-1]["code"] == 0):
        return _ended(events[-1]["code"])
    if accounted is not None:
        return JobState("COMPLETING", "")
    return JobState("UNKNOWN", "SLURM does not know it any more" if scheduler.is_here() else "there is no SLURM here to ask")


def _by_history(file: JobsFile, content: Submission, entries: Sequence[Entry]) -> dict[str, JobState]:
    """States of jobs that no scheduler knows; those that follow a main job depend on its state."""
    found = {entry.name: _own_state(file.history(entry.name), entry, content) for entry in content.jobs}
    for entry in content.jobs:
        main_state = found[entry.of].state if entry.of else ""
        if found[entry.name].state == "PENDING" and main_state in ("FAILED", "CANCELLED"):
            found[entry.name] = JobState("CANCELLED", f"{entry.of} did not succeed")
    return {entry.name: found[entry.name] for entry in entries}


def _own_state(history: History, entry: Entry, content: Submission) -> JobState:
    events = history.of(entry.id)
    if entry.id is None:
        return JobState("NOT SUBMITTED", "")
    if not events:
        may_start = content.launcher["kind"] == "command" or (content.process is not None and _may_live(content.process))
        if may_start:
            return JobState("PENDING", "")
        return JobState("CANCELLED", "never started")
    if events[-1]["event"] == "ended":
        return _ended(events[-1]["code"])
    return JobState("RUNNING", f"on {events[-1]['host']}") if _may_live(events[-1]) else JobState("FAILED", "its process is gone")


def _may_live(process: dict[str, Any]) -> bool:
    return process["host"] != this_process()["host"] or is_alive(process)


def _ended(code: int) -> JobState:
    if code == 0:
        return JobState("COMPLETED", "")
    return JobState("CANCELLED", f"by {_STOPPED[code]}") if code in _STOPPED else JobState("FAILED", f"exit code {code}")


def _status(file: JobsFile, entry: Entry, found: JobState) -> JobStatus:
    events = file.history(entry.name).of(entry.id)
    started = [event for event in events if event["event"] == "started"]
    since = float(started[-1].get("launched", started[-1]["time"])) if started else None
    has_failed = found.state not in _ACTIVE | {"COMPLETED", "CANCELLED", "NOT SUBMITTED"}
    error = _error(Path(entry.folder), since)
    if error is None and has_failed and started:
        error = _last_line(log_file(entry, 0))
    return JobStatus(entry, found.state, found.detail, max(0, len(started) - 1), _last_record(Path(entry.folder)), error)


def log_file(entry: Entry, rank: int) -> Path | None:
    return Path(entry.log.replace("%t", str(rank))) if entry.log else None


def _error(folder: Path, since: float | None) -> str | None:
    """What the first rank to fail said, of the attempt that began at `since`.

    A traceback says it in its last line, the report of a stall in its first.
    """
    found = [(path.stat().st_mtime, path) for path in folder.glob("errors/*.txt")]
    recent = sorted((time, path) for time, path in found if since is None or time >= since - 1)
    if not recent:
        return None
    first = recent[0][1]
    others = f", {len(recent) - 1} more in {first.parent}" if len(recent) > 1 else ""
    said = _lines(first)[0 if first.name.startswith("stall_") else -1 :][:1]
    return f"{said[0] if said else 'empty'} ({first}{others})"


def _remarks(status: JobStatus) -> str:
    parts = [f"({status.detail})"] if status.detail else []
    if status.restarts:
        parts.append(f"restarts {status.restarts}")
    if status.entry.role == "main" and status.record is not None:
        parts.append(_describe(status.record))
    if status.entry.role != "main":
        parts += _results(Path(status.entry.folder))
    return "  ".join(parts)


def _results(folder: Path) -> list[str]:
    """The first metrics of a finished evaluation: "knn/top1_k10 61.2"."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError):
        return []
    numbers = [(name, value) for name, value in metrics.items() if "/" in name and isinstance(value, int | float)]
    return [f"{name} {value:.4g}" for name, value in numbers[:_METRICS_SHOWN]]


def _describe(record: dict[str, Any]) -> str:
    """How far a run is, by the last record of its log."""
    described = f"step {record['step']}  epoch {record['epoch']}"
    loss = record.get("loss/total")
    return f"{described}  loss {loss:.4g}" if isinstance(loss, float) else described


def _last_record(folder: Path) -> dict[str, Any] | None:
    for line in reversed(_tail(folder / "log.jsonl").splitlines()):
        try:
            record = json.loads(line)
        except ValueError:  # cut short by a kill, or by the size of the tail
            continue
        if isinstance(record, dict) and "step" in record and "epoch" in record:
            return record
    return None


def _last_line(path: Path | None) -> str | None:
    lines = _lines(path) if path is not None else []
    return lines[-1] if lines else None


def _lines(path: Path) -> list[str]:
    return [line.strip()[:300] for line in _tail(path).splitlines() if line.strip()]


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
