"""task=finetune from its command line: two processes train and validate as one does."""

import json
import socket

import pytest

from tests.command_line.commands import losses, succeeded

OPTIONS = (
    "task=finetune", "backbone=swin_micro", "tracking=none", "device=cpu", "data.workers=0", "runtime.threads=1", "epochs=1",
    "frozen.network=untrained", "frozen.resize=32", "frozen.crop=32", "layer_decay=1", "warmup_epochs=0", "log_every=1",
    "mixing.probability=0",
)  # fmt: skip


def test_two_processes_equal_one_on_the_joined_batch(commands, images, tmp_path):
    """The first step sees the same weights; AdamW lets later ones drift apart by what rounding leaves of small gradients."""
    options = (*OPTIONS, f"data.root={images / 'train'}", f"data.val_root={images / 'val'}")
    one = commands.start(*options, "data.batch_size=4", f"output_dir={tmp_path / 'one'}")
    announced = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = [
        commands.start(
            *options,
            "data.batch_size=2",
            f"output_dir={tmp_path / 'two'}",
            extra_environment=announced | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    out = [succeeded(each.wait()).out for each in (one, *ranks)]
    assert "% top-1 of the" in out[0] and out[2] == ""
    ours, theirs = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] == list(range(1, 5))
    for name in ("loss/total", "gradient_norm"):
        assert ours[0][name] == pytest.approx(theirs[0][name], abs=1e-4)
    metrics = [json.loads((tmp_path / each / "metrics.json").read_text()) for each in ("one", "two")]
    assert metrics[0].keys() == metrics[1].keys() and metrics[0]["images_seen"] == metrics[1]["images_seen"] == 16
    assert metrics[0]["finetune/ema_loss"] == pytest.approx(metrics[1]["finetune/ema_loss"], abs=0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
