"""Several processes on this machine, one per GPU (or on CPU): what torchrun does, without composing the config in every rank.

The parent passes signals on, ends all ranks when one fails, and keeps the failures in `errors/rank_N.txt` of the run folder.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from launchers import children
from launchers.job import Job

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_SECONDS_AFTER_FAILURE = 5  # for the other ranks to fail by themselves, and leave their own tracebacks


@dataclass(kw_only=True)
class Gpus:
    """processes      how many ranks; 0 means one per visible NVIDIA GPU
    grace_seconds  how long ranks may go on, after one has ended on a signal, before they are killed
    parallel       how many children of a sweep run at once, each with so many ranks
    """

    returns_at_once: ClassVar[bool] = False
    processes: int
    grace_seconds: float
    parallel: int

    def launch(self, job: Job, *, then: Sequence[Job] = (), saved: Job | None = None) -> None:
        """Run the job, and what follows it, in every rank; ends this process with the first failing rank's exit code and message."""
        for each in children.in_order(job, then, saved):
            self._run(each)

    def launch_array(
        self,
        jobs: Sequence[Job],
        *,
        names: Sequence[str],
        folder: str | Path,
        then: Sequence[Sequence[Job]] = (),
        saved: Sequence[Job] = (),
    ) -> None:
        """Run the children to their ends; ends this process with exit code 1 if one of them failed."""
        children.run_array(self, jobs, names=names, folder=folder, then=then, saved=saved, gpus_each=self.gpus_each())

    def gpus_each(self) -> int:
        """How many GPUs one job takes."""
        return self.processes or max(1, len(children.gpus()))

    def _run(self, job: Job) -> None:
        count = self.gpus_each()
        shutil.rmtree(Path(job.folder) / "errors", ignore_errors=True)  # of an earlier attempt
        with tempfile.TemporaryDirectory() as scratch:
            port = _free_port()
            job.write(Path(scratch) / "job.json")
            ranks = [_start_rank(Path(scratch), job.root, rank, count, port) for rank in range(count)]
            handlers = {number: signal.signal(number, lambda number, _: _send(ranks, number)) for number in _FORWARDED}
            try:
                code = _wait(ranks, self.grace_seconds)
            finally:
                _send(ranks, signal.SIGKILL)
                for number, handler in handlers.items():
                    signal.signal(number, handler)
            if code:
                _tell_failures(Path(scratch), Path(job.folder))
            if code < 0:  # the signal that ended a rank
                print(f"error: a process was killed by {signal.Signals(-code).name}; was there enough memory?", file=sys.stderr)
            if code:
                sys.exit(128 - code if code < 0 else code)


def _start_rank(scratch: Path, root: str, rank: int, count: int, port: int) -> subprocess.Popen:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
    }
    # A session of its own: Ctrl-C reaches the parent only, which passes it on once.
    return subprocess.Popen([sys.executable, "-m", "launchers.worker", str(scratch)], env=environment, start_new_session=True)


def _wait(ranks: list[subprocess.Popen], grace_seconds: float) -> int:
    """Exit code of the first rank that ends with one, or 0; the others get some time to end by themselves."""
    code = 0
    deadline = float("inf")
    while None in (codes := [rank.poll() for rank in ranks]):
        if not code and any(codes):
            code = next(each for each in codes if each)
            deadline = time.monotonic() + (grace_seconds if code > 128 else _SECONDS_AFTER_FAILURE)
        if time.monotonic() > deadline:
            _send(ranks, signal.SIGKILL)
        time.sleep(0.05)
    return code or next((each for each in codes if each), 0)


def _tell_failures(scratch: Path, folder: Path) -> None:
    """Each distinct message once; the whole texts go into the run folder, if the run got as far as to have one."""
    texts = sorted(scratch.glob("rank_*.txt"))
    if texts and folder.exists():
        (folder / "errors").mkdir(exist_ok=True)  # a rank may have left a report of its own there
        for text in texts:
            shutil.copy(text, folder / "errors")
    for message in dict.fromkeys(text.read_text().strip().splitlines()[-1] for text in texts):
        print(message if message.startswith("error: ") else f"error: {message} (traceback in {folder / 'errors'})", file=sys.stderr)


def _send(ranks: list[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
