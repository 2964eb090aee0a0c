"""`-m`: one command line becomes many. Values are given in Hydra's own way (`a=1,2`, `range(1,4)`, `interval(1e-4,1e-2)`).

Unusual: Hydra's launchers run children inside of this process and wait for them, so its `-m` is not used. Its parser, its grammar and its
composition are.

A recipe is a file in `sweeps/`, chosen by `+sweeps=NAME`; `hydra.sweeper.params` in it says what varies.
"""

import contextlib
import datetime
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from conf import chain, shorthand
from conf.chain import Options
from conf.composition import Composer, opened
from conf.explain import explain
from conf.resolve import resolve
from esvit.errors import OptionError
from launchers.space import Dimension

_FLAGS = ("-m", "--multirun")
_RECIPE = re.compile(r"\+{0,2}sweeps=(?P<name>.*)")
_HAVE_RECIPES = ("sweeps", "experiment", "task")  # groups whose files may say what varies
_LONGEST_NAME = 80


def is_sweep(arguments: list[str]) -> bool:
    return any(argument in _FLAGS or _RECIPE.fullmatch(argument) for argument in arguments)


@dataclass(frozen=True, kw_only=True)
class Child:
    """One run of a sweep.

    name         its folder's name in the sweep's folder
    varied       the options that the sweep gives it, as typed
    options      all of its options, as `resolve` gives them
    evaluations  those of its `then`
    teachers     the evaluation of its kept teachers, or None
    """

    name: str
    varied: dict[str, str]
    options: Options
    evaluations: list[Options]
    teachers: Options | None


@dataclass(kw_only=True)
class Sweep:
    """A command line with `-m`, while `open_sweep` is open.

    folder  where the children's run folders are
    name    of the recipe, else of the task
    search  the options of the search, or None: every combination
    fixed   words that every child has, and the parsed words that vary
    """

    folder: Path
    name: str
    search: dict[str, Any] | None
    fixed: list[str]
    varying: list[Override]
    composer: Composer

    def children(self) -> list[Child]:
        """Every combination, the last option that varies changing fastest."""
        values = [[(_key(override), value) for value in _values(override)] for override in self.varying]
        return [self.child(number, dict(pairs)) for number, pairs in enumerate(itertools.product(*values))]

    def space(self) -> list[Dimension]:
        """What a search may choose from."""
        return [_dimension(override) for override in self.varying]

    def described(self) -> dict[str, list[str] | str]:
        """What varies: the values of each option, or the interval as typed."""
        return {_key(each): each.get_value_string() if each.is_interval_sweep() else _values(each) for each in self.varying}

    def child(self, number: int, varied: dict[str, str]) -> Child:
        """Raises OptionError that names the child if it cannot be composed."""
        name = _child_name(number, varied)
        try:
            options = self._compose(varied, name)
            return Child(
                name=name,
                varied=varied,
                options=options,
                evaluations=chain.after_training(options, self.composer),
                teachers=chain.of_kept_teachers(options, self.composer),
            )
        except (HydraException, OmegaConfBaseException, OptionError) as error:
            raise _OfChild(f"{name}: {explain(error)}") from None

    def _compose(self, varied: dict[str, str], name: str) -> Options:
        words = shorthand.expand([*self.fixed, *(f"{key}={value}" for key, value in varied.items())])
        config = self.composer.compose(words)
        self._place(config, name)
        return resolve(config)

    def _place(self, config: DictConfig, name: str) -> None:
        """A folder and a name in the tracking store of its own. A task without a run folder writes where it was told to."""
        if config.task.has_run_folder:
            config.output_dir = str(self.folder / name)
        if "run_name" in config.tracking:
            config.tracking.run_name = f"{self.name} {name}"
            with flag_override(config.tracking.tags, "struct", False):
                config.tracking.tags.sweep = self.folder.name


class _OfChild(OptionError):
    """A message that is whole already."""

    def __init__(self, message: str):
        Exception.__init__(self, message)

    def __str__(self) -> str:
        return str(self.args[0])


@contextlib.contextmanager
def open_sweep(arguments: list[str]) -> Iterator[Sweep]:
    """Read a command line for which `is_sweep` holds. Children can be composed until the block ends.

    Raises OptionError where nothing varies, where a range is empty, and for an option of a single run.
    """
    words = [argument for argument in arguments if argument not in _FLAGS]
    if flags := [word for word in words if word.startswith("-")]:
        raise OptionError("-m", f"cannot go together with {flags[0]}", "leave one of them away")
    with opened() as composer:
        typed = composer.parse(words)
        _check_values(typed)
        words = shorthand.with_task([*_recipe_words(composer, typed), *words])
        by_key = {_key(override): override for override in composer.parse(words)}
        varying = [override for override in by_key.values() if override.is_sweep_override()]
        fixed = [override.input_line or "" for override in by_key.values() if not override.is_sweep_override()]
        if not varying:
            raise OptionError("-m", "nothing varies", "give an option several values (seed=0,1,2), or a recipe (+sweeps=NAME)")
        _check_values(varying)
        config = composer.compose(shorthand.expand([_first(override) for override in by_key.values()]))
        search: Any = OmegaConf.to_container(config.search, enum_to_str=True) if config.search.trials else None
        if search is None:
            _refuse_intervals(varying)
        name = _recipe(words) or str(HydraConfig.get().runtime.choices["task"])
        folder, fixed = _folder(fixed, config, name)
        yield Sweep(folder=folder, name=name, search=search, fixed=fixed, varying=varying, composer=composer)


def _recipe_words(composer: Composer, typed: list[Override]) -> list[str]:
    """What the typed recipe, or experiment, has vary, and its task, which decides how other words are read."""
    files = [each for each in typed if not each.is_sweep_override() and (each.is_hydra_override() or each.key_or_group in _HAVE_RECIPES)]
    if not files:
        return []
    composer.compose([each.input_line or "" for each in files])
    node = HydraConfig.get()
    return [f"task={node.runtime.choices['task']}"] + [f"{key}={value}" for key, value in (node.sweeper.params or {}).items()]


def _folder(fixed: list[str], config: DictConfig, name: str) -> tuple[Path, list[str]]:
    """The sweep's folder: `output_dir`, where that is typed and the task has run folders. And the words without it."""
    typed = [word for word in fixed if word.startswith("output_dir=")]
    if not typed or not config.task.has_run_folder:
        now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        return Path(f"outputs/sweeps/{now}_{name}").absolute(), fixed
    if "${" in typed[0]:
        found = f"'{typed[0].partition('=')[2]}' refers to other options"
        raise OptionError("output_dir", found, "name the folder of the whole sweep; each run gets one in it")
    return Path(config.output_dir).absolute(), [word for word in fixed if word not in typed]


def _recipe(words: list[str]) -> str | None:
    names = [match["name"] for match in map(_RECIPE.fullmatch, words) if match]
    return names[-1].replace("/", "_") if names else None


def _check_values(overrides: list[Override]) -> None:
    for override in filter(Override.is_sweep_override, overrides):
        value = override.value()
        if not isinstance(value, IntervalSweep):
            if not _values(override):
                found = f"{override.get_value_string()} is empty"
                raise OptionError(override.key_or_group, found, "give the smaller end first; the last one is not part of a range")
            continue
        assert value.start is not None and value.end is not None
        if not value.start < value.end:
            raise OptionError(
                override.key_or_group, f"the interval from {value.start} to {value.end} is empty", "give the smaller end first"
            )
        if "log" in value.tags and value.start <= 0:
            found = f"an interval from {value.start} has no logarithm"
            raise OptionError(override.key_or_group, found, "begin above 0, or leave the tag away")


def _refuse_intervals(overrides: list[Override]) -> None:
    for override in filter(Override.is_interval_sweep, overrides):
        remedy = "give values (1,2,3), or a number of runs to search it with: search.trials=30"
        raise OptionError(override.key_or_group, "an interval has no list of values", remedy)


def _values(override: Override) -> list[str]:
    return list(override.sweep_string_iterator())


def _dimension(override: Override) -> Dimension:
    value = override.value()
    name = _key(override)
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        is_whole = isinstance(value.start, int) and isinstance(value.end, int)
        return Dimension(name=name, low=value.start, high=value.end, is_whole=is_whole, is_logarithmic="log" in value.tags)
    if isinstance(value, RangeSweep) and isinstance(value.start, int) and isinstance(value.step, int) and value.step > 0:
        numbers = list(value.range())
        return Dimension(name=name, low=numbers[0], high=numbers[-1], step=value.step, is_whole=True)
    return Dimension(name=name, choices=_values(override))


def _child_name(number: int, varied: dict[str, str]) -> str:
    """ "03_learning_rate=0.001_seed=1": the last part of each option's name, and what is fit for a file name."""
    parts = [f"{key.rpartition('.')[2].lstrip('+')}={value}" for key, value in varied.items()]
    readable = re.sub(r"[^\w.=,+-]+", "-", re.sub(r"[][{}'\"\\]", "", "_".join(parts))).strip("-")
    return f"{number:02d}_{readable}"[:_LONGEST_NAME].rstrip("-_.")


def _key(override: Override) -> str:
    return override.get_key_element()


def _first(override: Override) -> str:
    """The word with the first of its values."""
    if not override.is_sweep_override():
        return override.input_line or ""
    value = override.value()
    first = value.start if isinstance(value, IntervalSweep) else next(iter(_values(override)), "null")
    return f"{_key(override)}={first}"
