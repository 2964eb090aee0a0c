"""The linear classifier beside pre-training: it changes no bit of it, survives a resume, and learns."""

import json
import shutil

from tests.command_line.commands import checkpoint, differences, log, losses, succeeded

KNN = ("task.online_knn.every_epochs=1", "task.online_knn.neighbours=3", "task.online_knn.resize=32", "task.online_knn.crop=32")
PROBE = (*KNN, "task.online_linear.network=student", "task.online_linear.learning_rate=0.1")


def test_pre_training_is_the_same_bit_for_bit_with_and_without_it_and_so_is_a_resumed_one(commands, tiny, images, reference, tmp_path):
    command = (*tiny, *PROBE, f"data.val_root={images / 'val'}")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    succeeded(commands.run(*command, f"output_dir={whole}"))
    for part in ("student", "teacher", "loss", "optimizer", "rng"):
        assert differences(checkpoint(whole)[part], checkpoint(reference)[part], part) == []
    common = losses(reference)[0].keys()
    assert [{name: record[name] for name in common} for record in losses(whole)] == losses(reference)

    shutil.copytree(whole, resumed)  # as if the run had been killed in its seventh step
    for name in ("metrics.json", "checkpoint.pt", "checkpoint_8.pt"):
        (resumed / name).unlink()
    succeeded(commands.run(*command, f"output_dir={resumed}"))
    assert differences(checkpoint(resumed)["online_linear"], checkpoint(whole)["online_linear"]) == []
    assert losses(resumed) == losses(whole)

    shares = [100 * correct / 8 for correct in range(9)]  # two global crops of four images
    assert all(min(abs(record["linear/online_top1"] - share) for share in shares) < 1e-3 for record in log(whole))
    assert [record["step"] for record in log(whole) if "linear/online_validation_top1" in record] == [4, 8]
    metrics = json.loads((whole / "metrics.json").read_text())
    assert min(abs(metrics["linear/online_validation_top1"] - 100 * correct / 6) for correct in range(7)) < 1e-3
