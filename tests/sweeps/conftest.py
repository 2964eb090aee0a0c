"""A program as small as can be: the launchers, and `run.py` with runs that need no torch."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    """The folder that jobs take their code from; `run:train` is tests/sweeps/trials.py."""
    folder = tmp_path_factory.mktemp("program")
    shutil.copytree(ROOT / "launchers", folder / "launchers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "sweeps" / "trials.py", folder / "run.py")
    return folder
