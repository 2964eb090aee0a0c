"""`task=fewshot`: n-way k-shot classification of the validation images, by the pooled features of a frozen backbone.

The training images serve for their mean feature alone, which is subtracted; their labels are not looked at. Episodes are computed on the
CPU: each is a few matrices of some hundred rows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esvit import distributed
from esvit.data.base import Data
from esvit.errors import OptionError, Stopped
from esvit.evaluation.feature_files import FeatureSet
from esvit.evaluation.fewshot import MeanAccuracy, centered, draw_episode, logistic_accuracy, mean_accuracy, nearest_mean_accuracy
from esvit.evaluation.frozen import Frozen, FrozenBackbone
from esvit.evaluation.protocol import write_protocol
from esvit.evaluation.splits import labelled_splits
from esvit.runtime import Runtime
from esvit.tasks.tables import aligned
from esvit.tracking.base import EVALUATED_STEP


@dataclass(kw_only=True)
class FewShot:
    """One evaluation.

    ways        classes of an episode
    shots       labelled images of each class, for every accuracy to report
    queries     images of each class to classify
    episodes    over which accuracies are averaged
    classifier  "nearest_mean" or "logistic"
    penalty     of the logistic classifier
    center      subtract the mean of the training images' features first
    """

    ways: int
    shots: list[int]
    queries: int
    episodes: int
    classifier: str
    penalty: float
    center: bool
    frozen: Frozen
    data: Data

    def run(self, runtime: Runtime) -> None:
        """Print a table, write `metrics.json` and the protocol. Raises OptionError for options that cannot work."""
        self._check(runtime.seed)
        splits = labelled_splits(self.data)
        assert splits.validation.labels is not None
        self._classes(splits.validation.labels, splits.class_names)
        network = self.frozen.load(runtime, channels=self.data.channels)
        with runtime.recording() as tracker:
            tracker.resume(0)
            validation = network.features(splits.validation, batch_size=self.data.batch_size, workers=self.data.workers)
            train = network.features(splits.train, batch_size=self.data.batch_size, workers=self.data.workers) if self.center else None
            center = torch.zeros(1) if train is None else train.features.mean(dim=0)
            assert validation.labels is not None
            classes = self._classes(validation.labels.numpy(), splits.class_names)  # again: some images may be unreadable
            results = self._results(centered(validation.features, center), classes, runtime)
            metrics: dict[str, float] = {}
            for shots, result in results.items():
                name = f"{self.ways}way_{shots}shot"
                metrics |= {f"fewshot/{name}": result.mean, f"fewshot/{name}_interval": result.interval}
            if runtime.is_main:
                tracker.artifact(write_protocol(runtime.folder, self._protocol(network, train, validation, runtime.seed)))
                print("\n".join([*self._table(results), f"results in {runtime.folder}"]), flush=True)
            tracker.log(1, 0, metrics)
            tracker.artifact(runtime.folder / "config.yaml")
            tracker.final(metrics | {EVALUATED_STEP: network.step, "step": 1}, 1)

    def _check(self, seed: int) -> None:
        if not self.shots:
            raise OptionError("task.shots", "no number of shots", "give one or more, such as [1,5]")
        limits = (("ways", self.ways, 2), ("shots", min(self.shots), 1), ("queries", self.queries, 1), ("episodes", self.episodes, 2))
        for option, value, least in limits:
            if value < least:
                raise OptionError(f"task.{option}", f"{value} is too small", f"use {least} or more")
        if self.penalty <= 0:
            raise OptionError("task.penalty", f"{self.penalty}", "use a number above 0")
        if seed < 0:
            raise OptionError("seed", f"{seed}", "use 0 or more")

    def _classes(self, labels: np.ndarray, names: list[str]) -> list[np.ndarray]:
        """The rows of each class that has any. Raises OptionError if an episode takes more classes, or more of one, than there are."""
        rows = {name: np.flatnonzero(labels == label) for label, name in enumerate(names)}
        rows = {name: each for name, each in rows.items() if len(each)}
        if self.ways > len(rows):
            raise OptionError("task.ways", f"{self.ways} of {len(rows)} classes with validation images", f"use at most {len(rows)}")
        scarce = min(rows, key=lambda name: len(rows[name]))
        needed = max(self.shots) + self.queries
        if len(rows[scarce]) < needed:
            found = (
                f"an episode takes {max(self.shots)} shots and {self.queries} queries of a class, but '{scarce}' has {len(rows[scarce])}"
            )
            raise OptionError("task.shots", f"{found} validation images", "use fewer shots, or fewer task.queries")
        return list(rows.values())

    def _results(self, features: Tensor, classes: list[np.ndarray], runtime: Runtime) -> dict[int, MeanAccuracy]:
        """One for each number of shots, of all ranks together."""
        accuracies = torch.zeros(len(self.shots), self.episodes, dtype=torch.float64)
        for number in range(runtime.rank, self.episodes, runtime.world_size):
            if signal := runtime.stop_signal_here():
                raise Stopped(signal)
            runtime.beat(f"episode {number}")
            episode = draw_episode(classes, ways=self.ways, queries=self.queries, seed=runtime.seed, number=number)
            for row, shots in enumerate(self.shots):
                accuracies[row, number] = self._accuracy(features[episode.shots(shots)], features[episode.queries])
        accuracies = torch.stack(distributed.gather_objects(accuracies)).sum(dim=0)  # every episode is one rank's, 0 on the others
        return {shots: mean_accuracy(each) for shots, each in zip(self.shots, accuracies, strict=True)}

    def _accuracy(self, shots: Tensor, queries: Tensor) -> float:
        if self.classifier == "logistic":
            return logistic_accuracy(shots, queries, penalty=self.penalty)
        return nearest_mean_accuracy(shots, queries)

    def _protocol(self, network: FrozenBackbone, train: FeatureSet | None, validation: FeatureSet, seed: int) -> dict[str, Any]:
        return {
            "task": "fewshot",
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "episodes": self.episodes,
            "classifier": self.classifier,
            "penalty": self.penalty if self.classifier == "logistic" else None,
            "center": self.center,
            "seed": seed,
            "frozen": network.describe(),
            "data": {"train": train.data if train is not None else None, "validation": validation.data},
            "images": {"validation": len(validation.places)},
        }

    def _table(self, results: dict[int, MeanAccuracy]) -> list[str]:
        rows = [[f"{self.ways}-way {shots}-shot", f"{result.mean:.2f}", f"+- {result.interval:.2f}"] for shots, result in results.items()]
        return [
            f"{self.classifier.replace('_', ' ')}, percent, mean over {self.episodes} episodes and its 95% interval",
            *aligned(rows),
        ]
