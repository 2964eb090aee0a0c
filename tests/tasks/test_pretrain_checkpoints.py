"""How pre-training writes its checkpoints: at once or in the background, the same files; in shares, see test_sharding.py."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit.checkpoints import load_checkpoint_file
from esvit.errors import Interrupted, OptionError
from esvit.run_folder import RunFolder
from esvit.tracking.base import NoTracking
from run import build
from tests.command_line.commands import TINY, assert_same_training, checkpoint, differences
from tests.data.pictures import write_classes
from tests.tasks.colours import one_process
from tests.tasks.composition import composed
from tests.test_checkpoints import names

BACKGROUND = "task.checkpoint_writing=background"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_classes(folder, {"cat": 8, "dog": 8})
    return folder


def pretrain(pictures: Path, folder: Path, *changes: str) -> None:
    options = composed(*TINY, f"data.root={pictures}", "max_steps=4", "checkpoint_every=1", *changes)
    with one_process() as runtime:
        runtime.records_to(RunFolder(folder), tracking=NoTracking(host=None), config=options["chosen"])
        build(options["task"]).run(runtime)


@pytest.fixture(scope="module")
def at_once(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("at_once")
    pretrain(pictures, folder)
    return folder


def checkpoints(folder: Path) -> list[str]:
    return [name for name in names(folder) if "checkpoint" in name]


def test_checkpoints_of_the_background_are_those_that_training_waits_for(pictures, at_once, tmp_path):
    pretrain(pictures, tmp_path, BACKGROUND)
    assert checkpoints(tmp_path) == checkpoints(at_once) == ["checkpoint.pt", *(f"checkpoint_{step}.pt" for step in (2, 3, 4))]
    assert_same_training(tmp_path, at_once)
    for step in (2, 3, 4):
        ours, theirs = (checkpoint(folder, f"checkpoint_{step}.pt") for folder in (tmp_path, at_once))
        assert differences(ours, theirs | {"config": ours["config"]}) == []


def test_a_signal_while_a_checkpoint_is_written_ends_the_run_with_its_last_step_on_disk(pictures, at_once, tmp_path, monkeypatch):
    """The signal comes in the thread that writes the first one; the run goes on from the last."""
    real, calls = torch.save, []

    def save_and_signal(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(*arguments)

    monkeypatch.setattr(torch, "save", save_and_signal)
    with pytest.raises(Interrupted) as stopped:
        pretrain(pictures, tmp_path, BACKGROUND)
    monkeypatch.undo()
    assert 1 <= stopped.value.step < 4
    assert checkpoint(tmp_path)["step"] == stopped.value.step
    pretrain(pictures, tmp_path)
    assert_same_training(tmp_path, at_once)


def test_one_process_has_no_shares_to_write(pictures, tmp_path):
    pretrain(pictures, tmp_path, "task.sharding=fsdp", "task.checkpoint_shares=true", "max_steps=1")
    assert checkpoints(tmp_path) == ["checkpoint.pt", "checkpoint_1.pt"]
    assert load_checkpoint_file(tmp_path / "checkpoint.pt")["step"] == 1


def test_shares_of_nothing_are_refused_before_any_work(pictures, tmp_path):
    with pytest.raises(OptionError, match="^task.checkpoint_shares: needs student and teacher in shares[^\n]*$"):
        pretrain(pictures, tmp_path, "task.checkpoint_shares=true")
    assert names(tmp_path) == []
