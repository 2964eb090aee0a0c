"""The copy of the code that a job runs from."""

import subprocess
from pathlib import Path

import pytest

from launchers import snapshot


@pytest.fixture
def checkout(tmp_path) -> Path:
    """One committed file, one changed since, one untracked, one ignored, and one deleted."""
    root = tmp_path / "checkout"
    (root / "package").mkdir(parents=True)
    for name in ("run.py", "package/changed.py", "deleted.py", ".gitignore"):
        (root / name).write_text("ignored.bin\n" if name == ".gitignore" else "first\n")
    git = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    (root / "package" / "changed.py").write_text("second\n")
    (root / "untracked name.py").touch()
    (root / "ignored.bin").touch()
    (root / "deleted.py").unlink()
    return root


def copied(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_what_git_tracks_or_does_not_ignore_is_copied_as_it_is_now(checkout, tmp_path):
    taken = snapshot.take(checkout, tmp_path / "run")
    assert taken.root == tmp_path / "run" / "code"
    assert copied(taken.root) == {"run.py", "package/changed.py", "untracked name.py", ".gitignore"}
    assert (taken.root / "package" / "changed.py").read_text() == "second\n"
    assert taken.commit is not None and len(taken.commit) == 40 and taken.dirty


def test_a_later_snapshot_leaves_the_first_alone(checkout, tmp_path):
    first = snapshot.take(checkout, tmp_path / "run")
    (checkout / "run.py").write_text("third\n")
    second = snapshot.take(checkout, tmp_path / "run")
    assert second.root == tmp_path / "run" / "code_2"
    assert [(each.root / "run.py").read_text() for each in (first, second)] == ["first\n", "third\n"]


def test_a_run_folder_inside_of_the_checkout_is_not_copied_into_itself(checkout):
    (checkout / "runs" / "one").mkdir(parents=True)
    (checkout / "runs" / "one" / "checkpoint.pt").touch()
    assert "runs/one/checkpoint.pt" not in copied(snapshot.take(checkout, checkout / "runs" / "one").root)


def test_without_git_the_programs_own_folders_are_copied(tmp_path):
    source = tmp_path / "unpacked"
    for name in ("run.py", "esvit/a.py", "esvit/__pycache__/a.pyc", "conf/task/x.yaml", "data/photo.jpg"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    taken = snapshot.take(source, tmp_path / "run")
    assert copied(taken.root) == {"run.py", "esvit/a.py", "conf/task/x.yaml"}
    assert (taken.commit, taken.dirty) == (None, False)


def test_what_is_too_large_to_be_code_is_refused_by_name(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "_LARGEST_BYTES", 100)
    (checkout / "images.zip").write_bytes(bytes(1000))
    with pytest.raises(SystemExit, match=r"images\.zip the most of it; name in \.gitignore what is not code"):
        snapshot.take(checkout, tmp_path / "run")
    assert not (tmp_path / "run").exists()
