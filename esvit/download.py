"""Fetches one large file over connections that break: goes on where it stopped, notices a file that is not what it was. Imports no torch.

Next to FILE while it comes: FILE.part, and FILE.part.etag (which version of the file the server was sending). Next to it ever after:
FILE.sha256, in the format of `sha256sum`, written when the file was first used.
"""

import fcntl
import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from esvit.errors import OptionError

CHUNK_BYTES = 1 << 20
PATIENCE = 5  # attempts in a row that bring no byte, before giving up
TIMEOUT_SECONDS = 60.0
WANT_A_TOKEN = (401, 403, 404, 409)  # 404: some storages hide what one may not see; 409: Azure's "public access is not permitted"


def fetch(url: str, path: Path, *, token: str | None, option: str, token_option: str, pause_seconds: float = 2.0) -> Path:
    """The file at `url` as `path`: the one already there, or else downloaded. Its checksum is recorded once and compared from then on.

    token          query string that grants access, such as "sv=...&sig=..."; never printed
    option         what the user chose the file by, for errors
    token_option   what the user gives the token by, for errors
    pause_seconds  before the second attempt after one that brought nothing; doubled with each further one

    Raises OptionError when the server refuses, does not answer, or the checksum is another.
    """
    if not path.exists():
        with _part_of(path, option) as part:
            _complete(url, part, path, token=token, option=option, token_option=token_option, pause_seconds=pause_seconds)
            _etag_file(path).unlink(missing_ok=True)
            _compare_checksum(Path(str(part.name)), path, option=option)
            os.replace(str(part.name), path)
        return path
    _compare_checksum(path, path, option=option)
    return path


def checksum(path: Path) -> str:
    """SHA-256 in hexadecimal of a file, or of the files of a folder, one after the other in the order of their names."""
    digest = hashlib.sha256()
    for each in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(each, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _compare_checksum(found: Path, path: Path, *, option: str) -> None:
    """Compare `found` with what was recorded for `path`, or record it."""
    record = path.with_name(path.name + ".sha256")
    now = checksum(found)
    if not record.exists():
        record.write_text(f"{now}  {path.name}\n")
        return
    before = record.read_text().split()[0]
    if now != before:
        if found != path:
            found.unlink()
        where = f"'{path}' has" if found == path else "the downloaded file has"
        raise OptionError(
            option,
            f"{where} the checksum {now[:16]}..., not {before[:16]}... as when it was first used",
            f"remove '{path}' to download it again, and '{record}' too if the new file is to be trusted",
        )


@contextmanager
def _part_of(path: Path, option: str) -> Iterator[FileIO]:
    """The file that the download grows in, locked against a second process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = FileIO(path.with_name(path.name + ".part"), "ab")
    except OSError as error:
        raise _unwritable(path, error) from None
    with opened as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OptionError(option, f"another process is downloading '{path}'", "wait for it") from None
        yield part


def _complete(url: str, part: FileIO, path: Path, *, token: str | None, option: str, token_option: str, pause_seconds: float) -> None:
    """Append to `part` until it holds everything, over as many connections as it takes."""
    fruitless = 0
    while True:
        before = os.fstat(part.fileno()).st_size
        try:
            if _one_connection(url, part, path, token):
                return
            reason = "it was cut"
        except urllib.error.HTTPError as refusal:
            if refusal.code < 500:
                raise _refused(refusal, url, path, option, token_option) from None
            reason = f"the server answers {refusal.code} {refusal.reason}"
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        fruitless = 0 if os.fstat(part.fileno()).st_size > before else fruitless + 1
        if fruitless == PATIENCE:
            found = f"the connection to {_host(url)} failed {PATIENCE} times: {reason}"
            raise OptionError(option, found, "run this again: it goes on where it stopped")
        if fruitless:
            time.sleep(pause_seconds * 2 ** (fruitless - 1))


def _one_connection(url: str, part: FileIO, path: Path, token: str | None) -> bool:
    """Ask for what is missing and write what comes; whether the file is whole now."""
    have = os.fstat(part.fileno()).st_size
    request = urllib.request.Request(f"{url}?{token.lstrip('?')}" if token else url)
    if have:
        request.add_header("Range", f"bytes={have}-")
        noted = _noted_etag(path)
        if noted is not None:
            request.add_header("If-Range", noted)  # a server whose file has changed then sends all of it
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as refusal:
        if refusal.code != 416:  # "range not satisfiable": nothing is missing, or the file is another one by now
            raise
        refusal.close()
        total = re.fullmatch(r"bytes \*/(\d+)", refusal.headers.get("Content-Range", ""))
        if total is not None and int(total[1]) == have:
            return True
        part.truncate(0)
        return False
    with response:
        length, etag = response.headers.get("Content-Length"), _strong(response.headers.get("ETag"))
        if response.status == 206 and (not _begins_at(response, have) or etag != _noted_etag(path)):
            part.truncate(0)  # not what follows our bytes, whatever it is: ask for all of it
            return False
        if response.status != 206:
            part.truncate(0)
            have = 0
        if etag is None:
            _etag_file(path).unlink(missing_ok=True)
        else:
            _etag_file(path).write_text(etag)
        total_bytes = None if length is None else have + int(length)
        _copy(response, part, path.name, have, total_bytes)
    return total_bytes is None or os.fstat(part.fileno()).st_size == total_bytes


def _begins_at(response: Any, have: int) -> bool:
    place = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return place is not None and int(place[1]) == have


def _strong(etag: str | None) -> str | None:
    return None if etag is None or etag.startswith("W/") else etag  # a weak one says nothing about bytes


def _noted_etag(path: Path) -> str | None:
    file = _etag_file(path)
    return file.read_text() if file.exists() else None


def _copy(response: Any, part: FileIO, name: str, have: int, total: int | None) -> None:
    with tqdm(desc=name, initial=have, total=total, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr, disable=None) as bar:
        try:
            while chunk := response.read1(CHUNK_BYTES):  # read1: what has arrived, so that a cut loses nothing
                _write(part, chunk)
                bar.update(len(chunk))
        finally:
            os.fsync(part.fileno())


def _write(part: FileIO, chunk: bytes) -> None:
    try:
        while chunk:
            chunk = chunk[part.write(chunk) :]
    except OSError as error:  # or it would pass for an error of the connection
        raise _unwritable(Path(str(part.name)), error) from None


def _unwritable(path: Path, error: OSError) -> OptionError:
    return OptionError("ESVIT_HOME", f"cannot write '{path}' ({error.strerror})", "name a folder with room in this environment variable")


def _refused(refusal: urllib.error.HTTPError, url: str, path: Path, option: str, token_option: str) -> OptionError:
    refusal.close()
    found = f"{_host(url)} answers {refusal.code} {refusal.reason} for {url.rpartition('/')[2]}"
    by_hand = f"put the file at '{path}' yourself"
    if refusal.code in WANT_A_TOKEN:
        return OptionError(option, found, f"give the storage's access token as {token_option}, or {by_hand}")
    return OptionError(option, found, by_hand)


def _host(url: str) -> str:
    return urllib.request.Request(url).host


def _etag_file(path: Path) -> Path:
    return path.with_name(path.name + ".part.etag")
