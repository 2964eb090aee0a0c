"""Command lines composed in this process, as plain data, from which `run.build` makes a task."""

from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

import conf.schema
from conf.resolve import resolve
from tests.command_line.commands import ROOT


def composed(*overrides: str) -> dict[str, Any]:
    conf.schema.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        try:
            return resolve(config)
        finally:
            HydraConfig.instance().cfg = None
