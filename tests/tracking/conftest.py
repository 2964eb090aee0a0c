"""MLflow stores to test with: making one costs seconds, so it is made once (by two processes at the same time) and copied."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from esvit.tracking.mlflow import Mlflow

_FIRST_USE = """
import os, signal, sys, time
from pathlib import Path
from esvit.tracking.mlflow import Mlflow

name, uri, folder = sys.argv[1:]
tracking = Mlflow(uri=uri, experiment_name="first use", run_name=name, tags={}, host=None, close_timeout_seconds=120)
tracker = tracking.open(run_folder=Path(folder) / name, config={"seed": 1}, is_main=True)
tracker.resume(0)
for step in range(1, 21):
    tracker.log(step, 0, {"loss/total": step / 4})
if name == "ended":
    tracker.close("FINISHED")
else:
    while tracker._state.state.last_step < 20:
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@dataclass(frozen=True)
class FirstUse:
    """A store that two processes found empty at the same time: run `ended` finished, run `killed` sent 20 steps and got SIGKILL."""

    uri: str
    folder: Path


@pytest.fixture(scope="session")
def first_use(tmp_path_factory: pytest.TempPathFactory) -> FirstUse:
    folder = tmp_path_factory.mktemp("first-use")
    uri = f"sqlite:///{folder}/store/mlflow.db"
    processes = [subprocess.Popen([sys.executable, "-c", _FIRST_USE, name, uri, str(folder)]) for name in ("ended", "killed")]
    codes = [process.wait(timeout=240) for process in processes]
    assert codes == [0, -9]
    return FirstUse(uri=uri, folder=folder)


@pytest.fixture
def store_uri(first_use: FirstUse, tmp_path: Path) -> str:
    """A store of this test's own."""
    folder = tmp_path / "store"
    folder.mkdir()
    shutil.copy(first_use.uri.removeprefix("sqlite:///"), folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


def mlflow_tracking(uri: str, **changes: Any) -> Mlflow:
    options: dict[str, Any] = {
        "experiment_name": "esvit tests",
        "run_name": "a run",
        "tags": {},
        "host": None,
        "close_timeout_seconds": 60.0,
    }
    return Mlflow(uri=uri, **{**options, **changes})
