"""A real SLURM of two emulated nodes on this machine, and what the tests do to it."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.job import Job
from launchers.slurm import Slurm
from launchers.status import JobStatus, states

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VARIABLES = {"SLURM_CI_ROOT": "/tmp/slurm-esvit-tests", "SLURM_CI_PORT": "17900", "SLURM_CI_GPUS": "2"}
PATIENCE_SECONDS = 180


@dataclass
class Cluster:
    """Every method waits for what it asks for."""

    def up(self) -> None:
        """Raises CalledProcessError with what the script said."""
        done = subprocess.run([HERE / "slurm_up.sh"], env=os.environ | VARIABLES, capture_output=True, text=True, check=True, timeout=300)
        os.environ["SLURM_CONF"] = done.stdout.strip().partition("=")[2]

    def down(self) -> None:
        """End what a failed test left running: daemons that are stopped first would leave its processes behind."""
        subprocess.run(["scancel", "--user=root"], check=False, timeout=60)
        wait_until(lambda: not run("squeue", "-h"), "end of all jobs")
        subprocess.run([HERE / "slurm_down.sh", "--purge"], env=os.environ | VARIABLES, check=True, timeout=60, capture_output=True)

    def occupy(self, *, seconds: float) -> None:
        """Take both nodes for a job of the high partition, which preempts whatever runs, and wait until it has ended."""
        command = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", f"--wrap=sleep {seconds}"]
        job_id = run(*command).strip()
        wait_until(
            lambda: "COMPLETED" in run("sacct", "-X", "-n", "-P", "-o", "State", "-j", job_id), "end of the job of the high partition"
        )

    def requeue(self, job_id: str) -> None:
        """As an administrator, or SLURM after the failure of a node, would: no signal that the run could act upon is meant to matter."""
        run("scontrol", "requeue", job_id)

    def nudge(self, job_id: str) -> None:
        """Start a requeued job, which SLURM would hold back for two minutes.

        Within a second of the last attempt's end it would fail: slurmd takes the new credential for the one that was just revoked.
        """
        wait_until(lambda: run("squeue", "-h", "-j", job_id, "-o", "%T") == "PENDING\n", f"requeue of job {job_id}")
        time.sleep(2)
        run("scontrol", "update", f"JobId={job_id}", "StartTime=now")


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.1)
    return value


def slurm(**changed: Any) -> Slurm:
    """The launcher with options for a small CPU job on the emulated nodes."""
    options: dict[str, Any] = {
        "nodes": 2, "gpus_per_node": 0, "tasks_per_node": 2, "cpus_per_task": 1, "memory": "100M", "timeout_minutes": 60,
        "signal_delay_seconds": 30, "max_requeues": 3, "partition": None, "account": None, "qos": None, "constraint": None,
        "exclude": None, "comment": None, "array_parallelism": 2, "evaluation_nodes": 1, "evaluation_gpus_per_node": None,
        "evaluation_timeout_minutes": None, "extra": [], "setup": [], "container_image": None, "container_runtime": "pyxis",
        "container_mounts": [], "python": None,
    }  # fmt: skip
    return Slurm(**(options | changed))


def job(function: str, folder: Path, *, root: Path = ROOT, **config: Any) -> Job:
    """One of tests/launchers/jobs.py."""
    return Job(
        function=f"tests.launchers.jobs:{function}",
        config={"folder": str(folder), **config},
        folder=str(folder),
        root=str(root),
        command=["run.py", "as=typed"],
    )


def state(folder: Path, name: str = "run") -> JobStatus:
    return next(each for each in states(folder) if each.entry.name == name)


def wait_for_state(folder: Path, *wanted: str, name: str = "run") -> JobStatus:
    return wait_until(lambda: found if (found := state(folder, name)).state in wanted else None, f"{name} of {folder} to be {wanted}")


def wait_for_end(folder: Path) -> dict[str, JobStatus]:
    """Every job of a folder, by name, once none waits or runs."""

    def ended() -> list[JobStatus] | None:
        found = states(folder)
        return None if any(each.is_active or each.state == "UNKNOWN" for each in found) else found

    return {each.entry.name: each for each in wait_until(ended, f"end of all jobs of {folder}")}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in lines(folder / "log.jsonl")]
