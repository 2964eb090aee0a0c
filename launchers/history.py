"""What became of a job, as its first rank wrote it down in launch/<name>.history.jsonl, so that no scheduler need remember it."""

import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil


@dataclass
class History:
    """events: "started" (id, process, ...), "requeued" (signal), "ended" (code), oldest first"""

    path: Path
    events: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "History":
        """A line that was cut short by a kill is left out."""
        events = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    events.append(json.loads(line))
                except ValueError:
                    continue
        return cls(path, events)

    def add(self, event: str, **details: Any) -> None:
        self.events.append({"event": event, "time": round(time.time(), 1), **details})
        with self.path.open("a") as file:
            file.write(json.dumps(self.events[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def of(self, job_id: str | None) -> list[dict[str, Any]]:
        """The events of one submission."""
        return [event for event in self.events if event.get("id") == job_id]


def this_process() -> dict[str, Any]:
    """What tells this process from any other, also from a later one with its number."""
    return {"pid": os.getpid(), "since": round(psutil.Process().create_time(), 1), "host": socket.gethostname()}


def is_alive(process: dict[str, Any]) -> bool:
    """Whether the process of `this_process` still runs; False for one on another machine, of which nothing is known."""
    if process["host"] != socket.gethostname():
        return False
    try:
        found = psutil.Process(process["pid"])
        return abs(found.create_time() - process["since"]) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
