"""The children of a sweep on this machine: a process each, so many at a time, each with its share of the GPUs.

A child that fails stops no other. The children end with this process, however it ends.
"""

import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers import status, submission
from launchers.history import is_alive, this_process
from launchers.job import Job
from launchers.submission import Entry, JobsFile, saved_teachers

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def in_order(job: Job, then: Sequence[Job], saved: Job | None) -> Iterator[Job]:
    """A run, the evaluations of the teachers that it has saved by then, and those that come after it; finished evaluations are left out."""
    yield job
    if saved is not None:
        for teacher in saved_teachers(job.folder):
            evaluation = saved.filled(teacher=str(teacher.path), step=teacher.step)
            if not has_finished(evaluation):
                yield evaluation
    yield from (each for each in then if not has_finished(each))


def has_finished(job: Job) -> bool:
    return Path(job.folder, "metrics.json").exists()


def run_array(
    launcher: Any,
    jobs: Sequence[Job],
    *,
    names: Sequence[str],
    folder: str | Path,
    then: Sequence[Sequence[Job]],
    saved: Sequence[Job],
    gpus_each: int,
) -> None:
    """Write down the children of a sweep and run them; ends this process with exit code 1 if one of them fails."""
    mains = submission.children(jobs, names, then, saved)
    refuse_active(JobsFile(folder))
    slots(launcher.parallel, gpus_each)  # refuses what cannot be, before anything is written
    file = submission.prepare(folder, mains, launcher=submission.options_of(launcher), process=this_process())
    run(file, names, parallel=launcher.parallel, gpus_each=gpus_each)


def run(file: JobsFile, names: Sequence[str], *, parallel: int, gpus_each: int) -> None:
    """Run these jobs of `file` (main ones with what follows them), `parallel` at once, each with `gpus_each` GPUs where there are any.

    Ends this process with 1 if one fails, and with 128 + signal number if a signal ends them all.
    """
    pool = _Pool(file, slots(parallel, gpus_each))
    _begin(file, names)
    handlers = {number: signal.signal(number, lambda number, _: pool.stop(number)) for number in _FORWARDED}
    try:
        pool.run(list(names))
    finally:
        pool.send(signal.SIGKILL)
        with file.changing() as content:
            content.process = None
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print("\n".join(status.table(status.states(file.folder))), flush=True)
    if pool.signal:
        sys.exit(128 + pool.signal)
    if pool.failed:
        sys.exit(f"error: {len(pool.failed)} of {len(names)} failed; python -m launchers retry-failed {file.folder} starts them again")


@dataclass
class _Child:
    name: str
    slot: int
    process: subprocess.Popen


class _Pool:
    """The children at work, one to a slot."""

    def __init__(self, file: JobsFile, slots: list[dict[str, str]]):
        self.file = file
        self.slots = slots
        self.signal = 0
        self.failed: list[str] = []
        self._children: list[_Child] = []

    def run(self, waiting: list[str]) -> None:
        total = len(waiting)
        while waiting or self._children:
            while waiting and len(self._children) < len(self.slots) and not self.signal:
                slot = min(set(range(len(self.slots))) - {child.slot for child in self._children})
                name = waiting.pop(0)
                self._children.append(_Child(name, slot, start(self.file, name, self.slots[slot])))
                print(f"{total - len(waiting)} of {total}  {name}  (output in {self.file.launch_folder / f'{name}.log'})", flush=True)
            if self.signal:
                waiting.clear()
            self._collect()
            time.sleep(0.05)

    def stop(self, number: int) -> None:
        """End the children, and begin no more."""
        self.signal = number
        self.send(number)

    def send(self, number: int) -> None:
        for child in self._children:
            if child.process.poll() is None:
                child.process.send_signal(number)

    def _collect(self) -> None:
        ended = [child for child in self._children if child.process.poll() is not None]
        self._children = [child for child in self._children if child not in ended]
        for child in ended:
            if code := child.process.returncode:
                self.failed.append(child.name)
                print(f"{child.name}: failed with exit code {code}", file=sys.stderr, flush=True)


def start(file: JobsFile, name: str, variables: dict[str, str]) -> subprocess.Popen:
    """Begin a job of `file`, and what follows it, in a process that ends with this one. `variables` are put into its environment."""
    environment = os.environ | variables | python_path(file.read().code)
    command = [sys.executable, "-m", "launchers.start", "--with-parent", str(file.folder), name]
    with (file.launch_folder / f"{name}.log").open("ab") as log:
        # A session of its own: Ctrl-C reaches this process only, which passes it on once.
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def python_path(code: str) -> dict[str, str]:
    """What makes a Python import from the snapshot, whatever folder it runs in."""
    paths = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}


def refuse_active(file: JobsFile) -> None:
    """End this process with one line if another one works through these children."""
    if file.path.exists() and (process := file.read().process) and is_alive(process):
        sys.exit(f"error: output_dir: process {process['pid']} still runs the jobs of {file.folder}; wait for it, or end it")


def gpus() -> list[str]:
    """The visible GPUs' numbers, by the driver's own list, so that torch need not be imported here."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [each for each in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if each]
    return [str(number) for number in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]


def slots(parallel: int, gpus_each: int) -> list[dict[str, str]]:
    """Environment variables of each child that may run at the same time: which GPUs are its own."""
    visible = gpus()
    if not visible or parallel == 1:
        return [{} for _ in range(parallel)]
    if parallel * gpus_each > len(visible):
        found = f"{parallel} runs of {gpus_each} GPUs at once need {parallel * gpus_each}, there are {len(visible)}"
        sys.exit(f"error: launcher.parallel: {found}; use {max(1, len(visible) // gpus_each)}, or fewer processes")
    shares = [visible[slot * gpus_each : (slot + 1) * gpus_each] for slot in range(parallel)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def _begin(file: JobsFile, names: Sequence[str]) -> None:
    """Give the jobs and what follows them an id, and remember which process works through them."""
    with file.changing() as content:
        content.process = this_process()
        for entry in content.jobs:
            if entry.name in names or (entry.role == "then" and entry.of in names):
                renew(entry, file)


def renew(entry: Entry, file: JobsFile) -> None:
    """A new id for a job that no scheduler names; its main job's log is its own too."""
    if entry.id is not None and entry.id not in entry.earlier:
        entry.earlier.append(entry.id)
    entry.id = datetime.datetime.now().isoformat(sep="_", timespec="milliseconds")
    entry.log = str(file.launch_folder / f"{entry.of or entry.name}.log")
