"""Whether every combination of the options that change how a step is computed computes the same as the plain step, in losses and gradients.

For each combination of `task.parts`, `task.recompute`, `task.compile`, `precision` and, on a GPU, `loss.kernel`, a fresh student of the
same weights takes the same steps as the plain one (benchmarks/plain, float32). Compared are the loss of every step, and the first step's
gradient of every parameter before clipping. Drop path is off: its draws depend on the order in which crops pass.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.pretrain_step import Parts, PhaseTimer, Variant, positive, start_runtime  # noqa: E402
from conf.explain import mistakes_in_one_line  # noqa: E402

RECOMPUTE = ("none", "mlp", "attention", "blocks")
COMMON = [
    "augmentation.global_crops_size=96",
    "augmentation.local_crops_size=48",
    "backbone.drop_path_rate=0",
    "optimizer.learning_rate=0.1",  # for 256 images: large enough that the loss moves within the steps
]


WIDTHS = (11, 7, 11, 9, 9)  # of the printed columns
FIRST_SCALE = 2.0**16  # of the loss in fp16, torch's


@dataclass(frozen=True)
class Tolerance:
    """How far a combination may be from the plain step in float32, each relative: a loss, and a parameter's gradient by its norm.

    A gradient may be off by a share of the largest parameter's norm too: what is zero but for rounding has no relative error.
    """

    loss: float
    gradient: float
    of_largest: float


TOLERANCES = {
    "fp32": Tolerance(loss=1e-5, gradient=1e-4, of_largest=1e-6),
    # A region whose two nearest ones are alike to rounding may be matched with the other: 1 of 136 moves a gradient by 6e-2.
    "bf16": Tolerance(loss=5e-3, gradient=1e-1, of_largest=1e-2),
    "fp16": Tolerance(loss=1e-3, gradient=2e-2, of_largest=2e-3),
}


@dataclass(frozen=True)
class Way:
    """One combination of options."""

    precision: str
    parts: int
    recompute: str
    compile: bool
    kernel: str

    @property
    def overrides(self) -> list[str]:
        return [
            f"task.parts={self.parts}",
            f"task.recompute={self.recompute}",
            f"task.compile={str(self.compile).lower()}",
            f"loss.kernel={self.kernel}",
        ]


PLAINEST = Way("fp32", 1, "none", False, "chunked")


@dataclass(frozen=True)
class Course:
    """What some steps gave: the loss of each, and the first one's gradients by parameter."""

    losses: list[float]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Distance:
    """Of a course from the plain one: the largest relative difference of a loss, and of a parameter's gradient, which is named.

    gradient_share  the gradient's distance as a share of what the tolerance allows
    """

    loss: float
    gradient: float
    gradient_share: float
    parameter: str


class FirstGradients(PhaseTimer):
    """A timer that also keeps the gradients that the optimizer finds in the first step."""

    network: torch.nn.Module
    found: dict[str, Tensor] | None = None

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase == "optimizer" and self.found is None:
            self.found = {name: each.grad.detach().clone() for name, each in self.network.named_parameters() if each.grad is not None}
        with super().__call__(phase):
            yield


def main() -> None:
    arguments = parse(sys.argv[1:])
    with mistakes_in_one_line():
        report = compare(arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1))
    if not report["same"]:
        raise SystemExit("some combinations are further from the plain step than their tolerance")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="swin_micro", help="a preset of conf/backbone (%(default)s)")
    parser.add_argument("--loss", default="view_region", choices=["view", "view_region"], help="(%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=2, help="images per step (%(default)s)")
    parser.add_argument("--prototypes", type=positive, default=1024, help="(%(default)s)")
    parser.add_argument("--local-crops", type=int, default=4, help="local crops per image (%(default)s)")
    parser.add_argument("--steps", type=positive, default=20, help="(%(default)s)")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=list(TOLERANCES), help="(fp32 bf16)")
    parser.add_argument("--parts", type=positive, nargs="+", default=[1, 2, 4], help="of task.parts (1 2 4)")
    parser.add_argument("--graphs", default="both", choices=["both", "on", "off"], help="task.compile: graphs take minutes (%(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(%(default)s)")
    parser.add_argument("--threads", type=positive, help="CPU threads (all cores)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    return parser.parse_args(words)


def ways(arguments: argparse.Namespace) -> list[Way]:
    graphs = {"both": (False, True), "on": (True,), "off": (False,)}[arguments.graphs]
    has_gpu = arguments.device != "cpu" and torch.cuda.is_available()
    return [
        Way(precision, parts, recompute, compiled, kernel)
        for precision, compiled in itertools.product(arguments.precision, graphs)
        for kernel in (("chunked", "fused") if has_gpu and precision != "fp32" else ("chunked",))
        for parts, recompute in itertools.product(arguments.parts, RECOMPUTE)
    ]


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    plain = course_of("plain", PLAINEST, arguments)
    print(f"plain, fp32: loss {plain.losses[0]:.6f} in the first step, {plain.losses[-1]:.6f} in step {len(plain.losses)}")
    print(f"{'precision':<11}{'parts':<7}{'recompute':<11}{'compile':<9}{'kernel':<9}{'loss':>9}{'gradient':>10}  of parameter")
    rows = []
    for way in ways(arguments):
        away = distance(course_of("product", way, arguments), plain, TOLERANCES[way.precision])
        is_same = away.loss <= TOLERANCES[way.precision].loss and away.gradient_share <= 1
        rows.append(asdict(way) | asdict(away) | {"same": is_same})
        words = [way.precision, way.parts, way.recompute, str(way.compile).lower(), way.kernel]
        print(line(words, away) + ("" if is_same else "  TOO FAR"), flush=True)
    rounding = {}
    for precision in arguments.precision:
        if precision != "fp32":
            away = distance(course_of("plain", dataclasses.replace(PLAINEST, precision=precision), arguments), plain, TOLERANCES[precision])
            rounding[precision] = asdict(away)
            print(line([precision, "the plain step itself", "", "", ""], away), flush=True)
    return {
        "options": {name: value for name, value in vars(arguments).items() if name != "json"},
        "torch": torch.__version__,
        "plain_losses": plain.losses,
        "tolerances": {name: asdict(tolerance) for name, tolerance in TOLERANCES.items()},
        "ways": rows,
        "plain_in_precision": rounding,
        "same": all(row["same"] for row in rows),
    }


def line(words: Sequence[object], away: Distance) -> str:
    cells = "".join(f"{word!s:<{width}}" for word, width in zip(words, WIDTHS, strict=True))
    return f"{cells:<{sum(WIDTHS)}}{away.loss:>9.1e}{away.gradient:>10.1e}  {away.parameter}"


def course_of(kind: str, way: Way, arguments: argparse.Namespace) -> Course:
    """Of the "product" or the "plain" step."""
    options = argparse.Namespace(**vars(arguments) | {"precision": way.precision, "overrides": COMMON + way.overrides, "input": "photos"})
    with tempfile.TemporaryDirectory() as folder, start_runtime(options) as runtime:
        parts = Parts(options, folder, runtime)
        timer = FirstGradients(runtime.device)
        variant: Variant = getattr(parts, kind)(arguments.loss, timer)
        timer.network = variant.network
        losses = []
        for step in range(arguments.steps):
            if runtime.stop_signal():
                sys.exit("stopped by a signal")
            generator = torch.Generator().manual_seed(step)
            shapes = [(arguments.batch_size, 3, size, size) for size in parts.crop_sizes]
            losses.append(float(variant.step([torch.randn(shape, generator=generator).to(runtime.device) for shape in shapes])))
    assert timer.found is not None
    scale = FIRST_SCALE if way.precision == "fp16" else 1.0
    return Course(losses, {name: gradient / scale for name, gradient in timer.found.items()})


def distance(ours: Course, plain: Course, tolerance: Tolerance) -> Distance:
    assert ours.gradients.keys() == plain.gradients.keys()
    largest = max(float(gradient.norm()) for gradient in plain.gradients.values())
    found = []
    for name, expected in plain.gradients.items():
        difference, norm = float((ours.gradients[name] - expected).norm()), float(expected.norm())
        allowed = max(tolerance.gradient * norm, tolerance.of_largest * largest)
        found.append((difference / allowed, difference / norm if norm > 0 else difference / largest, name))
    share, relative, name = max(found)
    losses = zip(ours.losses, plain.losses, strict=True)
    return Distance(max(abs(our - their) / abs(their) for our, their in losses), relative, share, name)


if __name__ == "__main__":
    main()
