"""Output of a submitted job's ranks, so far or as it comes."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launchers import status
from launchers.status import JobStatus

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_QUESTIONS = 10.0  # to the scheduler


@dataclass
class _Reader:
    """Whole lines of one file, from where the last call left off."""

    path: Path
    prefix: str
    _offset: int = 0
    _rest: bytes = field(default=b"")

    def lines(self, *, to_the_end: bool) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            news = file.read()
        self._offset += len(news)
        *whole, self._rest = (self._rest + news).split(b"\n")
        if to_the_end and self._rest:
            whole, self._rest = [*whole, self._rest], b""
        return [self.prefix + line.decode(errors="replace") for line in whole]


def show(job: JobStatus, *, ranks: Sequence[int], lines: int, follow: bool, folder: Path) -> None:
    """Print the last `lines` lines of each rank's output (all, if 0), and go on with new ones until the job has ended."""
    readers = [_Reader(path, f"[{rank}] " if len(ranks) > 1 else "") for rank in ranks if (path := status.log_file(job.entry, rank))]
    for reader in readers:
        found = reader.lines(to_the_end=not follow)
        _print(found[-lines:] if lines else found)
    asked = time.monotonic()
    is_active = follow
    while is_active:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if time.monotonic() - asked > _SECONDS_BETWEEN_QUESTIONS:
            is_active = next(each for each in status.states(folder) if each.entry.name == job.entry.name).is_active
            asked = time.monotonic()
        for reader in readers:
            _print(reader.lines(to_the_end=not is_active))


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)
    sys.stdout.flush()
