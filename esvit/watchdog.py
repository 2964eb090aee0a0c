"""Ends a rank that has stopped making progress, after it wrote down where every one of its threads stands. Imports no torch.

A hang holds its GPUs for nothing and says nothing: one rank waits for data, the others wait for it in a collective. Each rank has a
watchdog of its own, so every rank's stack is there to be compared. Unusual: the process is ended from the watching thread, since the
main thread may be inside a call that never returns.
"""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

_SECONDS_FOR_THE_OTHERS = 10.0  # before the first one's end makes a launcher kill them: they stall together, and write the same report
EXIT_CODE = 1


class Watchdog:
    """stall_minutes  how long there may be no `beat`
    report         file that gets the step and all stacks; its folder is made when it is needed
    """

    def __init__(self, *, stall_minutes: float, report: Path):
        self._seconds = stall_minutes * 60
        self._report = report
        self._doing = "before the first step"
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="esvit-watchdog", daemon=True)
        self._thread.start()

    def beat(self, doing: str) -> None:
        """Progress was made; `doing` says with what, for the report."""
        self._doing = doing
        self._last = time.monotonic()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                return self._give_up()

    def _give_up(self) -> None:
        found = f"no progress for {self._seconds / 60:g} minutes ({self._doing})"
        self._report.parent.mkdir(parents=True, exist_ok=True)
        with self._report.open("w") as file:
            print(found, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        remedy = "raise runtime.stall_minutes if that is normal; the same command resumes"
        print(f"error: runtime.stall_minutes: {found}; stacks are in {self._report}; {remedy}", file=sys.stderr, flush=True)
        if not self._ended.wait(_SECONDS_FOR_THE_OTHERS):
            os._exit(EXIT_CODE)
