"""Composes many command lines that resemble each other, as a sweep's children and their evaluations do.

Hydra reads the files that the choices of groups name, and then sets values. Here the first part is done once for each set of choices,
and the second, Hydra's own code too, on a copy: the same config in a fifth of the time.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, open_dict

_CONF = Path(__file__).parent


@contextlib.contextmanager
def opened() -> Iterator["Composer"]:
    """Hydra ready to compose, for a program that `hydra.main` does not run."""
    with hydra.initialize_config_dir(str(_CONF), version_base="1.3", job_name="run"):
        yield Composer()


class _Base:
    """What the chosen files say, and what they say to Hydra."""

    def __init__(self, choices: list[str]):
        self.config = hydra.compose("config", choices, return_hydra_config=True)
        holder = HydraConfig.instance()
        holder.set_config(self.config)
        self.hydra = holder.cfg
        with open_dict(self.config):
            del self.config["hydra"]


class Composer:
    """Works while Hydra is initialised, by `opened` or `hydra.main`."""

    def __init__(self) -> None:
        self._loader: Any = GlobalHydra.instance().config_loader()
        self._parser = OverridesParser.create(config_loader=self._loader)
        self._parsed: dict[str, Override] = {}
        self._bases: dict[tuple[str, ...], _Base] = {}

    def parse(self, words: list[str]) -> list[Override]:
        for word in words:
            if word not in self._parsed:
                (self._parsed[word],) = self._parser.parse_overrides([word])
        return [self._parsed[word] for word in words]

    def compose(self, words: list[str]) -> DictConfig:
        """The config of a command line without sweeps; `${hydra:...}` in it refers to this one until the next is composed."""
        overrides = self.parse(words)
        choices = tuple(override.input_line or "" for override in overrides if self._is_choice(override))
        values = [override for override in overrides if not self._is_choice(override)]
        if choices not in self._bases:
            self._bases[choices] = _Base(list(choices))
        base = self._bases[choices]
        config = copy.deepcopy(base.config)
        self._loader._apply_overrides_to_config(values, config)
        HydraConfig.instance().cfg = base.hydra
        return config

    def _is_choice(self, override: Override) -> bool:
        """Whether an override decides which files are read, or speaks to Hydra."""
        name = override.key_or_group
        return override.package is not None or override.is_hydra_override() or self._loader.repository.group_exists(name)
