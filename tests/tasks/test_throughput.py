"""task=throughput: a cost that can be computed by hand, the files that it leaves, and one table of several backbones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from esvit.backbones.base import Backbone
from esvit.errors import OptionError
from esvit.run_folder import RunFolder
from esvit.runtime import Runtime
from esvit.tasks.throughput import Throughput, add_row, descend, flops, machine, parameters, peak_bytes, table_row
from esvit.tracking.base import NoTracking
from tests.backbones.networks import micro_resnet, micro_vit, swin
from tests.tasks.composition import composed

CELLS = ["1.0 M", "2.00", "9 4", "8", "5.0", "0.10"]


def measure(backbone: Backbone, folder: Path, **changes: Any) -> dict[str, float]:
    """metrics.json of a measurement of images of 64 pixels."""
    options: dict[str, Any] = {"batch_size": 2, "image_size": 64, "repeats": 1, "train_step": True, "table": None}
    options |= {"name": "micro", "in_channels": 3}
    threads = torch.get_num_threads()
    with Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1, stall_minutes=0) as runtime:
        runtime.records_to(RunFolder(folder), tracking=NoTracking(host=None), config={"epochs": 1, "max_steps": None})
        try:
            Throughput(backbone=backbone, **(options | changes)).run(runtime)
        finally:
            torch.set_num_threads(threads)
    return json.loads((folder / "metrics.json").read_text())


def test_a_linear_layer_costs_one_flop_for_each_weight_and_row():
    assert flops(nn.Linear(5, 7), torch.zeros(3, 5)) == 3 * 5 * 7


def test_the_flops_of_a_vit_are_those_counted_by_hand():
    """16 patches and a class token, width 24, in three blocks; attention's two products do not depend on the number of heads."""
    tokens, width = 17, 24
    patches = 16 * (16 * 16 * 3) * width
    block = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width + 2 * tokens * width * 4 * width
    assert flops(micro_vit().eval(), torch.zeros(1, 3, 64, 64)) == patches + 3 * block


def test_flops_grow_with_the_images():
    network = swin().eval()
    assert flops(network, torch.zeros(2, 3, 56, 56)) == 2 * flops(network, torch.zeros(1, 3, 56, 56))


def test_parameters_of_a_linear_layer_are_its_weights_and_biases():
    assert parameters(nn.Linear(5, 7)) == 5 * 7 + 7


def test_peak_memory_is_of_the_tensors_that_live_at_once():
    """A chain of layers holds the input of the layer at work and its output, beside weights and images; views cost nothing."""
    layers = [nn.Linear(10, 20), nn.Unflatten(1, (4, 5)), nn.Flatten(), nn.Linear(20, 30), nn.ReLU(inplace=True), nn.Linear(30, 1)]
    images = torch.zeros(100, 10)
    weights = 10 * 20 + 20 + 20 * 30 + 30 + 30 * 1 + 1
    network = nn.Sequential(*layers)
    with torch.no_grad():
        assert peak_bytes(network, images, lambda: network(images)) == 4 * (weights + 100 * 10 + 100 * (20 + 30))


def test_training_keeps_every_activation_until_the_backward_pass():
    """Four layers: a forward pass holds two results at once, training the output of every sigmoid; a step frees the gradients."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(10, 10), nn.Sigmoid())]
    network, images = nn.Sequential(*layers), torch.zeros(100, 10)
    weights, result = 4 * (10 * 10 + 10), 100 * 10

    def train() -> None:
        network(images).sum().backward()
        descend(network)

    with torch.no_grad():
        assert peak_bytes(network, images, lambda: network(images)) == 4 * (weights + 3 * result)
    assert 4 * (weights + 5 * result) <= peak_bytes(network, images, train) <= 4 * (2 * weights + 7 * result)
    assert all(weight.grad is None for weight in network.parameters())


def test_a_step_of_descent_hardly_moves_the_weights():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    (layer(torch.ones(1, 3)).sum() * 1e6).backward()
    descend(layer)
    assert 0 < (layer.weight - before).abs().max() < 1e-5


def test_a_measurement_leaves_flat_metrics_and_one_record(tmp_path, capsys):
    network = swin()
    metrics = measure(network, tmp_path)
    tokens = {f"tokens_stage_{stage}": count for stage, count in ((1, 256), (2, 64), (3, 16), (4, 4))}
    names = ("images_per_second", "peak_memory_gb", "images_per_second_train", "peak_memory_train_gb")
    measured = {name: metrics.pop(name) for name in names}
    assert min(measured.values()) > 0
    assert measured["peak_memory_train_gb"] > measured["peak_memory_gb"]
    sizes = {"parameters": sum(each.numel() for each in network.parameters()), "flops": flops(network, torch.zeros(1, 3, 64, 64))}
    assert metrics == {**sizes, **tokens, "features": 192, "threads": 1, "step": 1}
    (record,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert record["step"] == 1
    assert record["images_per_second"] == measured["images_per_second"]
    out = capsys.readouterr().out
    assert "256 64 16 4 tokens" in out
    assert out.count("images/s") == 2
    protocol = json.loads((tmp_path / "protocol.json").read_text())
    assert (protocol["precision"], protocol["batch_size"], protocol["machine"]) == ("fp32", 2, machine(torch.device("cpu")))


def test_a_measurement_without_training_leaves_the_weights_alone(tmp_path):
    network = swin()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    metrics = measure(network, tmp_path, train_step=False)
    assert not any("train" in name for name in metrics)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


def test_a_batch_too_small_for_batch_normalisation_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"^task\.batch_size: too small to train with"):
        measure(micro_resnet(), tmp_path, batch_size=1, image_size=32)


def test_class_tokens_are_not_counted_as_tokens_of_a_stage(tmp_path):
    assert measure(micro_vit(), tmp_path)["tokens_stage_1"] == 16


def test_a_network_without_attention_is_measured_too(tmp_path):
    metrics = measure(micro_resnet(), tmp_path)
    assert [metrics[f"tokens_stage_{stage}"] for stage in (1, 2, 3, 4)] == [256, 64, 16, 4]


@pytest.mark.parametrize(
    ("option", "value"), [("batch_size", 0), ("repeats", 0), ("image_size", 0), ("image_size", 8), ("table", "no_such_folder/table.md")]
)
def test_an_impossible_option_is_named_before_anything_is_written(option, value, tmp_path):
    with pytest.raises(OptionError, match=f"^task.{option}: "):
        measure(micro_vit(), tmp_path / "run", **{option: value})
    assert not (tmp_path / "run").exists()


def test_a_row_replaces_the_one_of_the_same_name_and_leaves_the_text_around_the_table(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("# Title\n")
    add_row(file, "one", CELLS)
    add_row(file, "one_more", CELLS)
    with file.open("a") as page:
        page.write("\nAfter it.\n")
    add_row(file, "one", ["3.0 M", *CELLS[1:]])
    add_row(file, "two", CELLS)
    lines = file.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("# Title", "After it.")
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if line.startswith("|")]
    assert rows[2:] == [["one", "3.0 M"], ["one_more", "1.0 M"], ["two", "1.0 M"]]


def test_only_options_that_the_task_refers_to_are_asked_for():
    with pytest.raises(OptionError, match=r"^backbone\.name: has no value"):
        composed("task=throughput", "backbone=timm")
    with pytest.raises(OptionError, match=r"^data\.root: has no value"):
        composed("task=pretrain")
    chosen = composed("task=throughput")["chosen"]
    assert "backbone" in chosen
    assert not {"data", "head", "loss"} & set(chosen)


def test_several_backbones_stand_below_each_other_and_in_one_table(tmp_path, capsys):
    table = tmp_path / "table.md"
    for name, network in (("vit", micro_vit()), ("resnet", micro_resnet())):
        measure(network, tmp_path / name, name=name, table=str(table), train_step=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["vit", "resnet"]
    assert len({line.index("GFLOPs") for line in lines}) == 1, "columns do not stand below each other"
    assert [row.split()[1] for row in table.read_text().splitlines()[2:]] == ["vit", "resnet"]
    assert table_row(table, "resnet")["features"] == str(micro_resnet().dim)
    assert table_row(table, "another") is None
