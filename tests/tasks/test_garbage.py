import gc
import weakref

import pytest

from esvit.tasks.garbage import EVERY, collected_together


class Node:
    """Refers to itself, so that only a collection ends it."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_waits_for_the_step_in_which_all_collect():
    with collected_together() as collect:
        assert not gc.isenabled()
        node = weakref.ref(Node())
        collect(EVERY - 1)
        assert node() is not None
        collect(EVERY)
        assert node() is None
    assert gc.isenabled()


def test_collection_is_automatic_again_after_an_error():
    with pytest.raises(ValueError, match="stop"), collected_together():
        raise ValueError("stop")
    assert gc.isenabled() and gc.get_freeze_count() == 0
