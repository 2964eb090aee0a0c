"""A run that was stopped, however it was stopped, ends exactly as one that was not: weights, centre, moments and log, bit for bit."""

import shutil
import signal

import pytest

from tests.command_line.commands import assert_same_training, checkpoint, log, losses, succeeded

# Everything that draws random numbers or keeps a state of its own; 16 steps, so that a run can be stopped in the middle.
KEYED = (
    "task.mixing.probability=1",
    "backbone.drop_path_rate=0.2",
    "head.batch_norm=true",
    "epochs=4",
    "checkpoint_every=5",
    "data.workers=1",
)


@pytest.fixture(scope="module")
def uninterrupted(commands, tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    succeeded(commands.run(*tiny, *KEYED, f"output_dir={run}"))
    assert [record["step"] for record in log(run)] == list(range(1, 17))
    return run


def last_step(run) -> int:
    records = log(run)
    return records[-1]["step"] if records else 0


@pytest.mark.parametrize("moment", ["with the first checkpoint", "between two checkpoints"])
def test_a_killed_run_ends_as_if_it_had_not_been(moment, commands, tiny, uninterrupted, tmp_path):
    run = tmp_path / "run"
    command = (*tiny, *KEYED, f"output_dir={run}")
    conditions = {"with the first checkpoint": (run / "checkpoint_5.pt").exists, "between two checkpoints": lambda: last_step(run) >= 8}
    assert commands.start(*command).kill_when(conditions[moment]).code == -signal.SIGKILL
    assert last_step(run) < 16 and not (run / "metrics.json").exists()
    succeeded(commands.run(*command))
    assert_same_training(run, uninterrupted)


def test_a_run_killed_before_its_first_checkpoint_begins_again(commands, tiny, uninterrupted, tmp_path):
    run = tmp_path / "run"
    command = (*tiny, *KEYED, f"output_dir={run}")
    commands.start(*command).kill_when(lambda: last_step(run) >= 2)
    assert not (run / "checkpoint.pt").exists()
    succeeded(commands.run(*command, "max_steps=4"))
    assert losses(run) == losses(uninterrupted)[:4]


def test_a_signal_saves_the_very_step_and_the_run_goes_on_from_it(commands, tiny, uninterrupted, tmp_path):
    run = tmp_path / "run"
    command = (*tiny, *KEYED, "checkpoint_every=1000", f"output_dir={run}")
    stopped = commands.start(*command).kill_when(lambda: last_step(run) >= 3, signal.SIGTERM)
    step = checkpoint(run)["step"]
    assert stopped.code == 143
    assert stopped.err == f"stopped by SIGTERM after step {step}, checkpoint written; the same command resumes\n"
    assert 3 <= step < 16 and (run / f"checkpoint_{step}.pt").exists()
    assert not (run / "metrics.json").exists()
    succeeded(commands.run(*command))
    assert_same_training(run, uninterrupted)


def test_the_means_of_a_record_survive_a_stop(commands, tiny, tmp_path):
    """A record every fourth step; the stop comes somewhere in between."""
    command = (*tiny, "epochs=3", "task.log_every=4", "checkpoint_every=1000", "loss=view")
    one, other = tmp_path / "one", tmp_path / "other"
    succeeded(commands.run(*command, f"output_dir={one}"))
    running = commands.start(*command, f"output_dir={other}")
    running.kill_when(lambda: last_step(other) >= 4, signal.SIGTERM)
    succeeded(commands.run(*command, f"output_dir={other}"))
    assert [record["step"] for record in log(other)] == [4, 8, 12]
    assert_same_training(other, one)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(commands, tiny, reference, tmp_path):
    run = tmp_path / "run"
    command = (*tiny, f"output_dir={run}")
    succeeded(commands.run(*command, "max_steps=6"))
    for damaged in (run / "checkpoint.pt", run / "checkpoint_6.pt"):
        content = damaged.read_bytes()
        damaged.unlink()  # the two names are one file
        damaged.write_bytes(content[: len(content) // 2])
    outcome = succeeded(commands.run(*command))
    assert outcome.err.startswith("warning: damaged checkpoint: ") and outcome.err.count("\n") == 1
    assert "checkpoint_3.pt is used instead" in outcome.err
    assert_same_training(run, reference)


def test_another_number_of_threads_is_warned_about(commands, tiny, tmp_path):
    command = (*tiny, f"output_dir={tmp_path / 'run'}")
    succeeded(commands.run(*command, "max_steps=1"))
    outcome = succeeded(commands.run(*command, "max_steps=2", "runtime.threads=2"))
    assert outcome.err.startswith("warning: runtime.threads: ") and outcome.err.count("\n") == 1


def test_other_images_are_refused(commands, tiny, images, tmp_path):
    """Same options, but the folder has more images than before."""
    root = shutil.copytree(images / "train", tmp_path / "train")
    command = (*tiny, f"data.root={root}", f"output_dir={tmp_path / 'run'}")
    succeeded(commands.run(*command, "max_steps=1"))
    shutil.copy(root / "cat" / "000.png", root / "cat" / "100.png")
    outcome = commands.run(*command)
    assert outcome.code == 1
    assert outcome.err.startswith("error: data.root: has 17 images") and outcome.err.count("\n") == 1


def test_a_swin_with_window_14_repeats_bit_for_bit_on_two_threads(commands, tiny, tmp_path):
    """Its table of relative positions is looked up at 196 x 196 places for each head: on CPU the backward of a plain lookup of more
    than 32,768 elements adds in the order in which threads come."""
    swin = ("backbone=swin_tiny_w14", "backbone.dim=24", "backbone.depths=[2,1]", "backbone.heads=[2,2]", "loss=view", "data.batch_size=1",
            "augmentation.global_crops_size=112", "augmentation.local_crops_number=0", "runtime.threads=2", "max_steps=3")  # fmt: skip
    one, other = tmp_path / "one", tmp_path / "other"
    for run in (one, other):
        succeeded(commands.run(*tiny, *swin, f"output_dir={run}"))
    assert_same_training(one, other)
