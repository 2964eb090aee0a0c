"""Several processes: one run folder, the answer of one process on the joined batch, exact resume, and no orphan, whoever starts them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.command_line.commands import ROOT, assert_same_training, checkpoint, environment, log, losses, succeeded, wait_until

TWO = ("launcher=gpus", "launcher.processes=2", "data.batch_size=2", "backbone.drop_path_rate=0.2")


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


@pytest.fixture(scope="module")
def two_processes(commands, tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("two_processes") / "run"
    succeeded(commands.run(*tiny, *TWO, f"output_dir={run}"))
    return run


def test_two_processes_write_one_run(two_processes):
    assert [record["step"] for record in log(two_processes)] == list(range(1, 9))
    assert {path.name for path in two_processes.parent.iterdir()} == {"run"}
    assert not (two_processes / "errors").exists()
    assert len(checkpoint(two_processes)["rng"]) == 2


def test_a_killed_run_of_two_processes_leaves_no_orphan_and_ends_as_if_it_had_not_been(commands, tiny, two_processes, tmp_path):
    """SIGKILL of the parent only, in the middle of an epoch and between two checkpoints."""
    run = tmp_path / "run"
    command = (*tiny, *TWO, f"output_dir={run}")
    commands.start(*command, extra_environment={"OF_TEST": str(run)}).kill_when(lambda: len(log(run)) >= 5 and len(ranks_of(run)) == 2)
    wait_until(lambda: not ranks_of(run), "the end of the ranks")
    assert len(log(run)) < 8
    succeeded(commands.run(*command))
    assert_same_training(run, two_processes)


def test_sigterm_stops_two_processes_at_the_same_step(commands, tiny, two_processes, tmp_path):
    run = tmp_path / "run"
    command = (*tiny, *TWO, f"output_dir={run}")
    stopped = commands.start(*command).kill_when(lambda: len(log(run)) >= 2, signal.SIGTERM)
    step = checkpoint(run)["step"]
    assert stopped.code == 143
    assert stopped.err == f"stopped by SIGTERM after step {step}, checkpoint written; the same command resumes\n"
    assert 2 <= step < 8


def test_torchrun_gives_one_run_equal_to_one_process_on_the_joined_batch(commands, tiny, images, tmp_path):
    """Without an output_dir every rank would find a folder name of its own; without drop path ranks draw nothing of their own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", str(ROOT / "run.py")]
    options = [*tiny, "data.batch_size=2", "max_steps=2"]
    ended = subprocess.run([*torchrun, *options], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (run,) = (tmp_path / "outputs" / "pretrain").iterdir()
    whole = tmp_path / "whole"
    succeeded(commands.run(*tiny, "max_steps=2", f"output_dir={whole}"))
    for ours, theirs in zip(losses(run), losses(whole), strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], abs=1e-5)
    torch.testing.assert_close(checkpoint(run)["loss"]["center"], checkpoint(whole)["loss"]["center"], rtol=0, atol=1e-5)

    before = (run / "log.jsonl").read_bytes()
    again = subprocess.run([*torchrun, *options, f"output_dir={run}"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("holds a finished run") == 1
    assert (run / "log.jsonl").read_bytes() == before


def test_a_mistake_found_by_the_ranks_is_told_once(commands, tiny, tmp_path):
    outcome = commands.run(*tiny, *TWO, "data.batch_size=9", folder=tmp_path)
    assert outcome.code == 1
    assert outcome.err.startswith("error: data.batch_size: one step takes 18 images") and outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
