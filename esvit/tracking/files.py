"""Files that are either old or new, never half written, and the lock that says which process writes to a run folder.

Locks are POSIX record locks (`fcntl.lockf`): they end with the process, also by SIGKILL, and forked loader workers do not inherit them.
The price: a process never conflicts with itself, and any `close` of the locked file by the process releases the lock.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, content: bytes) -> None:
    """Give `path` this content through a temporary file that is fsynced and then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class FolderLock:
    """Held by the one process that logs to, or sends from, a run folder (`tracking.lock` in it)."""

    def __init__(self, folder: Path):
        self.path = folder / "tracking.lock"
        self._file: BinaryIO | None = None

    def acquire(self, *, wait_seconds: float) -> bool:
        """Whether this process now holds the lock. A file system without locks counts as held: training must not fail for it."""
        file = self.path.open("ab+")
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    break
                if time.monotonic() >= deadline:
                    file.close()
                    return False
                time.sleep(0.2)
        self._file = file
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        return True

    def is_held(self) -> bool:
        """Whether another process holds the lock now; asks without taking it, and writes nothing."""
        try:
            with self.path.open("rb") as file:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
        return False

    def holder(self) -> str:
        """Who holds the lock, in words."""
        with contextlib.suppress(OSError):
            return self.path.read_text(errors="replace") or "another process"
        return "another process"

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
