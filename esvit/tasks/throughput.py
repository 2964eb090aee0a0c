"""Measures what a backbone costs: parameters, FLOPs, tokens, images per second and peak memory, forward and in training. Needs no data.

Unusual: a multiply-add counts as one FLOP, as papers on vision networks have it; torch's counter, where it counts as two, is halved.
Only matrix products and convolutions are counted, attention's included. Peak memory is the allocator's on CUDA, else that of the tensors
that live at once. A training step is that of the backbone alone: the mean of its features, differentiated, and a plain gradient step;
pre-training adds crops, teacher, heads, prototypes and AdamW to it. In a sweep each run adds its row to one Markdown table.
"""

import platform
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from esvit.backbones.base import Backbone
from esvit.errors import OptionError, Stopped
from esvit.evaluation.protocol import write_protocol
from esvit.run_folder import write_atomically
from esvit.runtime import Runtime

_WARM_UP = 2  # passes that are not timed: they choose kernels and fill caches
_LEARNING_RATE = 1e-12
_HEADER = "| backbone | parameters | GFLOPs | tokens per stage | features | images/s | peak memory (GB) |"
_RULE = "| --- | ---: | ---: | --- | ---: | ---: | ---: |"


@dataclass(kw_only=True)
class Throughput:
    """One measurement.

    backbone     the network; its weights do not matter
    in_channels  channels of the images, as the backbone wants them
    batch_size   images per pass when time and memory are measured
    image_size   side of the images (pixels), for the FLOPs and tokens too
    repeats      timed passes, of which the median counts
    train_step   measure training steps too
    table        Markdown file that gets this backbone's row, in place of one of the same name; None: no file
    name         the backbone's name in the tables
    """

    backbone: Backbone
    in_channels: int
    batch_size: int
    image_size: int
    repeats: int
    train_step: bool
    table: str | None
    name: str

    def run(self, runtime: Runtime) -> None:
        """Print one line, write `metrics.json` and the row in `table`. Raises OptionError for options that cannot work."""
        self._check(runtime)
        self.backbone.to(runtime.device).eval().requires_grad_(False)
        one = torch.zeros(1, self.in_channels, self.image_size, self.image_size, device=runtime.device)
        tokens = self._tokens_per_stage(one)
        with runtime.recording() as tracker:
            tracker.resume(0)
            metrics: dict[str, float] = {
                "parameters": parameters(self.backbone),
                "flops": flops(self.backbone, one),
                **{f"tokens_stage_{number}": count for number, count in enumerate(tokens, 1)},
                "features": self.backbone.dim,
                **self._speeds(runtime, one.expand(self.batch_size, -1, -1, -1).contiguous()),
                "threads": runtime.threads,
            }
            tracker.log(1, 0, metrics)
            tracker.artifact(runtime.folder / "config.yaml")
            tracker.artifact(write_protocol(runtime.folder, self._protocol(runtime)))
            tracker.final(metrics | {"step": 1}, 1)
        cells = [
            f"{metrics['parameters'] / 1e6:.1f} M",
            f"{metrics['flops'] / 1e9:.2f}",
            " ".join(map(str, tokens)),
            str(self.backbone.dim),
            f"{metrics['images_per_second']:.1f}",
            f"{metrics['peak_memory_gb']:.2f}",
        ]
        print(line(self.name, cells) + (train_line(metrics) if self.train_step else ""), flush=True)
        if self.table is not None:
            add_row(Path(self.table), self.name, cells)

    def _check(self, runtime: Runtime) -> None:
        for option, value in (("batch_size", self.batch_size), ("image_size", self.image_size), ("repeats", self.repeats)):
            if value < 1:
                raise OptionError(f"task.{option}", f"{value} is too small", "use 1 or more")
        if runtime.world_size > 1:
            found = f"{runtime.world_size} processes would disturb each other"
            raise OptionError("launcher.processes", found, "measure in one, launcher=local")
        if self.table is not None and not Path(self.table).absolute().parent.is_dir():
            raise OptionError("task.table", f"there is no folder for '{self.table}'", "give a file in a folder that exists")

    def _tokens_per_stage(self, image: Tensor) -> list[int]:
        try:
            with torch.no_grad():
                return [stage.grid[0] * stage.grid[1] for stage in self.backbone.encode(image)]
        except (RuntimeError, ValueError, AssertionError) as error:
            found = f"the backbone cannot take images of {self.image_size} pixels ({(str(error).splitlines() or [''])[0]})"
            raise OptionError("task.image_size", found, "use another size") from None

    def _protocol(self, runtime: Runtime) -> dict[str, Any]:
        return {
            "task": "throughput",
            "machine": machine(runtime.device),
            "precision": runtime.precision,
            "threads": runtime.threads if runtime.device.type == "cpu" else None,
            "deterministic": runtime.deterministic,
            "batch_size": self.batch_size,
            "image_size": self.image_size,
            "torch": torch.__version__,
        }

    def _speeds(self, runtime: Runtime, images: Tensor) -> dict[str, float]:
        def forward() -> None:
            with torch.no_grad(), runtime.autocast():
                self.backbone(images)

        def train() -> None:
            with runtime.autocast():
                features = self.backbone(images)
                loss = features.pooled.float().mean() + features.regions.float().mean()
            loss.backward()
            descend(self.backbone)

        rate, peak_gb = self._speed(runtime, images, forward)
        metrics = {"images_per_second": rate, "peak_memory_gb": peak_gb}
        if self.train_step:
            self.backbone.train().requires_grad_(True)
            rate, peak_gb = self._speed(runtime, images, train)
            metrics |= {"images_per_second_train": rate, "peak_memory_train_gb": peak_gb}
        return metrics

    def _speed(self, runtime: Runtime, images: Tensor, work: Callable[[], None]) -> tuple[float, float]:
        """Images per second, and peak memory in GB."""
        try:
            if runtime.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(runtime.device)
            seconds = self._seconds(runtime, work)
            peak_gb = runtime.peak_memory_gb() if runtime.device.type == "cuda" else peak_bytes(self.backbone, images, work) / 1e9
        except torch.OutOfMemoryError:
            found = f"{len(images)} images do not fit into the memory of {machine(runtime.device)}"
            raise OptionError("task.batch_size", found, "use fewer, or task.train_step=false") from None
        except ValueError as error:  # normalisation over a batch that leaves one value for each channel
            raise OptionError("task.batch_size", f"too small to train with ({error})", "use more, or task.train_step=false") from None
        return len(images) / seconds, peak_gb

    def _seconds(self, runtime: Runtime, work: Callable[[], None]) -> float:
        """Median time of the timed passes."""
        seconds = []
        for _ in range(_WARM_UP + self.repeats):
            if signal := runtime.stop_signal():
                raise Stopped(signal)
            start = time.perf_counter()
            work()
            if runtime.device.type != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[_WARM_UP:])


def machine(device: torch.device) -> str:
    """What computes: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (models[0] if models else platform.processor() or platform.machine()) + (" (GPU)" if device.type != "cpu" else "")


def descend(network: nn.Module) -> None:
    """One step of plain gradient descent, so small that the weights stay what they are, and the gradients freed."""
    trained = [(weight, weight.grad) for weight in network.parameters() if weight.grad is not None]
    with torch.no_grad():
        torch._foreach_add_([weight for weight, _ in trained], [gradient for _, gradient in trained], alpha=-_LEARNING_RATE)
    network.zero_grad(set_to_none=True)


def parameters(backbone: nn.Module) -> int:
    return sum(parameter.numel() for parameter in backbone.parameters())


@torch.no_grad()
def flops(backbone: nn.Module, images: Tensor) -> int:
    """Multiply-adds of one forward pass in matrix products and convolutions."""
    # The plain form of attention is products, which the counter knows on every device; fused kernels it knows on some.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone(images)
    return counter.get_total_flops() // 2


def peak_bytes(backbone: nn.Module, images: Tensor, work: Callable[[], None]) -> int:
    """Weights, images and all tensors that live at once during `work`, without what a kernel takes for itself.

    For devices whose allocator keeps no such count. A process's resident memory would not do: in a sweep it still has what earlier
    networks freed.
    """
    with LiveTensors([*backbone.parameters(), *backbone.buffers(), images]) as live:
        work()
    return live.peak


class LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as they are alive."""

    def __init__(self, existing: list[Tensor]):
        super().__init__()
        self._known = WeakIdKeyDictionary()
        self.now = 0
        self.peak = 0
        for tensor in existing:
            self.count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.count(each)
        return result

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:  # a view, or an operation in place
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, size: int) -> None:
        self.now -= size


def line(name: str, cells: list[str]) -> str:
    """For the console: lines of several runs stand well below each other, and need no header."""
    size, cost, tokens, width, speed, memory = cells
    return f"{name:<20} {size:>8} parameters {cost:>7} GFLOPs  {tokens:>16} tokens  {width:>4} features {speed:>7} images/s {memory:>6} GB"


def table_row(file: Path, name: str) -> dict[str, str] | None:
    """The cells of the row `name` in the table that `add_row` wrote, by column; None where there is none."""
    lines = file.read_text().splitlines()
    rows = lines[lines.index(_HEADER) + 2 :] if _HEADER in lines else []
    row = next((each for each in rows if each.startswith(f"| {name} |")), None)
    if row is None:
        return None
    names, cells = ([cell.strip() for cell in each.strip("|").split("|")] for each in (_HEADER, row))
    return dict(zip(names, cells, strict=True))


def train_line(metrics: dict[str, float]) -> str:
    """The end of a console line: what training costs."""
    return f"   training {metrics['images_per_second_train']:>7.1f} images/s {metrics['peak_memory_train_gb']:>6.2f} GB"


def add_row(file: Path, name: str, cells: list[str]) -> None:
    """Put a row into the table of `file`, in place of the row of the same name, else as the last; the rest of the file stays.

    The table is the one with our header; without one it is made at the end of the file.
    """
    lines = file.read_text().splitlines() if file.exists() else []
    if _HEADER not in lines:
        lines += [*([""] if lines else []), _HEADER, _RULE]
    start = end = lines.index(_HEADER) + 2
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    row = f"| {' | '.join([name, *cells])} |"
    rows = [row if each.startswith(f"| {name} |") else each for each in lines[start:end]]
    lines[start:end] = rows if row in rows else [*rows, row]
    write_atomically(file, "\n".join(lines) + "\n")
