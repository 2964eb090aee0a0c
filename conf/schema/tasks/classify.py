"""Options of the evaluations that classify whole images by frozen features."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.schema.tasks.frozen import Frozen


@dataclass
class Knn:
    _target_: str = "esvit.tasks.knn.Knn"
    has_run_folder: bool = True
    neighbours: list[int] = field(default_factory=lambda: [10, 20, 100, 200])  # every k to report; several cost no more than the largest
    temperature: float = 0.07  # of the neighbours' votes, which weigh exp(cosine / temperature)
    baselines: bool = False  # also k-NN on raw pixels, on colour histograms and on the untrained network
    frozen: Frozen = field(default_factory=Frozen)
    data: Any = "${data}"


class Scaling(Enum):
    standardize = "standardize"
    unit_length = "unit_length"


@dataclass
class Logistic:
    _target_: str = "esvit.tasks.logistic.Logistic"
    has_run_folder: bool = True
    scaling: Scaling = Scaling.standardize  # of features: standardize (each to mean 0, deviation 1) or unit_length (each row)
    penalties: list[float] = field(
        default_factory=lambda: [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]
    )  # L2, beside the mean loss: to choose from
    held_out: float = 0.1  # share of each class's training images that the penalty is chosen on
    label_fraction: float = 1.0  # share of each class's training images that are used at all
    max_iterations: int = 1000  # of L-BFGS for one penalty
    frozen: Frozen = field(default_factory=Frozen)
    data: Any = "${data}"


class Classifier(Enum):
    nearest_mean = "nearest_mean"
    logistic = "logistic"


@dataclass
class FewShot:
    _target_: str = "esvit.tasks.fewshot.FewShot"
    has_run_folder: bool = True
    ways: int = 5  # classes of an episode
    shots: list[int] = field(default_factory=lambda: [1, 5])  # labelled images of each class, for every accuracy to report
    queries: int = 15  # images of each class to classify
    episodes: int = 600  # over which accuracies are averaged
    classifier: Classifier = Classifier.nearest_mean  # nearest_mean (cosine to the class's mean feature) or logistic
    penalty: float = 1.0  # of the logistic classifier: weight of half the squared weights against the sum of the losses
    center: bool = True  # subtract the mean of the training images' features first
    frozen: Frozen = field(default_factory=Frozen)
    data: Any = "${data}"


SCHEMAS = {
    ("task", "knn"): Knn,
    ("task", "logistic"): Logistic,
    ("task", "fewshot"): FewShot,
}
