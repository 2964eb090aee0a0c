"""Where a run came from, told as tags, params and a diff."""

import subprocess
from pathlib import Path

import pytest

from esvit.tracking.environment import environment_tags, flatten, source_state
from esvit.tracking.system import SystemMonitor


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "code.py").write_text("one = 1\n")

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    return folder


def test_a_clean_checkout_has_a_commit_and_no_diff(checkout: Path) -> None:
    source = source_state(checkout / "package" / "code.py")
    assert source is not None and len(source.commit) == 40
    assert not source.dirty and source.diff == b""
    assert environment_tags(source)["git.dirty"] == "false"


def test_the_diff_holds_every_tracked_change_and_names_untracked_files(checkout: Path) -> None:
    (checkout / "package" / "code.py").write_text("one = 2\n")
    (checkout / "new.py").write_text("")
    source = source_state(checkout / "package" / "code.py")
    assert source is not None and source.dirty
    assert source.diff.startswith(b"# untracked: new.py\n") and b"+one = 2" in source.diff
    subprocess.run(["git", "-C", str(checkout), "checkout", "-q", "."], check=True)
    subprocess.run(["git", "-C", str(checkout), "apply", "-"], input=source.diff, check=True)
    assert (checkout / "package" / "code.py").read_text() == "one = 2\n"


def test_code_that_no_checkout_tracks_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "installed.py").write_text("")
    assert source_state(checkout / "installed.py") is None
    assert source_state(checkout.parent / "outside.py") is None
    monkeypatch.setenv("PATH", "")  # no git at all
    assert source_state(checkout / "package" / "code.py") is None
    assert environment_tags(None)["git.commit"] == "unknown"


def test_a_config_becomes_flat_text_without_passwords() -> None:
    config = {
        "seed": 1,
        "data": {"root": "/data", "mean": [0.5, 0.25]},
        "loss": {},
        "checkpoint": None,
        "name": "",
        "uri": "https://me:secret@host/x",
    }
    assert flatten(config) == {
        "seed": "1",
        "data.root": "/data",
        "data.mean": "[0.5, 0.25]",
        "loss": "{}",
        "checkpoint": "null",
        "name": '""',
        "uri": "https://***@host/x",
    }


def test_system_metrics_describe_this_process_and_machine(tmp_path: Path) -> None:
    metrics = SystemMonitor(tmp_path).metrics()
    assert 0.005 < metrics["system/process_memory_gb"] <= metrics["system/machine_memory_gb"] + metrics["system/process_memory_gb"]
    assert 0 <= metrics["system/cpu_percent"] <= 100
    assert metrics["system/disk_free_gb"] > 0
