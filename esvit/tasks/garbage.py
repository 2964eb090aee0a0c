"""Python's garbage is collected in the same step on every rank: a rank that collects by itself lets all others wait for it.

Unusual: what is there when training begins, hundreds of thousands of objects of libraries, is never looked at again until it ends.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator

EVERY = 100  # optimizer steps between collections


@contextlib.contextmanager
def collected_together() -> Iterator[Callable[[int], None]]:
    """No automatic collection inside; gives a function to be told of every completed step (counted from 1), which collects in its turn."""
    was_automatic = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        yield _collect
    finally:
        gc.unfreeze()
        if was_automatic:
            gc.enable()


def _collect(done: int) -> None:
    if done % EVERY == 0:
        gc.collect()
