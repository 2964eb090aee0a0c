"""A checkpoint as a folder, into which every rank writes its own shares of what is spread over the ranks, and nobody gathers anything.

    share_<r>_of_<R>.pt   of rank r: {"step", "shares": {place in the state: {"begin", "shape" of the whole, "values"}}}
    index.pt              written last, by rank 0: {"step", "files", "tensors": {place: shape of the whole}, "state" with None for tensors}

A place is the names on the way to a tensor, as in "optimizer/parameters/backbone.norm.weight/exp_avg". Of copies of a share only the
first is written, and what is whole on every rank only by rank 0. A rank without any share writes no file.

Unusual: not torch.distributed.checkpoint, whose table of contents is a pickle that may run any code when it is loaded. Each file here is
one of state_files.py, and where a share lies is told by its tensor's own mesh, so that tensors on several meshes go together.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from esvit import distributed, state_files
from esvit.distributed import Scattered

INDEX = "index.pt"


def file_name(rank: int, ranks: int) -> str:
    return f"share_{rank}_of_{ranks}.pt"


# ---------------------------------------------------------------------------------------------------- writing


def own_shares(state: Any, *, copied: Callable[[Tensor], Tensor]) -> dict[str, dict[str, Any]]:
    """What this rank writes of `state`: its shares by their places, and on rank 0 also what is whole.

    copied  makes the tensor that is written, with memory of its own: a share may be a view of something larger, which would be written too
    """
    shares: dict[str, dict[str, Any]] = {}
    for place, tensor in _tensors(state).items():
        if distributed.is_sharded(tensor):
            begin, is_ours = distributed.begin_of_share(tensor), distributed.is_first_copy(tensor)
        else:
            begin, is_ours = (0,) * tensor.ndim, distributed.rank() == 0
        if is_ours:
            (share,) = distributed.shares([tensor])
            shares[place] = {"begin": begin, "shape": tuple(tensor.shape), "values": copied(share)}
    return shares


def index_of(state: dict[str, Any], *, step: int, files: list[str]) -> dict[str, Any]:
    """What rank 0 writes when all files are there. Raises TypeError for what is not plain."""
    index = {
        "step": step,
        "files": files,
        "tensors": {place: tuple(tensor.shape) for place, tensor in _tensors(state).items()},
        "state": _rebuilt(state, lambda place, leaf: None if isinstance(leaf, Tensor) else leaf),
    }
    state_files.require_plain(index)
    return index


def write_share(shares: Mapping[str, dict[str, Any]], path: Path, *, step: int) -> None:
    """Whole or not at all, and on the disk when it returns."""
    state_files.save_atomically({"step": step, "shares": dict(shares)}, path)


def _tensors(state: Any) -> dict[str, Tensor]:
    """By their places."""
    found: dict[str, Tensor] = {}

    def note(place: str, leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            if place in found:
                raise ValueError(f"two tensors of the state are at {place}")
            found[place] = leaf

    _rebuilt(state, note)
    return found


def _rebuilt(state: Any, leaf: Callable[[str, Any], Any], place: str = "") -> Any:
    """The same containers with `leaf(place, value)` for each value."""
    if isinstance(state, dict):
        return type(state)((key, _rebuilt(value, leaf, f"{place}/{key}" if place else str(key))) for key, value in state.items())
    if isinstance(state, (list, tuple)):
        return type(state)(_rebuilt(value, leaf, f"{place}/{number}") for number, value in enumerate(state))
    return leaf(place, state)


# ---------------------------------------------------------------------------------------------------- reading


def is_one(path: Path) -> bool:
    """Whether it is a folder of shares."""
    return (path / INDEX).is_file()


def peek(folder: Path) -> dict[str, Any]:
    """The state with None for tensors."""
    return state_files.as_dict(state_files.read(folder / INDEX)["state"])


def read(folder: Path) -> dict[str, Any]:
    """The whole state, put together on the CPU. Raises ValueError, or what a reader of files does, where something is damaged."""
    return _rebuilt(read_scattered(folder, rank=0, ranks=1), lambda _, leaf: leaf.whole() if isinstance(leaf, Scattered) else leaf)


def read_scattered(folder: Path, *, rank: int, ranks: int) -> dict[str, Any]:
    """The state, what is in shares left on the disk (`Scattered`) until somebody asks for a part of it.

    rank, ranks  of so many processes that read it together each checks some of the files

    Raises ValueError, or what a reader of files does, where something is damaged.
    """
    index = state_files.read(folder / INDEX)
    for name in index["files"][rank::ranks]:
        with _named(name):
            state_files.check(folder / name)
    pieces: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {place: [] for place in index["tensors"]}
    for name in index["files"]:
        with _named(name):
            content = state_files.read_lazily(folder / name)
            if content["step"] != index["step"]:
                raise ValueError(f"of step {content['step']}, not of {index['step']}")
        for place, share in content["shares"].items():
            pieces[place].append((share["begin"], share["values"]))
    tensors = {place: _tensor(place, shape, pieces[place]) for place, shape in index["tensors"].items()}
    return _rebuilt(index["state"], lambda place, leaf: tensors.get(place, leaf))


@contextlib.contextmanager
def _named(file: str) -> Iterator[None]:
    """What goes wrong in reading it begins with its name."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{file}: {error}") from error


def _tensor(place: str, shape: tuple[int, ...], pieces: list[tuple[tuple[int, ...], Tensor]]) -> Tensor | Scattered:
    if not pieces or sum(values.numel() for _, values in pieces) != math.prod(shape):
        raise ValueError(f"shares of {place} are missing")
    first = pieces[0][1]
    return first.clone() if tuple(first.shape) == shape else Scattered(shape, pieces)
