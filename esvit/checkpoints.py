"""Checkpoints that survive a kill at any moment, load without running code, and fit the network or say why not.

A checkpoint is written under a temporary name, synced to the disk and only then renamed, so a final name never holds half a file.
Only tensors and plain containers are written and `weights_only=True` is all that ever loads them. Files of the original hold an
argparse.Namespace and numpy numbers besides: these, and nothing else, are let through, the numbers by stand-ins of ours.
"""

import argparse
import contextlib
import os
import re
import shutil
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from esvit import distributed
from esvit.errors import OptionError

LATEST = "checkpoint.pt"
SAME_NETWORK = "use the backbone, head and loss that the checkpoint was made with"
PLAIN_TYPES = (Tensor, nn.Parameter, str, int, float, bool, bytes, type(None))


class CheckpointFolder:
    """The checkpoints of one run: `checkpoint.pt` is the latest, `checkpoint_<step>.pt` the last `keep` of them.

    The latest and the kept file of its step are one file with two names where the file system can do that, else two copies.
    Making one clears away what a killed run left half-written, so only the run itself makes one of its folder, before it
    trains; everyone else reads with `load_checkpoint_file`.
    """

    def __init__(self, folder: Path, *, keep: int):
        if keep < 0:
            raise ValueError(f"cannot keep {keep} checkpoints")
        self.folder = Path(folder)
        self.keep = keep
        for leftover in self.folder.glob(".checkpoint*.tmp"):
            leftover.unlink(missing_ok=True)

    def save(self, state: dict[str, Any], step: int) -> None:
        """Write `state` as the checkpoint of `step`; to be called by one process only. Raises TypeError for what is not plain.

        Of the older ones the newest `keep` stay, this one included. Checkpoints of later steps go: they are the damaged ones, or those
        of a course that the run went back from, and would otherwise be mistaken for its latest.
        """
        _require_plain(state, "")
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / f"checkpoint_{step}.pt"
        written = self.folder / f".{kept.name}.tmp"
        _write_synced(state, written)
        second_name = self.folder / f".{LATEST}.tmp"
        _link_or_copy(written, second_name)
        os.replace(written, kept)
        os.replace(second_name, self.folder / LATEST)
        self._sync_folder()
        kept_files = _kept(self.folder)
        older = [path for path_step, path in kept_files if path_step <= step]
        later = [path for path_step, path in kept_files if path_step > step]
        for path in later + older[self.keep :]:
            path.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The latest checkpoint that can be read, on the CPU; None if there is no checkpoint at all.

        Warns in one line about damaged ones. Raises OptionError if all are damaged.
        """
        damaged = []
        for path in _candidates(self.folder):
            try:
                state = _read(path)
            except MemoryError:
                raise
            except Exception as error:  # whatever the unpickler makes of garbage
                damaged.append(f"{path} ({_one_line(error)})")
                continue
            if damaged:
                warnings.warn(f"damaged checkpoint: {', '.join(damaged)}; {path} is used instead", stacklevel=2)
            return state
        if not damaged:
            return None
        found = f"no checkpoint in it can be read: {', '.join(damaged)}"
        raise OptionError("output_dir", found, "remove these files to start afresh, or name another folder")

    def _sync_folder(self) -> None:
        """Make the new names themselves survive a power failure."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path`, whole or not at all. Raises TypeError for what is not plain."""
    _require_plain(state, "")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.tmp")
    _write_synced(state, written)
    os.replace(written, path)


def _write_synced(state: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in `folder` would resume from it."""
    return bool(_candidates(folder))


def peek(folder: Path) -> dict[str, Any] | None:
    """What the run in `folder` would resume from, its tensors left on the disk; None if there is nothing, or nothing undamaged to see."""
    for path in _candidates(folder):
        with contextlib.suppress(Exception):  # loading it to resume says what is wrong with it
            return _as_dict(torch.load(path, weights_only=True, map_location="cpu", mmap=True))
    return None


def load_checkpoint_file(path: Path) -> dict[str, Any]:
    """What is in a file that the user named, of this program or another (`.safetensors` too), on the CPU; nothing in it is run.

    Raises OptionError if it is missing, cannot be read, or holds anything but tensors, plain containers, numpy numbers and an
    argparse.Namespace.
    """
    path = Path(path)
    if not path.is_file():
        raise OptionError("checkpoint", f"there is no file '{path}'", "give a checkpoint file, outputs/.../checkpoint.pt for example")
    try:
        return _read_foreign(path)
    except MemoryError:
        raise
    except Exception as error:
        stranger = re.search(r"GLOBAL ([\w.]+)", str(error))
        if stranger is not None:
            found = f"'{path}' asks for {stranger.group(1)}, which could run any code, so it was not loaded"
            raise OptionError("checkpoint", found, "give a file of tensors and plain containers, a state dict for example") from error
        found = f"'{path}' cannot be read as tensors and plain containers ({_one_line(error)})"
        raise OptionError("checkpoint", found, "give a checkpoint that this program wrote, or a published one") from error


def strict_load(module: nn.Module, state: dict[str, Any], *, option: str, what: str, remedy: str = SAME_NETWORK) -> None:
    """Load `state` into `module` if it has all of its entries in the same shapes and no others.

    Otherwise nothing is loaded and OptionError names `option`, `what` ("student", say), a few of the entries that differ, and `remedy`.
    """
    here = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    there = {name: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for name, value in state.items()}
    differences = [
        _few("missing", [name for name in here if name not in there]),
        _few("unexpected", [name for name in there if name not in here]),
        _few("of another shape", [f"{n} {there[n]} instead of {here[n]}" for n in here if n in there and here[n] != there[n]]),
    ]
    if any(differences):
        found = f"the weights of the {what} do not fit: {', '.join(text for text in differences if text)}"
        raise OptionError(option, found, remedy)
    ours = module.state_dict()
    module.load_state_dict({name: distributed.shared_like(value, ours[name]) for name, value in state.items()})


def _candidates(folder: Path) -> list[Path]:
    """Checkpoints of the run in `folder`, the one to resume from first."""
    return [path for path in (folder / LATEST, *(path for _, path in _kept(folder))) if path.exists()]


def _kept(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the kept checkpoints, newest first."""
    found = []
    for path in folder.glob("checkpoint_*.pt"):
        match = re.fullmatch(r"checkpoint_(\d+)\.pt", path.name)
        if match:
            found.append((int(match.group(1)), path))
    return sorted(found, reverse=True)


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch does not look at the check sums: a flipped bit would become a weight
        wrong = archive.testzip()
    if wrong is not None:
        raise ValueError(f"wrong check sum of {wrong}")
    return _as_dict(torch.load(path, weights_only=True, map_location="cpu"))


def _read_foreign(path: Path) -> dict[str, Any]:
    """As `_read`, and also what the original's checkpoints hold, files of older versions of torch (not zip), and safetensors."""
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    with torch.serialization.safe_globals(_OF_THE_ORIGINAL):
        return _read(path) if zipfile.is_zipfile(path) else _as_dict(torch.load(path, weights_only=True, map_location="cpu"))


def _as_dict(state: Any) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not a dict")
    return state


class _NumberType:
    """Stands for numpy.dtype in a file: the original's optimizer keeps learning rates as numpy numbers. Numpy itself runs nothing."""

    def __init__(self, code: str, *_: Any):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.code = str(state[1]) + self.code.lstrip("<>=|")


def _number(kind: _NumberType, data: bytes) -> float | int:
    """Stands for numpy's scalar constructor."""
    letter = {"f8": "d", "f4": "f", "i8": "q", "i4": "i"}[kind.code[-2:]]
    return struct.unpack(("<" if kind.code[0] != ">" else ">") + letter, data)[0]


_OF_THE_ORIGINAL: list[Any] = [
    argparse.Namespace,  # its options
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def _require_plain(value: Any, place: str) -> None:
    """Raise TypeError, naming its place, for the first thing in `value` that weights_only could not load."""
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            _require_plain(key, f"{place} key {key!r}")
            _require_plain(entry, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            _require_plain(entry, f"{place}[{index}]")
    elif type(value) not in PLAIN_TYPES:  # not isinstance: numpy.float64 is a float, and cannot be loaded
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"state{place} is a {kind}; a checkpoint holds tensors and plain containers only")


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # no hard links on this file system
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def _few(kind: str, names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {kind} ({shown})"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
