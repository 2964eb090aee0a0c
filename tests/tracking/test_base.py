"""The trackers that need no server."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from esvit.errors import OptionError
from esvit.tracking import base
from esvit.tracking.base import NoTracking
from esvit.tracking.files import FolderLock


def test_a_local_run_leaves_its_log_its_final_metrics_and_its_state(tmp_path: Path) -> None:
    tracker = NoTracking(host=None).open(run_folder=tmp_path / "run", config={"seed": 1}, is_main=True)
    tracker.resume(0)
    tracker.log(1, 0, {"loss/total": 2.0})
    tracker.log(2, 0, {"loss/total": math.nan})
    assert [record["loss/total"] for record in tracker.records()][0] == 2.0
    tracker.final({"knn/teacher": 61.5, "loss/total": math.nan}, step=2)
    tracker.close("FINISHED")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == {"knn/teacher": 61.5, "loss/total": "NaN"}
    state = json.loads((tmp_path / "run" / "tracking.json").read_text())
    assert (state["status"], state["uri"], state["params"]) == ("FINISHED", None, {"seed": "1"})


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    tracker = NoTracking(host=None).open(run_folder=tmp_path / "run", config={}, is_main=False)
    tracker.resume(0)
    tracker.log(1, 0, {"loss/total": 2.0})
    tracker.final({"knn/teacher": 1.0}, step=1)
    tracker.close("FINISHED")
    assert tracker.records() == [] and not (tmp_path / "run").exists()


def test_a_run_folder_has_one_writer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; from pathlib import Path; from esvit.tracking.files import FolderLock; lock = FolderLock(Path(sys.argv[1])); "
    program += "print(lock.acquire(wait_seconds=0), flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"True\n"
    monkeypatch.setattr(base, "_LOCK_SECONDS", 0.0)
    with pytest.raises(OptionError, match=f"output_dir: process {other.pid} on .* is writing to"):
        NoTracking(host=None).open(run_folder=tmp_path, config={}, is_main=True)
    other.kill()
    other.communicate()
    lock = FolderLock(tmp_path)
    assert lock.acquire(wait_seconds=10)
    lock.release()


def test_tracking_imports_neither_torch_nor_mlflow() -> None:
    program = "import sys, esvit.tracking.mlflow, esvit.tracking.system, esvit.tasks.sync; print({'torch', 'mlflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"set()\n"
