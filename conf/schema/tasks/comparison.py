"""Options of the tasks that look at many runs."""

from dataclasses import dataclass, field
from enum import Enum


class Best(Enum):
    auto = "auto"
    max = "max"
    min = "min"


def _metrics() -> list[str]:
    accuracies = ["knn/top1_k20", "knn/teacher", "linear/top1", "logistic/top1", "finetune/top1", "finetune/ema_top1", "fewshot/*shot"]
    dense = ["segmentation/knn_miou", "segmentation/linear_miou", "correspondence/accuracy"]
    return [*accuracies, *dense, "loss/total", "images_per_second*"]


@dataclass
class Compare:
    _target_: str = "esvit.tasks.compare.Compare"
    has_run_folder: bool = False
    runs: list[str] = field(default_factory=list)  # run folders, folders with runs at any depth, and run ids of the tracking store
    experiment: str | None = None  # an MLflow experiment, whose runs are compared
    metrics: list[str] = field(default_factory=_metrics)  # which, in order: names with * and ?; '!NAME' takes out
    best: Best = Best.auto  # which values are good: max, min, or auto: small ones of losses, errors and times, else large ones
    rank_by: str | None = (
        None  # metric that orders groups, goes over the cost and picks what is registered; null means the first of metrics
    )
    cost: str | None = None  # final metric or option that results are weighed against, e.g. hours; null means one in which runs differ
    register: str | None = (
        None  # make the best finished run's checkpoint a version, with the alias best, of this model in MLflow's registry
    )
    uri: str | None = "${oc.select:tracking.uri,null}"
    folder: str = "${output_dir}"
    title: str = "${name}"


@dataclass
class Figure:
    _target_: str = "esvit.tasks.figure.Figure"
    has_run_folder: bool = False
    runs: list[str] = field(
        default_factory=list
    )  # run folders, folders with runs at any depth, and run ids: accuracies and task=throughput
    experiment: str | None = None  # an MLflow experiment, whose runs are drawn
    linear: list[str] = field(default_factory=lambda: ["linear/top1"])  # metrics for the left panel; of several the first counts
    knn: list[str] = field(default_factory=lambda: ["knn/top1_k20", "knn/best_top1", "knn/teacher"])  # for the right panel
    published: bool = True  # draw the models of the paper's table too
    dataset: str | None = None  # what the accuracies of the runs were measured on; null means the name of the folder of the images
    uri: str | None = "${oc.select:tracking.uri,null}"
    folder: str = "${output_dir}"


SCHEMAS = {
    ("task", "compare"): Compare,
    ("task", "figure"): Figure,
}
