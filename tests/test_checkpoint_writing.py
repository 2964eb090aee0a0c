"""Checkpoints written while training goes on: what they hold, who waits for them, and where their errors come out."""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit.checkpoint_writing import CheckpointWriter
from esvit.checkpoints import CheckpointFolder, load_checkpoint_file
from tests.command_line.commands import differences
from tests.test_checkpoints import names

FORMS = pytest.mark.parametrize("in_shares", [False, True])


class Gate:
    """torch.save, which waits here until it is opened, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._real = torch.save
        self._open = threading.Event()
        self.error: Exception | None = None
        monkeypatch.setattr(torch, "save", self)

    def __call__(self, *arguments: Any) -> None:
        assert self._open.wait(20)
        if self.error is not None:
            raise self.error
        self._real(*arguments)

    def open(self) -> None:
        self._open.set()

    @contextmanager
    def opened_soon(self) -> Iterator[None]:
        """And not before the block under it waits, as far as half a tenth of a second tells."""
        thread = threading.Timer(0.05, self.open)
        thread.start()
        yield
        thread.join()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def background(folder: Path) -> CheckpointWriter:
    return CheckpointWriter(CheckpointFolder(folder, keep=2), background=True)


def live_state() -> dict[str, Any]:
    weight = torch.arange(6.0).view(2, 3)
    return {"student": {"weight": weight, "part of it": weight[0]}, "sums": [torch.tensor(1.5), ("a", 2)], "count": 3}


@FORMS
def test_a_checkpoint_is_of_the_step_it_was_taken_in_however_late_it_is_written(in_shares, tmp_path, gate):
    state, expected = live_state(), live_state()
    writer = background(tmp_path)
    writer.save(state, 1, in_shares=in_shares)
    state["student"]["weight"] += 1
    state["sums"][0] += 1
    state["sums"].append("later")
    gate.open()
    writer.wait()
    assert differences(load_checkpoint_file(tmp_path / "checkpoint.pt"), expected) == []


@FORMS
def test_the_next_save_waits_for_the_one_before(in_shares, tmp_path, gate):
    writer = background(tmp_path)
    writer.save(live_state(), 1, in_shares=in_shares)
    with gate.opened_soon():
        writer.save(live_state(), 2, in_shares=in_shares)
        assert any(name.startswith("checkpoint_1") for name in names(tmp_path))
    writer.wait()
    assert [name.removesuffix(".pt") for name in names(tmp_path) if name != "checkpoint.pt"] == ["checkpoint_1", "checkpoint_2"]


@FORMS
def test_an_error_of_the_disk_comes_out_at_the_next_wait_and_the_checkpoint_before_stands(in_shares, tmp_path, gate):
    writer = background(tmp_path)
    gate.open()
    writer.save(live_state(), 1, in_shares=in_shares)
    writer.wait()
    gate.error = OSError(errno.ENOSPC, "No space left on device")
    writer.save(live_state(), 2, in_shares=in_shares)
    with pytest.raises(OSError, match="No space left"):
        writer.save(live_state(), 3, in_shares=in_shares)
    writer.wait()  # it has been told
    loaded = CheckpointFolder(tmp_path, keep=2).load()
    assert loaded is not None and differences(loaded, live_state()) == []
    assert [name.removesuffix(".pt") for name in names(tmp_path) if name != "checkpoint.pt"] == ["checkpoint_1"]


def test_what_is_not_plain_is_refused_at_once(tmp_path):
    with pytest.raises(TypeError, match="a checkpoint holds tensors and plain containers only"):
        background(tmp_path).save({"folder": tmp_path}, 1, in_shares=False)
    with pytest.raises(TypeError, match="a checkpoint holds tensors and plain containers only"):
        background(tmp_path).save({"folder": tmp_path}, 1, in_shares=True)


@pytest.mark.parametrize("failure", [None, ValueError])
def test_a_training_does_not_end_before_its_last_checkpoint_is_on_the_disk(failure, tmp_path, gate):
    def train() -> None:
        writer = background(tmp_path)
        with gate.opened_soon(), writer.writing():
            writer.save(live_state(), 1, in_shares=False)
            if failure:
                raise failure

    if failure:
        with pytest.raises(failure):
            train()
    else:
        train()
    assert names(tmp_path) == ["checkpoint.pt", "checkpoint_1.pt"]


def test_a_training_that_fails_only_warns_that_its_last_checkpoint_failed_too(tmp_path, gate):
    gate.error = OSError(errno.ENOSPC, "No space left on device")
    gate.open()
    writer = background(tmp_path)
    warned = pytest.warns(UserWarning, match="the last checkpoint was not written .*No space left")
    with warned, pytest.raises(ZeroDivisionError), writer.writing():
        writer.save(live_state(), 1, in_shares=False)
        raise ZeroDivisionError


def test_a_second_ctrl_c_waits_for_nothing(tmp_path, gate):
    writer = background(tmp_path)
    with pytest.raises(KeyboardInterrupt), writer.writing():
        writer.save(live_state(), 1, in_shares=False)
        raise KeyboardInterrupt
    assert "checkpoint.pt" not in names(tmp_path)
    gate.open()
    writer.wait()
    assert "checkpoint.pt" in names(tmp_path)  # had it been waited for, the gate would have given up
