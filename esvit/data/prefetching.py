"""Fetches the shards that an epoch will need next from their server, in a thread of the training process, while others are being read.

Without it the first image of a shard would wait for the whole shard. A shard that cannot be fetched is left to the loading process that
needs it, which tells the reason.
"""

import threading

import numpy as np

from esvit.data.base import ImageSet
from esvit.errors import OptionError


class Prefetcher:
    """Keeps half as many chunks ahead as can be at hand: those of the next window, beside the one that is being read."""

    def __init__(self, images: ImageSet):
        assert images.chunk_ends is not None and images.chunks_at_hand is not None
        self._images = images
        self._ends = images.chunk_ends
        self._ahead = max(1, images.chunks_at_hand // 2)
        self._changed = threading.Condition()
        self._first_images = np.empty(0, dtype=np.int64)  # of each chunk of the epoch, in the order in which they are needed
        self._first_positions = np.empty(0, dtype=np.int64)
        self._fetched = self._wanted = 0  # so many chunks of them
        self._closed = False
        self._thread = threading.Thread(target=self._fetch, name="prefetching of shards", daemon=True)
        self._thread.start()

    def begin(self, order: np.ndarray) -> None:
        """An epoch whose images come in this order."""
        _, positions = np.unique(np.searchsorted(self._ends, order, side="right"), return_index=True)
        with self._changed:
            self._first_positions = np.sort(positions)
            self._first_images = order[self._first_positions]
            self._fetched = self._wanted = 0

    def reach(self, position: int) -> None:
        """What stands before `position` of the epoch has been asked for."""
        with self._changed:
            begun = int(np.searchsorted(self._first_positions, position, side="right"))
            self._fetched = max(self._fetched, begun - 1)  # what was read without us, after a resume
            self._wanted = min(begun + self._ahead, len(self._first_images))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _fetch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._fetched < self._wanted)
                if self._closed:
                    return
                image = int(self._first_images[self._fetched])
                self._fetched += 1
            try:
                self._images.fetch(image)
            except OptionError:
                continue
