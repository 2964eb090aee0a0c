"""What a pre-training would be and cost, said before anybody waits for GPUs: `plan=true`. Needs no GPU and no data, and writes nothing.

Sizes and operations are counted (plan_step.py). Time is an estimate between two shares of a GPU's peak, unless it was measured.

Letters: B images of one micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from esvit.errors import OptionError
from esvit.schedules import Schedules, scaled_learning_rate
from esvit.tasks import sharding
from esvit.tasks.plan_ranks import Traffic, efficiency_lines, messages_of_step, rows_of_step
from esvit.tasks.plan_step import StepCost, count_step
from esvit.tasks.pretrain import BACKGROUND, Pretrain
from esvit.tasks.throughput import table_row

IMAGENET_IMAGES = 1_281_167
_FAST = "H100 80 GB"
_GPUS_OF_A_MACHINE = 8
_RESERVED_BYTES = 1.5e9  # CUDA's context and libraries, NCCL's buffers
_USABLE = 0.9  # of the rest: what fragmentation leaves


@dataclass(frozen=True)
class Gpu:
    """memory (GiB), and the stated peak of matrix products (1e12 operations a second, two per multiply-add), without sparsity."""

    name: str
    memory: int
    half: float
    single: float


GPUS = (
    Gpu("V100 16 GB", 16, 125, 15.7),
    Gpu("V100 32 GB", 32, 125, 15.7),
    Gpu("RTX 3090", 24, 71, 35.6),
    Gpu("RTX 4090", 24, 165, 82.6),
    Gpu("L40S", 45, 362, 91.6),
    Gpu("A100 40 GB", 40, 312, 19.5),
    Gpu("A100 80 GB", 80, 312, 19.5),
    Gpu("H100 80 GB", 80, 989, 66.9),
    Gpu("H200", 140, 989, 66.9),
)
# Shares of the peak that a training step reaches, from slow to fast: the estimate of time. In half precision small networks spend most of
# a step on memory, not on products. DINO's published ViT-S/16 runs (8 V100, 1.75 days for 100 epochs) come to a tenth of the peak.
HALF_SHARES = (0.1, 0.3)
SINGLE_SHARES = (0.3, 0.6)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a plan needs besides the task's parts.

    name, backbone     of the run and of the backbone's preset
    precision          "fp32", "bf16" or "fp16"
    processes          one per GPU, on all machines
    images             of the training set; None: those of the task's data
    images_per_second  of one GPU in training, measured; None: estimated
    throughput         Markdown file with a table of task=throughput, or None
    script             what would be submitted, or None
    """

    name: str
    backbone: str
    precision: str
    processes: int
    images: int | None
    images_per_second: float | None
    throughput: str | None
    script: str | None


def plan_ahead(make_task: Callable[[], Pretrain], around: Surroundings) -> list[str]:
    """Lines for the console. Raises OptionError for options that cannot work, as the run would.

    make_task  builds the task of its options
    """
    _check(around)
    with torch.device("meta"):  # no weights are made
        task = make_task()
    images, source = _images(task, around)
    per_step = task.data.batch_size * around.processes * task.accumulation
    if images < per_step:
        found = f"one step takes {per_step} images but there are {images}"
        raise OptionError("data.batch_size", found, "use a smaller batch, fewer processes or less accumulation")
    schedules = task.schedule(
        epochs=task.epochs,
        steps_per_epoch=images // per_step,
        learning_rate=scaled_learning_rate(task.optimizer.learning_rate, per_step),
    )
    cost = count_step(task, batch_size=task.data.batch_size, precision=around.precision)
    ways = {"none": 1, "fsdp": around.processes, "hsdp": min(_GPUS_OF_A_MACHINE, around.processes)}[task.sharding]
    in_shares = _with_prototypes_in_shares(make_task, cost, around).in_shares(ways)
    keeps_gradients = around.processes > 1 or task.accumulation > 1
    stop = min(schedules.total_steps, task.max_steps or schedules.total_steps)
    first = task.start_epoch * schedules.steps_per_epoch
    seen = max(0, stop - first) * per_step
    return [
        f"plan of {around.name}: nothing is run, nothing is written",
        "",
        *_sizes(task, cost),
        f"images         {images} ({source}), {per_step} per step "
        f"({task.data.batch_size} x {_count(around.processes, 'process', 'es')} x {_count(task.accumulation, 'micro-batch', 'es')})",
        *_schedule(schedules, task, stop, first),
        *_memory(task, in_shares, around, keeps_gradients),
        *_disk(task, cost),
        "",
        *_gpu_table(task, in_shares, around, keeps_gradients, seen),
        *_measured(task, cost, around, seen),
        *_communication(task, cost, around),
        *([] if around.script is None else ["", "would be submitted:", "", around.script.rstrip()]),
    ]


def _check(around: Surroundings) -> None:
    for option, value in (("images", around.images), ("images_per_second", around.images_per_second)):
        if value is not None and value <= 0:
            raise OptionError(f"planning.{option}", f"{value} is too small", "use a number above 0, or leave it away")
    if around.throughput is not None and not Path(around.throughput).is_file():
        raise OptionError(
            "planning.throughput", f"there is no file '{around.throughput}'", "give the table of task=throughput task.table=FILE"
        )


def _images(task: Pretrain, around: Surroundings) -> tuple[int, str]:
    """How many, and how that is known."""
    if around.images is not None:
        return around.images, "planning.images"
    why = f"'{task.data.root}' is not there" if task.data.root else "data.root is not given"
    try:
        return len(task.data.train()), f"of {task.data.root or 'the package'}"
    except OptionError:
        return IMAGENET_IMAGES, f"ImageNet-1K's, assumed because {why}; planning.images=N for others"


def _sizes(task: Pretrain, cost: StepCost) -> list[str]:
    heads = 2 if task.loss.needs_regions else 1
    per_image = cost.flops / task.data.batch_size
    return [
        f"parameters     {cost.backbone / 1e6:.2f} M backbone, {cost.parameters / 1e6:.2f} M with heads, "
        f"{cost.trained / 1e6:.2f} M trained",
        f"prototypes     {task.head.prototypes} x {task.head.bottleneck_dim}, {_count(heads, 'head')}",
        f"arithmetic     {per_image / 1e9:.1f} G multiply-adds per image and step, all crops, teacher, student and loss",
    ]


def _schedule(schedules: Schedules, task: Pretrain, stop: int, first: int) -> list[str]:
    steps = f"{stop} of {schedules.total_steps}" if stop < schedules.total_steps else f"{stop}"
    before = f"from step {first}, " if first else ""
    peak = f"{schedules.learning_rate:.3g} at its peak ({task.optimizer.learning_rate:.3g} for 256 images, scaled)"
    return [
        f"steps          {before}{steps}, {schedules.steps_per_epoch} per epoch, {_count(schedules.epochs, 'epoch')}",
        f"learning rate  {peak}, {_count(schedules.warmup_steps, 'step')} of warm-up",
    ]


def _memory(task: Pretrain, cost: StepCost, around: Surroundings, keeps_gradients: bool) -> list[str]:
    total = cost.peak(keeps_gradients=keeps_gradients)
    return [
        f"memory         {total / 1e9:.2f} GB per GPU with {_count(task.data.batch_size, 'image')} in {around.precision}: "
        f"weights {cost.weights / 1e9:.2f}, optimizer {cost.moments / 1e9:.2f}, gradients {cost.gradients / 1e9:.2f}"
        f"{'' if keeps_gradients else ' (some after the activations)'}, activations {cost.activations / 1e9:.2f}",
        f"               and what CUDA and NCCL keep for themselves, {_RESERVED_BYTES / 1e9} GB assumed",
        *_of_shares(task, around),
    ]


def _of_shares(task: Pretrain, around: Surroundings) -> list[str]:
    lines = []
    if task.shard_prototypes and around.processes > 1:
        lines = [f"               with {task.head.prototypes // around.processes} of the prototypes on each (task.shard_prototypes)"]
    if task.sharding == "none":
        return lines
    machine = f", machines of {_GPUS_OF_A_MACHINE} GPUs assumed" if task.sharding == "hsdp" else ""
    return [*lines, f"               with student, teacher and optimizer in shares (task.sharding={task.sharding}{machine})"]


def _with_prototypes_in_shares(make_task: Callable[[], Pretrain], cost: StepCost, around: Surroundings) -> StepCost:
    """`cost`, where each process has all prototypes, if they are not asked to be in shares."""
    with torch.device("meta"):
        task = make_task()  # anew: a count leaves its marks on the parts
    if not task.shard_prototypes or around.processes == 1:
        return cost
    count, ways = task.head.prototypes, around.processes
    sharding.check_prototypes(prototypes=count, optimizer=task.optimizer, precision=around.precision, world_size=ways)
    head = replace(task.head, prototypes=count // ways)
    share = count_step(replace(task, head=head), batch_size=task.data.batch_size, precision=around.precision)
    return cost.with_prototypes_in_shares(share, ways, width=head.bottleneck_dim)


def _disk(task: Pretrain, cost: StepCost) -> list[str]:
    files = task.checkpoint_keep + 1
    copy = ", from a copy in the CPU's memory" if task.checkpoint_writing == BACKGROUND else ""
    return [
        f"disk           {files * cost.checkpoint() / 1e9:.1f} GB: {_count(task.checkpoint_keep, 'checkpoint')} of "
        f"{cost.checkpoint() / 1e9:.2f} GB kept, one more while it is written{copy}, every {task.checkpoint_every} steps"
    ]


def _gpu_table(task: Pretrain, cost: StepCost, around: Surroundings, keeps_gradients: bool, seen: int) -> list[str]:
    is_estimated = around.images_per_second is None
    batch = task.data.batch_size
    lines = [
        f"{'':<13}{'fits':>6}{'largest batch':>15}" + (f"{f'hours with {around.processes}':>22}{'GPU-hours':>18}" if is_estimated else "")
    ]
    for gpu in GPUS:
        if around.precision == "bf16" and gpu.name.startswith("V100"):
            lines.append(f"{gpu.name:<13}  has no bf16")
            continue
        largest = _largest_batch(gpu, cost, batch, keeps_gradients)
        hours = _hours(gpu, cost, batch, around, seen)
        time = f"{_range(hours, around.processes):>22}{_range(hours, 1):>18}" if is_estimated else ""
        lines.append(f"{gpu.name:<13}{'yes' if largest >= batch else 'no':>6}{largest:>15}{time}")
    if around.images_per_second is not None:
        hours = [seen / around.images_per_second / 3600]
        found = f"{_range(hours, around.processes)} with {around.processes}, {_range(hours, 1)} GPU-hours"
        return [*lines, "", f"hours: {found}, at {around.images_per_second:g} images per second of each GPU, as given"]
    low, high = _shares(around)
    basis = f"{low:.0%} to {high:.0%} of the peak in {around.precision}, assumed; nothing here was measured"
    return [*lines, "", f"hours: {basis}; waiting for data, communication and k-NN come on top"]


def _hours(gpu: Gpu, cost: StepCost, batch: int, around: Surroundings, seen: int) -> list[float]:
    """Of one GPU for everything, if it reaches the largest share of its peak and if it reaches the smallest."""
    peak = (gpu.single if around.precision == "fp32" else gpu.half) * 1e12
    low, high = _shares(around)
    return [2 * cost.flops / batch * seen / (share * peak) / 3600 for share in (high, low)]


def _shares(around: Surroundings) -> tuple[float, float]:
    return SINGLE_SHARES if around.precision == "fp32" else HALF_SHARES


def _largest_batch(gpu: Gpu, cost: StepCost, batch: int, keeps_gradients: bool) -> int:
    """Images per process: activations grow with the batch, all else stays."""
    usable = (gpu.memory * 2**30 - _RESERVED_BYTES) * _USABLE
    left = usable - cost.weights - cost.moments - cost.gradients_beside(keeps_gradients=keeps_gradients)
    return max(0, int(left / (cost.activations / batch)))


def _communication(task: Pretrain, cost: StepCost, around: Surroundings) -> list[str]:
    """How the step would scale over GPUs; a fast one, which leaves least time to hide behind, where nothing was measured."""
    if around.processes == 1:
        return []
    batch = task.data.batch_size
    gpu = next(each for each in GPUS if each.name == _FAST)
    _, share = _shares(around)
    rate = share * (gpu.single if around.precision == "fp32" else gpu.half) * 1e12
    seconds, basis = 2 * cost.flops / rate, f"{gpu.name} at {share:.0%} of its peak, assumed"
    if around.images_per_second is not None:
        seconds, basis = batch / around.images_per_second, "as given"
    width, prototypes = task.head.bottleneck_dim, cost.gradients - cost.early_gradients
    traffic = Traffic(gradients=cost.early_gradients, prototypes=prototypes, centres=len(cost.rows) * (4 * width,))
    if task.shard_prototypes:
        numbers, passes = 2 if around.precision == "bf16" else 4, len(cost.passes)
        messages = sum(messages_of_step(rows, passes=passes, prototypes=task.head.prototypes) for rows in cost.rows)
        traffic = replace(
            traffic,
            prototypes=0,
            rows=task.accumulation * sum(rows_of_step(rows, width=width, product_bytes=numbers) for rows in cost.rows),
            logsumexps=task.accumulation * sum(4 * (rows.students + rows.teachers) for rows in cost.rows),
            messages=task.accumulation * messages,
            norms=4 * len(cost.rows) * (1 if task.head.norm_last_layer else 2),
            logits=4 * len(cost.rows) * task.head.prototypes,
        )
    return [
        *([""] if task.sharding == "none" else ["", f"with task.sharding=none; {task.sharding} sends more, and is not modelled:"]),
        *efficiency_lines(
            compute=seconds * task.accumulation, last_backward=seconds * cost.last_flops / cost.flops, traffic=traffic, basis=basis
        ),
    ]


def _measured(task: Pretrain, cost: StepCost, around: Surroundings, seen: int) -> list[str]:
    """Time on the device of a table of task=throughput, if a step does as many operations a second as a forward pass did there."""
    if around.throughput is None:
        return []
    row = table_row(Path(around.throughput), around.backbone)
    if row is None:
        found = f"'{around.throughput}' has no row '{around.backbone}'"
        remedy = f"measure it: task=throughput backbone={around.backbone} task.table={around.throughput}"
        raise OptionError("planning.throughput", found, remedy)
    rate = float(row["images/s"]) * float(row["GFLOPs"]) * 1e9  # multiply-adds a second
    per_second = rate / (cost.flops / task.data.batch_size)
    hours = seen / per_second / 3600
    return [
        f"hours on the device of {around.throughput}: {_range([hours], around.processes)} with {around.processes}, "
        f"{_range([hours], 1)} device-hours, at {per_second:.3g} images per second of each",
        f"(as many operations a second as in the forward pass measured there, {rate / 1e12:.3g}e12 multiply-adds)",
    ]


def _range(hours: list[float], processes: int) -> str:
    shown = [f"{each / processes:.0f}" if each / processes >= 10 else f"{each / processes:.2g}" for each in hours]
    return " to ".join(dict.fromkeys(shown))


def _count(number: int, thing: str, plural: str = "s") -> str:
    return f"{number} {thing}{'' if number == 1 else plural}"
