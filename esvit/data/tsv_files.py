"""Rows of TSV files at random: where their lines begin, and reading them without a position of the file.

A line index `<stem>.lineidx` beside `<stem>.tsv` has the byte at which each line begins, one number a line. One that is missing is made:
beside the file, or, where that folder cannot be written to, in the cache of listings.

Rows are read with `os.pread`: loading processes that were forked share an open file without sharing a position. Each process keeps a
limited number of files open.
"""

import io
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from esvit import distributed
from esvit.data.index import IndexCache, write_atomically
from esvit.errors import OptionError

_BLOCK = 1 << 24  # bytes read at a time in search of line ends
_HEAD = 512  # bytes that hold the columns before the image, as a rule
_SECONDS_UNTIL_SHOWN = 2


class TsvFiles:
    """Some TSV files, of which each process keeps at most `open_files` open."""

    def __init__(self, paths: Sequence[str], *, open_files: int):
        self.paths = list(paths)
        self._limit = open_files
        self._open: OrderedDict[int, io.FileIO] = OrderedDict()

    def read(self, file: int, start: int, size: int) -> bytes:
        """`size` bytes of file number `file` from `start` on, fewer at its end. Raises OSError."""
        return os.pread(self._descriptor(file), size, start)

    def line(self, file: int, start: int, size: int) -> bytes:
        """The line that begins at `start`, without its end. size  how long it may be expected to be"""
        parts = []
        while part := self.read(file, start, size):
            line, end, _ = part.partition(b"\n")
            parts.append(line)
            if end:
                break
            start += len(part)
        return b"".join(parts).removesuffix(b"\r")

    def head(self, file: int, start: int, columns: int) -> list[bytes]:
        """The first `columns` columns of the line that begins at `start`, fewer where it has no more; the last one may be cut short."""
        size = _HEAD
        while True:
            part = self.read(file, start, size)
            line, end, _ = part.partition(b"\n")
            found = line.split(b"\t", columns - 1)
            if len(found) == columns or end or len(part) < size:
                return [column.removesuffix(b"\r") for column in found]
            size *= 8

    def _descriptor(self, file: int) -> int:
        if file in self._open:
            self._open.move_to_end(file)
        else:
            while len(self._open) >= self._limit:
                self._open.popitem(last=False)[1].close()
            self._open[file] = open(self.paths[file], "rb", buffering=0)  # noqa: SIM115 (stays open until others take its place)
        return self._open[file].fileno()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}


def line_starts(path: str, *, index: IndexCache, option: str) -> np.ndarray:
    """Where each line of the file begins, and where the last one ends: (lines + 1,) int64.

    Raises OptionError naming `option` for an empty file, and for a line index of another file.
    """
    lineidx = _beside(path, ".lineidx")
    state = _state(path, option)
    if not state[0]:
        raise OptionError(option, f"'{path}' is empty", "make or copy it again")
    if os.path.exists(lineidx):
        starts = read_numbers(lineidx, option)
        _check_starts(path, lineidx, starts, int(state[0]), option)
        return np.append(starts, state[0])
    kept = index.load("lineidx", path)
    if kept is not None and np.array_equal(kept["state"], state):
        return kept["starts"]
    starts = _find_starts(path, option)
    try:
        lines = "".join(f"{start}\n" for start in starts[:-1].tolist())
        write_atomically(Path(lineidx), [lines.encode()])
    except OSError:
        index.save("lineidx", path, {"starts": starts, "state": state})
    return starts


def read_numbers(path: str, option: str) -> np.ndarray:
    """One number a line: (lines,) int64. Raises OptionError naming file and line of one that is none."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise OptionError(option, f"'{path}' cannot be read ({error.strerror})", "check its permissions") from error
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # of text that is no number
        try:
            numbers = np.fromstring(text, dtype=np.int64, sep="\n")
            if len(numbers) == _line_count(text):
                return numbers
        except (DeprecationWarning, ValueError):
            pass
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip().isdigit():
            raise OptionError(option, f"{path} line {line} is no number: '{_shown(content)}'", "write one number a line")
    raise OptionError(option, f"{path} holds numbers that are too large", "make it again")


def _line_count(text: bytes) -> int:
    """Lines, empty ones at the end left out; without a list of them, which would take gigabytes."""
    lines = text.rstrip()
    return lines.count(b"\n") + 1 if lines else 0


def selected_rows(path: str, rows: int, option: str) -> np.ndarray | None:
    """The numbers of the rows to keep that `<stem>.linelist` names, rising; None without such a file."""
    linelist = _beside(path, ".linelist")
    if not os.path.exists(linelist):
        return None
    chosen = read_numbers(linelist, option)
    for line in np.flatnonzero((chosen < 0) | (chosen >= rows))[:1]:
        raise OptionError(option, f"{linelist} line {line + 1} names row {chosen[line]}, '{path}' has {rows}", "use numbers from 0 upwards")
    return np.sort(chosen)


def _beside(path: str, ending: str) -> str:
    return os.path.splitext(path)[0] + ending


def _state(path: str, option: str) -> np.ndarray:
    """Size and modification time: (2,) int64."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise OptionError(option, f"'{path}' cannot be read ({error.strerror})", "check its permissions and links") from error
    return np.array([status.st_size, status.st_mtime_ns], dtype=np.int64)


def _find_starts(path: str, option: str) -> np.ndarray:
    size = os.path.getsize(path)
    ends, at = [np.zeros(1, dtype=np.int64)], 0
    bar = tqdm(
        total=size,
        desc=f"indexing {path}",
        unit="B",
        unit_scale=True,
        delay=_SECONDS_UNTIL_SHOWN,
        leave=False,
        disable=distributed.rank() > 0,
    )
    try:
        with open(path, "rb", buffering=0) as file, bar:
            while block := file.read(_BLOCK):
                ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + (at + 1))
                at += len(block)
                bar.update(len(block))
    except OSError as error:
        raise OptionError(option, f"'{path}' cannot be read ({error.strerror})", "check its permissions") from error
    starts = np.concatenate(ends)
    return starts if starts[-1] == at else np.append(starts, at)


def _check_starts(path: str, lineidx: str, starts: np.ndarray, size: int, option: str) -> None:
    """Raises OptionError if the line index is not of this file, as far as some looks can tell."""
    fits = bool(len(starts)) and starts[0] == 0 and bool((np.diff(starts) > 0).all()) and starts[-1] < size
    if fits:
        with open(path, "rb", buffering=0) as file:
            looks = {len(starts) // 2, len(starts) - 1} - {0}
            fits = all(os.pread(file.fileno(), 1, int(starts[look]) - 1) == b"\n" for look in looks)
            fits = fits and b"\n" not in os.pread(file.fileno(), min(_BLOCK, size - int(starts[-1])), int(starts[-1])).rstrip(b"\r\n")
    if not fits:
        raise OptionError(option, f"'{lineidx}' is not the line index of '{path}'", "delete it: it is made again")


def _shown(line: bytes) -> str:
    return line[:60].decode(errors="replace")
