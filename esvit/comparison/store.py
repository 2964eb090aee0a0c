"""Runs as an MLflow store knows them, and the best of them into its model registry.

Unusual: where a run's folder is on this machine too, the folder is read, which has all and is faster; the store serves for the rest.
MLflow is imported by the functions, because the import takes seconds.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esvit.comparison.runs import Gathered, Run, Series, Wanted, hours_of_training, joined, read_folders
from esvit.errors import OptionError
from esvit.evaluation.protocol import PROTOCOL_NAME
from esvit.tracking.mlflow import client_of, one_line
from esvit.tracking.state import STATE_NAME

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

_FINAL = "final/"
_PARENT = "mlflow.parentRunId"
_PAGE = 1000
_STATUS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted", "RUNNING": "running", "SCHEDULED": "running"}
BEST_ALIAS = "best"
CHECKPOINT = "checkpoint.pt"


def read_experiment(uri: str, name: str, *, wanted: Wanted) -> Gathered:
    """The runs of an experiment. Raises OptionError if the store, or the experiment in it, is not there."""
    client = client_of(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        there = ", ".join(sorted(each.name for each in client.search_experiments())) or "none"
        raise OptionError("task.experiment", f"{uri} has no experiment {name!r}", f"there are: {there}")
    stored: list[StoredRun] = []
    token: str | None = None
    while token is None or token:
        page = client.search_runs([experiment.experiment_id], max_results=_PAGE, page_token=token, order_by=["attributes.start_time ASC"])
        stored += page
        token = page.token or ""
    return _read(client, uri, stored, wanted=wanted)


def read_runs(uri: str, run_ids: Iterable[str], *, wanted: Wanted) -> Gathered:
    """The runs with these ids. Raises OptionError for an id that the store does not know."""
    from mlflow.exceptions import MlflowException

    client = client_of(uri)
    stored = []
    for run_id in run_ids:
        try:
            stored.append(client.get_run(run_id))
        except MlflowException as error:
            raise OptionError("task.runs", f"{uri} gives no run {run_id} ({one_line(error)})", "give an id of that store") from None
    return _read(client, uri, stored, wanted=wanted)


def _read(client: "MlflowClient", uri: str, stored: "list[StoredRun]", *, wanted: Wanted) -> Gathered:
    here = {run.info.run_id: folder for run in stored if (folder := _folder_here(run)) is not None}
    gathered = read_folders(here.values(), wanted=wanted)
    ids = {folder.absolute(): run_id for run_id, folder in here.items()}
    # A run's folder may name the store by another address, of which this one is a copy.
    gathered.runs = [replace(run, uri=uri, run_id=ids[run.folder]) if run.folder in ids else run for run in gathered.runs]
    # A run without params only holds others together.
    elsewhere = {run.info.run_id: run for run in stored if run.info.run_id not in here and run.data.params}
    evaluations: dict[str, list[StoredRun]] = {}
    for run in elsewhere.values():
        if _is_evaluation(run) and run.data.tags.get(_PARENT) in elsewhere:
            evaluations.setdefault(run.data.tags[_PARENT], []).append(run)
    folded = {run.info.run_id for runs in evaluations.values() for run in runs}
    for run_id, run in elsewhere.items():
        if run_id not in folded:
            gathered.runs.append(_read_stored(client, uri, run, evaluations.get(run_id, []), wanted=wanted))
    return gathered


def _is_evaluation(run: "StoredRun") -> bool:
    return run.data.params.get("of", "null") != "null"


def _folder_here(run: "StoredRun") -> Path | None:
    """The run's folder, if it lies on this machine and is the same run's."""
    folder = Path(run.data.tags.get("run_folder", "/dev/null"))
    try:
        state = json.loads((folder / STATE_NAME).read_bytes())
        is_same = state["folder_id"] == run.data.tags["run_folder_id"] and (folder / "config.yaml").exists()
    except (OSError, ValueError, KeyError):
        return None
    return folder if is_same else None


def _read_stored(client: "MlflowClient", uri: str, run: "StoredRun", evaluations: "list[StoredRun]", *, wanted: Wanted) -> Run:
    """A run from what the store has of it. Courses are asked for one metric at a time, so only those of interest."""
    final = {name.removeprefix(_FINAL): value for name, value in run.data.metrics.items() if name.startswith(_FINAL)}
    known = {name: value for name, value in run.data.metrics.items() if not name.startswith(_FINAL)} | final
    known.pop("epoch", None)
    steps = int(known.pop("step", 0))
    ended = run.info.end_time
    hours = hours_of_training(known)
    if hours is None and ended:
        hours = (ended - run.info.start_time) / 3.6e6
    if hours is not None:
        known["hours"] = hours
    parts = [part for each in evaluations for part in _evaluated(client, each, wanted)]
    evaluated = {part.metric for part in parts}
    protocol = _protocol(client, run) if "final/evaluated_step" in run.data.metrics or _is_evaluation(run) else None
    for name in known:
        if wanted(name) and name not in evaluated:
            history = client.get_metric_history(run.info.run_id, name) if name in run.data.metrics else []
            points = {point.step: point.value for point in sorted(history, key=lambda point: (point.step, point.timestamp))}
            if not points or (name in final and points[max(points)] != final[name]):
                points[max(steps, *points, 0)] = known[name]
            parts.append(Series(name, protocol, tuple(sorted(points.items()))))
    return Run(
        name=run.data.params.get("name") or run.info.run_name,
        status=_STATUS.get(run.info.status, "unknown"),
        options={name: _value(text) for name, text in run.data.params.items()},
        series=joined(parts),
        final=known,
        tags=run.data.tags,
        steps=steps,
        folder=None,
        uri=uri,
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        written=ended / 1000 if ended else None,
    )


def _evaluated(client: "MlflowClient", run: "StoredRun", wanted: Wanted) -> list[Series]:
    """What an evaluation found, at the step of the weights."""
    final = {name.removeprefix(_FINAL): value for name, value in run.data.metrics.items() if name.startswith(_FINAL)}
    step = int(final.get("evaluated_step", 0))
    protocol = _protocol(client, run) or {"task": run.data.params.get("choices.task", ""), "protocol": "unknown"}
    return [Series(name, protocol, ((step, value),)) for name, value in final.items() if "/" in name and wanted(name)]


def _protocol(client: "MlflowClient", run: "StoredRun") -> Mapping[str, Any] | None:
    """protocol.json of the run's artifacts; None if it has none, or it cannot be had."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(Path(client.download_artifacts(run.info.run_id, PROTOCOL_NAME, folder)).read_text())
    except Exception:  # whatever an artifact store can raise; the caller says that the protocol is unknown
        return None


def _value(text: str) -> Any:
    """A param as the option that it was written from, see esvit.tracking.environment.flatten."""
    if text in ("True", "False"):
        return text == "True"
    try:
        return json.loads(text)
    except ValueError:
        return text


def register_best(run: Run, *, model: str, metric: str, value: float, protocol: Mapping[str, Any] | None) -> str:
    """Make the run's newest checkpoint a version of the registered model, with the alias `best`; returns the version's number.

    The version's source is a folder in the run's folder, with the checkpoint under a second name, so that a run which goes on does not
    change what was registered. A server refuses paths of its clients, so there the checkpoint becomes an artifact of the run, once. The
    same checkpoint registered before keeps its version.

    Raises OptionError if the run is in no store, or its checkpoint is not on this machine.
    """
    if run.uri is None or run.run_id is None:
        remedy = f"send it first: python run.py task=sync output_dir={run.folder} task.uri=STORE"
        raise OptionError("task.register", f"the best run, {run.name}, was tracked nowhere", remedy)
    checkpoint = run.folder / CHECKPOINT if run.folder else None
    if checkpoint is None or not checkpoint.exists():
        found = f"the best run, {run.name}, has no checkpoint on this machine ({checkpoint or 'its folder is elsewhere'})"
        raise OptionError("task.register", found, "compare on the machine that has it")
    client = client_of(run.uri)
    kept = _kept(checkpoint, run.steps)
    source = _artifact(client, run.run_id, kept) if run.uri.startswith("http") else kept.as_uri()
    tags = {"metric": metric, "value": repr(value), "step": str(run.steps), "run_name": run.name}
    if protocol is not None:
        tags["protocol"] = json.dumps(protocol)
    version = _version(client, model, run.run_id, source, tags)
    client.set_registered_model_alias(model, BEST_ALIAS, version)
    return version


def _kept(checkpoint: Path, step: int) -> Path:
    """A folder with this checkpoint alone, which costs no space where the file system knows links."""
    folder = checkpoint.parent.absolute() / "registered" / f"step_{step}"
    kept = folder / CHECKPOINT
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            os.link(checkpoint, kept)
        except OSError:
            shutil.copy2(checkpoint, kept)
    return folder


def _artifact(client: "MlflowClient", run_id: str, folder: Path) -> str:
    """Where the store has the folder among the run's artifacts."""
    place = f"registered/{folder.name}"
    if not client.list_artifacts(run_id, place):
        client.log_artifacts(run_id, str(folder), place)
    return f"{client.get_run(run_id).info.artifact_uri}/{place}"


def _version(client: "MlflowClient", model: str, run_id: str, source: str, tags: dict[str, str]) -> str:
    """The number of the version with this source and these tags, made if need be, and the model before it."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model, description="Checkpoints of self-supervised pre-training; alias best: see its tags.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise OptionError("task.register", f"cannot be {model!r} ({one_line(error)})", "use another name") from None
    for known in client.search_model_versions(f"name='{model}'"):
        if known.run_id == run_id and known.source == source and known.tags.get("step") == tags["step"]:
            for name, text in tags.items():
                client.set_model_version_tag(model, known.version, name, text)
            return str(known.version)
    return str(client.create_model_version(model, source, run_id, tags=tags).version)
