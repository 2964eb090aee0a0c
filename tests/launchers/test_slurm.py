"""The batch scripts that options make, and what is refused; tests/slurm submits them."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchers.job import Job
from launchers.kinds import launcher_of
from launchers.submission import options_of
from tests.slurm.cluster import slurm


def script(tmp_path: Path, **changed: Any) -> str:
    job = Job(function="x:y", config={}, folder=str(tmp_path / "my run"), root=str(tmp_path))
    return slurm(**changed).script(job)


def parameters(text: str) -> dict[str, str]:
    """{"nodes": "2", "requeue": "", ...}"""
    return {name: value.strip("'") for name, value in re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE)}


def test_options_become_sbatch_parameters(tmp_path):
    text = script(
        tmp_path,
        nodes=4,
        gpus_per_node=8,
        tasks_per_node=None,
        cpus_per_task=12,
        memory="900G",
        timeout_minutes=600,
        signal_delay_seconds=300,
        partition="a100",
        account="vision",
        qos="high",
        constraint="nvlink",
        exclude="node[3-4]",
        comment="two words",
        extra=["--reservation=maintenance", "--exclusive"],
    )
    assert parameters(text) == {
        "job-name": "my run",
        "nodes": "4",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "mem": "900G",
        "time": "600",
        "signal": "USR2@300",
        "partition": "a100",
        "account": "vision",
        "qos": "high",
        "constraint": "nvlink",
        "exclude": "node[3-4]",
        "comment": "two words",
        "reservation": "maintenance",
        "exclusive": "",
        "chdir": str(Path.cwd()),
        "requeue": "",
        "open-mode": "append",
        "output": f"{tmp_path}/my run/launch/%j_0_log.out",
    }
    assert "--kill-on-bad-exit=1 --wait=0" in text and "--cpus-per-task=12" in text.splitlines()[-1]


def test_without_gpus_none_are_asked_for_and_there_is_one_process(tmp_path):
    found = parameters(script(tmp_path, gpus_per_node=0, tasks_per_node=None, memory=None))
    assert "gpus-per-node" not in found and "mem" not in found
    assert found["ntasks-per-node"] == "1"


def test_the_job_runs_from_the_snapshot_after_the_set_up_commands(tmp_path):
    lines = script(tmp_path, setup=["module load cuda"]).splitlines()
    place = f"export PYTHONPATH='{tmp_path}/my run/code'\"${{PYTHONPATH:+:$PYTHONPATH}}\""
    assert lines.index("module load cuda") < lines.index(place) < len(lines) - 1
    assert f"{sys.executable} -u -m submitit.core._submit" in lines[-1]


def test_a_container_gets_the_run_folder_and_what_the_user_mounts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mounts = {"container_image": "esvit.sqsh", "container_mounts": ["/data", "/scratch/x:/tmp/x"]}
    pyxis = script(tmp_path, **mounts).splitlines()[-1]
    folder = f"{tmp_path}/my run"
    assert f"--container-mounts=/data:/data,/scratch/x:/tmp/x,{folder}:{folder},{tmp_path}:{tmp_path}" in pyxis
    assert "--container-image=esvit.sqsh" in pyxis and " python3 -u -m submitit" in pyxis
    apptainer = script(tmp_path, **mounts, container_runtime="apptainer", gpus_per_node=1, python="/opt/bin/python").splitlines()[-1]
    assert f"apptainer exec --nv --bind /data --bind /scratch/x:/tmp/x --bind '{folder}' --bind {tmp_path}" in apptainer
    assert "esvit.sqsh /opt/bin/python -u -m submitit" in apptainer


def test_what_jobs_json_remembers_makes_the_same_launcher():
    before = slurm(partition="a100", extra=["--exclusive"])
    assert launcher_of(options_of(before)) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"nodes": 0}, "launcher.nodes: 0 is too small; use 1 or more"),
        (
            {"timeout_minutes": 5, "signal_delay_seconds": 290},
            "launcher.signal_delay_seconds: 290 of the 300 seconds of timeout_minutes leave",
        ),
        ({"extra": ["reservation=x"]}, "launcher.extra: 'reservation=x' is no option of sbatch; write '--name=value'"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_written(changed, said, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    job = Job(function="x:y", config={}, folder=str(tmp_path / "run"), root=str(tmp_path))
    with pytest.raises(SystemExit, match=re.escape(f"error: {said}")):
        slurm(**changed).launch(job)
    assert not (tmp_path / "run").exists()


def test_where_an_evaluation_is_refused_its_training_is_cancelled(tmp_path, monkeypatch):
    """A stand-in for sbatch accepts the first job only."""
    programs = tmp_path / "programs"
    programs.mkdir()
    accepted = tmp_path / "accepted"
    sbatch = f"[ -e {accepted} ] && echo 'sbatch: error: Invalid qos' >&2 && exit 1; touch {accepted}; echo Submitted batch job 41"
    for name, text in {"sbatch": sbatch, "srun": "", "squeue": "", "scancel": f'echo "$@" > {tmp_path}/cancelled'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    folder = tmp_path / "run"
    (tmp_path / "run.py").touch()
    job = Job(function="x:y", config={}, folder=str(folder), root=str(tmp_path))
    with pytest.raises(SystemExit, match="error: launcher: sbatch refused the job: Invalid qos"):
        slurm().launch(job, then=[replace(job, folder=str(folder / "knn"))])
    assert (tmp_path / "cancelled").read_text() == "41\n"


def test_without_slurm_the_user_is_told_where_to_submit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="there is no sbatch here; submit where SLURM's commands are, or use launcher=gpus"):
        slurm().launch(Job(function="x:y", config={}, folder=str(tmp_path / "run"), root=str(tmp_path)))
