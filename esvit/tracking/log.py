"""`log.jsonl`, the one file that knows every number of a run: one JSON object per logged step.

A record is {"step": 20, "epoch": 1, "time": 1790000000.123, "loss/total": 7.1, ...}: `step` counts completed optimizer steps from 1 and
grows strictly, `time` is seconds since 1970. JSON has no NaN and no infinity, so these are written as the strings "NaN", "Infinity" and
"-Infinity", and `read_records` gives them back as floats. Each record is one write of one line: a killed process leaves at most one torn
last line, which every reader passes over and the next writer removes.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esvit.tracking.files import replace_file

Record = dict[str, Any]
RESERVED = ("step", "epoch", "time")


def encode_number(value: float) -> float | int | str:
    """A number as JSON can hold it: itself, or the name of what JSON has no number for."""
    if isinstance(value, int):
        return int(value)
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _decode_line(line: bytes) -> Record | None:
    """One line as a record, or None if it is torn or damaged."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record["step"], int):
            return None
        return {key: float(value) if isinstance(value, str) else value for key, value in record.items()}
    except (ValueError, KeyError):
        return None


def read_records(path: Path, offset: int = 0, limit: int | None = None) -> tuple[list[Record], int]:
    """The records of complete lines from byte `offset` (at most about `limit` bytes), and the offset at which to read on."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read() if limit is None else b"".join(file.readlines(limit))
    except FileNotFoundError:
        return [], offset
    end = content.rfind(b"\n") + 1
    records = [record for line in content[:end].splitlines() if (record := _decode_line(line)) is not None]
    return records, offset + end


class LogFile:
    """The writer of a `log.jsonl`. There is one per run folder, on rank 0."""

    def __init__(self, path: Path):
        self.path = path
        self.last_step = 0
        self._file = path.open("ab", buffering=0)
        self.keep_up_to(None)

    def append(self, *, step: int, epoch: float, time: float, metrics: Mapping[str, float]) -> None:
        """Write one record; it survives SIGKILL of this process from here on (but loss of power only after `sync_to_disk`).

        Raises ValueError if the step does not grow or a metric is called `step`, `epoch` or `time`: mistakes of the calling code.
        """
        if step <= self.last_step:
            raise ValueError(f"step {step} was logged after step {self.last_step}: one record per step, in order, from 1")
        if taken := [name for name in RESERVED if name in metrics]:
            raise ValueError(f"a metric cannot be called {taken[0]!r}")
        record = {"step": step, "epoch": epoch, "time": time, **{name: encode_number(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.last_step = step

    def keep_up_to(self, step: int | None) -> int:
        """Drop the records after `step` (None: only what is torn) in one atomic replacement; returns how many were dropped."""
        content = self.path.read_bytes() if self.path.exists() else b""
        kept, dropped, last_step = [], 0, 0
        for line in content.splitlines(keepends=True):
            record = _decode_line(line) if line.endswith(b"\n") else None
            if record is not None and (step is None or record["step"] <= step):
                kept.append(line)
                last_step = record["step"]
            else:
                dropped += record is not None
        self._file.close()
        if (remaining := b"".join(kept)) != content:
            replace_file(self.path, remaining)
        self._file = self.path.open("ab", buffering=0)
        self.last_step = last_step
        return dropped

    def sync_to_disk(self) -> None:
        """Return once everything logged so far would survive a loss of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
