"""The options of `plan=true`: those of the run, where data need not be named and the number of processes is known.

Unusual: a value of `data` that is missing is filled with an empty one, so that any experiment can be planned as it is.
"""

import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from conf.resolve import resolve
from esvit.errors import OptionError


def options_of_plan(config: DictConfig) -> dict[str, Any]:
    """As `resolve` gives them, and `processes` (of all machines together) and `backbone_name`.

    Raises OptionError where the task is no pre-training.
    """
    for name in OmegaConf.missing_keys(config):
        if name.startswith("data."):
            OmegaConf.update(config, name, "")
    options = resolve(config)
    choices = HydraConfig.get().runtime.choices
    if choices["task"] != "pretrain":
        raise OptionError("plan", f"task={choices['task']} cannot be planned", "use task=pretrain, or leave plan=true away")
    return options | {"processes": _processes(options["launcher"]), "backbone_name": choices["backbone"]}


def _processes(launcher: dict[str, Any]) -> int:
    if "gpus_per_node" in launcher:
        return launcher["nodes"] * (launcher["tasks_per_node"] or launcher["gpus_per_node"] or 1)
    return launcher.get("processes") or (_gpus_here() if "processes" in launcher else 1)


def _gpus_here() -> int:
    """By the driver's own list, so that torch need not be imported; 1 where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return max(1, len(visible.split(",")) if visible else len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))
