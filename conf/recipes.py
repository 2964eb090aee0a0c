"""Where sweep recipes are: Hydra finds `sweeps/`, beside `conf/`, as a group of its own, chosen by `+sweeps=NAME`."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin


class Recipes(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("sweeps", f"file://{Path(__file__).parents[1]}")


def register() -> None:
    Plugins.instance().register(Recipes)
