"""A copy of the code as it is when a job is submitted, so that what is edited while the job waits cannot change it.

What git tracks, and what it does not ignore, is copied; without git, the program's own folders are.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LARGEST_BYTES = 500_000_000
_KNOWN = ("run.py", "setup.cfg", "conf", "esvit", "launchers", "sweeps")
_GIT_SECONDS = 30


@dataclass(frozen=True)
class Snapshot:
    """root    the folder of the copy
    commit  what was checked out, None without git
    dirty   whether a file differed from that commit
    """

    root: Path
    commit: str | None
    dirty: bool


def take(source: Path, folder: Path) -> Snapshot:
    """Copy the code in `source` to `folder`/code, or code_2 and so on, if there is one already."""
    root = next(path for path in _candidates(folder) if not path.exists())
    tracked = _git(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = {os.fsdecode(name) for name in (tracked or b"").split(b"\0") if name}
    files = [source / name for name in sorted(names)] if names else list(_known_files(source))
    files = [path for path in files if path.is_file() and not path.is_relative_to(folder)]  # a tracked file may have been deleted
    _refuse_large(files, source)
    for path in files:
        target = root / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    commit = _git(source, "rev-parse", "HEAD") if names else None
    changes = _git(source, "status", "--porcelain", "--", ".") if names else None
    return Snapshot(root=root, commit=commit.decode().strip() if commit else None, dirty=bool(changes))


def _candidates(folder: Path) -> Iterator[Path]:
    yield folder / "code"
    number = 2
    while True:
        yield folder / f"code_{number}"
        number += 1


def _known_files(source: Path) -> Iterator[Path]:
    for name in _KNOWN:
        if (source / name).is_file():
            yield source / name
        yield from (path for path in sorted((source / name).rglob("*")) if "__pycache__" not in path.parts)


def _refuse_large(files: list[Path], source: Path) -> None:
    sizes = {path: path.stat().st_size for path in files}
    total = sum(sizes.values())
    if total > _LARGEST_BYTES:
        largest = max(files, key=lambda path: sizes[path])
        sys.exit(
            f"error: launcher: the code that would be copied has {total / 1e6:.0f} MB, {largest.relative_to(source)} the most of it; "
            "name in .gitignore what is not code"
        )


def _git(source: Path, *arguments: str) -> bytes | None:
    """What git printed; None without git or outside of a checkout."""
    command = ["git", "-C", str(source), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=_GIT_SECONDS, env=environment).stdout
    except (OSError, subprocess.SubprocessError):
        return None
