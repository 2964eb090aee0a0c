"""`task=logistic`: logistic regression on the pooled features of a frozen backbone, its L2 penalty chosen on a held-out part of train.

Unusual: ranks share the penalties, and each fit is one rank's alone, so that any number of ranks gets the same numbers; the last fit, on
all training images, is made by every rank. Each rank holds a copy of the scaled features on its device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esvit import distributed
from esvit.data.base import Data
from esvit.data.subsets import Subset, held_out, stratified_fraction
from esvit.errors import OptionError, Stopped
from esvit.evaluation.feature_files import FeatureSet
from esvit.evaluation.frozen import Frozen, FrozenBackbone
from esvit.evaluation.logistic import Accuracy, LogisticRegression, Scaling, accuracy
from esvit.evaluation.protocol import write_protocol
from esvit.evaluation.splits import labelled_splits
from esvit.runtime import Runtime
from esvit.tasks.tables import aligned
from esvit.tracking.base import EVALUATED_STEP

_BLOCK = 20  # iterations between looks at the stop signal


@dataclass(frozen=True)
class Scaled:
    """features  (n, F) of the training images, on the device, those that are held out at the end
    labels    (n,)
    kept      how many are not held out
    test_features, test_labels  of the validation images
    """

    features: Tensor
    labels: Tensor
    kept: int
    test_features: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Trial:
    """What one penalty came to on the held-out images, and how its fit ended."""

    penalty: float
    accuracy: Accuracy
    iterations: int
    has_converged: bool


@dataclass(kw_only=True)
class Logistic:
    """One evaluation.

    scaling         "standardize" or "unit_length"
    penalties       to choose from; of equally good ones the largest is taken. A single one needs no held-out images
    held_out        share of each class's training images that the penalty is chosen on
    label_fraction  share of each class's training images that are used at all
    max_iterations  of one fit
    """

    scaling: str
    penalties: list[float]
    held_out: float
    label_fraction: float
    max_iterations: int
    frozen: Frozen
    data: Data

    def run(self, runtime: Runtime) -> None:
        """Print a table, write `metrics.json` and the protocol. Raises OptionError for options that cannot work."""
        self._check()
        splits = labelled_splits(self.data)
        assert splits.train.labels is not None
        labelled = Subset(splits.train, stratified_fraction(splits.train.labels, self.label_fraction, runtime.seed))
        network = self.frozen.load(runtime, channels=self.data.channels)
        with runtime.recording() as tracker:
            tracker.resume(0)
            train = network.features(labelled, batch_size=self.data.batch_size, workers=self.data.workers)
            test = network.features(splits.validation, batch_size=self.data.batch_size, workers=self.data.workers)
            images = self._scaled(train, test, runtime)
            classes = len(splits.class_names)
            trials = self._trials(images, classes, runtime)
            for number, trial in enumerate(trials, 1):
                tracker.log(number, 0, {"logistic/penalty": trial.penalty, "logistic/held_out_top1": trial.accuracy.top1})
            penalty = _best(trials).penalty if trials else self.penalties[0]
            model = self._fit(images.features, images.labels, classes, penalty, runtime)
            result = accuracy(model, images.test_features, images.test_labels)
            metrics = {"logistic/top1": result.top1, "logistic/top5": result.top5, "logistic/penalty": penalty}
            if trials:
                metrics["logistic/held_out_top1"] = _best(trials).accuracy.top1
            if runtime.is_main:
                tracker.artifact(write_protocol(runtime.folder, self._protocol(network, train, test, runtime.seed)))
                print(
                    "\n".join([*_table(trials), *_verdict(model, penalty, result, self.penalties, images), f"results in {runtime.folder}"]),
                    flush=True,
                )
            tracker.artifact(runtime.folder / "config.yaml")
            tracker.final(metrics | {EVALUATED_STEP: network.step, "step": len(trials) + 1}, len(trials) + 1)

    def _check(self) -> None:
        if not self.penalties or min(self.penalties) <= 0:
            raise OptionError("task.penalties", f"{self.penalties}", "give one or more numbers above 0")
        if not 0 < self.held_out < 1:
            raise OptionError("task.held_out", f"{self.held_out} is no share of the training images", "use a number between 0 and 1")
        if not 0 < self.label_fraction <= 1:
            raise OptionError(
                "task.label_fraction", f"{self.label_fraction} is no share of the training images", "use a number from 0 to 1"
            )
        if self.max_iterations < 1:
            raise OptionError("task.max_iterations", f"{self.max_iterations}", "use 1 or more")

    def _scaled(self, train: FeatureSet, test: FeatureSet, runtime: Runtime) -> Scaled:
        """Raises OptionError if there are no images to learn from, to choose by, or to test on."""
        assert train.labels is not None and test.labels is not None
        for option, labels in (("data.root", train.labels), ("data.val_root", test.labels)):
            if len(labels) == 0:
                raise OptionError(option, "none of its images can be read", "check that it is still there and intact")
        share = self.held_out if len(self.penalties) > 1 else 0
        kept, out = map(torch.from_numpy, held_out(train.labels.numpy(), share, runtime.seed))
        if share and len(out) == 0:
            found = f"nothing to choose a penalty by: no class has two of the {len(train.labels)} labelled training images"
            raise OptionError("task.held_out", found, "use more images, or a single one of task.penalties")
        order = torch.cat([kept, out])
        features = train.features[order].to(runtime.device)
        scaling = Scaling(self.scaling, features)
        return Scaled(
            features=scaling(features),
            labels=train.labels[order].to(runtime.device),
            kept=len(kept),
            test_features=scaling(test.features.to(runtime.device, copy=True)),
            test_labels=test.labels.to(runtime.device),
        )

    def _trials(self, images: Scaled, classes: int, runtime: Runtime) -> list[Trial]:
        """One for each penalty, from small to large, of all ranks together; none for a single penalty."""
        if len(self.penalties) == 1:
            return []
        mine = []
        for penalty in sorted(set(self.penalties))[runtime.rank :: runtime.world_size]:
            model = self._fit(images.features[: images.kept], images.labels[: images.kept], classes, penalty, runtime)
            result = accuracy(model, images.features[images.kept :], images.labels[images.kept :])
            mine.append(Trial(penalty, result, model.iterations, model.has_converged))
        return sorted(sum(distributed.gather_objects(mine), []), key=lambda trial: trial.penalty)

    def _fit(self, features: Tensor, labels: Tensor, classes: int, penalty: float, runtime: Runtime) -> LogisticRegression:
        model = LogisticRegression(features, labels, classes=classes, penalty=penalty)
        left = self.max_iterations
        while left > 0 and not model.has_converged:
            if signal := runtime.stop_signal_here():
                raise Stopped(signal)
            runtime.beat(f"iteration {model.iterations} with penalty {penalty:g}")
            model.advance(min(left, _BLOCK))
            left -= _BLOCK  # also when line searches used it up
        return model

    def _protocol(self, network: FrozenBackbone, train: FeatureSet, test: FeatureSet, seed: int) -> dict[str, Any]:
        return {
            "task": "logistic",
            "scaling": self.scaling,
            "penalties": self.penalties,
            "held_out": self.held_out,
            "label_fraction": self.label_fraction,
            "max_iterations": self.max_iterations,
            "seed": seed,
            "frozen": network.describe(),
            "data": {"train": train.data, "validation": test.data},
            "images": {"train": len(train.places), "validation": len(test.places)},
        }


def _best(trials: list[Trial]) -> Trial:
    return max(trials, key=lambda trial: (trial.accuracy.top1, trial.penalty))


def _table(trials: list[Trial]) -> list[str]:
    if not trials:
        return []
    rows = [[f"{trial.penalty:g}", f"{trial.accuracy.top1:.2f}", str(trial.iterations), _ending(trial.has_converged)] for trial in trials]
    return [line.rstrip() for line in aligned([["penalty", "held-out top-1", "iterations", ""], *rows])]


def _ending(has_converged: bool) -> str:
    return "" if has_converged else "not converged"


def _verdict(model: LogisticRegression, penalty: float, result: Accuracy, penalties: list[float], images: Scaled) -> list[str]:
    fit = f"{model.iterations} iterations {_ending(model.has_converged)}".rstrip()
    lines = [
        f"penalty {penalty:g} on all {len(images.labels)} training images: {fit}",
        f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % of {len(images.test_labels)} validation images",
    ]
    if len(penalties) > 1 and penalty in (min(penalties), max(penalties)):
        lines.append(
            f"note: {penalty:g} is the {'least' if penalty == min(penalties) else 'largest'} of task.penalties; try some beyond it"
        )
    return lines
