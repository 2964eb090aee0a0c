"""Options of what stands before and above single runs: `plan=true`, and the search of `-m`."""

from dataclasses import dataclass
from enum import Enum


@dataclass
class Planning:
    """What plan=true cannot know."""

    images: int | None = None  # training images; null counts those of data.root, or takes ImageNet-1K's 1,281,167 where it is not there
    images_per_second: float | None = None  # of one GPU in training, measured; null estimates it from the GPU's arithmetic
    throughput: str | None = None  # Markdown file whose table task=throughput wrote on the GPU in question; adds its time to the plan


class Direction(Enum):
    maximize = "maximize"
    minimize = "minimize"


class Sampler(Enum):
    tpe = "tpe"
    random = "random"


@dataclass
class Search:
    """What `-m` does with the values it is given: runs every combination, or searches them with Optuna."""

    trials: int = 0  # runs in all, failed and stopped ones too; 0 runs every combination instead
    metric: str = "knn/teacher"  # what is searched for: a name in the runs' metrics.json and, to stop runs early, log.jsonl
    direction: Direction = Direction.maximize  # maximize or minimize
    sampler: Sampler = Sampler.tpe  # tpe (learns from the runs so far) or random
    startup_trials: int = 8  # with tpe: so many random runs first
    seed: int = 0  # of the sampler
    at_once: int | None = None  # runs at the same time; null means launcher.parallel, or launcher.array_parallelism with SLURM
    prune: bool = True  # stop a run whose metric is worse than the median of the others at the same epoch
    prune_startup_trials: int = 4  # so many runs end undisturbed first
    prune_from_epoch: int = 0  # no run is stopped before this epoch (from 0)
