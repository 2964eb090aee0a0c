"""task=linear from the command line, by one process and by two."""

import json
import socket

import pytest

from tests.command_line.commands import checkpoint, losses, succeeded

OPTIONS = (
    "task=linear", "backbone=swin_micro", "tracking=none", "device=cpu", "runtime.threads=1", "data.workers=0", "epochs=2", "blocks=[1,4]",
    "learning_rates=[0.1,1]", "held_out=0.25", "frozen.network=untrained", "frozen.resize=32", "frozen.crop=32", "frozen.cache=null",
)  # fmt: skip


def test_two_processes_give_the_answer_of_one_on_the_joined_batch(commands, images, tmp_path):
    command = (*OPTIONS, f"data.root={images / 'train'}", f"data.val_root={images / 'val'}")
    one, two = tmp_path / "one", tmp_path / "two"
    alone = commands.start(*command, "data.batch_size=4", f"output_dir={one}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks = [
        commands.start(
            *(*command, "data.batch_size=2", f"output_dir={two}"),
            extra_environment=address | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        )
        for rank in "01"
    ]
    for running in (alone, *ranks):
        succeeded(running.wait())
    assert json.loads((two / "metrics.json").read_text()) == pytest.approx(json.loads((one / "metrics.json").read_text()), rel=1e-4)
    for mine, whole in zip(losses(two), losses(one), strict=True):
        assert mine == pytest.approx(whole, rel=1e-4)
    for name, weights in checkpoint(two)["probes"]["linears"].items():
        assert (weights - checkpoint(one)["probes"]["linears"][name]).abs().max() < 1e-5
