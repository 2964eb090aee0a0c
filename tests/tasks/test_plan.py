"""plan=true: what it counts against real steps and formulas, what it prints, and that it needs no data and writes nothing."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import conf.schema
from conf.composition import Composer, opened
from conf.plan import options_of_plan
from esvit.errors import OptionError
from esvit.records import StepValues
from esvit.runtime import Runtime
from esvit.tasks.distillation import Distillation
from esvit.tasks.plan_ahead import GPUS, Surroundings, plan_ahead
from esvit.tasks.plan_ranks import BUCKET_BYTES, HeadRows, Link, Traffic, rows_of_step, seconds_of_step
from esvit.tasks.plan_step import count_step
from esvit.tasks.throughput import LiveTensors, add_row, flops
from run import build

SMALL = (
    "backbone=vit_tiny", "backbone.image_size=32", "backbone.patch_size=8", "backbone.dim=48", "backbone.depth=2", "backbone.heads=2",
    "augmentation.global_crops_size=32", "augmentation.local_crops_size=16", "augmentation.local_crops_number=3", "head.hidden_dim=40",
    "head.bottleneck_dim=16", "head.prototypes=100", "data.batch_size=4", "epochs=20",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def composer() -> Iterator[Composer]:
    conf.schema.register()
    with opened() as composer:
        yield composer


@pytest.fixture
def options(composer) -> Callable[..., dict[str, Any]]:
    """Of a small ViT, or of another backbone as it is."""

    def compose(*words: str) -> dict[str, Any]:
        is_other = any(word.startswith("backbone=") for word in words)
        small = [word for word in SMALL if not (is_other and word.startswith("backbone"))]
        return options_of_plan(composer.compose([*small, *words]))

    return compose


def surroundings(options: dict[str, Any], **changes: Any) -> Surroundings:
    own = {"name": "run", "backbone": options["backbone_name"], "precision": options["precision"], "processes": options["processes"]}
    return Surroundings(**(own | {"script": None} | options["planning"] | changes))


def plan(options: dict[str, Any], **changes: Any) -> str:
    return "\n".join(plan_ahead(lambda: build(options["task"]), surroundings(options, **changes)))


def on_meta(options: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return build(options["task"])


def test_the_count_is_what_a_real_step_has_alive(options):
    """A real step on the CPU, forward and backward, tensor by tensor; and what its checkpoint would hold."""
    given = options("loss=view_region")
    cost = count_step(on_meta(given), batch_size=4, precision="fp32", device=CPU)
    task = build(given["task"])
    network = task.head.attach(task.backbone, regions=task.loss.needs_regions)
    task.loss.setup(prototypes=task.head.prototypes)
    runtime = Runtime(device="cpu", precision="fp32", seed=0, deterministic=True, threads=1, timeout_minutes=1.0, stall_minutes=0.0)
    optimizer = task.optimizer.build(network, precision="fp32", device=CPU)
    distillation = Distillation(
        network=network, loss=task.loss, optimizer=optimizer, runtime=runtime, global_count=2, accumulation=1, parts=2, mixing=None
    )
    moments = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    modules = (network, distillation.teacher, task.loss)
    crops = [torch.zeros(4, 3, size, size) for size in task.augmentation.crop_sizes]
    now = StepValues(epoch=0, learning_rate=0.001, weight_decay=0.0, momentum=0.99, temperature=0.04, last_layer_frozen=False)
    kept = [each for module in modules for each in (*module.parameters(), *module.buffers())]
    with LiveTensors([*kept, *moments, *crops]) as live:
        distillation.step([crops], now, sound=torch.tensor(True), rng=np.random.default_rng(0))
    assert cost.peak(keeps_gradients=False) == pytest.approx(live.peak, rel=0.05)
    assert cost.checkpoint() == sum(each.numel() * each.element_size() for each in (*kept, *moments))
    assert cost.gradients == 4 * cost.trained == 4 * sum(each.numel() for each in network.parameters() if each.requires_grad)


def test_operations_are_those_of_the_formula(options):
    """Backbone passes as task=throughput counts them; heads and prototypes by hand."""
    task = on_meta(options("loss=view"))
    cost = count_step(task, batch_size=4, precision="fp32")
    real = build(options()["backbone"])
    globals_together = flops(real, torch.zeros(8, 3, 32, 32))  # by the teacher; the student's crops of one size pass in two parts
    student = 2 * flops(real, torch.zeros(4, 3, 32, 32)) + flops(real, torch.zeros(4, 3, 16, 16)) + flops(real, torch.zeros(8, 3, 16, 16))
    head = 48 * 40 + 40 * 40 + 40 * 16
    rows, teacher_rows = 4 * 5, 4 * 2
    backbone = 3 * student + globals_together
    prototypes = 100 * 16 * 3 * (rows + teacher_rows)  # logits, mean prototype, the prototypes' gradient; so few targets are kept
    pulls = 2 * 5 * 4 * 16  # of the view loss: teacher views x crops x images x width
    assert cost.flops == pytest.approx(backbone + head * (3 * rows + teacher_rows) + prototypes + pulls, rel=1e-4)


def test_half_precision_needs_less_and_twice_the_images_twice_as_much(options):
    task = options("loss=view_region")
    single, half = (count_step(on_meta(task), batch_size=4, precision=precision) for precision in ("fp32", "bf16"))
    assert single.activations > half.activations
    assert (single.weights, single.moments, single.flops) == (half.weights, half.moments, half.flops)
    twice = count_step(on_meta(task), batch_size=8, precision="fp32")
    assert twice.activations == pytest.approx(2 * single.activations, rel=0.1)


def test_shares_divide_student_teacher_and_moments(options):
    task = on_meta(options("loss=view"))
    whole = count_step(task, batch_size=4, precision="fp32")
    fourth = whole.in_shares(4)
    parameters = 48 * 40 + 40 + 40 * 40 + 40 + 40 * 16 + 16 + whole.backbone
    assert whole.weights - fourth.weights == whole.moments - fourth.moments == 2 * 4 * parameters * 3 // 4
    assert fourth.gradients == whole.gradients
    words = "launcher=gpus", "launcher.processes=4", "planning.images=1000"
    assert "in shares (task.sharding=fsdp)" in plan(options(*words, "task.sharding=fsdp"))
    assert "in shares" not in plan(options(*words))


def test_prototypes_in_shares_spare_memory_and_send_rows_instead(options):
    """Of 4 processes each has 25 of 100 prototypes, and the rows of all: 5 crops of 4 images, of which the teacher sees 2."""
    words = "loss=view", "launcher=gpus", "launcher.processes=4", "planning.images=1000", "planning.images_per_second=100"
    given = options(*words, "task.shard_prototypes=true")
    whole, fourth = count_step(on_meta(given), batch_size=4, precision="fp32"), on_meta(given)
    fourth.head = replace(fourth.head, prototypes=25)
    share = count_step(fourth, batch_size=4, precision="fp32")
    shared = whole.with_prototypes_in_shares(share, 4, width=16)
    assert whole.moments - shared.moments == 2 * 4 * 75 * 16
    assert whole.gradients - shared.gradients == 4 * 75 * 16
    assert shared.flops == whole.flops
    assert shared.passes == tuple(each + 4 * 16 * 3 * (8 + 2 * 5) for each in share.passes)  # 20 student rows in four passes
    (rows,) = whole.rows
    assert rows == HeadRows(students=20, teachers=8)
    row_bytes = rows_of_step(rows, width=16, product_bytes=4)
    assert row_bytes == 20 * (16 * 4 + 4 + 16 * 4) + 8 * (2 * 16 * 4 + 16 * 4)
    text = plan(given)
    assert "with 25 of the prototypes on each" in text
    assert f"{row_bytes / 1e6:.1f} MB of rows" in text
    assert "of the prototypes 0.0" in text
    assert "MB of rows" not in plan(options(*words))
    with pytest.raises(OptionError, match="100 cannot be divided among 3 processes"):
        plan(options("task.shard_prototypes=true", "launcher=gpus", "launcher.processes=3", "planning.images=1000"))


def test_rows_that_go_to_every_rank_take_longer_with_more_of_them():
    """10 MB in 3 messages from each of 4 ranks to the other 3, by a link of 1 GB/s, of which 0.8 are used; 1 MB of logsumexps is 4."""
    link = Link("slow", 1.0, 0.001)
    assert link.all_gather(10_000_000, 4, messages=3) == pytest.approx(3 * 0.0125 + 3 * 3 * 0.001)
    traffic = Traffic(gradients=0, prototypes=0, centres=(0,), flag=0, rows=6_000_000, logsumexps=1_000_000, messages=3)
    others = 5 * 6 * 0.001 + 3 * 0.001  # hops of gradients, prototypes, centre, flag and norms, all-reduced; of logits, gathered
    assert seconds_of_step(compute=1.0, last_backward=0.1, traffic=traffic, link=link, ranks=4) == pytest.approx(1.0465 + others)


def test_a_plan_for_several_gpus_tells_what_they_send(options):
    """Gradients of everything trained, and the mean embedding of both heads."""
    given = options("loss=view_region", "launcher=gpus", "launcher.processes=8", "planning.images_per_second=100", "planning.images=1000")
    cost = count_step(on_meta(given), batch_size=4, precision="fp32")
    text = plan(given)
    assert f"{(cost.gradients + 2 * 4 * 16 + 4) / 1e6:.1f} MB all-reduced per step" in text
    assert f"40 ms per step on one GPU (as given), {40 * cost.last_flops / cost.flops:.0f} ms of them" in text
    assert "efficiency" not in plan(options("planning.images=1000"))


def test_gradients_hide_behind_the_last_pass_of_backward_but_for_the_last_bucket():
    """100 MB in 4 ranks by a link of 1 GB/s, of which 0.8 are used: 1.5 x 100 MB in 0.1875 s, and the prototypes' 10 MB in 0.01875 s."""
    link = Link("slow", 1.0, 0.0)
    traffic = Traffic(gradients=100_000_000, prototypes=10_000_000, centres=(0,), flag=0)

    def seconds(last_backward: float, ranks: int) -> float:
        return seconds_of_step(compute=1.0, last_backward=last_backward, traffic=traffic, link=link, ranks=ranks)

    assert seconds(0.1, 4) == pytest.approx(1 + 0.0875 + 0.01875)
    assert seconds(0.5, 4) == pytest.approx(1 + 1.5 * BUCKET_BYTES / 0.8e9 + 0.01875)
    assert seconds(0.1, 1) == 1.0
    slow_to_begin = Link("late", 1.0, 0.001)
    assert slow_to_begin.all_reduce(0, 4) == pytest.approx(0.006)


def test_a_plan_needs_no_data_and_tells_what_was_assumed(options):
    text = plan(options("planning.images=1000", "task.accumulation=2", "launcher=gpus", "launcher.processes=8"))
    assert "1000 (planning.images), 64 per step (4 x 8 processes x 2 micro-batches)" in text
    assert "steps          300, 15 per epoch, 20 epochs" in text
    assert "learning rate  0.000125 at its peak" in text
    assert all(gpu.name in text for gpu in GPUS)
    text = plan(options("backbone=swin_micro", "data.root=/nowhere", "precision=bf16"))
    assert "1281167 (ImageNet-1K's, assumed because '/nowhere' is not there" in text
    assert "has no bf16" in text


def test_measured_speed_replaces_the_estimate(options, tmp_path):
    given = options("planning.images=7200", "planning.images_per_second=40", "launcher=gpus", "launcher.processes=4")
    assert "hours: 0.25 with 4, 1 GPU-hours, at 40 images per second of each GPU, as given" in plan(given)
    table = tmp_path / "table.md"
    add_row(table, "vit_tiny", ["5.5 M", "1.00", "16", "48", "10.0", "0.03"])
    text = plan(options("planning.images=7200", f"planning.throughput={table}"))
    assert f"hours on the device of {table}" in text and "0.01e12 multiply-adds" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=zoo"], "plan: task=zoo cannot be planned"),
        (["planning.images=3"], "data.batch_size: one step takes 4 images but there are 3"),
        (["planning.images=-1"], "planning.images: -1 is too small"),
        (["planning.throughput=/nowhere.md"], "planning.throughput: there is no file '/nowhere.md'"),
    ],
)
def test_mistakes_are_one_line(words, message, options):
    with pytest.raises(OptionError, match=message):
        plan(options(*words))
