"""Sums of the loop's scalars, kept on the device between two log records: reading them is the step's only host sync."""

import time
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Measured(Protocol):
    """What a step leaves behind: whether it was finite on every rank and on this one (0-d bool), and its scalars by name, on the device."""

    @property
    def finite(self) -> Tensor: ...

    @property
    def finite_here(self) -> Tensor: ...

    def scalars(self) -> dict[str, Tensor]: ...


class Meter:
    """Means since the last reading, and the sticky flag of a non-finite loss.

    `finite` is a 0-d bool tensor: once a step was not finite on any rank it stays False, which masks every later update,
    so that the state at the next reading is the one before the first bad step.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad_here = torch.zeros((), dtype=torch.bool, device=device)
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._images = 0
        self._since = time.perf_counter()
        self._wait_seconds = 0.0

    def add(self, result: Measured, *, step: int, images: int) -> None:
        """One optimizer step (from 0) over `images` images on all ranks."""
        newly_bad = self.finite & ~result.finite
        self._first_bad_step = torch.where(newly_bad, step, self._first_bad_step)
        self._bad_here = torch.where(newly_bad, ~result.finite_here, self._bad_here)
        self.finite = self.finite & result.finite
        self.add_scalars(result.scalars())
        self._count += 1
        self._images += images

    def add_scalars(self, values: Mapping[str, Tensor]) -> None:
        """More 0-d values of the step that is, or was, added."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.detach().clone()

    def waited(self, seconds: float) -> None:
        """Time the loop stood still because no batch was ready."""
        self._wait_seconds += seconds

    def read(self) -> dict[str, float]:
        """Means since the last reading, images per second and the share of time spent waiting for data; then starts anew."""
        if self._count == 0:
            return {}
        names = list(self._sums)
        values = torch.stack([self._sums[name].float() for name in names]).div(self._count).tolist()
        seconds = time.perf_counter() - self._since
        metrics = dict(zip(names, values, strict=True))
        metrics["speed/images_per_second"] = self._images / seconds
        metrics["speed/data_wait_share"] = self._wait_seconds / seconds
        self._sums, self._count, self._images = {}, 0, 0
        self._since, self._wait_seconds = time.perf_counter(), 0.0
        return metrics

    def first_bad_step(self) -> int | None:
        """The first step (from 0) whose loss was not finite; waits for the device."""
        step = int(self._first_bad_step)
        return None if step < 0 else step

    def was_bad_here(self) -> bool:
        """Whether the first bad step's loss was not finite on this rank."""
        return bool(self._bad_here)

    def restart_clock(self) -> None:
        """Leave out of the speed what happened since the last reading (an evaluation, a checkpoint)."""
        self._since, self._wait_seconds = time.perf_counter(), 0.0

    def state_dict(self) -> dict:
        return {"sums": {name: value.cpu() for name, value in self._sums.items()}, "count": self._count}

    def load_state_dict(self, state: dict) -> None:
        """Means go on where they were; the clock begins anew."""
        self._sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self._count = state["count"]
