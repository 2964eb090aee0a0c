"""A run that begins with the weights of a file, ours or the original's: where it begins, what of it is fresh, and what is refused."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.command_line.commands import Outcome, assert_same_training, checkpoint, differences, log, losses, succeeded
from tests.golden.steps import original_name

# Weights stay as they were (bar one step of next to nothing), so that a checkpoint shows what the run began with.
STILL = ("optimizer.learning_rate=1e-30", "schedule.final_learning_rate=0", "schedule.weight_decay_start=0", "schedule.weight_decay_end=0",
         "schedule.teacher_momentum_start=1")  # fmt: skip
# What a tiny run needs of the experiment: as many epochs as it has, no warm-up of the temperature
REGION = ("experiment=continue_region", "schedule.teacher_temperature_warmup_epochs=0", "epochs=3", "head.norm_last_layer=true")


@pytest.fixture(scope="module")
def view_run(commands, tiny, tmp_path_factory) -> Path:
    """Two epochs of the view loss alone: eight steps."""
    run = tmp_path_factory.mktemp("view_only") / "run"
    succeeded(commands.run(*tiny, "loss=view", f"output_dir={run}"))
    return run


@pytest.fixture(scope="module")
def view_file(view_run, tmp_path_factory) -> Path:
    """Its last checkpoint as the original would have written it."""
    state = checkpoint(view_run)
    content = {
        "student": {f"module.{original_name(name)}": value for name, value in state["student"].items()},
        "teacher": {original_name(name): value for name, value in state["teacher"].items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.001)}]},
        "epoch": 2,
        "args": argparse.Namespace(arch="swin_tiny", epochs=2),
        "dino_loss": {"center": state["loss"]["center"]},
    }
    path = tmp_path_factory.mktemp("published") / "checkpoint0002.pth"
    torch.save(content, path)
    return path


def told(outcome: Outcome) -> str:
    assert outcome.code == 1
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    return outcome.err


def test_a_view_only_checkpoint_goes_on_with_a_fresh_region_head(commands, tiny, view_run, view_file, tmp_path):
    """The same from our file and from the original's; the fresh head is one and the same in student and teacher."""
    ours, published = tmp_path / "ours", tmp_path / "published"
    options = (*tiny, *STILL, *REGION, "start_epoch=2", "max_steps=9")
    succeeded(commands.run(*options, f"checkpoint={view_run / 'checkpoint.pt'}", f"output_dir={ours}"))
    outcome = succeeded(commands.run(*options, f"checkpoint={view_file}", f"output_dir={published}"))
    assert "checkpoint0002.pth (of the original (--arch swin_tiny), after 2 epochs); the region head is fresh" in outcome.out
    assert "at epoch 2 of the schedules, with a fresh optimizer" in outcome.out
    assert_same_training(ours, published)

    before, after = checkpoint(view_run), checkpoint(published)
    assert [record["step"] for record in log(published)] == [9]
    assert after["step"] == 9
    for network in ("student", "teacher"):
        kept = {name: value for name, value in after[network].items() if not name.startswith("region_")}
        assert differences(kept, before[network]) == []
    fresh = {name: value for name, value in after["student"].items() if name.startswith("region_")}
    for name, value in fresh.items():  # the step moved what is zero
        torch.testing.assert_close(value, after["teacher"][name], rtol=0, atol=1e-25)
    assert {"region_head.mlp.0.weight", "region_prototypes.weight_v"} <= fresh.keys()
    assert all(value.std() > 0.01 for name, value in fresh.items() if name.endswith((".0.weight", "weight_v")))
    assert differences(after["loss"]["center"], before["loss"]["center"]) != []  # it moved by one step, from where it was
    moved = (after["loss"]["center"] - 0.9 * before["loss"]["center"]).norm()
    assert moved < 0.5 * after["loss"]["center"].norm()
    assert after["loss"]["center_region"].any()


def test_a_continued_run_follows_the_schedules_and_the_data_from_its_epoch_on(commands, tiny, reference, tmp_path):
    run = tmp_path / "run"
    succeeded(commands.run(*tiny, "start_epoch=1", f"checkpoint={reference / 'checkpoint_3.pt'}", f"output_dir={run}"))
    ours, theirs = losses(run), losses(reference)[4:]
    assert [record["step"] for record in ours] == [5, 6, 7, 8]
    assert [record["epoch"] for record in ours] == [1, 1, 1, 1]
    for name in ("schedule/learning_rate", "schedule/weight_decay", "schedule/momentum"):
        assert [record[name] for record in ours] == [record[name] for record in theirs]
    assert (run / "checkpoint_6.pt").exists() and (run / "metrics.json").exists()


def test_a_continued_run_that_was_stopped_ends_as_one_that_was_not(commands, tiny, view_file, tmp_path):
    command = (*tiny, *REGION, "start_epoch=1", f"checkpoint={view_file}")
    succeeded(commands.run(*command, f"output_dir={tmp_path / 'one'}"))
    succeeded(commands.run(*command, f"output_dir={tmp_path / 'other'}", "max_steps=6"))
    outcome = succeeded(commands.run(*command, f"output_dir={tmp_path / 'other'}"))
    assert "begins with" not in outcome.out
    assert [record["step"] for record in log(tmp_path / "other")] == list(range(5, 13))
    assert_same_training(tmp_path / "one", tmp_path / "other")


def test_a_fresh_schedule_begins_with_heads_and_centres_of_the_file(commands, tiny, view_file, view_run, tmp_path):
    run = tmp_path / "run"
    succeeded(commands.run(*tiny, *STILL, "loss=view", f"checkpoint={view_file}", "max_steps=1", f"output_dir={run}"))
    assert [record["step"] for record in log(run)] == [1]
    assert log(run)[0]["epoch"] == 0
    for network in ("student", "teacher"):
        assert differences(checkpoint(run)[network], checkpoint(view_run)[network]) == []


def test_what_cannot_be_continued_is_refused_before_a_run_folder_is_made(commands, tiny, reference, view_file, tmp_path):
    ours = f"checkpoint={reference / 'checkpoint.pt'}"
    mistakes = {
        ("start_epoch=1",): "checkpoint: is not set, but start_epoch goes on from one; give the checkpoint file to begin with",
        REGION: "checkpoint: is not set, but fresh_heads goes on from one; give the checkpoint file to begin with",
        ("start_epoch=2", ours): "start_epoch: 2 is not before the end of epochs=2; use a smaller one, or more epochs",
        ("start_epoch=1", "max_steps=4", ours): "max_steps: 4, but start_epoch=1 begins after 4; use a larger one",
        (*REGION, ours): "fresh_heads: 'region', but the checkpoint has a region head",
        (f"checkpoint={view_file}",): "or fresh_heads=region to begin with a fresh region head",
        ("loss=view", "head.prototypes=32", f"checkpoint={view_file}"): "view_prototypes.weight_g (64, 1) instead of (32, 1)",
    }
    for options, message in mistakes.items():
        assert message in told(commands.run(*tiny, *options, f"output_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()
