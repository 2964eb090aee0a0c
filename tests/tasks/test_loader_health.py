"""The hint of a training that waits for its images."""

import pytest

from esvit.tasks.loader_health import RECORDS_BETWEEN_HINTS, LoaderHealth, cores_per_process


def health(**changes):
    known = {"workers": 7, "cores": 8, "engine": "device", "on_gpu": True, "sampler": "chunk", "has_chunks": True}
    return LoaderHealth(**(known | changes))


def test_the_first_record_is_of_the_start_and_little_waiting_is_fine():
    looking = health()
    assert looking.look(0.9) is None
    assert looking.look(0.1) is None and looking.look(None) is None
    assert looking.look(0.42).startswith("42% of the time is spent waiting for images: ")


def test_hints_are_rare():
    looking = health()
    said = [record for record in range(1, 2 * RECORDS_BETWEEN_HINTS + 3) if looking.look(0.5)]
    assert said == [2, 2 + RECORDS_BETWEEN_HINTS, 2 + 2 * RECORDS_BETWEEN_HINTS]


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"workers": 0, "engine": "reference"}, "data.workers=7"),
        ({"workers": 3, "engine": "reference"}, "raise data.workers from 3 to 7"),
        ({"engine": "reference", "on_gpu": False}, "use augmentation.engine=fast"),
        ({"engine": "reference"}, "use augmentation.engine=fast or device"),
        ({"engine": "fast"}, "use augmentation.engine=device"),
        ({"engine": "fast", "on_gpu": False, "has_chunks": False}, "task=pack"),
        ({"sampler": "shuffle"}, "use sampler=chunk"),
        ({}, "more cores, fewer or smaller crops"),
    ],
)
def test_the_hint_names_what_to_change(changes, remedy):
    looking = health(**changes)
    looking.look(0.5)
    assert remedy in looking.look(0.5)


def test_there_is_a_core_for_each_process(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100000")
    assert cores_per_process() == 1
