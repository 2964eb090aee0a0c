"""Checkpoints: atomic at every moment of a kill, falling back from damaged files, refusing what does not fit."""

import errno
import multiprocessing
import os
import signal
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from esvit.checkpoints import CheckpointFolder, load_checkpoint_file, strict_load
from esvit.errors import OptionError


def state(step: int, size: int = 10) -> dict:
    return {"step": step, "student": {"weight": torch.full((size,), float(step))}}


def latest(folder: CheckpointFolder) -> dict[str, Any]:
    loaded = folder.load()
    assert loaded is not None
    return loaded


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_state_comes_back_equal(tmp_path):
    saved: dict[str, Any] = {
        "student": OrderedDict(weight=torch.randn(3, 2), count=torch.tensor(3)),
        "rng": (torch.get_rng_state(), [1, 2.5, None, True], b"bytes"),
        "module": nn.Linear(2, 2).state_dict(),
        "steps": {3: "three"},
    }
    CheckpointFolder(tmp_path / "run", keep=2).save(saved, 5)
    loaded = latest(CheckpointFolder(tmp_path / "run", keep=2))
    assert loaded.keys() == saved.keys()
    assert torch.equal(loaded["student"]["weight"], saved["student"]["weight"])
    assert torch.equal(loaded["rng"][0], saved["rng"][0]) and loaded["rng"][1:] == saved["rng"][1:]
    assert torch.equal(loaded["module"]["bias"], saved["module"]["bias"])
    assert loaded["steps"] == {3: "three"}


def test_a_missing_or_empty_folder_has_no_checkpoint(tmp_path):
    assert CheckpointFolder(tmp_path / "none", keep=2).load() is None
    assert CheckpointFolder(tmp_path, keep=2).load() is None


def test_the_latest_and_the_newest_kept_ones_stay(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (8, 9, 10, 11):
        folder.save(state(step), step)
    assert names(tmp_path) == ["checkpoint.pt", "checkpoint_10.pt", "checkpoint_11.pt"]
    assert latest(folder)["step"] == 11
    assert load_checkpoint_file(tmp_path / "checkpoint_10.pt")["step"] == 10


def test_keeping_none_leaves_the_latest(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=0)
    folder.save(state(1), 1)
    folder.save(state(2), 2)
    assert names(tmp_path) == ["checkpoint.pt"]
    assert latest(folder)["step"] == 2


def test_the_same_step_can_be_saved_twice(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(state(1), 1)
    folder.save(state(1) | {"note": "again"}, 1)
    assert latest(folder)["note"] == "again"
    assert names(tmp_path) == ["checkpoint.pt", "checkpoint_1.pt"]


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1), 1)
    folder.save(state(2), 2)
    assert names(tmp_path) == ["checkpoint.pt", "checkpoint_2.pt"]
    assert not os.path.samefile(tmp_path / "checkpoint.pt", tmp_path / "checkpoint_2.pt")
    assert latest(folder)["step"] == 2


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"not a checkpoint at all" * 50)


def flip_one_bit_of_a_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(np.full(10, 2.0, np.float32).tobytes())
    content[place] ^= 1
    path.unlink()
    path.write_bytes(bytes(content))


def not_a_dict(path: Path) -> None:
    path.unlink()
    torch.save([1, 2], path)


DAMAGES = pytest.mark.parametrize("damage", [truncate, empty, garbage, flip_one_bit_of_a_weight, not_a_dict])


@DAMAGES
def test_a_damaged_latest_falls_back_to_the_one_before_with_one_warning(tmp_path, damage):
    folder = CheckpointFolder(tmp_path, keep=3)
    folder.save(state(1), 1)
    folder.save(state(2), 2)
    damage(tmp_path / "checkpoint.pt")
    damage(tmp_path / "checkpoint_2.pt")
    with pytest.warns(UserWarning) as caught:
        loaded = latest(folder)
    assert loaded["step"] == 1
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "checkpoint.pt" in message and "checkpoint_1.pt is used instead" in message and "\n" not in message


def test_an_intact_latest_loads_without_a_warning(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(state(1), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest(folder)["step"] == 1


@DAMAGES
def test_only_damaged_checkpoints_are_an_error_that_names_the_folder_option(tmp_path, damage):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(state(2), 2)
    damage(tmp_path / "checkpoint.pt")
    damage(tmp_path / "checkpoint_2.pt")
    with pytest.raises(OptionError, match="^output_dir: .*checkpoint_2.pt") as caught:
        folder.load()
    assert "\n" not in str(caught.value)


def test_a_run_that_fell_back_does_not_keep_the_damaged_later_checkpoint_over_its_own(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    (tmp_path / "checkpoint_100.pt").write_bytes(b"damaged")
    folder.save(state(60), 60)
    assert names(tmp_path) == ["checkpoint.pt", "checkpoint_60.pt"]


def test_leftover_temporary_files_are_removed_at_the_start_and_other_files_are_not(tmp_path):
    for name in (".checkpoint_5.pt.tmp", ".checkpoint.pt.tmp", "notes.tmp", "checkpoint_best.pt"):
        (tmp_path / name).write_bytes(b"")
    folder = CheckpointFolder(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint_best.pt", "notes.tmp"]
    folder.save(state(1), 1)
    assert "checkpoint_best.pt" in names(tmp_path)


@pytest.mark.parametrize(
    "entry, place",
    [
        (np.float64(1.0), "['rng']['deep'][1]"),
        (np.zeros(3), "['rng']['deep'][1]"),
        (Path("x"), "['rng']['deep'][1]"),
        ({1, 2}, "['rng']['deep'][1]"),
        (torch.device("cpu"), "['rng']['deep'][1]"),
    ],
)
def test_what_is_not_plain_is_refused_by_its_place_before_a_file_is_made(tmp_path, entry, place):
    with pytest.raises(TypeError) as caught:
        CheckpointFolder(tmp_path, keep=1).save({"rng": {"deep": [1, entry]}}, 1)
    assert place in str(caught.value)
    assert names(tmp_path) == []


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("function", ["fsync", "link", "replace", "open"])
def test_an_end_at_any_call_to_the_system_leaves_a_loadable_checkpoint(tmp_path, monkeypatch, function):
    """The state on the disk after each call is what a kill between two calls would leave."""
    CheckpointFolder(tmp_path, keep=2).save(state(1), 1)
    real = getattr(os, function)
    for moment in range(20):
        calls = 0

        def dying(*arguments, moment=moment, **options):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            return real(*arguments, **options)

        ended = True
        with monkeypatch.context() as patch:
            patch.setattr(os, function, dying)
            try:
                CheckpointFolder(tmp_path, keep=2).save(state(2), 2)
            except Killed:
                ended = False
        loaded = latest(CheckpointFolder(tmp_path, keep=2))
        assert loaded["student"]["weight"].unique().tolist() == [loaded["step"]]
        assert loaded["step"] in (1, 2)
        if ended:
            assert loaded["step"] == 2
            break
    else:
        pytest.fail("saving never came to its end")


def _save_for_ever(path: Path, states: list[dict], start: int) -> None:
    folder = CheckpointFolder(path, keep=2)
    for step in range(start, start + 100_000):
        folder.save(states[step % len(states)] | {"step": step}, step)


def test_a_process_killed_while_saving_leaves_a_loadable_checkpoint(tmp_path):
    """Forked, so that the child need not import torch; its tensors are made here, since threads do not survive a fork."""
    states = [{"student": torch.full((300_000,), float(number))} for number in range(3)]
    CheckpointFolder(tmp_path, keep=2).save(states[0] | {"step": 0}, 0)
    last = 0
    for round_number in range(12):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads
            child = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(tmp_path, states, last + 1))
            child.start()
        deadline = time.monotonic() + 10
        while not (tmp_path / f"checkpoint_{last + 1}.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.0037 * round_number)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = latest(CheckpointFolder(tmp_path, keep=2))
        assert loaded["student"].unique().tolist() == [loaded["step"] % 3]
        assert loaded["step"] >= last
        last = loaded["step"]
    assert last > 12 // 2


def test_a_named_file_that_is_missing_is_an_error_that_names_the_option(tmp_path):
    with pytest.raises(OptionError, match="^checkpoint: there is no file"):
        load_checkpoint_file(tmp_path / "nothing.pt")
    with pytest.raises(OptionError, match="^checkpoint: there is no file"):
        load_checkpoint_file(tmp_path)


@DAMAGES
def test_a_named_file_that_is_damaged_is_an_error_of_one_line(tmp_path, damage):
    path = tmp_path / "some.pt"
    torch.save(state(2), path)
    damage(path)
    with pytest.raises(OptionError, match="^checkpoint: .*some.pt") as caught:
        load_checkpoint_file(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"args": Path("x"), "model": nn.Linear(1, 1)}, tmp_path / "code.pt")
    with pytest.raises(OptionError, match="^checkpoint: "):
        load_checkpoint_file(tmp_path / "code.pt")


def test_strict_load_loads_what_fits():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    strict_load(target, source.state_dict(), option="checkpoint", what="student")
    assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)


def test_strict_load_counts_and_names_every_kind_of_difference_and_loads_nothing():
    target = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    wrong = nn.Sequential(nn.Linear(3, 2), nn.Linear(5, 2)).state_dict()
    del wrong["0.bias"]
    wrong |= {f"extra.{number}": torch.zeros(1) for number in range(5)}
    with pytest.raises(OptionError) as caught:
        strict_load(target, wrong, option="checkpoint", what="teacher")
    message = str(caught.value)
    assert message.startswith("checkpoint: the weights of the teacher do not fit: ")
    assert "1 missing (0.bias)" in message
    assert "5 unexpected (extra.0, extra.1, extra.2, ...)" in message
    assert "1 of another shape (1.weight (2, 5) instead of (2, 2))" in message
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
