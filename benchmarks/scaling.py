"""How time and memory of a pre-training step grow with each of its sizes: `python benchmarks/scaling.py --help`.

Unusual: every measurement has a process of its own, for its memory, forked from one that has imported everything. On a CPU seconds are
those of the processor, which other users of the machine change least. Memory of the step is the high-water mark of the process above its
imports (on a GPU: what torch allocated at most); that of the loss alone is counted as tensors come and go: what lives at once above
embeddings, prototypes and the prototypes' gradient. Growth is the slope of a line through log cost over log size.

Letters: K prototypes.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from benchmarks.pretrain_step import LossInput, Parts, Variant, peak_bytes, positive, start_runtime, wait_for  # noqa: E402
from esvit.comparison.drawing import GRID, INK, MUTED, tick_text  # noqa: E402
from esvit.tasks.throughput import LiveTensors, parameters  # noqa: E402

VARIANTS = ("product", "plain")
MEASURES = {"step_seconds": "step (s)", "step_bytes": "step (MB)", "loss_seconds": "loss alone (s)", "loss_bytes": "loss alone (MB)"}
COLORS = {"product": "#d9772b", "plain": "#1f6fb2"}
CELL = 32  # pixels across a region of a Swin of four stages
TOLERANCE = 0.05  # between two exponents, for noise
PLAIN_COPIES = 6  # of all logits, that the plain step holds at once


@dataclass(frozen=True)
class Point:
    """The sizes of one step; global_size in pixels, window in cells."""

    backbone: str
    window: int
    batch_size: int
    prototypes: int
    local_crops: int
    global_size: int

    @property
    def regions(self) -> int:
        """Of one global crop."""
        return math.ceil(self.global_size / CELL) ** 2

    @property
    def logits_bytes(self) -> int:
        """Of all crops and both heads in float32; a local crop of 96 pixels has 9 regions."""
        rows = 2 * (self.regions + 1) + self.local_crops * (9 + 1)
        return 4 * self.batch_size * rows * self.prototypes


@dataclass(frozen=True)
class Cost:
    """What one step takes, and its loss alone; parameters are the backbone's."""

    step_seconds: float
    step_bytes: int
    loss_seconds: float
    loss_bytes: int
    parameters: int


@dataclass(frozen=True)
class Sweep:
    """Points that differ in one size: `values` of the field `name` of `base`.

    size  a number from a point and its cost: what growth is measured against
    """

    name: str
    label: str
    base: Point
    values: tuple[Any, ...]
    size: Callable[[Point, Cost], float]

    def points(self) -> list[Point]:
        return [replace(self.base, **{self.name: value}) for value in self.values]


def sweeps(*, quick: bool) -> list[Sweep]:
    base = Point(backbone="swin_micro", window=7, batch_size=4, prototypes=16384, local_crops=8, global_size=224)
    if quick:
        base = replace(base, batch_size=1, prototypes=64, local_crops=1, global_size=64)
    values: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
        "prototypes": ((1024, 4096, 16384, 65536, 262144), (64, 128)),
        "global_size": ((128, 192, 256, 384, 512), (64, 96)),
        "local_crops": ((0, 2, 6, 14, 30), (0, 1)),
        "batch_size": ((1, 2, 4, 8, 16), (1, 2)),
        "window": ((7, 14), (7, 14)),
        "backbone": (("swin_micro", "swin_tiny", "swin_small", "swin_base"), ("swin_micro",)),
    }
    labels: dict[str, tuple[str, Callable[[Point, Cost], float]]] = {
        "prototypes": ("prototypes", lambda point, cost: point.prototypes),
        "global_size": ("regions of a global crop", lambda point, cost: point.regions),
        "local_crops": ("crops of an image", lambda point, cost: 2 + point.local_crops),
        "batch_size": ("images", lambda point, cost: point.batch_size),
        "window": ("window (cells across)", lambda point, cost: point.window),
        "backbone": ("backbone (M parameters)", lambda point, cost: cost.parameters / 1e6),
    }
    few = {"backbone": replace(base, batch_size=min(2, base.batch_size))}  # swin_base fits a small machine
    return [Sweep(name, labels[name][0], few.get(name, base), values[name][quick], labels[name][1]) for name in values]


def main() -> None:
    arguments = parse(sys.argv[1:])
    report = measure(arguments, in_own_process, say=lambda line: print(line, flush=True))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1))
    if arguments.figure:
        Path(arguments.figure).write_bytes(figure(report))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [sweep.name for sweep in sweeps(quick=False)]
    parser.add_argument("--sizes", nargs="+", default=names, choices=names, metavar="SIZE", help=f"which to sweep ({' '.join(names)})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds: tells that it works, and nothing about growth")
    parser.add_argument("--steps", type=positive, default=2, help="measured steps after one to warm up; medians are printed (%(default)s)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="(%(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(%(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--plain-gb", type=float, default=8.0, help="no plain step whose logits would take more, in GB (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--figure", metavar="FILE", help="draw them there, as PNG")
    return parser.parse_args(words)


# ---------------------------------------------------------------------------------------------------- measuring


def measure(
    arguments: argparse.Namespace, run: Callable[[Point, str, argparse.Namespace], Cost | None], *, say: Callable[[str], None]
) -> dict[str, Any]:
    """All sweeps, each said as soon as it is done. `run` gives the cost of a point in a variant, or None where it does not fit."""
    found: dict[str, Any] = {}
    known: dict[tuple[Point, str], Cost | None] = {}  # sweeps meet in a point
    for sweep in sweeps(quick=arguments.quick):
        if sweep.name not in arguments.sizes:
            continue
        rows = []
        for point in sweep.points():
            for variant in VARIANTS:
                if (point, variant) not in known:
                    is_too_large = variant == "plain" and PLAIN_COPIES * point.logits_bytes > arguments.plain_gb * 1e9
                    known[point, variant] = None if is_too_large else run(point, variant, arguments)
            product, plain = (known[point, variant] for variant in VARIANTS)
            if product is None:
                raise SystemExit(f"the step itself does not fit at {point}")
            rows.append((point, product, plain))
        found[sweep.name] = summary(sweep, rows)
        say("\n".join(table(found[sweep.name])))
    report = {"arguments": vars(arguments), "versions": {"torch": torch.__version__}, "sweeps": found, "outgrown": outgrown(found)}
    if not arguments.quick:
        say(f"grows faster than the plain algorithm: {', '.join(report['outgrown']) or 'nothing'}")
    return report


def in_own_process(point: Point, variant: str, arguments: argparse.Namespace) -> Cost | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.scaling"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(cost_of, point, variant, arguments).result()
        except BrokenProcessPool:  # the system ended it, for want of memory
            return None


def cost_of(point: Point, variant_name: str, arguments: argparse.Namespace) -> Cost:
    """Of `1 + arguments.steps` steps on random crops, then as often of the loss alone."""
    imported_bytes = psutil.Process().memory_info().rss
    overrides = [f"augmentation.global_crops_size={point.global_size}"]
    if point.window != 7:
        overrides.append(f"backbone.window_size={point.window}")
    options = argparse.Namespace(**vars(arguments), **dataclasses.asdict(point), loss="view_region", overrides=overrides)
    with tempfile.TemporaryDirectory() as folder, start_runtime(options) as runtime:
        parts = Parts(options, folder, runtime)
        variant: Variant = getattr(parts, variant_name)(options.loss)
        torch.use_deterministic_algorithms(variant.is_deterministic)
        shapes = [(point.batch_size, 3, size, size) for size in parts.crop_sizes]
        step_seconds = [
            seconds_of(lambda: variant.step([torch.randn(shape, device=runtime.device) for shape in shapes]), runtime.device)
            for _ in range(1 + arguments.steps)
        ]
        step_bytes = peak_bytes(runtime.device) - (0 if runtime.device.type == "cuda" else imported_bytes)
        given = parts.loss_input(variant.network)
        loss_seconds = []
        for _ in range(1 + arguments.steps):
            given.forget_gradients()
            loss_seconds.append(seconds_of(lambda: variant.loss_gradients(given), runtime.device))
        return Cost(
            step_seconds=statistics.median(step_seconds[1:]),
            step_bytes=step_bytes,
            loss_seconds=statistics.median(loss_seconds[1:]),
            loss_bytes=loss_bytes(variant, given),
            parameters=parameters(variant.network.backbone),
        )


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Of the processor, all threads; by the clock where another device works."""
    now = time.process_time if device.type == "cpu" else time.perf_counter
    wait_for(device)
    began = now()
    work()
    wait_for(device)
    return now() - began


def loss_bytes(variant: Variant, given: LossInput) -> int:
    """Of the tensors that live at once during the loss and its gradients, above embeddings, prototypes and the latter's gradient."""
    given.forget_gradients()
    inputs = [tensor for tensor in tree_leaves((given.student, given.teacher)) if tensor is not None]
    weights = [tensor for tensor in tree_leaves((given.student_prototypes, given.teacher_prototypes)) if tensor is not None]
    with LiveTensors([*inputs, *weights]) as live:
        before = live.now
        variant.loss_gradients(given)
    return live.peak - before - sum(each.grad.nbytes for each in weights if each.grad is not None)


# ---------------------------------------------------------------------------------------------------- growth


def summary(sweep: Sweep, rows: list[tuple[Point, Cost, Cost | None]]) -> dict[str, Any]:
    """The numbers of one sweep; exponents of both variants are fitted through the points that both have."""
    points: list[dict[str, Any]] = [
        {
            "size": sweep.size(point, product),
            "product": dataclasses.asdict(product),
            "plain": None if plain is None else dataclasses.asdict(plain),
        }
        for point, product, plain in rows
    ]
    common = [point for point in points if point["plain"] is not None]
    exponents = {
        measured: {variant: exponent([(each["size"], each[variant][measured]) for each in common]) for variant in VARIANTS}
        for measured in MEASURES
    }
    return {
        "name": sweep.name,
        "label": sweep.label,
        "base": dataclasses.asdict(sweep.base),
        "values": sweep.values,
        "points": points,
        "exponents": exponents,
    }


def exponent(pairs: list[tuple[float, float]]) -> float | None:
    """Slope of the line through log cost over log size, by least squares; None where fewer than two sizes have a cost."""
    logs = [(math.log(size), math.log(cost)) for size, cost in pairs if cost > 0]
    if len({size for size, _ in logs}) < 2:
        return None
    return statistics.linear_regression([size for size, _ in logs], [cost for _, cost in logs]).slope


def outgrown(found: dict[str, Any]) -> list[str]:
    """Costs that have a larger exponent in the product than in the plain algorithm, and to which the largest size adds more.

    Both, because an exponent is also larger where less is there from the beginning, and more is added where noise is.
    """
    names = []
    for sweep in found.values():
        common = [point for point in sweep["points"] if point["plain"] is not None]
        for measured, label in MEASURES.items():
            added = {variant: common[-1][variant][measured] - common[0][variant][measured] for variant in VARIANTS}
            slopes = sweep["exponents"][measured]
            is_steeper = None not in slopes.values() and slopes["product"] > slopes["plain"] + TOLERANCE
            if is_steeper and added["product"] > added["plain"]:
                names.append(f"{label} by {sweep['label']}")
    return names


# ---------------------------------------------------------------------------------------------------- what is printed and drawn


def table(sweep: dict[str, Any]) -> list[str]:
    fixed = ", ".join(f"{name} {value}" for name, value in sweep["base"].items() if name != sweep["name"])
    lines = [
        f"{sweep['label']}  ({fixed})",
        f"{'':>12}" + "".join(f"{label:>24}" for label in MEASURES.values()),
        f"{'':>12}" + "".join(f"{'product':>14}{'plain':>10}" for _ in MEASURES),
    ]
    for point in sweep["points"]:
        costs = [[shown(point[variant], name) for variant in VARIANTS] for name in MEASURES]
        lines.append(f"{tick(point['size']):>12}" + "".join(cells(*pair) for pair in costs))
    slopes = [[sweep["exponents"][name][variant] for variant in VARIANTS] for name in MEASURES]
    lines.append(f"{'exponent':>12}" + "".join(cells(*("-" if each is None else f"{each:.2f}" for each in pair)) for pair in slopes))
    return [*lines, ""]


def cells(product: str, plain: str) -> str:
    return f"{product:>14}{plain:>10}"


def shown(cost: dict[str, float] | None, measured: str) -> str:
    if cost is None:
        return "-"
    return f"{cost[measured] / 1e6:.1f}" if measured.endswith("bytes") else f"{cost[measured]:.3f}"


def figure(report: dict[str, Any]) -> bytes:
    """PNG: a column for each size, a row for each measure, both axes logarithmic, and the exponents of product and plain step."""
    found = list(report["sweeps"].values())
    sheet = Figure(figsize=(2.3 * len(found) + 0.6, 8.6), dpi=150, layout="constrained")
    FigureCanvasAgg(sheet)
    grid = sheet.subplots(len(MEASURES), len(found), squeeze=False, sharex="col", sharey="row")
    for axes, (measured, sweep) in zip(grid.flat, ((measured, sweep) for measured in MEASURES for sweep in found), strict=True):
        _draw(axes, sweep, measured)
    for axes, label in zip(grid[:, 0], MEASURES.values(), strict=True):
        axes.set_ylabel(label, color=INK)
    for axes, sweep in zip(grid[-1], found, strict=True):
        axes.set_xlabel(sweep["label"], color=INK, fontsize=9)
        axes.set_xticks([point["size"] for point in sweep["points"]])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: tick(size)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", labelrotation=45)
    sheet.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, labelcolor=INK)
    sheet.align_ylabels()
    with tempfile.TemporaryFile() as file:
        sheet.savefig(file, format="png")
        file.seek(0)
        return file.read()


def tick(size: float) -> str:
    return f"{size / 1024:.0f}k" if size >= 1024 else f"{size:.3g}"


def _draw(axes: Axes, sweep: dict[str, Any], measured: str) -> None:
    unit = 1e6 if measured.endswith("bytes") else 1.0
    for variant in VARIANTS:
        pairs = [(point["size"], point[variant][measured] / unit) for point in sweep["points"] if point[variant] is not None]
        axes.plot(*zip(*pairs, strict=True), marker="o", markersize=4, linewidth=1.4, color=COLORS[variant], label=variant)
    axes.set_xscale("log")
    axes.set_yscale("log")
    slopes = (sweep["exponents"][measured][variant] for variant in VARIANTS)
    text = " / ".join("-" if each is None else f"{each:.2f}" for each in slopes)
    axes.text(0.04, 0.95, text, transform=axes.transAxes, va="top", fontsize=8, color=MUTED)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.tick_params(labelsize=8, colors=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
