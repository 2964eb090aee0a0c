"""Runs with results that can be computed by hand: in memory, and in folders made by the project's own trackers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from esvit.comparison.differences import ABSENT
from esvit.comparison.runs import Run, Series
from esvit.evaluation.protocol import write_protocol
from esvit.run_folder import flatten
from esvit.tracking.base import NoTracking

OPTIONS: dict[str, Any] = {
    "task": {"log_every": 10, "online_knn": {"neighbours": 20}},
    "backbone": {"dim": 64, "depths": [2, 2], "drop_path_rate": 0.1},
    "loss": {"student_temperature": 0.1},
    "optimizer": {"learning_rate": 0.1},
    "data": {"root": "/data/leaves/train", "val_root": "/data/leaves/val"},
    "tracking": {"uri": "nowhere"},
    "device": "cpu",
    "seed": 0,
    "choices": {"task": "pretrain", "backbone": "swin_micro", "loss": "view", "data": "folder"},
}
PROTOCOL = {"task": "knn", "k": 20, "frozen": {"crop": 96, "weights": "a", "step": 20}, "data": {"train": "1f" * 16}}


def run(name: str, values: dict[str, float | list[float]], *, protocol: Any = None, status: str = "finished", **changes: Any) -> Run:
    """A run with these values after 10, 20, ... steps, and options with dots written as two underscores."""
    series = []
    for metric, value in values.items():
        points = value if isinstance(value, list) else [value]
        series.append(Series(metric, protocol, tuple((10 * (place + 1), each) for place, each in enumerate(points))))
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    chosen = {**flatten(OPTIONS), "name": name, **changed}
    return Run(
        name=name, status=status, options={key: value for key, value in chosen.items() if value is not ABSENT}, series=tuple(series),
        final={each.metric: each.final for each in series}, tags={}, steps=10, folder=None, uri=None, run_id=None, experiment_id=None,
        written=None,
    )  # fmt: skip


def options(name: str, **changes: Any) -> dict[str, Any]:
    """A config with `changes`, whose dots are written as two underscores; None takes an option out."""
    config = yaml.safe_load(yaml.safe_dump(OPTIONS)) | {"name": name}
    for place, value in changes.items():
        *groups, last = place.split("__")
        node = config
        for group in groups:
            node = node.setdefault(group, {})
        if value is None:
            del node[last]
        else:
            node[last] = value
    return config


def make_run(
    folder: Path,
    config: Mapping[str, Any],
    *,
    course: Mapping[str, Sequence[float]],
    final: Mapping[str, float] | None,
    status: str = "FINISHED",
    protocol: Mapping[str, Any] | None = None,
    host: Path | None = None,
    tracking: Any = None,
) -> Path:
    """A run folder.

    course  metric -> its values after 10, 20, ... steps
    final   metrics.json without the steps, or None for a run that never came to its end
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    tracker = (tracking or NoTracking(host=str(host) if host else None)).open(run_folder=folder, config=config, is_main=True)
    tracker.resume(0)
    count = max(map(len, course.values()), default=0)
    for place in range(count):
        tracker.log(10 * (place + 1), 0, {name: values[place] for name, values in course.items() if place < len(values)})
    if protocol is not None:
        tracker.artifact(write_protocol(folder, protocol))
    if final is not None:
        tracker.final({**final, "step": 10 * count}, 10 * count)
    tracker.close(status)
    return folder
