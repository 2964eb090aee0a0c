"""Features of a whole image set in one file that all ranks fill and share: one row per image, in dataset order.

Each rank writes the rows of its own images straight into the file, and reads what it needs by memory map: nothing is gathered, and
1.3 million rows of 768 numbers (4 GB) need no memory of their own. With several machines the folder has to be on a file system
that they share, as the run folder has.

Letters: n images, B images of a batch, F width of a row.
"""

import json
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esvit import distributed


@dataclass(frozen=True)
class FeatureSet:
    """features  (n, F) float32 on the CPU, memory-mapped, in dataset order
    labels    (n,) int64 classes, or None
    places    (n,) int64, each row's image in its image set; images that could not be read have no row
    data      hash of the names and labels of the image set
    """

    features: Tensor
    labels: Tensor | None
    places: Tensor
    data: str


def write_rows(path: Path, *, count: int, width: int, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fill the file at `path` (count, width) float32 from every rank's `batches`: rows (B, F) and their places (B,).

    The file appears when it is whole. Rows of places that are in no batch are listed beside it, as missing.
    """
    partial = distributed.from_rank_zero(lambda: _allocate(path, count, width))
    rows = np.lib.format.open_memmap(partial, mode="r+")
    written: list[Tensor] = []
    for features, places in batches:
        rows[places.numpy()] = features.float().cpu().numpy()
        written.append(places)
    rows.flush()
    del rows
    present = distributed.gather_objects(torch.cat(written) if written else torch.zeros(0, dtype=torch.int64))
    distributed.from_rank_zero(lambda: _complete(partial, path, count, torch.cat(present)))


def read_rows(path: Path) -> tuple[Tensor, Tensor]:
    """Rows (n, F), memory-mapped unless some are missing, and their places (n,)."""
    rows = np.load(path, mmap_mode="c")  # copy on write: torch wants memory that may be written
    missing = json.loads(_missing_file(path).read_text())
    places = np.delete(np.arange(len(rows)), missing)
    return torch.from_numpy(rows if not missing else rows[places]), torch.from_numpy(places)


def is_complete(path: Path) -> bool:
    return path.exists() and _missing_file(path).exists()


def _allocate(path: Path, count: int, width: int) -> Path:
    """An empty file of this run's own: another run may be filling one for the same features."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial")
    np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(count, width)).flush()
    return partial


def _complete(partial: Path, path: Path, count: int, present: Tensor) -> None:
    missing = sorted(set(range(count)) - set(present.tolist()))
    _missing_file(path).write_text(json.dumps(missing))
    os.replace(partial, path)


def _missing_file(path: Path) -> Path:
    return path.with_suffix(".missing.json")
