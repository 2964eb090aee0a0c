"""Where a run came from: commit and uncommitted changes, host, versions, command line, and its options as flat text.

Versions come from package metadata, so nothing heavy is imported. Passwords inside addresses ("http://user:word@host") are masked.
"""

import getpass
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "torchvision", "timm", "mlflow")
_GIT_SECONDS = 10.0


@dataclass(frozen=True)
class SourceState:
    """The checkout that the code runs from.

    commit  full hash
    dirty   whether a tracked file differs from the commit or an untracked one lies beside it
    diff    what `git apply` needs to redo the tracked changes, after one "# untracked:" line per untracked file; empty when clean
    """

    commit: str
    dirty: bool
    diff: bytes


def source_state(source: Path) -> SourceState | None:
    """The checkout in which the file `source` is tracked; None without git, outside a checkout, or where git does not answer.

    That the file is tracked matters: an installed package may lie inside a checkout of something else.
    """

    def git(*arguments: str, folder: Path) -> bytes:
        command = ["git", "-C", str(folder), *arguments]
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
        return subprocess.run(command, capture_output=True, check=True, timeout=_GIT_SECONDS, env=environment).stdout

    try:
        git("ls-files", "--error-unmatch", source.name, folder=source.parent)
        top = Path(os.fsdecode(git("rev-parse", "--show-toplevel", folder=source.parent)).rstrip("\n"))
        commit = git("rev-parse", "HEAD", folder=top).decode().strip()
        changes = git("diff", "HEAD", "--no-color", "--no-ext-diff", folder=top)
        untracked = git("ls-files", "--others", "--exclude-standard", folder=top).splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    diff = b"".join(b"# untracked: " + name + b"\n" for name in untracked) + changes
    return SourceState(commit=commit, dirty=bool(diff), diff=diff)


def mask_passwords(text: str) -> str:
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user number without a name
        return str(os.getuid())


def environment_tags(source: SourceState | None) -> dict[str, str]:
    """Tags of a run; the `mlflow.` ones fill the columns that MLflow's pages already have."""
    tags = {
        "host": socket.gethostname(),
        "command": mask_passwords(shlex.join(sys.argv)),
        "git.commit": source.commit if source else "unknown",
        "git.dirty": str(source.dirty).lower() if source else "unknown",
        "version.python": platform.python_version(),
        "mlflow.user": _user(),
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
        "mlflow.source.type": "LOCAL",
    }
    if source:
        tags["mlflow.source.git.commit"] = source.commit
    for package in _PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            tags[f"version.{package}"] = "not installed"
    return tags


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A resolved config as {"data.root": "/data", ...}; lists and empty values become JSON, so that none is an empty text."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        elif isinstance(value, str) and value:
            flat[name] = mask_passwords(value)
        elif isinstance(value, Mapping | Sequence) or value is None:
            flat[name] = mask_passwords(json.dumps(value, default=str))
        else:
            flat[name] = str(value)
    return flat
