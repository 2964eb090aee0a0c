"""Checkpoints that survive a kill at any moment, load without running code, and fit the network or say why not.

A checkpoint is written under a temporary name, synced to the disk and only then renamed, so a final name never holds half a checkpoint.
It is one file (state_files.py), or a folder to which each rank gave its shares (checkpoint_shares.py). Files of the original hold an
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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from esvit import checkpoint_shares, distributed, state_files
from esvit.distributed import Scattered
from esvit.errors import OptionError

LATEST = "checkpoint.pt"
SAME_NETWORK = "use the backbone, head and loss that the checkpoint was made with"


class CheckpointFolder:
    """The checkpoints of one run: `checkpoint.pt` is the latest, `checkpoint_<step>.pt` the last `keep` of them.

    The latest and the kept file of its step are one file with two names where the file system can do that, else two copies. A folder
    of shares is `checkpoint_<step>`; where it is the latest there is no `checkpoint.pt`.

    Making one clears away what a killed run left half-written, so only the run itself makes one of its folder, before it
    trains; everyone else reads with `load_checkpoint_file`.
    """

    def __init__(self, folder: Path, *, keep: int):
        if keep < 0:
            raise ValueError(f"cannot keep {keep} checkpoints")
        self.folder = Path(folder)
        self.keep = keep
        for leftover in self.folder.glob(".checkpoint*.tmp"):
            _delete(leftover)

    def save(self, state: dict[str, Any], step: int) -> None:
        """Write `state` as the checkpoint of `step`; to be called by one process only. Raises TypeError for what is not plain.

        Of the older ones the newest `keep` stay, this one included. Checkpoints of later steps go: they are the damaged ones, or those
        of a course that the run went back from, and would otherwise be mistaken for its latest.
        """
        state_files.require_plain(state)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / f"checkpoint_{step}.pt"
        written = self.folder / f".{kept.name}.tmp"
        state_files.write_synced(state, written)
        second_name = self.folder / f".{LATEST}.tmp"
        _link_or_copy(written, second_name)
        os.replace(written, kept)
        os.replace(second_name, self.folder / LATEST)
        _sync_folder(self.folder)
        self._forget_others(kept, step)

    def prepare_shares(self, step: int) -> Path:
        """An empty folder under a temporary name, for the shares of the checkpoint of `step`; to be called by one process only."""
        folder = self.folder / f".checkpoint_{step}.tmp"
        _delete(folder)
        folder.mkdir(parents=True)
        return folder

    def publish_shares(self, written: Path, step: int) -> None:
        """Give the folder, with all that belongs into it, its name; as `save` in all else."""
        kept = self.folder / f"checkpoint_{step}"
        _sync_folder(written)
        _delete(kept)
        os.replace(written, kept)
        (self.folder / LATEST).unlink(missing_ok=True)
        _sync_folder(self.folder)
        self._forget_others(kept, step)

    def load(self) -> dict[str, Any] | None:
        """The latest checkpoint that can be read, on the CPU; None if there is no checkpoint at all. All ranks call it together.

        Tensors of a folder of shares are `Scattered` and stay on the disk, so that each rank reads only what it takes.

        Warns in one line about damaged ones. Raises OptionError if all are damaged.
        """
        damaged = []
        for path in _candidates(self.folder):
            try:
                state = _read_together(path) if path.is_dir() else state_files.read(path)
            except MemoryError:
                raise
            except Exception as error:  # whatever the unpickler makes of garbage
                damaged.append(f"{path} ({_one_line(error)})")
                continue
            if damaged and distributed.rank() == 0:
                warnings.warn(f"damaged checkpoint: {', '.join(damaged)}; {path} is used instead", stacklevel=2)
            return state
        if not damaged:
            return None
        found = f"no checkpoint in it can be read: {', '.join(damaged)}"
        raise OptionError("output_dir", found, "remove these files to start afresh, or name another folder")

    def _forget_others(self, saved: Path, step: int) -> None:
        """Delete what is too old, of later steps, or of the same step in another form."""
        others = [(path_step, path) for path_step, path in _kept(self.folder) if path != saved]
        older = [path for path_step, path in others if path_step < step]
        for path in [path for path_step, path in others if path_step >= step] + older[max(self.keep - 1, 0) :]:
            _delete(path)
        if self.keep == 0 and saved.is_file():
            _delete(saved)


def _read_together(folder: Path) -> dict[str, Any]:
    """A folder of shares, of which each rank checks a part; what one finds damaged, all refuse."""
    state, problem = {}, None
    try:
        state = checkpoint_shares.read_scattered(folder, rank=distributed.rank(), ranks=distributed.world_size())
    except MemoryError:
        raise
    except Exception as error:
        problem = _one_line(error)
    problems = [each for each in distributed.gather_objects(problem) if each is not None]
    if problems:
        raise ValueError(problems[0])
    return state


def _sync_folder(folder: Path) -> None:
    """Make the new names themselves survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    """A file, or a folder of shares, if it is there; its name never holds a part of it."""
    if not path.is_dir():
        return path.unlink(missing_ok=True)
    hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.old.tmp")
    if hidden != path:
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
    return shutil.rmtree(hidden, ignore_errors=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in `folder` would resume from it."""
    return bool(_candidates(folder))


def peek(folder: Path) -> dict[str, Any] | None:
    """What the run in `folder` would resume from, its tensors left on the disk (None, of a checkpoint in shares); None if there is
    nothing, or nothing undamaged to see."""
    for path in _candidates(folder):
        with contextlib.suppress(Exception):  # loading it to resume says what is wrong with it
            return checkpoint_shares.peek(path) if path.is_dir() else state_files.read_lazily(path)
    return None


def load_checkpoint_file(path: Path) -> dict[str, Any]:
    """What is in a file that the user named, of this program or another (`.safetensors` too), on the CPU; nothing in it is run.

    A folder of shares is put together; `checkpoint.pt` of a run whose latest is one means that.

    Raises OptionError if it is missing, cannot be read, or holds anything but tensors, plain containers, numpy numbers and an
    argparse.Namespace.
    """
    path = latest(Path(path))
    if not path.is_file() and not checkpoint_shares.is_one(path):
        raise OptionError("checkpoint", f"there is no file '{path}'", "give a checkpoint file, outputs/.../checkpoint.pt for example")
    try:
        return checkpoint_shares.read(path) if path.is_dir() else _read_foreign(path)
    except MemoryError:
        raise
    except Exception as error:
        stranger = re.search(r"GLOBAL ([\w.]+)", str(error))
        if stranger is not None:
            found = f"'{path}' asks for {stranger.group(1)}, which could run any code, so it was not loaded"
            raise OptionError("checkpoint", found, "give a file of tensors and plain containers, a state dict for example") from error
        found = f"'{path}' cannot be read as tensors and plain containers ({_one_line(error)})"
        raise OptionError("checkpoint", found, "give a checkpoint that this program wrote, or a published one") from error


def latest(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or for the `checkpoint.pt` of a run that has none its newest folder of shares."""
    if path.name != LATEST or path.exists():
        return path
    return next((kept for _, kept in _kept(path.parent) if kept.is_dir()), path)


def strict_load(module: nn.Module, state: Mapping[str, Any], *, option: str, what: str, remedy: str = SAME_NETWORK) -> None:
    """Load `state` into `module` if it has all of its entries in the same shapes and no others.

    Otherwise nothing is loaded and OptionError names `option`, `what` ("student", say), a few of the entries that differ, and `remedy`.
    """
    here = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    there = {name: tuple(value.shape) if isinstance(value, (Tensor, Scattered)) else type(value).__name__ for name, value in state.items()}
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
    for path in folder.glob("checkpoint_*"):
        match = re.fullmatch(r"checkpoint_(\d+)(\.pt)?", path.name)
        if match and path.is_dir() == (match.group(2) is None):
            found.append((int(match.group(1)), path))
    return sorted(found, reverse=True)


def _read_foreign(path: Path) -> dict[str, Any]:
    """As `state_files.read`, and also what the original's checkpoints hold, files of older versions of torch (not zip), and safetensors."""
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    with torch.serialization.safe_globals(_OF_THE_ORIGINAL):
        if zipfile.is_zipfile(path):
            return state_files.read(path)
        return state_files.as_dict(torch.load(path, weights_only=True, map_location="cpu"))


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
