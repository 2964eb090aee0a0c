"""Shards that lie on a server, fetched whole into a folder of bounded size.

The `webdataset` library opens the addresses (by `curl`, `gsutil`, or for `s3://` by `aws s3 cp`, or any command after `pipe:`). A shard
is visible in the folder once it is whole. All processes of a machine share the folder: each shard is fetched by one of them, under a
lock; room is made by removing what was not used for longest, which does no harm to a process that has it open.
"""

import fcntl
import hashlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from esvit.data.shard_index import SUFFIX, index_beside, read_index
from esvit.errors import OptionError

_COPY_BYTES = 1 << 20
_ADDRESS = re.compile(r"^(pipe:|[a-z][a-z0-9]+://)")


def is_remote(place: str) -> bool:
    """Whether a shard's place is an address, not a path."""
    return bool(_ADDRESS.match(place)) and not place.startswith("file:")


class ShardCache:
    """A folder that holds at most `gigabytes` of shards, and one more while it is fetched.

    option  the option that gave the addresses, for errors
    """

    def __init__(self, folder: Path, *, gigabytes: float, option: str):
        self.folder = folder
        self._limit = int(gigabytes * 1e9)
        self._gigabytes = gigabytes
        self._option = option

    def path_of(self, address: str) -> Path:
        """Where a shard is, or would be, in the folder."""
        name = re.sub(r"[^\w.-]+", "_", address.partition("?")[0].rpartition("/")[2])[-80:] or "shard"
        return self.folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name}"

    def fetch(self, address: str) -> Path:
        """The shard's file: the one already there, or else fetched.

        Raises OptionError if the address cannot be read, or the shard is too large for the folder.
        """
        path = self.path_of(address)
        if self._touch(path):
            return path
        with self._locked(path.name):
            if self._touch(path):  # another process fetched it meanwhile
                return path
            index = read_index(index_beside(path))
            self._make_room(0 if index is None else index.shard_bytes)
            self._download(address, path)
            if index is not None and path.stat().st_size != index.shard_bytes:
                found = f"'{address}' has {path.stat().st_size:,} bytes, its index was made for {index.shard_bytes:,}"
                self.forget(address)
                raise OptionError(self._option, found, f"put the shard and its {SUFFIX} there together, and try again")
            self._make_room(0, keep=path)
        return path

    def fetch_index(self, address: str) -> bool:
        """Whether the server has an index beside the shard; it is in the folder then, beside the shard's place."""
        if address.startswith("pipe:"):
            return False
        place, question, query = address.partition("?")
        path = index_beside(self.path_of(address))
        try:
            with self._locked(path.name):
                self._download(f"{place}{SUFFIX}{question}{query}", path, may_be_missing=True)
        except OptionError:
            return False
        if read_index(path) is None:  # a page that says that there is no such file
            path.unlink()
            return False
        return True

    def forget(self, address: str) -> None:
        """Remove a shard and its index from the folder, so that both are fetched anew."""
        path = self.path_of(address)
        path.unlink(missing_ok=True)
        index_beside(path).unlink(missing_ok=True)

    def read_lines(self, address: str) -> list[str] | None:
        """The lines of a small text file, or None if it cannot be had."""
        out = io.BytesIO()
        try:
            copy_remote(address, out, may_be_missing=True)
        except (OSError, ValueError):
            return None
        return out.getvalue().decode("utf-8", "surrogateescape").splitlines() or None

    def room_for(self, shard_bytes: int) -> int:
        """How many shards of this size the folder holds."""
        return self._limit // shard_bytes

    def _touch(self, path: Path) -> bool:
        """Whether the file is there; if so, it was used now."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _download(self, address: str, path: Path, *, may_be_missing: bool = False) -> None:
        part = path.with_name(f".{path.name}.part")
        try:
            with open(part, "wb") as out:
                copy_remote(address, out, may_be_missing=may_be_missing)
            if part.stat().st_size == 0:
                raise OSError("it is empty, or there is no such file")
            os.replace(part, path)
        except (OSError, ValueError) as error:
            found = f"cannot fetch '{address}' ({' '.join(str(error).split())[:200]})"
            raise OptionError(self._option, found, "check the address, the network, and that data.cache can be written") from error
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, coming_bytes: int, keep: Path | None = None) -> None:
        """Remove shards until so many bytes more are within the limit."""
        with self._locked("room"):
            shards = []
            for file in self.folder.iterdir():
                if file.name.startswith(".") or file.name.endswith(SUFFIX):
                    continue
                with suppress(FileNotFoundError):
                    shards.append((file.stat().st_mtime_ns, file.stat().st_size, file))
            held = sum(size for _, size, _ in shards) + coming_bytes
            for _, size, file in sorted(shards):
                if held <= self._limit:
                    break
                if file != keep:
                    file.unlink(missing_ok=True)
                    held -= size
            if held > self._limit:
                found = f"a shard of {held / 1e9:.3g} GB does not fit into {self._gigabytes:g} GB"
                raise OptionError("data.cache_gb", found, "allow more, or make smaller shards")

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / f".{name}.lock", "wb")  # noqa: SIM115
        except OSError as error:
            remedy = "give a folder that can be written"
            raise OptionError("data.cache", f"cannot write to '{self.folder}' ({error.strerror})", remedy) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def copy_remote(address: str, out: BinaryIO, *, may_be_missing: bool = False) -> None:
    """Everything at `address`. Raises OSError if it cannot be read to its end.

    may_be_missing  then the command that looks for it is silent about it
    """
    from webdataset.gopen import gopen  # a second, which sets without addresses need not spend

    if address.startswith("s3://"):  # which the library knows by way of a command alone
        address = f"pipe:aws s3 cp {shlex.quote(address)} - --only-show-errors{' 2>/dev/null' if may_be_missing else ''}"
    with gopen(address, "rb") as stream:
        while content := stream.read(_COPY_BYTES):
            out.write(content)
