"""Listings of large image sets, kept in a folder: what took minutes to list opens in a moment the next time.

One file for each set: a line of JSON that says what is in it, then arrays, which are mapped into memory, so that all processes of a machine
share one copy. The arrays have a checksum. A file that is damaged or of another version is as good as none: whoever asked lists again.
Writing is a rename, so that any number of processes may keep the same set at a time.
"""

import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

CACHED_FROM = 20_000  # images; smaller sets are listed in less than a second
_VERSION = 1
_ALIGNMENT = 64  # bytes


class IndexCache:
    """Listings in `folder`; None keeps nothing."""

    def __init__(self, folder: str | None):
        self._folder = None if folder is None else Path(folder).expanduser()

    def path(self, kind: str, source: str) -> Path | None:
        """Where the listing of this `kind` of the file or folder `source` is kept."""
        if self._folder is None:
            return None
        digest = hashlib.sha256(os.fsencode(os.path.realpath(source))).hexdigest()[:16]
        return self._folder / f"{kind}-{digest}.index"

    def load(self, kind: str, source: str) -> dict[str, np.ndarray] | None:
        """The arrays that were kept, or None. Whether `source` is still what it was then is for the caller to find out."""
        path = self.path(kind, source)
        if path is None or not path.exists():
            return None
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the listing in %s is damaged (%s); made again", path, error)
            return None

    def save(self, kind: str, source: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays. A folder that cannot be written to costs a warning: next time is as slow as this time."""
        path = self.path(kind, source)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _blocks(arrays))
        except OSError as error:
            log.warning("the listing of '%s' cannot be kept in data.index_cache=%s (%s)", source, self._folder, error)


def write_atomically(path: Path, blocks: Any) -> None:
    """Blocks of bytes as the file `path`: whole, or not at all."""
    number, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(number, "wb") as file:
            for block in blocks:
                file.write(block)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _blocks(arrays: Mapping[str, np.ndarray]) -> Any:
    """The file's content: the head, then each array from a multiple of 64 bytes on."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    places, size, checksum = {}, 0, 0
    for name, array in contiguous.items():
        places[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "at": size}
        size += _padded(array.nbytes)
        checksum = zlib.crc32(_bytes(array), checksum)
    body = json.dumps({"version": _VERSION, "size": size, "checksum": checksum, "arrays": places}).encode()
    head = body.ljust(_padded(len(body) + 1) - 1) + b"\n"
    yield head
    for array in contiguous.values():
        yield _bytes(array)
        yield b"\0" * (_padded(array.nbytes) - array.nbytes)


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _read(path: Path) -> dict[str, np.ndarray]:
    """Raises ValueError for a damaged file."""
    with open(path, "rb") as file:
        line = file.readline(1 << 20)
    head = json.loads(line)
    if head["version"] != _VERSION:
        raise ValueError("it is of another version")
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    if len(mapped) != len(line) + head["size"]:
        raise ValueError("it is cut off")
    arrays, checksum = {}, 0
    for name, place in head["arrays"].items():
        dtype = np.dtype(place["dtype"])
        begin = len(line) + place["at"]
        size = int(np.prod(place["shape"], dtype=np.int64)) * dtype.itemsize
        part = np.asarray(mapped[begin : begin + size])
        checksum = zlib.crc32(part.data, checksum)
        arrays[name] = part.view(dtype).reshape(place["shape"])
    if checksum != head["checksum"]:
        raise ValueError("its checksum differs")
    return arrays
