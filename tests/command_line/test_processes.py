"""Several processes: one run folder, the answer of one process on the joined batch, exact resume, and no orphan, whoever starts them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line.commands import (
    PATIENCE_SECONDS,
    ROOT,
    assert_same_training,
    checkpoint,
    environment,
    log,
    losses,
    succeeded,
    wait_until,
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(ROOT / "run.py")]


def ranks_of(folder: Path) -> list[int]:
    """Process ids of the ranks at work in a run folder, by their arguments and environment."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                is_rank = b"launchers.worker" in (process / "cmdline").read_bytes()
                if is_rank and f"OF_TEST={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
            except OSError:
                continue
    return found


def torchrun(*arguments: str, folder: Path) -> str:
    """What it printed."""
    started = subprocess.Popen(
        [*TORCHRUN, *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = started.communicate(timeout=PATIENCE_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def two_processes(tiny, tmp_path_factory) -> Path:
    """A run that plain torchrun started without output_dir, so that every rank found a folder name of its own."""
    folder = tmp_path_factory.mktemp("torchrun")
    torchrun(*tiny, "data.batch_size=2", folder=folder)
    (run,) = (folder / "outputs" / "pretrain").iterdir()
    return run


def test_two_processes_write_one_run(two_processes):
    assert [record["step"] for record in log(two_processes)] == list(range(1, 9))
    assert len(checkpoint(two_processes)["rng"]) == 2


def test_two_processes_equal_one_on_the_joined_batch(two_processes, reference):
    """The first step sees the same weights; AdamW lets later ones drift apart by what rounding leaves of small gradients."""
    for name in ("loss/total", "loss/view", "loss/region"):
        assert losses(two_processes)[0][name] == pytest.approx(losses(reference)[0][name], abs=1e-5)


def test_torchrun_on_a_finished_run_says_so_once(two_processes, tiny, tmp_path):
    before = (two_processes / "log.jsonl").read_bytes()
    printed = torchrun(*tiny, "data.batch_size=2", f"output_dir={two_processes}", folder=tmp_path)
    assert printed.count("holds a finished run") == 1
    assert (two_processes / "log.jsonl").read_bytes() == before


def test_a_killed_run_of_two_processes_leaves_no_orphan_and_ends_as_if_it_had_not_been(commands, tiny, two_processes, tmp_path):
    """SIGKILL of the parent only, in the middle of an epoch and between two checkpoints; torchrun and our launcher agree bit for bit."""
    run = tmp_path / "run"
    command = (*tiny, "data.batch_size=2", "launcher=gpus", "launcher.processes=2", f"output_dir={run}")
    killed = commands.start(*command, extra_environment={"OF_TEST": str(run)})
    killed.kill_when(lambda: len(log(run)) >= 4 and len(ranks_of(run)) == 2)
    wait_until(lambda: not ranks_of(run), "the end of the ranks")
    assert len(log(run)) < 8
    succeeded(commands.run(*command))
    assert_same_training(run, two_processes)
    assert not (run / "errors").exists()


def test_a_run_of_two_processes_goes_on_in_one_with_steps_of_as_many_images(commands, tiny, two_processes, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two_processes, run)
    for name in ("metrics.json", "checkpoint.pt", "checkpoint_8.pt"):
        (run / name).unlink()
    outcome = succeeded(commands.run(*tiny, "data.batch_size=2", f"output_dir={run}"))
    assert "2 micro-batches" in outcome.out
    assert checkpoint(run)["sampler"] == checkpoint(two_processes)["sampler"]
    for mine, other in zip(losses(run)[6:], losses(two_processes)[6:], strict=True):
        assert mine["loss/total"] == pytest.approx(other["loss/total"], abs=1e-4)


def test_a_run_cannot_go_on_in_processes_that_do_not_divide_its_steps(commands, tiny, two_processes, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two_processes, run)
    (run / "metrics.json").unlink()
    outcome = commands.run(*tiny, "data.batch_size=2", "launcher=gpus", "launcher.processes=3", f"output_dir={run}")
    assert outcome.code == 1
    assert "error: launcher.processes: 3 processes of data.batch_size=2 cannot make the steps of 4 images" in outcome.err
