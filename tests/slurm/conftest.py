"""One cluster for the whole suite; where there can be none, every test is skipped and says why."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd")


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if not request.config.getoption("--slurm"):
        pytest.skip("needs a SLURM: make test-slurm brings one up")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing and shutil.which("apt-get") is None:
        pytest.skip(f"no {', '.join(missing)} here, and no apt-get to install them")
    brought_up = Cluster()
    try:
        brought_up.up()
    except subprocess.CalledProcessError as error:
        if "apt-get failed" in error.stderr:
            pytest.skip(f"{', '.join(missing)} could not be installed: {error.stderr.strip().splitlines()[-1]}")
        raise RuntimeError(error.stderr) from None
    yield brought_up
    brought_up.down()
