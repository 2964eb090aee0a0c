"""One folder of golden cases: its seed, its arrays, and weights and inputs made by the rule."""

import json
from pathlib import Path

import numpy as np
import torch

from tests.golden import rule

DATA = Path(__file__).parent / "data"


class Goldens:
    """The cases in one folder. Names and shapes of the original's models come from tests/golden/data, whatever the folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seed = int((folder / "SEED.txt").read_text())

    def case(self, name: str) -> dict[str, np.ndarray]:
        """Arrays of `<name>.npz`; fails if the case is missing."""
        with np.load(self.folder / f"{name}.npz") as arrays:
            return {key: arrays[key] for key in arrays.files}

    def json(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.json").read_text())

    def input(self, tag: str, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
        """float32 tensor named by `tag`."""
        return torch.from_numpy(rule.tensor_input(tag, shape, self.seed)) * scale

    def weight(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """float32 value of the original's state-dict entry `name`."""
        return torch.from_numpy(rule.weight(name, tuple(shape), self.seed))

    def fill(self, module: torch.nn.Module, original_name=lambda name: name) -> None:
        """Give every floating-point state-dict entry of `module` its value by the rule.

        original_name  maps our entry's name to the original's (without `module.`)
        """
        state = module.state_dict()
        for name, value in state.items():
            if value.is_floating_point():
                state[name] = self.weight(original_name(name), value.shape)
        module.load_state_dict(state)


def original_layout(model: str) -> dict:
    """The published layout of `model` (e.g. "swin_tiny_w7"): names, shapes, parameter counts."""
    return json.loads((DATA / "keys" / f"{model}.json").read_text())


def micro_layouts() -> dict:
    """Names and shapes of the small models of the train_* cases and of the heads."""
    return json.loads((DATA / "micro_keys.json").read_text())


def assert_close(ours, golden, *, absolute: float | None = None, relative_l2: float | None = None, relative: float | None = None):
    """Within every limit given: max abs difference, relative L2 distance of the whole array, elementwise relative difference."""
    ours = np.asarray(ours.detach().cpu() if isinstance(ours, torch.Tensor) else ours, dtype=np.float64)
    golden = np.asarray(golden, dtype=np.float64)
    assert ours.shape == golden.shape, f"shape {ours.shape}, golden {golden.shape}"
    difference = np.abs(ours - golden)
    if absolute is not None:
        assert difference.max() <= absolute, f"max abs difference {difference.max():.3g} > {absolute}"
    if relative_l2 is not None:
        distance = np.linalg.norm(difference) / max(np.linalg.norm(golden), 1e-300)
        assert distance <= relative_l2, f"relative L2 distance {distance:.3g} > {relative_l2}"
    if relative is not None:
        ratio = (difference / np.maximum(np.abs(golden), 1e-300)).max()
        assert ratio <= relative, f"relative difference {ratio:.3g} > {relative}"
