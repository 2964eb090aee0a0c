"""One state in one file: tensors and plain containers, synced to the disk before it gets its name, loaded without running code.

Unusual: torch does not look at the check sums in its own files, so `check` does; a flipped bit would become a weight.
"""

import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PLAIN_TYPES = (Tensor, nn.Parameter, str, int, float, bool, bytes, type(None))


def write_synced(state: dict[str, Any], path: Path) -> None:
    """On the disk when it returns, but whole only then: for a temporary name."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path`, whole or not at all. Raises TypeError for what is not plain."""
    require_plain(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.tmp")
    write_synced(state, written)
    os.replace(written, path)


def check(path: Path) -> None:
    """Raises ValueError, or what zipfile does, if the file is damaged."""
    with zipfile.ZipFile(path) as archive:
        wrong = archive.testzip()
    if wrong is not None:
        raise ValueError(f"wrong check sum of {wrong}")


def read(path: Path) -> dict[str, Any]:
    """What is in an undamaged file, on the CPU."""
    check(path)
    return as_dict(torch.load(path, weights_only=True, map_location="cpu"))


def read_lazily(path: Path) -> dict[str, Any]:
    """The same unchecked, its tensors left on the disk until they are looked at."""
    return as_dict(torch.load(path, weights_only=True, map_location="cpu", mmap=True))


def as_dict(state: Any) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not a dict")
    return state


def require_plain(value: Any, place: str = "") -> None:
    """Raise TypeError, naming its place, for the first thing in `value` that weights_only could not load."""
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            require_plain(key, f"{place} key {key!r}")
            require_plain(entry, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            require_plain(entry, f"{place}[{index}]")
    elif type(value) not in PLAIN_TYPES:  # not isinstance: numpy.float64 is a float, and cannot be loaded
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"state{place} is a {kind}; a checkpoint holds tensors and plain containers only")
