"""What the launchers' tests run in ranks: plain functions that need no torch."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def tell(config: dict) -> None:
    """Write down who this rank is."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    told = {name: os.environ[name] for name in names} | {"config": config, "pid": os.getpid()}
    told["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    Path(config["folder"], f"told_{os.environ['RANK']}.json").write_text(json.dumps(told))


def fail_in_rank_1(config: dict) -> None:
    """Rank 0 would wait for a minute."""
    if os.environ["RANK"] == "1":
        raise RuntimeError("the second rank fell")
    time.sleep(60)


def mistake(config: dict) -> None:
    sys.exit("error: data.root: is missing; give one")


def exit_on_signal(config: dict) -> None:
    """End with 143 on SIGTERM, as a run does after its checkpoint; ready once `told` files exist."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    tell(config)
    time.sleep(60)


def ignore_signals(config: dict) -> None:
    """Rank 0 ends on SIGTERM, rank 1 never by itself."""
    if os.environ["RANK"] == "0":
        return exit_on_signal(config)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell(config)
    return time.sleep(60)


def end_in_rank_0(config: dict) -> None:
    """Rank 0 is killed from outside, as for want of memory."""
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


VERSION = "as submitted"  # a test edits this line after the submission


def count(config: dict) -> None:
    """Take `steps` steps of `seconds` each, from where the last attempt stopped; a run without torch.

    Ends on a signal after the step at hand, as a run does: rank 0 writes its state, every rank exits with 128 + signal. Rank 0 logs every
    step, and what it was started as. Handlers come only when the file `go`, if the config asks for it, is in the folder.
    """
    folder = Path(config["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"pid_{os.environ['RANK']}").write_text(str(os.getpid()))
    while config.get("waits_to_go") and not (folder / "go").exists():
        time.sleep(0.02)
    stopped_by: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _: stopped_by.append(number))
    is_main = os.environ["RANK"] == "0"
    state = folder / "state.json"
    first = json.loads(state.read_text())["step"] if state.exists() else 0
    if is_main:
        _append(folder / "attempts.jsonl", {"from": first, "version": VERSION, "command": sys.argv, "cwd": os.getcwd()})
    for step in range(first + 1, config["steps"] + 1):
        time.sleep(config["seconds"])
        if is_main:
            _append(folder / "log.jsonl", {"step": step, "epoch": 0, "time": time.time()})
            _leave_teacher(folder, step, config.get("teacher_every", 0))
        if stopped_by:
            if is_main:
                _replace(state, {"step": step})
            sys.exit(128 + stopped_by[0])
    if is_main:
        _replace(folder / "metrics.json", {"step": config["steps"]})


def fail(config: dict) -> None:
    """Every rank says what it does not like."""
    raise RuntimeError(f"rank {os.environ['RANK']} of {config['folder']} fell")


def fail_once(config: dict) -> None:
    """Fail unless a file named `mended` lies in the folder."""
    if not (Path(config["folder"]) / "mended").exists():
        raise RuntimeError("not mended yet")
    tell(config)


def look_at_teacher(config: dict) -> None:
    """An evaluation of a saved teacher."""
    if os.environ["RANK"] == "0":
        Path(config["folder"]).mkdir(parents=True, exist_ok=True)
        _replace(Path(config["folder"]) / "metrics.json", {"step": config["step"], "teacher": Path(config["teacher"]).read_text()})


def _leave_teacher(folder: Path, step: int, every: int) -> None:
    if every and step % every == 0:
        (folder / "teachers").mkdir(exist_ok=True)
        (folder / "teachers" / ".tmp").write_text(f"teacher of step {step}")
        (folder / "teachers" / ".tmp").rename(folder / "teachers" / f"teacher_{step}.pt")


def _append(path: Path, record: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _replace(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
