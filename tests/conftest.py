"""Options and fixtures of the whole suite."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).parent / "golden" / "data" / "cases"
    parser.addoption(
        "--slurm", action="store_true", help="run tests/slurm on a SLURM of its own, installed with apt-get where it is missing"
    )
    parser.addoption("--goldens", type=Path, default=default, help="folder of golden cases (SEED.txt and *.npz)")
