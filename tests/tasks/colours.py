"""A data set of plain colours, a backbone that sees an image's mean colour and nothing else, and one process or several to evaluate it."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from esvit import distributed
from esvit.augmentations.evaluation import Normalize
from esvit.backbones.base import Backbone, Stage
from esvit.data.base import Data
from esvit.data.folder import FolderData
from esvit.evaluation.frozen import Frozen
from esvit.run_folder import RunFolder
from esvit.runtime import Runtime
from esvit.tracking.base import NoTracking
from tests.data.pictures import data_options

PATIENCE_SECONDS = 60
Colour = tuple[int, int, int]


class Task(Protocol):
    def run(self, runtime: Runtime) -> None: ...


class MeanColour(Backbone):
    """One region per image, of three features. An image's mean colour, times a weight so that there is something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 3
        self.block_dims = [3]
        self.norm = nn.Identity()
        self.scale = nn.Parameter(torch.ones(1))

    def encode(self, images: Tensor, *, last_only: bool = False) -> list[Stage]:
        cells = images.mean(dim=(2, 3))[:, None] * self.scale
        return [Stage([cells] if last_only else [cells, cells], (1, 1))]


def paint(root: Path, colours: dict[str, Sequence[Colour]]) -> Path:
    """`root/<class>/<number>.png`, 8 pixels wide, each of one colour; returns `root`."""
    for name, its_colours in colours.items():
        (root / name).mkdir(parents=True)
        for number, colour in enumerate(its_colours):
            Image.new("RGB", (8, 8), colour).save(root / name / f"{number:02d}.png")
    return root


def images(root: Path) -> Data:
    """`root/train` and `root/val`."""
    return FolderData(**data_options(root=str(root / "train"), val_root=str(root / "val"), batch_size=4, max_bad_fraction=0.5))


def frozen(cache: Path | None = None, **changes: Any) -> Frozen:
    """The colours as they are: -1 is none of a channel, 1 all of it."""
    options: dict[str, Any] = {
        "backbone": MeanColour(),
        "checkpoint": None,
        "network": "untrained",
        "resize_positions": False,
        "normalize": Normalize(mean=[0.5] * 3, std=[0.5] * 3),
        "resize": 8,
        "crop": 8,
        "cache": None if cache is None else str(cache),
    }
    return Frozen(**(options | changes))


@contextmanager
def one_process(seed: int = 0) -> Iterator[Runtime]:
    """This process on the CPU with one thread; afterwards it has as many as before."""
    threads = torch.get_num_threads()
    try:
        with Runtime(
            device="cpu", precision="fp32", seed=seed, deterministic=None, threads=1, timeout_minutes=1, stall_minutes=0
        ) as runtime:
            yield runtime
    finally:
        torch.set_num_threads(threads)


def evaluate(task: Task, folder: Path, *, seed: int = 0) -> dict[str, float]:
    """metrics.json, without how far the run went."""
    with one_process(seed) as runtime:
        return _evaluate(task, folder, runtime)


def _evaluate(task: Task, folder: Path, runtime: Runtime) -> dict[str, float]:
    runtime.records_to(RunFolder(folder), tracking=NoTracking(host=None), config={"epochs": 1, "max_steps": None})
    task.run(runtime)
    distributed.barrier()  # rank 0 has written
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if "/" in name}


def evaluate_in_ranks(make_tasks: Callable[[], dict[str, Task]], folder: Path, *, ranks: int) -> dict[str, dict[str, float]]:
    """metrics.json of each task, evaluated one after the other by `ranks` processes, forked so that they need not import torch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_be_rank, args=(rank, ranks, port, make_tasks, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * ranks
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in make_tasks()}


def _be_rank(rank: int, ranks: int, port: int, make_tasks: Callable[[], dict[str, Task]], folder: Path) -> None:
    environment = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    with one_process() as runtime:
        for name, task in make_tasks().items():
            metrics = _evaluate(task, folder / name, runtime)
            if rank == 0:
                (folder / f"{name}.json").write_text(json.dumps(metrics))
