"""Where a run happens: device, ranks, precision, determinism, seed, run folder, signals. A context manager.

Unusual: all randomness is keyed. Before each step `seed_step` sets torch's generators from (seed, step, rank), so a
resumed step draws what it would have drawn; the data loader has keys of its own (seed, epoch, position).
"""

import contextlib
import datetime
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from esvit import distributed
from esvit.errors import Interrupted, OptionError
from esvit.run_folder import RunFolder
from esvit.watchdog import Watchdog

_AUTOCAST_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Runtime:
    """Device and ranks of one process.

    device           "auto", "cpu", "cuda" or "mps"
    precision        "fp32", "bf16" or "fp16": type of matrix products under `autocast`
    seed             of weights, data order, crops and drop path
    deterministic    only algorithms that repeat bit for bit; None means on CPU only
    threads          CPU threads of torch per process; None means all cores divided by the processes on this machine
    timeout_minutes  how long a collective may wait for the other ranks
    stall_minutes    how long a run may make no progress before it writes down its stacks and ends; 0 means for ever
    """

    def __init__(
        self,
        *,
        device: str,
        precision: str,
        seed: int,
        deterministic: bool | None,
        threads: int | None,
        timeout_minutes: float,
        stall_minutes: float,
    ):
        self.device = _choose_device(device)
        self.precision = precision
        self.seed = seed
        self.deterministic = self.device.type == "cpu" if deterministic is None else deterministic
        self.threads = threads or max(1, (os.cpu_count() or 1) // _processes_here())
        self.timeout = datetime.timedelta(minutes=timeout_minutes)
        self.stall_minutes = stall_minutes
        self.folder = Path()
        self._watchdog: Watchdog | None = None
        self._signal = 0
        self._old_handlers: dict[int, Any] = {}
        self._pending_vote: tuple[torch.Tensor, dist.Work] | None = None
        self._vote_group: dist.ProcessGroup | None = None

    def __enter__(self) -> "Runtime":
        torch.set_num_threads(self.threads)
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Does what torch.use_deterministic_algorithms does, which would import torch's compiler: seconds, for nothing here.
        torch.set_deterministic_debug_mode("error" if self.deterministic else "default")
        torch.backends.cudnn.benchmark = not self.deterministic
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if distributed.environment_world_size() > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            device_id = self.device if self.device.type == "cuda" else None
            dist.init_process_group(backend, timeout=self.timeout, device_id=device_id)
            self._vote_group = dist.new_group(backend="gloo", timeout=self.timeout)  # type: ignore[assignment]  # never -100 for a member
        for number in _STOP_SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._on_signal)
        self._seed_everything(self.seed)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if self._pending_vote is not None and kind is None:
            self._pending_vote[1].wait()
        if distributed.is_active():
            if kind is None:
                distributed.barrier()
            dist.destroy_process_group()

    @property
    def rank(self) -> int:
        return distributed.rank()

    @property
    def world_size(self) -> int:
        return distributed.world_size()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def records_to(self, run_folder: RunFolder, *, tracking: Any, config: dict[str, Any]) -> None:
        """Say where results will go; nothing is written before `recording`."""
        self.folder = run_folder.path
        self._run_folder = run_folder
        self._tracking = tracking
        self._config = config

    @contextlib.contextmanager
    def recording(self) -> Iterator[Any]:
        """The run folder and its tracker, for a task that has checked its options; tells the tracker how the run ended.

        Raises OptionError if the folder cannot be written, or another process writes to it.
        """
        tracker = self._open_tracker()  # before anything else is written: it holds the folder's lock
        try:
            distributed.from_rank_zero(lambda: self._run_folder.begin(self._config))
            with self._watched():
                yield tracker
        except Interrupted:
            tracker.close("KILLED")
            raise
        except BaseException:
            tracker.close("FAILED")
            raise
        tracker.close("FINISHED")

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        if self.stall_minutes > 0:
            report = self.folder / "errors" / f"stall_rank_{self.rank}.txt"
            self._watchdog = Watchdog(stall_minutes=self.stall_minutes, report=report)
        try:
            yield
        finally:
            if self._watchdog is not None:
                self._watchdog.end()
                self._watchdog = None

    def beat(self, doing: str) -> None:
        """Tell the watchdog of progress, e.g. "step 120"."""
        if self._watchdog is not None:
            self._watchdog.beat(doing)

    def _open_tracker(self) -> Any:
        """This rank's tracker; what rank 0 has to object is raised on every rank."""
        opened = []

        def open_mine() -> None:
            try:
                opened.append(self._tracking.open(run_folder=self.folder, config=self._config, is_main=self.is_main))
            except OSError as error:
                found = f"cannot write to '{self.folder}' ({error.strerror})"
                raise OptionError("output_dir", found, "give a folder that can be written") from None

        distributed.from_rank_zero(open_mine)
        if not self.is_main:
            open_mine()
        return opened[0]

    def autocast(self) -> contextlib.AbstractContextManager:
        kind = _AUTOCAST_TYPES[self.precision]
        if kind is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=kind)

    def seed_step(self, step: int) -> np.random.Generator:
        """Key all of torch's randomness in this step by (seed, step, rank); returns a generator for mixing, keyed alike."""
        sequence = np.random.SeedSequence([self.seed, step, self.rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
        return np.random.default_rng(sequence)

    def stop_signal(self) -> int:
        """The signal that asks the run to stop, the same number on every rank in the same step, or 0.

        With several ranks the vote of one step is collected in the next, so that nobody waits for it.
        """
        if self._vote_group is None:
            return self._signal
        agreed = 0
        if self._pending_vote is not None:
            votes, work = self._pending_vote
            work.wait()
            agreed = int(votes.item())
        votes = torch.tensor(self._signal, dtype=torch.int32)
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._vote_group, async_op=True)
        self._pending_vote = (votes, work)
        return agreed

    def stop_signal_here(self) -> int:
        """The signal that this rank got, or 0: for work that ends without the others' consent, all ranks being told alike."""
        return self._signal

    def peak_memory_gb(self) -> float:
        """High-water mark of this process: allocated device memory on a GPU, resident memory otherwise."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def _seed_everything(self, seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)


def _processes_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise OptionError("device", "'cuda' was asked for but torch sees no CUDA device", "use device=cpu, or device=auto")
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise OptionError(
                "launcher.processes",
                f"process {local_rank} has no GPU of its own, there are {torch.cuda.device_count()}",
                "start one process per GPU, or use device=cpu",
            )
        return torch.device("cuda", local_rank)
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise OptionError("device", "'mps' was asked for but torch sees no Apple GPU", "use device=cpu, or device=auto")
        if distributed.environment_world_size() > 1:
            raise OptionError("launcher.processes", "several processes cannot share 'mps'", "use launcher.processes=1, or device=cpu")
    return torch.device(name)


def warn_of_thread_change(before: int | None, now: int) -> None:
    """Sums over threads depend on their number: say so when a resumed run has another one."""
    if before is not None and before != now:
        warnings.warn(
            f"runtime.threads: the run so far had {before} CPU threads, now {now}; results will not repeat bit for bit", stacklevel=2
        )
