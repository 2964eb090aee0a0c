"""`of=RUN_FOLDER`: what an evaluation of a pre-training run takes over from it, as options put before those that the user typed.

The run's backbone, images and tracking store, its newest checkpoint, the size of its global crops and its normalisation.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from conf.schema import tasks
from conf.schema.tasks.analyze import Analyze
from conf.schema.tasks.frozen import Frozen
from esvit.errors import OptionError
from esvit.run_folder import RunFolder, flatten

_GROUPS = ("backbone", "data")
_RESIZE_OVER_CROP = 256 / 224  # as published


def take_over(arguments: list[str], planned: Mapping[str, dict[str, Any]]) -> list[str]:
    """The command line with what `of=RUN_FOLDER` in it stands for; without `of`, as it is.

    planned  the options of runs that have not begun yet, by folder

    Raises OptionError if there is no run in the folder, or the task evaluates none.
    """
    typed = dict(argument.partition("=")[::2] for argument in arguments)
    folder = typed.get("of", "null")
    if folder == "null":
        return arguments
    task = typed.get("task", "pretrain")
    schema = tasks.SCHEMAS.get(("task", task))
    if task == "pretrain":
        raise OptionError("of", "a pre-training evaluates no run", "choose an evaluation, e.g. task=knn, or begin with checkpoint=FILE")
    run = RunFolder(folder.strip("'\""))
    if str(run.path) not in planned and not run.config_file.exists():
        raise OptionError("of", f"no run in '{run.path}'", "give the folder of a pre-training run, which holds config.yaml")
    config = planned.get(str(run.path)) or run.config()
    known = {"checkpoint": str(run.path / "checkpoint.pt"), "of": str(run.path)}
    if schema is not None and _has_frozen(schema):
        known |= _frozen(config) | {"output_dir": f"{run.path}/evaluations/{task}_${{now:%Y-%m-%d_%H-%M-%S}}"}
    choices = config.get("choices", {})
    if schema is Analyze and choices.get("data") == "folder":
        known["task.dataset"] = config["data"]["val_root"]
    if "tracking" not in typed:
        known |= _tracking(config["tracking"])
    for group in _GROUPS:
        if group in choices and group not in typed:
            known |= {group: choices[group]} | {f"{group}.{name}": value for name, value in flatten(config[group]).items()}
    rest = {name: argument for argument in arguments if (name := argument.partition("=")[0]) != "of"}
    return [f"{name}={_written(value)}" for name, value in known.items() if name not in rest] + list(rest.values())


def _has_frozen(schema: type) -> bool:
    return any(field.type is Frozen for field in dataclasses.fields(schema))


def _frozen(config: dict[str, Any]) -> dict[str, Any]:
    """The crop as large as the run's global crops, out of images somewhat larger; its normalisation."""
    crop = _global_size(config["augmentation"])
    normalize = {f"task.frozen.normalize.{name}": value for name, value in config["task"]["normalize"].items()}
    return {"task.frozen.crop": crop, "task.frozen.resize": round(crop * _RESIZE_OVER_CROP)} | normalize


def _global_size(augmentation: dict[str, Any]) -> int:
    """Side of the crops that the teacher saw."""
    if "global_crops_size" in augmentation:
        return augmentation["global_crops_size"]
    return next(group["size"] for group in augmentation["crops"] if group["is_global"])


def _tracking(options: dict[str, Any]) -> dict[str, Any]:
    """The run's own store."""
    if "uri" not in options:
        return {"tracking": "none"}
    return {"tracking": "mlflow", "tracking.uri": options["uri"], "tracking.experiment_name": options["experiment_name"]}


def _written(value: Any) -> str:
    """A value as Hydra reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_written(each)}" for name, each in value.items()) + "}"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'") if "\\" in value or "'" in value else value
        return f"'{escaped}'"
    return str(value)
