"""Runs as a comparison sees them: options, how the run ended, and each metric with the protocol that it was measured by.

Unusual: an evaluation is a run of its own, but its values belong to the pre-training run that it evaluated, its host. So the host is what
is compared, even if only the evaluation was named, and an evaluation's values stand at the step of the weights that it saw.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from esvit.evaluation.protocol import protocol_differences, read_protocol
from esvit.run_folder import RunFolder, flatten
from esvit.tracking.base import EVALUATIONS_NAME, LOG_NAME, METRICS_NAME
from esvit.tracking.files import FolderLock
from esvit.tracking.log import RESERVED, Record, read_records
from esvit.tracking.state import STATE_NAME

Points = tuple[tuple[int, float], ...]
Wanted = Callable[[str], bool]  # whether the course of a metric is of interest
_PARTS_OF_DATA = ("val", "validation", "valid", "test", "train", "/")
_STATUS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted", "RUNNING": "running"}


@dataclass(frozen=True)
class Series:
    """One metric of one run, measured by one protocol.

    protocol  what protocol.json says; None where the run measured itself while it trained
    points    (step, value) in order of the steps, at least one
    measured  folder of the run that measured it, None where it lies elsewhere
    """

    metric: str
    protocol: Mapping[str, Any] | None
    points: Points
    measured: Path | None = None

    @cached_property
    def way(self) -> str:
        """How it was measured: equal texts for numbers that compare, see `protocol_differences`."""
        return "itself" if self.protocol is None else repr(protocol_differences(self.protocol, {}))

    @property
    def final(self) -> float:
        return self.points[-1][1]

    def best(self, *, lower: bool) -> float:
        """The best value on the way; the final one where none is finite."""
        values = [value for _, value in self.points if math.isfinite(value)]
        return (min(values) if lower else max(values)) if values else self.final


@dataclass(frozen=True)
class Run:
    """One run.

    name        as its user called it
    status      finished, running, interrupted (by a signal), failed, killed (without a word) or unknown
    options     "group.option" -> value, with "choices.group" -> name of the chosen preset
    series      of the metrics that are of interest
    final       every metric's last known value, and "hours"
    tags        host, git.commit and others
    steps       optimizer steps done
    folder      run folder, None where only a store knows the run
    uri, run_id, experiment_id  its place in an MLflow store, None where it has none
    written     when it wrote last (seconds since 1970), None if it never did
    """

    name: str
    status: str
    options: Mapping[str, Any]
    series: tuple[Series, ...]
    final: Mapping[str, float]
    tags: Mapping[str, str]
    steps: int
    folder: Path | None
    uri: str | None
    run_id: str | None
    experiment_id: str | None
    written: float | None

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    @property
    def task(self) -> str:
        """The name of its task; empty for runs made before it was written down, but for those that are known by what they measured."""
        return str(self.options.get("choices.task") or ("throughput" if "flops" in self.final else ""))


@dataclass
class Gathered:
    """The runs to compare, and sentences on what could not be read."""

    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_run_folders(top: Path) -> Iterator[Path]:
    """The run folders at or below `top`, in the order of their names. What lies inside of a run folder is the run's own.

    Their mark is the log, or tracking.json: a store's folder of artifacts has copies of a run's other files.
    """
    for place, folders, files in os.walk(top, followlinks=True):
        if "config.yaml" in files and {STATE_NAME, LOG_NAME} & set(files):
            folders.clear()
            yield Path(place)
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))


def read_folders(folders: Iterable[Path], *, wanted: Wanted) -> Gathered:
    """The runs in `folders`, each once; in place of an evaluation the run that it evaluated, where that is still there."""
    gathered = Gathered()
    hosts = dict.fromkeys(_host(folder) or folder.absolute() for folder in folders)
    for folder in hosts:
        try:
            gathered.runs.append(read_folder(folder, wanted=wanted))
        except (OSError, ValueError, yaml.YAMLError) as error:
            gathered.notes.append(f"{folder} could not be read ({type(error).__name__}) and is left out.")
    return gathered


def read_folder(folder: Path, *, wanted: Wanted) -> Run:
    """The run in `folder`, with the values of its evaluations. Raises OSError, ValueError or YAMLError if the folder is damaged."""
    options = flatten(RunFolder(folder).config())
    state = _state(folder)
    records, _ = read_records(folder / LOG_NAME)
    final = _decoded(json.loads((folder / METRICS_NAME).read_text())) if (folder / METRICS_NAME).exists() else {}
    known = dict(final) if final else _last_values(records)
    steps = int(final["step"]) if "step" in final else records[-1]["step"] if records else 0
    started = state.get("start_time")
    ended = state.get("end_time") or (records[-1]["time"] * 1000 if records else None)
    if (hours := hours_of_training(known)) is None and started and ended:
        hours = max(0.0, ended - started) / 3.6e6
    if hours is not None:
        known["hours"] = hours
    own = read_protocol(folder)
    series = [Series(metric, own, points, folder) for metric, points in _courses(records, known, steps, wanted).items()]
    return Run(
        name=str(options.get("name") or folder.name),
        status=_status(folder, state, has_final=bool(final)),
        options=options,
        series=(*series, *_evaluations(folder, wanted)),
        final=known,
        tags=state.get("tags", {}),
        steps=steps,
        folder=folder,
        uri=state.get("uri"),
        run_id=state.get("run_id"),
        experiment_id=state.get("experiment_id"),
        written=ended / 1000 if ended else None,
    )


def joined(parts: Iterable[Series]) -> tuple[Series, ...]:
    """One series for each metric and protocol; of several values at one step the last one counts."""
    series: list[Series] = []
    for part in parts:
        place = next((i for i, known in enumerate(series) if (known.metric, known.way) == (part.metric, part.way)), None)
        if place is None:
            series.append(part)
        else:
            points = dict(series[place].points) | dict(part.points)
            series[place] = replace(series[place], points=tuple(sorted(points.items())))
    return tuple(series)


def images_of(run: Run, series: Series) -> str:
    """The name of the folder of the images that the values were measured on, e.g. "leaves" for /data/leaves/val."""
    options = run.options
    if series.measured is not None and series.measured != run.folder and RunFolder(series.measured).config_file.exists():
        options = flatten(RunFolder(series.measured).config())
    path = Path(str(options.get("data.val_root") or options.get("data.root") or "images"))
    parts = [part for part in path.parts if part.lower() not in _PARTS_OF_DATA]
    return parts[-1] if parts else "images"


def hours_of_training(final: Mapping[str, float]) -> float | None:
    """Time of the training steps alone, without pauses between processes; None where the run did not measure its speed."""
    images, speed = final.get("images_seen"), final.get("images_per_second")
    return images / speed / 3600 if images and speed else None


def _host(folder: Path) -> Path | None:
    host = _state(folder).get("host")
    return Path(host) if host and RunFolder(host).config_file.exists() else None


def _state(folder: Path) -> dict[str, Any]:
    """tracking.json; empty where there is none, or it is damaged."""
    try:
        state = json.loads((folder / STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _status(folder: Path, state: Mapping[str, Any], *, has_final: bool) -> str:
    if has_final:
        return "finished"
    status = _STATUS.get(state.get("status", ""), "unknown")
    return "killed" if status == "running" and not FolderLock(folder).is_held() else status


def _decoded(values: Mapping[str, Any]) -> dict[str, float]:
    """Numbers, with those that JSON cannot hold ("NaN")."""
    return {name: float(value) for name, value in values.items() if value is not None}


def _last_values(records: list[Record]) -> dict[str, float]:
    known: dict[str, float] = {}
    for record in records:
        known |= {name: value for name, value in record.items() if name not in RESERVED}
    return known


def _courses(records: list[Record], known: Mapping[str, float], steps: int, wanted: Wanted) -> dict[str, Points]:
    """Metric -> its points. The last one is the final value, also where that was taken anew at the end."""
    courses: dict[str, dict[int, float]] = {name: {} for name in known if name not in RESERVED and wanted(name)}
    for record in records:
        for name in courses.keys() & record.keys():
            courses[name][record["step"]] = record[name]
    for name, course in courses.items():
        if not course or course[max(course)] != known[name]:
            course[max(steps, *course, 0)] = known[name]
    return {name: tuple(course.items()) for name, course in courses.items()}


def _evaluations(folder: Path, wanted: Wanted) -> tuple[Series, ...]:
    """What evaluations of this run, each in a folder of its own, have found."""
    parts = []
    for place, line in _last_lines(folder / EVALUATIONS_NAME).items():
        measured = _moved(Path(place), folder)
        protocol = read_protocol(measured) or {"task": line.get("task", ""), "protocol": "unknown"}
        values = {name: value for name, value in line.items() if "/" in name and wanted(name)}
        parts += [Series(name, protocol, ((line["step"], float(value)),), measured) for name, value in values.items()]
    return joined(parts)


def _last_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Folder of an evaluation -> its line; the last one where it was repeated. A torn line counts for nothing."""
    lines: dict[str, dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            lines[line["folder"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def _moved(evaluation: Path, host: Path) -> Path:
    """Where the evaluation's folder is now, if its host was moved or copied together with it."""
    beside = host / "evaluations" / evaluation.name
    return beside if not evaluation.exists() and beside.exists() else evaluation
