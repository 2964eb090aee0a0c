"""What a run leaves in its folder, and what the same command does when it is given again."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.command_line.commands import assert_same_training, checkpoint, differences, log, losses, succeeded


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def copied(reference, tmp_path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(reference, tmp_path / "run"))


def test_a_run_leaves_the_files_of_the_contract(reference):
    assert {
        "config.yaml",
        "metrics.json",
        "log.jsonl",
        "checkpoint.pt",
        "checkpoint_3.pt",
        "checkpoint_6.pt",
        "checkpoint_8.pt",
        "report.html",
        "crops.png",
    } <= set(files(reference))
    assert not list(reference.glob(".*.tmp"))
    config = (reference / "config.yaml").read_text()
    assert "_target_" not in config and "${" not in config
    assert "local_crops_number: 2" in config
    metrics = json.loads((reference / "metrics.json").read_text())
    assert metrics["step"] == 8 and metrics["images_seen"] == 32
    assert all(isinstance(value, int | float) for value in metrics.values())
    report = (reference / "report.html").read_text()
    assert all(part in report for part in ("What the network sees", "data:image/png", "data:image/svg+xml", "head.prototypes=64"))


def test_the_log_has_every_step_once_and_in_order(reference):
    records = log(reference)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["epoch"] for record in records] == [0] * 4 + [1] * 4
    names = (
        *("loss/total", "loss/view", "loss/region", "gradient_norm", "speed/images_per_second", "speed/data_wait_share", "memory/peak_gb"),
        *("schedule/learning_rate", "schedule/weight_decay", "schedule/momentum", "schedule/temperature"),
    )
    for name in names:
        assert all(isinstance(record[name], float) for record in records)
    assert len({record["loss/total"] for record in records}) == 8


def test_a_checkpoint_loads_without_running_code(reference):
    state = checkpoint(reference)
    assert state["step"] == 8
    for network in (state["student"], state["teacher"]):
        assert all(isinstance(value, torch.Tensor) and value.isfinite().all() for value in network.values())
    assert state["student"].keys() == state["teacher"].keys()
    assert differences(state["student"], state["teacher"]) != []
    assert state["loss"]["center"].abs().sum() > 0
    assert state["config"]["head"]["prototypes"] == 64


def test_a_finished_run_says_so_and_changes_nothing(commands, tiny, copied):
    before = files(copied)
    outcome = succeeded(commands.run(*tiny, f"output_dir={copied}"))
    assert "finished" in outcome.out and str(copied) in outcome.out
    assert outcome.err == ""
    assert files(copied) == before


def test_a_run_stopped_by_max_steps_goes_on_to_a_higher_one(commands, tiny, reference, tmp_path):
    run = f"output_dir={tmp_path / 'run'}"
    succeeded(commands.run(*tiny, run, "max_steps=5"))
    assert [record["step"] for record in log(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["step"] == 5
    outcome = succeeded(commands.run(*tiny, run, "max_steps=null"))
    assert "5 done before" in outcome.out
    assert_same_training(tmp_path / "run", reference)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["step"] == 8


def test_more_epochs_continue_a_finished_run_with_a_warning(commands, tiny, copied):
    before = losses(copied)
    outcome = succeeded(commands.run(*tiny, f"output_dir={copied}", "epochs=3"))
    assert outcome.err.startswith("warning: epochs: raised from 2 to 3") and outcome.err.count("\n") == 1
    assert losses(copied)[:8] == before
    assert [record["step"] for record in log(copied)] == list(range(1, 13))


def test_a_checkpoint_file_gives_the_weights_to_begin_with(commands, tiny, reference, tmp_path):
    """A learning rate of next to nothing and a teacher that stays as it is leave them as they were."""
    still = ("optimizer.learning_rate=1e-30", "schedule.final_learning_rate=0", "schedule.teacher_momentum_start=1", "max_steps=1")
    run = tmp_path / "run"
    succeeded(commands.run(*tiny, *still, f"output_dir={run}", f"checkpoint={reference / 'checkpoint.pt'}"))
    assert [record["step"] for record in log(run)] == [1]
    for network in ("student", "teacher"):
        assert differences(checkpoint(run)[network], checkpoint(reference)[network]) == []


def test_the_runs_own_checkpoint_beats_the_one_given(commands, tiny, reference, tmp_path):
    """The command that began from a file goes on from its own state when it is given again."""
    command = (*tiny, f"checkpoint={reference / 'checkpoint.pt'}")
    succeeded(commands.run(*command, f"output_dir={tmp_path / 'one'}", "max_steps=5"))
    succeeded(commands.run(*command, f"output_dir={tmp_path / 'one'}"))
    succeeded(commands.run(*command, f"output_dir={tmp_path / 'other'}"))
    assert_same_training(tmp_path / "one", tmp_path / "other")
    assert losses(tmp_path / "one")[0]["loss/total"] != losses(reference)[0]["loss/total"]


def test_a_checkpoint_of_another_network_is_refused(commands, tiny, reference, tmp_path):
    outcome = commands.run(*tiny, "loss=view", f"output_dir={tmp_path / 'run'}", f"checkpoint={reference / 'checkpoint.pt'}")
    assert outcome.code == 1
    assert outcome.err.startswith("error: checkpoint: the weights of the student do not fit") and outcome.err.count("\n") == 1


def test_the_view_loss_alone_and_no_local_crops(commands, tiny, tmp_path):
    run = tmp_path / "run"
    succeeded(commands.run(*tiny, "loss=view", "augmentation.local_crops_number=0", "max_steps=2", f"output_dir={run}"))
    assert len(log(run)) == 2
    assert "loss/region" not in log(run)[0]
    assert not any(name.startswith("region") for name in checkpoint(run)["student"])


def test_online_knn_and_its_baselines_end_in_the_metrics(commands, tiny, images, tmp_path):
    knn = (
        "task.online_knn.every_epochs=1",
        "task.online_knn.neighbours=3",
        "task.online_knn.resize=32",
        "task.online_knn.crop=32",
        "task.online_knn.baselines=true",
    )
    outcome = succeeded(
        commands.run(*tiny, *knn, f"data.val_root={images / 'val'}", "task.health_every=2", f"output_dir={tmp_path / 'run'}")
    )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    shares = [100 * correct / 6 for correct in range(7)]  # six validation images
    for name in ("knn/raw_pixels", "knn/color_histogram", "knn/untrained", "knn/teacher"):
        assert min(abs(metrics[name] - share) for share in shares) < 1e-3
    assert [record["step"] for record in log(tmp_path / "run") if "knn/teacher" in record] == [4, 8]
    assert [record["step"] for record in log(tmp_path / "run") if any(name.startswith("health/") for name in record)] == [2, 4, 6, 8]
    assert "k-NN of the trained teacher" in outcome.out


# ---------------------------------------------------------------------- trouble


def test_a_corrupt_image_is_replaced_counted_and_listed(commands, tiny, images, tmp_path):
    root = Path(shutil.copytree(images / "train", tmp_path / "train"))
    bad = root / "cat" / "003.png"
    bad.write_bytes(bad.read_bytes()[:40])
    run = tmp_path / "run"
    succeeded(commands.run(*tiny, f"data.root={root}", "data.workers=1", f"output_dir={run}"))
    assert (run / "bad_images.txt").read_text() == "cat/003.png\n"
    assert json.loads((run / "metrics.json").read_text())["data/bad_images"] == 1


def test_too_many_corrupt_images_end_the_run(commands, tiny, images, tmp_path):
    root = Path(shutil.copytree(images / "train", tmp_path / "train"))
    for bad in (root / "cat").iterdir():
        bad.write_bytes(b"")
    outcome = commands.run(*tiny, f"data.root={root}", "data.max_bad_fraction=0.25", f"output_dir={tmp_path / 'run'}")
    assert outcome.code == 1
    assert outcome.err.startswith("error: data.max_bad_fraction: ") and outcome.err.count("\n") == 1
    assert "of 16 images cannot be read" in outcome.err
    assert len((tmp_path / "run" / "bad_images.txt").read_text().splitlines()) > 4  # a quarter of 16


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_evidence(commands, tiny, tmp_path):
    """The log is read every 4 steps only, so that three steps at least had to be masked; the checkpoint of step 3 comes before it."""
    run = tmp_path / "run"
    outcome = commands.run(
        *tiny, "optimizer.learning_rate=1e30", "optimizer.clip=none", "task.log_every=4", "checkpoint_every=1", f"output_dir={run}"
    )
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: optimizer.learning_rate: loss or gradient was not finite in step ")
    first_bad = int(line.split("not finite in step ")[1].split(";")[0])
    (report,) = (run / "nonfinite").glob("*.json")
    assert str(report) in line
    described = json.loads(report.read_text())
    assert described["step"] == first_bad - 1
    kept = checkpoint(run)
    assert kept["step"] == first_bad - 1
    for network in ("student", "teacher"):
        assert all(value.isfinite().all() for value in kept[network].values())
    assert kept["loss"]["center"].isfinite().all()
    assert not (run / "metrics.json").exists()

    crops = torch.load(report.with_suffix(".pt"), weights_only=True)
    assert [[tuple(crop.shape) for crop in batch] for batch in crops] == [[(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 2]
    assert all(crop.dtype == torch.uint8 for crop in crops[0])
    again = commands.run(
        *tiny, "optimizer.learning_rate=1e30", "optimizer.clip=none", "task.log_every=4", "checkpoint_every=1", f"output_dir={run}"
    )
    assert again.code == 1 and again.err == outcome.err  # the resumed run meets the same step and draws the same batch
    assert differences(torch.load(report.with_suffix(".pt"), weights_only=True), crops) == []
    assert json.loads(report.read_text()) == described


def test_two_micro_batches_of_two_are_one_batch_of_four(commands, tiny, tmp_path):
    """With SGD, since AdamW divides rounding errors by their own size."""
    one, two = tmp_path / "one", tmp_path / "two"
    sgd = (*tiny, "optimizer=sgd", "optimizer.learning_rate=0.5", "max_steps=3")
    succeeded(commands.run(*sgd, f"output_dir={one}"))
    succeeded(commands.run(*sgd, "data.batch_size=2", "task.accumulation=2", f"output_dir={two}"))
    for ours, theirs in zip(losses(two), losses(one), strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], abs=1e-5)
    mine, whole = checkpoint(two), checkpoint(one)
    assert mine["student"].keys() == whole["student"].keys()
    for part in ("student", "teacher", "loss"):
        for name, value in mine[part].items():
            torch.testing.assert_close(value, whole[part][name], rtol=0, atol=1e-5)


def test_of_two_different_runs_started_at_once_in_one_folder_one_is_refused(commands, tiny, tmp_path):
    """Neither sees the other's config.yaml when it is admitted; the folder's lock lets them in one after the other."""
    both = [commands.start(*tiny, "max_steps=1", f"seed={seed}", f"output_dir={tmp_path / 'run'}") for seed in (0, 1)]
    outcomes = [each.wait() for each in both]
    assert sorted(outcome.code for outcome in outcomes) == [0, 1]
    refused = outcomes[0] if outcomes[0].code else outcomes[1]
    assert refused.err.startswith("error: output_dir: ") and "seed" in refused.err
    winner = 0 if outcomes[1].code else 1
    assert checkpoint(tmp_path / "run")["config"]["seed"] == winner
    assert len(log(tmp_path / "run")) == 1
