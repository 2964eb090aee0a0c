"""Who may begin or go on in a run folder, and what is refused before anything is written."""

import json
import warnings

import pytest
import yaml

from esvit.errors import OptionError
from esvit.run_folder import RunFolder, flatten, write_atomically

CONFIG = {
    "epochs": 10, "max_steps": None, "seed": 0, "device": "cpu", "output_dir": "/a", "name": "a", "checkpoint": None,
    "tracking": {"uri": "sqlite:///a.db"}, "launcher": {}, "runtime": {"threads": 2, "deterministic": None},
    "data": {"root": "/images", "batch_size": 4},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A run that has begun with CONFIG."""
    begun = RunFolder(tmp_path / "runs" / "one")
    begun.begin(CONFIG)
    return begun


def finish(folder: RunFolder, step: int) -> None:
    folder.metrics_file.write_text(json.dumps({"step": step}))


def refusal(folder: RunFolder, changes: dict) -> str:
    with pytest.raises(OptionError) as error:
        folder.admit(CONFIG | changes)
    assert error.value.option == "output_dir"
    return str(error.value)


def test_flatten_joins_keys_and_keeps_lists_whole():
    assert flatten({"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": None, "g": {}}) == {"a.b": 1, "a.c.d": [1, {"e": 2}], "f": None}


def test_admitting_writes_nothing(tmp_path):
    RunFolder(tmp_path / "run").admit(CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_beginning_makes_the_folder_and_keeps_the_config(folder):
    assert folder.config() == CONFIG
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == CONFIG
    folder.admit(CONFIG)
    folder.begin(CONFIG)
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "changes",
    [
        {"output_dir": "/b"},
        {"name": "b"},
        {"device": "cuda"},
        {"launcher": {"processes": 2}},
        {"tracking": {}},
        {"max_steps": 5},
        {"checkpoint": "/c.pt"},
        {"runtime": {"threads": 8, "deterministic": None}},
    ],
)
def test_what_does_not_change_the_computation_may_change(folder, changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder.admit(CONFIG | changes)
        folder.begin(CONFIG | changes)
    assert folder.config() == CONFIG | changes


def test_all_other_changes_are_refused_by_name_with_both_values(folder):
    message = refusal(
        folder, {"seed": 1, "data": {"root": "/other", "batch_size": 4, "new": 3}, "runtime": {"threads": 2, "deterministic": True}}
    )
    for described in ("seed (0 -> 1)", "data.root (/images -> /other)", "data.new (None -> 3)", "runtime.deterministic (None -> True)"):
        assert described in message
    assert "batch_size" not in message and "threads" not in message


def test_epochs_may_grow_with_one_warning_but_not_shrink(folder):
    with pytest.warns(UserWarning, match="epochs: raised from 10 to 12") as warned:
        folder.admit(CONFIG | {"epochs": 12})
        folder.begin(CONFIG | {"epochs": 12})
    assert len(warned) == 1
    assert "epochs (12 -> 11)" in refusal(folder, {"epochs": 11})


def test_beginning_refuses_what_another_process_has_begun_since(folder, tmp_path):
    late = RunFolder(folder.path)
    with pytest.raises(OptionError, match="seed"):
        late.begin(CONFIG | {"seed": 1})
    assert folder.config() == CONFIG


@pytest.mark.parametrize(
    ("before", "reached", "now", "finished"),
    [
        ({}, 100, {}, True),
        ({"max_steps": 5}, 5, {"max_steps": 5}, True),
        ({"max_steps": 5}, 5, {"max_steps": 6}, False),
        ({"max_steps": 5}, 5, {}, False),
        ({}, 100, {"max_steps": 5}, True),
        ({}, 100, {"epochs": 12}, False),
    ],
)
def test_a_run_is_finished_if_it_went_as_far_as_asked(tmp_path, before, reached, now, finished):
    folder = RunFolder(tmp_path)
    folder.begin(CONFIG | before)
    assert not folder.is_finished(CONFIG | now)
    finish(folder, reached)
    assert folder.is_finished(CONFIG | now) is finished


def test_an_extended_run_loses_its_metrics_and_a_finished_one_keeps_them(folder):
    finish(folder, 100)
    folder.begin(CONFIG)
    assert folder.metrics_file.exists()
    folder.begin(CONFIG | {"epochs": 12})
    assert not folder.metrics_file.exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(OptionError, match="output_dir: .*is a file"):
        RunFolder(tmp_path / "file").admit(CONFIG)
    with pytest.raises(OptionError, match="output_dir: cannot write"):
        RunFolder(tmp_path / "file" / "run").begin(CONFIG)


def test_an_atomic_write_replaces_the_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("a long text that was there before")
    write_atomically(path, "short")
    assert path.read_text() == "short"
    assert list(tmp_path.iterdir()) == [path]
