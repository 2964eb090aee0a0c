"""Whether training waits for images, and which option to change if it does."""

import os
from dataclasses import dataclass, field

TOLERATED_SHARE = 0.1  # of the time between two log records
RECORDS_BETWEEN_HINTS = 50


@dataclass(kw_only=True)
class LoaderHealth:
    """What is known of the loading; `look` at every record.

    workers       loading processes of each training process
    cores         CPU cores for each training process, its loading processes included
    engine        of the augmentation
    on_gpu        whether steps run on a GPU
    sampler       its name
    has_chunks    whether the images come in chunks of their own, as in shards
    """

    workers: int
    cores: int
    engine: str
    on_gpu: bool
    sampler: str
    has_chunks: bool
    _records: int = field(default=0, init=False)
    _last_hint: int | None = field(default=None, init=False)

    def look(self, wait_share: float | None) -> str | None:
        """One line where a record shows too much waiting, though not for every such record; the first is of the loader's start.

        wait_share  of the time since the last record; None if it was not measured
        """
        self._records += 1
        is_quiet = self._last_hint is not None and self._records - self._last_hint < RECORDS_BETWEEN_HINTS
        if wait_share is None or wait_share <= TOLERATED_SHARE or self._records == 1 or is_quiet:
            return None
        self._last_hint = self._records
        return f"{wait_share:.0%} of the time is spent waiting for images: {self._remedy()}"

    def _remedy(self) -> str:
        """The first that applies, the cheapest before others."""
        spare = max(1, self.cores - 1)
        if self.workers == 0:
            return f"set data.workers={spare}, 0 loads them between the steps"
        if self.workers < spare:
            return f"raise data.workers from {self.workers} to {spare} (there are {self.cores} cores for each process)"
        if self.engine == "reference":
            return "use augmentation.engine=fast" + (" or device" if self.on_gpu else "")
        if self.engine == "fast" and self.on_gpu:
            return "use augmentation.engine=device, which leaves colours and blur to the GPU"
        if not self.has_chunks:
            return "if the cores are idle the storage is slow: pack the images (task=pack) and use sampler=chunk; if not, use smaller crops"
        if self.sampler != "chunk":
            return "if the cores are idle the storage is slow: use sampler=chunk; if they are busy, use fewer or smaller crops"
        return "use more cores, fewer or smaller crops, or images that are stored smaller"


def cores_per_process() -> int:
    """CPU cores that each training process of this machine may count on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
