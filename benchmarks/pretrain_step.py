"""How long the parts of one pre-training step take and how much memory it needs: `python benchmarks/pretrain_step.py --help`.

Unusual: with `--compare plain` the product's step and the plain one take turns in one process, so that both meet the same
noise, and medians are compared; memory is measured in a process of its own for each. Around each phase the host waits for
the device, so that a GPU's phases add up; a real run waits for nothing and is a little faster.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (torch's optimizers import it in their first step; it is no memory of the step)
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import esvit.data  # noqa: E402
from benchmarks.plain.step import PlainDistillation, PlainLoss, logits_of  # noqa: E402
from conf import schema  # noqa: E402
from conf.explain import mistakes_in_one_line  # noqa: E402
from esvit.data.loading import TrainLoader  # noqa: E402
from esvit.networks import MultiCropNetwork  # noqa: E402
from esvit.optimizers import AdamW  # noqa: E402
from esvit.records import NetworkOutput, PrototypeWeights, StepValues  # noqa: E402
from esvit.runtime import Runtime  # noqa: E402
from esvit.schedules import scaled_learning_rate  # noqa: E402
from esvit.tasks.distillation import Distillation  # noqa: E402
from run import build  # noqa: E402

PHASES = ["data", "teacher", "student", "loss", "backward", "optimizer", "EMA", "centre"]
SUMS = ["other", "step", "cpu"]  # time outside the phases, the whole step, its processor time
GLOBAL_CROPS = 2
PHOTO_SIZE = (500, 375)  # pixels, a usual ImageNet photo
PHOTOS = 64
CACHED_BATCHES = 2
DATA_NOTES = {
    "photos": f"data: how long the step waits for one loading process (JPEG of {PHOTO_SIZE[0]} x {PHOTO_SIZE[1]} pixels, decoding and all "
    "crops), which works while the step before runs, then transfer and normalisation",
    "cached": f"data: transfer and normalisation of {CACHED_BATCHES} batches of crops that were made before, in turn: no loading at all",
}


def main() -> None:
    arguments = parse(sys.argv[1:])
    imported_bytes = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder, mistakes_in_one_line(), start_runtime(arguments) as runtime:
        if arguments.memory_of:
            report = measure_memory(arguments, folder, runtime, imported_bytes)
        else:
            write_photos(Path(folder), max(PHOTOS, arguments.batch_size))
            report = describe(arguments, runtime) | measure(arguments, folder, runtime, imported_bytes)
            print(table(report))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="swin_tiny", help="a preset of conf/backbone (%(default)s)")
    parser.add_argument("--loss", default="view_region", choices=["view", "view_region"], help="(%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=4, help="images per step (%(default)s)")
    parser.add_argument("--prototypes", type=positive, default=65536, help="(%(default)s)")
    parser.add_argument("--local-crops", type=int, default=8, help="local crops per image (%(default)s)")
    parser.add_argument("--steps", type=positive, default=5, help="measured steps, of which the medians are printed (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those (%(default)s)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="(%(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(%(default)s)")
    parser.add_argument("--threads", type=positive, help="CPU threads (all cores)")
    parser.add_argument("--compare", choices=["plain"], help="also measure the published algorithm, written plainly (benchmarks/plain)")
    parser.add_argument("--input", default="photos", choices=list(DATA_NOTES), help="loaded photos, or crops made before (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("overrides", nargs="*", help="options of a run for our step, task.compile=true for example")
    parser.add_argument("--memory-of", choices=["product", "plain"], help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(words)


def plain_precision(runtime: Runtime) -> str:
    """As published, fp16 with a scaled loss where ours runs in bf16; on a CPU, which is slow at fp16, the same."""
    return "fp16" if runtime.precision == "bf16" and runtime.device.type == "cuda" else runtime.precision


def positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def start_runtime(arguments: argparse.Namespace) -> Runtime:
    return Runtime(
        device=arguments.device,
        precision=arguments.precision,
        seed=0,
        deterministic=None,
        threads=arguments.threads,
        timeout_minutes=30.0,
        stall_minutes=0,
    )


# ---------------------------------------------------------------------------------------------------- what is measured


class PhaseTimer:
    """Seconds per phase of each step; the host waits for the device around each phase."""

    def __init__(self, device: torch.device):
        self._device = device
        self._now: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        wait_for(self._device)
        began = time.perf_counter()
        yield
        wait_for(self._device)
        self._now[phase] = self._now.get(phase, 0.0) + time.perf_counter() - began

    @contextlib.contextmanager
    def whole_step(self) -> Iterator[None]:
        self._now = {}
        began, began_cpu = time.perf_counter(), time.process_time()
        yield
        wait_for(self._device)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
        self.steps.append(self._now | {"other": seconds - sum(self._now.values()), "step": seconds, "cpu": cpu_seconds})

    def medians(self, skip: int) -> dict[str, float]:
        """Per phase, over all but the first `skip` steps; `cpu` is processor time of all threads, which other users' load changes least."""
        return {name: statistics.median(step[name] for step in self.steps[skip:]) for name in (*PHASES, *SUMS)}


@dataclass
class Variant:
    """One way to take a step.

    step              takes V normalised crops, returns the loss
    network           the student
    loss_gradients    loss and gradients of embeddings and prototypes, from the outputs of student and teacher
    is_deterministic  whether it runs under torch's deterministic algorithms, as the product does on CPU
    """

    step: Callable[[list[Tensor]], Tensor | float]
    network: MultiCropNetwork
    loss_gradients: Callable[["LossInput"], None]
    timer: PhaseTimer
    is_deterministic: bool

    def take_step(self, batches: Iterator, normalize: Callable[[Tensor], Tensor], device: torch.device) -> None:
        torch.use_deterministic_algorithms(self.is_deterministic)
        with self.timer.whole_step():
            with self.timer("data"):
                crops = [normalize(crop) for crop in next(batches).to(device).crops]
            self.step(crops)


@dataclass(frozen=True)
class LossInput:
    """Random outputs of the shapes that the networks give."""

    student: list[NetworkOutput]
    teacher: list[NetworkOutput]
    student_prototypes: PrototypeWeights
    teacher_prototypes: PrototypeWeights

    def forget_gradients(self) -> None:
        for tensor in tree_leaves((self.student, self.student_prototypes)):
            if tensor is not None:
                tensor.grad = None


class Parts:
    """The objects that a pre-training run with the same options has, made anew at every call."""

    def __init__(self, arguments: argparse.Namespace, folder: str, runtime: Runtime):
        self._arguments = arguments
        self._runtime = runtime
        schema.register()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            self._config = compose(
                "config",
                overrides=[
                    f"backbone={arguments.backbone}",
                    f"head.prototypes={arguments.prototypes}",
                    f"augmentation.local_crops_number={arguments.local_crops}",
                    f"data.root={folder}",
                    f"data.batch_size={arguments.batch_size}",
                    "data.workers=1",
                    *arguments.overrides,
                ],
            )
            self._losses = {
                name: compose("config", overrides=[f"loss={name}", *arguments.overrides]).loss for name in ("view", "view_region")
            }
        crops = self._config.augmentation
        self.crop_sizes = [crops.global_crops_size] * GLOBAL_CROPS + [crops.local_crops_size] * crops.local_crops_number
        self.normalize = self._build(self._config.task.normalize)
        self.optimizer: AdamW = self._build(self._config.optimizer)
        self.plain_precision = plain_precision(runtime)
        self.kernel = "auto"  # and in the end the one that was taken

    def batches(self) -> Iterator:
        """Endless batches of views: loaded by one process, or the same few."""
        data = self._build(self._config.data)
        loaded = TrainLoader(
            images=data.train(),
            transform=self._build(self._config.augmentation),
            batch_size=data.batch_size,
            workers=data.workers,
            seed=self._runtime.seed,
            rank=0,
            world_size=1,
            accumulation=1,
            max_bad_fraction=0.0,
        ).from_step(0)
        if self._arguments.input == "photos":
            return loaded
        return itertools.cycle([next(loaded) for _ in range(CACHED_BATCHES)])

    def now(self) -> StepValues:
        """Half-way through training: nothing is frozen."""
        rate = scaled_learning_rate(self.optimizer.learning_rate, self._arguments.batch_size)
        schedules = self._build(self._config.schedule)(epochs=100, steps_per_epoch=1000, learning_rate=rate)
        return schedules.at(schedules.total_steps // 2)

    def product(self, loss_name: str, timer: PhaseTimer | None = None) -> Variant:
        timer = timer or PhaseTimer(self._runtime.device)
        now, loss = self.now(), self._build(self._losses[loss_name])
        network = self._network(regions=loss.needs_regions)
        loss.setup(prototypes=self._arguments.prototypes)
        loss.to(self._runtime.device)
        loss.choose_kernel(device=self._runtime.device, precision=self._runtime.precision, width=self._config.head.bottleneck_dim)
        self.kernel = "fused" if loss.is_fused else "chunked"
        distillation = Distillation(
            network=network,
            loss=loss,
            optimizer=self.optimizer.build(network, precision=self._runtime.precision, device=self._runtime.device),
            runtime=self._runtime,
            global_count=GLOBAL_CROPS,
            accumulation=1,
            parts=self._config.task.parts,
            mixing=None,
            phase=timer,
        )
        network.backbone.recompute(self._config.task.recompute.value)
        if self._config.task.compile:
            for each in (network, distillation.teacher.network):
                each.backbone.compile_blocks()
        sound = torch.ones((), dtype=torch.bool, device=self._runtime.device)

        def step(crops: list[Tensor]) -> Tensor:
            return distillation.step([crops], now, sound=sound, rng=self._runtime.seed_step(len(timer.steps))).terms.total

        def loss_gradients(given: LossInput) -> None:
            crops = [torch.empty(1, 1, size, size) for size in self.crop_sizes]
            with self._runtime.autocast():
                parts = loss.against(
                    given.teacher, given.student_prototypes, given.teacher_prototypes, now.temperature, crops=len(given.student)
                )
                for group in network.passes(crops, parts=self._config.task.parts):
                    parts.terms(given.student[group], group, None).total.backward()
                for weights, gradient in parts.prototype_gradients().with_weights(given.student_prototypes):
                    weights.grad = gradient

        return Variant(step, network, loss_gradients, timer, self._runtime.deterministic)

    def plain(self, loss_name: str, timer: PhaseTimer | None = None) -> Variant:
        timer = timer or PhaseTimer(self._runtime.device)
        now, loss = self.now(), self._build(self._losses[loss_name])
        network = self._network(regions=loss.needs_regions)
        distillation = PlainDistillation(
            network=network,
            loss=loss,
            prototypes=self._arguments.prototypes,
            optimizer=self.optimizer,
            device=self._runtime.device,
            precision=self.plain_precision,
            global_count=GLOBAL_CROPS,
            phase=timer,
        )

        def step(crops: list[Tensor]) -> float:
            self._runtime.seed_step(len(timer.steps))
            return distillation.step(crops, now)

        def loss_gradients(given: LossInput) -> None:
            plain_loss: PlainLoss = distillation.loss
            with distillation.autocast():
                student = logits_of(given.student, given.student_prototypes)
                teacher = logits_of(given.teacher, given.teacher_prototypes)
                total = plain_loss(student, teacher, crops=len(given.student), global_count=len(given.teacher), temperature=now.temperature)
            total.backward()

        return Variant(step, network, loss_gradients, timer, False)

    def loss_input(self, network: MultiCropNetwork) -> LossInput:
        """Random unit embeddings, one set of gradients to each."""
        device, images, sizes = self._runtime.device, self._arguments.batch_size, self.crop_sizes
        with torch.no_grad():
            shapes = {size: network([torch.zeros(1, 3, size, size, device=device)])[0] for size in set(sizes)}

        def unit(*shape: int, trained: bool) -> Tensor:
            return torch.nn.functional.normalize(torch.randn(shape, device=device), dim=-1).requires_grad_(trained)

        def output(size: int, trained: bool) -> NetworkOutput:
            view, region, features = shapes[size].view, shapes[size].region, shapes[size].features
            return NetworkOutput(
                view=unit(images, *view.shape[1:], trained=trained),
                region=None if region is None else unit(images, *region.shape[1:], trained=trained),
                features=None if features is None else unit(images, *features.shape[1:], trained=False),
                pooled=torch.zeros(images, 1, device=device),
            )

        def prototypes(trained: bool) -> PrototypeWeights:
            view, region = network.view_prototypes.weight_v.shape, network.region_prototypes
            return PrototypeWeights(
                view=unit(*view, trained=trained), region=None if region is None else unit(*region.weight_v.shape, trained=trained)
            )

        return LossInput(
            student=[output(size, True) for size in sizes],
            teacher=[output(size, False) for size in sizes[:GLOBAL_CROPS]],
            student_prototypes=prototypes(True),
            teacher_prototypes=prototypes(False),
        )

    def _network(self, *, regions: bool) -> MultiCropNetwork:
        torch.manual_seed(self._runtime.seed)
        return self._build(self._config.head).attach(self._build(self._config.backbone), regions=regions).to(self._runtime.device)

    @staticmethod
    def _build(node: Any) -> Any:
        options = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
        assert isinstance(options, dict)
        return build({str(key): value for key, value in options.items()})


# ---------------------------------------------------------------------------------------------------- measuring


def measure(arguments: argparse.Namespace, folder: str, runtime: Runtime, imported_bytes: int) -> dict[str, Any]:
    """Time and memory of the product's step; with --compare also of the others, and the ratios."""
    parts = Parts(arguments, folder, runtime)
    variants = {"product": parts.product(arguments.loss)}
    if arguments.compare:
        other_loss = "view" if arguments.loss == "view_region" else "view_region"
        variants |= {"plain": parts.plain(arguments.loss), other_loss: parts.product(other_loss)}
    take_turns(arguments, parts, variants, runtime)
    seconds = {name: variant.timer.medians(skip=arguments.warmup) for name, variant in variants.items()}
    report: dict[str, Any] = {
        "kernel": parts.kernel,
        "images_per_second": arguments.batch_size / seconds["product"]["step"],
        "seconds": seconds["product"],
        "data_wait_share": seconds["product"]["data"] / seconds["product"]["step"],
        "peak_memory_bytes": peak_bytes(runtime.device) - (0 if runtime.device.type == "cuda" else imported_bytes),
    }
    if not arguments.compare:
        return report
    loss_seconds = time_losses(arguments, parts, variants, runtime)
    del variants
    memory = {name: memory_in_own_process(name) for name in ("product", "plain")}
    compute = {name: median["step"] - median["data"] for name, median in seconds.items()}
    by_loss = {arguments.loss: compute["product"], other_loss: compute[other_loss]}
    return report | {
        "peak_memory_bytes": memory["product"]["step"],
        "plain": {
            "images_per_second": arguments.batch_size / seconds["plain"]["step"],
            "seconds": seconds["plain"],
            "peak_memory_bytes": memory["plain"]["step"],
        },
        "loss_alone": {name: {"seconds": loss_seconds[name], "peak_memory_bytes": memory[name]["loss"]} for name in ("product", "plain")},
        "speed_ratio": compute["plain"] / compute["product"],
        "cpu_ratio": seconds["plain"]["cpu"] / seconds["product"]["cpu"],
        "memory_ratio": ratio(memory["product"]["step"], memory["plain"]["step"]),
        "loss_time_ratio": loss_seconds["product"] / loss_seconds["plain"],
        "loss_memory_ratio": ratio(memory["product"]["loss"], memory["plain"]["loss"]),
        "region_over_view": by_loss["view_region"] / by_loss["view"],
    }


def take_turns(arguments: argparse.Namespace, parts: Parts, variants: dict[str, Variant], runtime: Runtime) -> None:
    """A B A B ...: every variant takes one step per round."""
    batches = parts.batches()
    for _ in range(arguments.warmup + arguments.steps):
        for variant in variants.values():
            if runtime.stop_signal():
                sys.exit("stopped by a signal")
            variant.take_step(batches, parts.normalize, runtime.device)
    torch.use_deterministic_algorithms(runtime.deterministic)


def time_losses(arguments: argparse.Namespace, parts: Parts, variants: dict[str, Variant], runtime: Runtime) -> dict[str, float]:
    """Median seconds of the loss with its gradients, from embeddings and prototypes: product and plain, turn by turn."""
    found: dict[str, list[float]] = {"product": [], "plain": []}
    given = parts.loss_input(variants["product"].network)
    for _ in range(1 + arguments.steps):
        for name, seconds in found.items():
            torch.use_deterministic_algorithms(variants[name].is_deterministic)
            given.forget_gradients()
            wait_for(runtime.device)
            began = time.perf_counter()
            variants[name].loss_gradients(given)
            wait_for(runtime.device)
            seconds.append(time.perf_counter() - began)
    torch.use_deterministic_algorithms(runtime.deterministic)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def memory_in_own_process(variant: str) -> dict[str, int]:
    """`measure_memory` of one variant, in a process with the same options."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "memory.json"
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--memory-of", variant, "--json", str(file)]
        subprocess.run(command, check=True)
        return json.loads(file.read_text())


def measure_memory(arguments: argparse.Namespace, folder: str, runtime: Runtime, imported_bytes: int) -> dict[str, int]:
    """Peak bytes of the loss alone, above its inputs and the prototypes' gradient, and of a whole step, above the imports."""
    parts = Parts(arguments, folder, runtime)
    variant = parts.product(arguments.loss) if arguments.memory_of == "product" else parts.plain(arguments.loss)
    given = parts.loss_input(variant.network)
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
        before = torch.cuda.memory_allocated(runtime.device)
    else:
        before = psutil.Process().memory_info().rss
    variant.loss_gradients(given)
    weights = [tensor for tensor in (given.student_prototypes.view, given.student_prototypes.region) if tensor is not None]
    loss_bytes = peak_bytes(runtime.device) - before - sum(each.grad.nbytes for each in weights if each.grad is not None)
    del given, weights
    torch.use_deterministic_algorithms(variant.is_deterministic)
    for _ in range(2):
        variant.step([torch.randn(arguments.batch_size, 3, size, size, device=runtime.device) for size in parts.crop_sizes])
    return {"loss": loss_bytes, "step": peak_bytes(runtime.device) - (0 if runtime.device.type == "cuda" else imported_bytes)}


def peak_bytes(device: torch.device) -> int:
    """High-water mark: allocated memory on a GPU, else resident memory of this process (VmHWM, where there is no /proc ru_maxrss)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, VmHWM does not begin with the size of the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(above: int, below: int) -> float | None:
    return above / below if below > 0 else None


def write_photos(folder: Path, count: int) -> None:
    """JPEG files of `PHOTO_SIZE` from the photos that come with the package, over and over."""
    assert esvit.data.__file__ is not None
    sources = sorted((Path(esvit.data.__file__).parent / "photos").glob("*.jpg"))
    for number in range(count):
        with Image.open(sources[number % len(sources)]) as photo:
            ImageOps.fit(photo.convert("RGB"), PHOTO_SIZE).save(folder / f"{number:05}.jpg", quality=90)


# ---------------------------------------------------------------------------------------------------- what is printed


def describe(arguments: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    options = {name: value for name, value in vars(arguments).items() if name not in ("json", "memory_of")}
    return {
        "command": " ".join(["python", "benchmarks/pretrain_step.py", *sys.argv[1:]]),
        "options": options,
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": runtime.threads,
            "device": torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "cpu",
            "deterministic": runtime.deterministic,
        },
        "plain_precision": plain_precision(runtime),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": version("torchvision")},
        "data_note": DATA_NOTES[arguments.input],
    }


def table(report: dict[str, Any]) -> str:
    options, machine = report["options"], report["machine"]
    columns = {"product": report} | ({"plain": report["plain"]} if "plain" in report else {})

    def row(name: str, cells: list[str]) -> str:
        return f"{name:<18}" + "".join(f"{cell:>14}" for cell in cells)

    lines = [
        f"{options['backbone']}, loss {options['loss']} ({report['kernel']}), {options['batch_size']} images per step, "
        f"{GLOBAL_CROPS} global and {options['local_crops']} local crops, {options['prototypes']} prototypes, {options['precision']}"
        + (f" (plain in {report['plain_precision']})" if report["plain_precision"] != options["precision"] else ""),
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, device {machine['device']}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"medians of {options['steps']} steps after {options['warmup']} to warm up; the host waits for the device around each phase",
        report["data_note"],
        "",
        row("", list(columns)),
        row("images/s", [f"{column['images_per_second']:.3f}" for column in columns.values()]),
        *(row(f"{name} (s)", [f"{column['seconds'][name]:.4f}" for column in columns.values()]) for name in (*PHASES, *SUMS)),
        row("data / step", [f"{column['seconds']['data'] / column['seconds']['step']:.3f}" for column in columns.values()]),
        row("peak memory (MB)", [f"{column['peak_memory_bytes'] / 1e6:.0f}" for column in columns.values()]),
    ]
    if "plain" in report:
        alone = report["loss_alone"].values()
        lines += [
            row("loss alone (s)", [f"{each['seconds']:.4f}" for each in alone]),
            row("loss alone (MB)", [f"{each['peak_memory_bytes'] / 1e6:.0f}" for each in alone]),
            "",
            f"speed_ratio        {_times(report['speed_ratio'])}  plain step / product step, without data",
            f"cpu_ratio          {_times(report['cpu_ratio'])}  plain / product, processor time of a step",
            f"memory_ratio       {_times(report['memory_ratio'])}  product / plain, peak of a step above the imports",
            f"loss_time_ratio    {_times(report['loss_time_ratio'])}  product / plain, loss and gradients of embeddings and prototypes",
            f"loss_memory_ratio  {_times(report['loss_memory_ratio'])}  product / plain, the same, peak above what goes in",
            f"region_over_view   {_times(report['region_over_view'])}  product's step with loss view_region / with loss view",
        ]
    return "\n".join(lines)


def _times(value: float | None) -> str:
    return "   n/a" if value is None else f"{value:6.2f}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
