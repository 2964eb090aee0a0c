"""When and by whom a run's checkpoints are written: at once or while training goes on, by rank 0 as one file or by every rank its shares.

In the background a thread of each rank that writes has a copy of the state in the CPU's memory and never communicates: rank 0's gives a
folder of shares its name when it sees that all files are there. What went wrong is told at the next `wait`, on all ranks.
"""

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esvit import checkpoint_shares, distributed, state_files
from esvit.checkpoints import CheckpointFolder

_SECONDS_BETWEEN_LOOKS = 0.05  # for the other ranks' files
_PATIENCE_SECONDS = 60.0  # with the other ranks' files, when the run fails


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time. All ranks call everything together, but for the end of `writing` by an exception.

    background  `save` returns when the state has been copied; otherwise when the checkpoint is on the disk
    """

    def __init__(self, folder: CheckpointFolder, *, background: bool):
        self.folder = folder
        self.background = background
        self._writing: _Writing | None = None

    def save(self, state: dict[str, Any], step: int, *, in_shares: bool) -> None:
        """Write the checkpoint of `step`, after the one before it.

        state      on every rank with the same sharded tensors; of all else rank 0's counts
        in_shares  every rank writes its own into one folder; otherwise rank 0 gathers them and writes a file
        """
        self.wait()
        self._writing = self._of_shares(state, step) if in_shares else self._of_one_file(state, step)
        if self.background:
            self._writing.start()
        else:
            self.wait()

    def wait(self) -> None:
        """Until what `save` began is on the disk. Raises on all ranks what went wrong on one; the checkpoint before then still stands."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.finish()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around a training: it does not end before its last checkpoint is on the disk, but for a second Ctrl-C."""
        try:
            yield
        except Exception:
            if self._writing is not None:
                self._writing.finish_alone()
            raise
        self.wait()

    def _of_one_file(self, state: dict[str, Any], step: int) -> "_Writing":
        whole = _copied(state) if self.background else distributed.gathered(state, everywhere=False)
        if distributed.rank() != 0:
            return _Writing(write=_nothing, publish=_nothing)
        state_files.require_plain(whole)
        return _Writing(write=lambda: self.folder.save(whole, step), publish=_nothing)

    def _of_shares(self, state: dict[str, Any], step: int) -> "_Writing":
        shares = checkpoint_shares.own_shares(state, copied=_copy)
        _wait_for_copies()
        ranks = distributed.world_size()
        folder: Path = distributed.from_rank_zero(lambda: self.folder.prepare_shares(step))
        writes = distributed.gather_objects(bool(shares))
        files = [checkpoint_shares.file_name(rank, ranks) for rank in range(ranks) if writes[rank]]
        mine = folder / checkpoint_shares.file_name(distributed.rank(), ranks)
        write = (lambda: checkpoint_shares.write_share(shares, mine, step=step)) if shares else _nothing
        if distributed.rank() != 0:
            return _Writing(write=write, publish=_nothing)
        index = checkpoint_shares.index_of(state, step=step, files=files)

        def publish() -> None:
            state_files.write_synced(index, folder / checkpoint_shares.INDEX)
            self.folder.publish_shares(folder, step)

        return _Writing(write=write, publish=publish, needed=[folder / name for name in files])


class _Writing:
    """One checkpoint on its way to the disk.

    write    this rank's file
    publish  when all files are there: gives the checkpoint its name, on rank 0
    needed   all files, where this rank has to look for them
    """

    def __init__(self, *, write: Callable[[], None], publish: Callable[[], None], needed: list[Path] | None = None):
        self._write = write
        self._publish = publish
        self._needed = needed or []
        self._error: Exception | None = None
        self._has_written = threading.Event()
        self._is_refused = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Go on in a thread, which a process that has to end does not wait for."""
        self._thread = threading.Thread(target=self._write_and_publish, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """All ranks together. Raises what went wrong on any."""
        if self._thread is None:
            self._write_mine()
        else:
            self._has_written.wait()
        self._raise_on_all()  # nobody is beyond this before all have written
        if self._thread is None:
            self._try(self._publish)
        else:
            self._thread.join()
        self._raise_on_all()

    def finish_alone(self) -> None:
        """While an exception ends this rank, and perhaps no other; what goes wrong is a warning."""
        if self._thread is None:
            return
        self._has_written.wait()
        self._thread.join(_PATIENCE_SECONDS)
        if self._error is not None or self._thread.is_alive():
            reason = "not all ranks wrote their shares" if self._error is None else str(self._error)
            warnings.warn(f"the last checkpoint was not written ({reason}); the one before stands", stacklevel=2)

    def _write_and_publish(self) -> None:
        self._write_mine()
        while self._error is None and not self._is_refused.is_set():
            if all(file.exists() for file in self._needed):
                return self._try(self._publish)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return None

    def _write_mine(self) -> None:
        self._try(self._write)
        self._write = _nothing  # the copy of the state goes
        self._has_written.set()

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error

    def _raise_on_all(self) -> None:
        errors = [error for error in distributed.gather_objects(self._error) if error is not None]
        if errors:
            self._is_refused.set()
            raise self._error or errors[0]


def _nothing() -> None:
    pass


def _copied(state: Any) -> Any:
    """The same containers with whole tensors in memory of their own, on the CPU; on ranks other than 0 worthless."""
    copy = _on_cpu(state)
    _wait_for_copies()
    return copy


def _on_cpu(state: Any) -> Any:
    if isinstance(state, dict):
        return type(state)((name, _on_cpu(value)) for name, value in state.items())
    if isinstance(state, (list, tuple)):
        return type(state)(_on_cpu(value) for value in state)
    if distributed.is_sharded(state):
        return distributed.gathered(state, everywhere=False)
    return _copy(state) if isinstance(state, Tensor) and distributed.rank() == 0 else state


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU, in memory of its own; from a GPU on its way until `_wait_for_copies`."""
    tensor = tensor.detach()
    on_gpu = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)  # only into pinned memory it does not stop at each tensor
    return copy.copy_(tensor, non_blocking=on_gpu)


def _wait_for_copies() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
