"""What the trials of a search run in the tests: a run without torch, whose accuracy depends on its options."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

EPOCHS = 4


def train(config: dict) -> None:
    """Four epochs; the accuracy is best at x=0.5 and grows with the epochs. Ends on SIGTERM after the epoch at hand, to go on from there.

    config: x, seconds of an epoch, the run's options ("config", for its config.yaml), and where to go wrong ("fails", "hangs_at": an epoch
    that never ends)
    """
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    folder = Path(config["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if config.get("fails"):
        sys.exit("error: optimizer.learning_rate: too high; lower it")
    if "config" in config:
        (folder / "config.yaml").write_text(yaml.safe_dump(config["config"]))
    state = folder / "state.json"
    first = json.loads(state.read_text()) if state.exists() else 0
    append(folder / "attempts.jsonl", first)
    for epoch in range(first, EPOCHS):
        time.sleep(config["seconds"])
        append(folder / "log.jsonl", {"step": epoch + 1, "epoch": epoch, "knn/teacher": accuracy(config["x"], epoch)})
        state.with_suffix(".tmp").write_text(json.dumps(epoch + 1))
        state.with_suffix(".tmp").replace(state)
        while epoch == config.get("hangs_at") and not stopped and not (folder / "go_on").exists():
            time.sleep(0.02)
        if stopped:
            sys.exit(128 + stopped[0])
    (folder / "metrics.json").write_text(json.dumps({"knn/teacher": accuracy(config["x"], EPOCHS - 1), "step": EPOCHS}))


def accuracy(x: float, epoch: int) -> float:
    return 100 - 100 * abs(x - 0.5) + epoch


def append(path: Path, line: object) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
