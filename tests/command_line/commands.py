"""Starts the program's command line, with options that make a run as small as it can be."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120  # for a loaded machine; a test fails when a command takes longer

# 16 images of 32 pixels, four per step: four steps an epoch, eight in all
TINY = (
    "backbone=swin_micro", "tracking=none", "device=cpu", "data.batch_size=4", "data.workers=0", "augmentation.global_crops_size=32",
    "augmentation.local_crops_size=16", "augmentation.local_crops_number=2", "head.hidden_dim=32", "head.bottleneck_dim=16",
    "head.prototypes=64", "schedule.warmup_epochs=0", "epochs=2", "task.log_every=1", "checkpoint_every=3", "task.checkpoint_keep=3",
    "runtime.threads=1", "optimizer.learning_rate=0.05", "schedule.freeze_last_layer_epochs=0",
)  # fmt: skip


def environment() -> dict[str, str]:
    """Ours, without what the test runner put there for itself."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {"OMP_NUM_THREADS": "1"}


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@dataclass
class Running:
    """A command under way."""

    pid: int
    poll: Callable[[], int | None]
    out_file: Path
    err_file: Path

    def wait(self) -> Outcome:
        code = wait_until(lambda: (code,) if (code := self.poll()) is not None else None, f"end of process {self.pid}: {self.err_file}")[0]
        return Outcome(code, self.out_file.read_text(), self.err_file.read_text())

    def kill_when(self, condition: Callable[[], object], number: int = signal.SIGKILL) -> Outcome:
        """Send a signal as soon as `condition` holds; the command must still be under way then."""

        def holds() -> bool:
            if (code := self.poll()) is not None:
                raise AssertionError(f"ended with {code} before it was to be stopped: {self.err_file.read_text()}")
            return bool(condition())

        wait_until(holds, "the moment to stop the run")
        os.kill(self.pid, number)
        return self.wait()


@dataclass
class ForkServer:
    """See tests/command_line/fork_server.py."""

    scratch: Path
    _server: subprocess.Popen = field(init=False)
    _count: int = 0

    def __post_init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert json.loads(self._pipe(self._server.stdout).readline()) == "ready"

    def start(self, *arguments: str, folder: Path | None = None, extra_environment: dict[str, str] | None = None) -> Running:
        """`python run.py ARGUMENTS` in `folder` (an empty one of its own by default)."""
        self._count += 1
        own = self.scratch / f"command_{self._count}"
        own.mkdir(parents=True)
        command = {
            "arguments": arguments,
            "folder": str(folder or own),
            "out": str(own / "out"),
            "err": str(own / "err"),
            "environment": environment() | (extra_environment or {}),
        }
        pid = self._ask({"start": command})
        assert pid is not None
        code: list[int] = []

        def poll() -> int | None:
            if not code and (answer := self._ask({"poll": pid})) is not None:
                code.append(answer)
            return code[0] if code else None

        wait_until((own / "err").exists, "a process's streams")
        return Running(pid, poll, own / "out", own / "err")

    def run(self, *arguments: str, folder: Path | None = None) -> Outcome:
        return self.start(*arguments, folder=folder).wait()

    def close(self) -> None:
        self._pipe(self._server.stdin).close()
        self._server.wait(timeout=PATIENCE_SECONDS)

    def _ask(self, request: dict) -> int | None:
        print(json.dumps(request), file=self._pipe(self._server.stdin), flush=True)
        return json.loads(self._pipe(self._server.stdout).readline())

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def wait_until(condition: Callable, what: str):
    """The first true value of `condition`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_SECONDS} s for {what}")
        time.sleep(0.01)
    return value


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def log(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def losses(folder: Path) -> list[dict]:
    """What the log says of the training itself, without times and loads."""
    return [
        {key: value for key, value in record.items() if not key.startswith(("time", "speed/", "memory/", "system/"))}
        for record in log(folder)
    ]


def checkpoint(folder: Path, name: str = "checkpoint.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def differences(ours: object, theirs: object, place: str = "") -> list[str]:
    """Places where two nests of containers and tensors are not equal bit for bit."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return [] if ours.dtype == theirs.dtype and ours.equal(theirs) else [place]
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return [f"{place} keys {set(ours) ^ set(theirs)}"]
        return [each for key in ours for each in differences(ours[key], theirs[key], f"{place}.{key}")]
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        return [each for number, pair in enumerate(zip(ours, theirs, strict=True)) for each in differences(*pair, f"{place}[{number}]")]
    return [] if ours == theirs else [place]


def assert_same_training(ours: Path, theirs: Path) -> None:
    """Same weights, centre, moments and log, bit for bit."""
    mine, other = checkpoint(ours), checkpoint(theirs)
    for part in ("student", "teacher", "loss", "optimizer", "step", "sampler", "meters"):
        assert differences(mine[part], other[part], part) == []
    assert losses(ours) == losses(theirs)
