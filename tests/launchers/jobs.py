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
