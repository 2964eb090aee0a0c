"""Measures what a backbone costs: parameters, FLOPs, tokens, images per second and peak memory of a forward pass. Needs no data.

Unusual: a multiply-add counts as one FLOP, as papers on vision networks have it; torch's counter, where it counts as two, is halved.
Only matrix products and convolutions are counted, attention's included. Peak memory is the allocator's on CUDA, else that of the tensors
that live at once. In a sweep each run adds its row to one Markdown table.
"""

import statistics
import time
import weakref
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
from esvit.errors import Interrupted, OptionError
from esvit.run_folder import write_atomically
from esvit.runtime import Runtime

_WARM_UP = 2  # passes that are not timed: they choose kernels and fill caches
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
    table        Markdown file that gets this backbone's row, in place of one of the same name; None: no file
    name         the backbone's name in the tables
    """

    backbone: Backbone
    in_channels: int
    batch_size: int
    image_size: int
    repeats: int
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
                **self._speed(runtime, one.expand(self.batch_size, -1, -1, -1).contiguous()),
                "threads": runtime.threads,
            }
            tracker.log(1, 0, metrics)
            tracker.artifact(runtime.folder / "config.yaml")
            tracker.final(metrics | {"step": 1}, 1)
        cells = [
            f"{metrics['parameters'] / 1e6:.1f} M",
            f"{metrics['flops'] / 1e9:.2f}",
            " ".join(map(str, tokens)),
            str(self.backbone.dim),
            f"{metrics['images_per_second']:.1f}",
            f"{metrics['peak_memory_gb']:.2f}",
        ]
        print(line(self.name, cells), flush=True)
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

    @torch.no_grad()
    def _speed(self, runtime: Runtime, images: Tensor) -> dict[str, float]:
        on_cuda = runtime.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(runtime.device)
        seconds = []
        for _ in range(_WARM_UP + self.repeats):
            if signal := runtime.stop_signal():
                raise _Stopped(signal, 0)
            start = time.perf_counter()
            with runtime.autocast():
                self.backbone(images)
            if runtime.device.type != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - start)
        if on_cuda:
            peak_gb = runtime.peak_memory_gb()
        else:
            with runtime.autocast():
                peak_gb = peak_bytes(self.backbone, images) / 1e9
        return {"images_per_second": len(images) / statistics.median(seconds[_WARM_UP:]), "peak_memory_gb": peak_gb}


class _Stopped(Interrupted):
    def __str__(self) -> str:
        return "stopped by a signal, nothing measured; the same command begins anew"


def parameters(backbone: nn.Module) -> int:
    return sum(parameter.numel() for parameter in backbone.parameters())


@torch.no_grad()
def flops(backbone: nn.Module, images: Tensor) -> int:
    """Multiply-adds of one forward pass in matrix products and convolutions."""
    # The plain form of attention is products, which the counter knows on every device; fused kernels it knows on some.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone(images)
    return counter.get_total_flops() // 2


@torch.no_grad()
def peak_bytes(backbone: nn.Module, images: Tensor) -> int:
    """Weights, images and all tensors that live at once in a forward pass, without what a kernel takes for itself.

    For devices whose allocator keeps no such count. A process's resident memory would not do: in a sweep it still has what earlier
    networks freed.
    """
    with _LiveTensors([*backbone.parameters(), *backbone.buffers(), images]) as live:
        backbone(images)
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as they are alive."""

    def __init__(self, existing: list[Tensor]):
        super().__init__()
        self._known = WeakIdKeyDictionary()
        self._now = 0
        self.peak = 0
        for tensor in existing:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._count(each)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:  # a view, or an operation in place
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._free, size)
        self._now += size
        self.peak = max(self.peak, self._now)

    def _free(self, size: int) -> None:
        self._now -= size


def line(name: str, cells: list[str]) -> str:
    """For the console: lines of several runs stand well below each other, and need no header."""
    size, cost, tokens, width, speed, memory = cells
    return f"{name:<20} {size:>8} parameters {cost:>7} GFLOPs  {tokens:>16} tokens  {width:>4} features {speed:>7} images/s {memory:>6} GB"


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
