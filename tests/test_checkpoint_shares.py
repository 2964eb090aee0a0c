"""Checkpoints in shares, put together from files made by hand. With real ranks: tests/tasks/test_sharding.py."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esvit import checkpoint_shares, state_files
from esvit.checkpoints import CheckpointFolder, has_checkpoint, load_checkpoint_file, peek
from esvit.distributed import Scattered
from esvit.errors import OptionError
from tests.test_checkpoints import Killed, garbage, names, state, truncate

WHOLE = torch.arange(15.0).view(5, 3)


def share(begin: tuple[int, ...], values: Tensor, shape: tuple[int, ...] = (5, 3)) -> dict[str, Any]:
    return {"begin": begin, "shape": shape, "values": values.clone()}


def save_shares(folder: CheckpointFolder, step: int, *, fill: float | None = None) -> None:
    """What two ranks write: WHOLE (or `fill`) by rows, and a centre that rank 0 alone writes."""
    weights = WHOLE if fill is None else torch.full((10, 1), fill)
    first = len(weights) * 3 // 5
    shape = tuple(weights.shape)
    written = folder.prepare_shares(step)
    saved = {"student": {"weight": weights}, "loss": {"center": torch.ones(1, 2)}, "rng": [("a", 1)], "step": step}
    own = {"student/weight": share((0, 0), weights[:first], shape), "loss/center": share((0, 0), torch.ones(1, 2), (1, 2))}
    checkpoint_shares.write_share(own, written / "share_0_of_2.pt", step=step)
    checkpoint_shares.write_share({"student/weight": share((first, 0), weights[first:], shape)}, written / "share_1_of_2.pt", step=step)
    index = checkpoint_shares.index_of(saved, step=step, files=["share_0_of_2.pt", "share_1_of_2.pt"])
    state_files.write_synced(index, written / checkpoint_shares.INDEX)
    folder.publish_shares(written, step)


def test_shares_are_put_together_and_plain_values_are_as_they_were(tmp_path):
    save_shares(CheckpointFolder(tmp_path, keep=2), 4)
    assert names(tmp_path) == ["checkpoint_4"]
    assert names(tmp_path / "checkpoint_4") == ["index.pt", "share_0_of_2.pt", "share_1_of_2.pt"]
    loaded = load_checkpoint_file(tmp_path / "checkpoint_4")
    assert torch.equal(loaded["student"]["weight"], WHOLE) and torch.equal(loaded["loss"]["center"], torch.ones(1, 2))
    assert loaded["rng"] == [("a", 1)] and loaded["step"] == 4


@pytest.mark.parametrize(("begin", "shape"), [((0, 0), (5, 3)), ((1, 1), (4, 1)), ((3, 0), (2, 3)), ((5, 0), (0, 3)), ((2, 2), (1, 1))])
def test_any_box_can_be_cut_out_of_any_pieces(begin, shape):
    quarters = [((0, 0), WHOLE[:2, :2]), ((0, 2), WHOLE[:2, 2:]), ((2, 0), WHOLE[2:, :2]), ((2, 2), WHOLE[2:, 2:]), ((5, 0), WHOLE[5:])]
    box = Scattered((5, 3), quarters).box(begin, shape)
    assert torch.equal(box, WHOLE[begin[0] : begin[0] + shape[0], begin[1] : begin[1] + shape[1]])


def test_each_file_opens_as_plain_tensors_and_says_where_its_shares_belong(tmp_path):
    save_shares(CheckpointFolder(tmp_path, keep=2), 4)
    content = torch.load(tmp_path / "checkpoint_4" / "share_1_of_2.pt", weights_only=True)
    assert content["step"] == 4 and list(content["shares"]) == ["student/weight"]
    assert content["shares"]["student/weight"]["begin"] == (3, 0) and content["shares"]["student/weight"]["shape"] == (5, 3)


def test_the_latest_in_shares_is_what_checkpoint_pt_stands_for(tmp_path):
    """Also after a single file, which would otherwise be taken for the latest; and a later file ends that."""
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(state(1), 1)
    save_shares(folder, 2)
    assert names(tmp_path) == ["checkpoint_1.pt", "checkpoint_2"]
    assert has_checkpoint(tmp_path)
    seen = peek(tmp_path)
    assert seen is not None and seen["step"] == 2 and seen["student"] == {"weight": None}
    assert load_checkpoint_file(tmp_path / "checkpoint.pt")["step"] == 2
    save_shares(folder, 3)
    assert names(tmp_path) == ["checkpoint_2", "checkpoint_3"]
    folder.save(state(4), 4)
    assert names(tmp_path) == ["checkpoint.pt", "checkpoint_3", "checkpoint_4.pt"]
    assert load_checkpoint_file(tmp_path / "checkpoint.pt")["step"] == 4


def test_a_course_that_went_back_leaves_neither_later_shares_nor_those_of_its_step(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=3)
    save_shares(folder, 2)
    save_shares(folder, 3)
    folder.save(state(2), 2)
    assert names(tmp_path) == ["checkpoint.pt", "checkpoint_2.pt"]
    save_shares(folder, 2)
    save_shares(folder, 2)
    assert names(tmp_path) == ["checkpoint_2"]


def test_what_a_killed_run_left_half_written_is_cleared_and_never_loaded(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    save_shares(folder, 2)
    half = folder.prepare_shares(3)
    shutil.copy(tmp_path / "checkpoint_2" / "share_0_of_2.pt", half)
    (tmp_path / ".checkpoint_1.old.tmp").mkdir()  # it was being deleted
    loaded = folder.load()
    assert loaded is not None and loaded["step"] == 2
    assert load_checkpoint_file(tmp_path / "checkpoint.pt")["step"] == 2
    CheckpointFolder(tmp_path, keep=2)
    assert names(tmp_path) == ["checkpoint_2"]


def remove(path: Path) -> None:
    path.unlink()


def of_another_step(path: Path) -> None:
    shutil.copy(path.parents[1] / "checkpoint_1" / path.name, path)


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((4,), 2.0).numpy().tobytes())] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, garbage, flip_one_bit, remove, of_another_step])
def test_a_damaged_share_falls_back_to_the_checkpoint_before_with_one_warning(tmp_path, damage):
    folder = CheckpointFolder(tmp_path, keep=3)
    save_shares(folder, 1, fill=1.0)
    save_shares(folder, 2, fill=2.0)
    damage(tmp_path / "checkpoint_2" / "share_1_of_2.pt")
    with pytest.warns(UserWarning) as caught:
        loaded = folder.load()
    assert loaded is not None and loaded["step"] == 1 and torch.equal(loaded["student"]["weight"].whole(), torch.ones(10, 1))
    assert "checkpoint_2 (share_1_of_2.pt: " in str(caught[0].message)
    assert len(caught) == 1 and "checkpoint_1 is used instead" in str(caught[0].message) and "\n" not in str(caught[0].message)
    with pytest.raises(OptionError, match="^checkpoint: '[^\n]*checkpoint_2' cannot be read[^\n]*$"):
        load_checkpoint_file(tmp_path / "checkpoint_2")


def test_without_its_index_a_folder_is_damaged(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=3)
    save_shares(folder, 1)
    (tmp_path / "checkpoint_1" / "index.pt").unlink()
    with pytest.raises(OptionError, match="^output_dir: no checkpoint in it can be read"):
        folder.load()
    with pytest.raises(OptionError, match="^checkpoint: there is no file"):
        load_checkpoint_file(tmp_path / "checkpoint_1")


def test_intact_shares_load_without_a_warning(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    save_shares(folder, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = folder.load()
    assert loaded is not None and isinstance(loaded["student"]["weight"], Scattered)
    assert torch.equal(loaded["student"]["weight"].whole(), WHOLE)


@pytest.mark.parametrize("function", ["fsync", "replace", "open", "mkdir"])
def test_an_end_at_any_call_to_the_system_leaves_a_loadable_checkpoint(tmp_path, monkeypatch, function):
    """The state on the disk after each call is what a kill between two calls would leave; the same step may be there already."""
    save_shares(CheckpointFolder(tmp_path, keep=2), 1, fill=1.0)
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
                save_shares(CheckpointFolder(tmp_path, keep=2), 2, fill=2.0)
            except Killed:
                ended = False
        loaded = CheckpointFolder(tmp_path, keep=2).load()
        assert loaded is not None
        assert loaded["student"]["weight"].whole().unique().tolist() == [loaded["step"]]
        if ended:
            assert loaded["step"] == 2
            break
    else:
        pytest.fail("saving never came to its end")
