"""From a composed config to plain data: nothing missing, nothing unknown, every reference resolved."""

import dataclasses
import difflib
import itertools
import re
import warnings
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from conf.schema import augmentations, data, models, running, sampling, tasks, training
from esvit.errors import OptionError

_CONF = Path(__file__).parent
_OF_THE_COMMAND = {"plan", "planning", "search"}  # groups that no task refers to
_REFERENCE = re.compile(r"\$\{(\w+)")


def resolve(config: DictConfig) -> dict[str, Any]:
    """Every option as plain containers, ready to be shipped.

    Added to the options: `chosen` (what a user chose: no key that only refers to another option, no `_target_`; the
    run's config.yaml) and `has_run_folder` (whether the task writes into a run folder of its own).

    A group that the task does not refer to, e.g. `data` where no images are needed, is not asked for its values and not part of `chosen`.

    Raises OptionError for an option without a value, and for one added with `+` that no schema knows.
    """
    _refuse_unknown(config, "")
    references = _plain(config, resolve=False)
    used = _used(references)
    _warn_of_idle_options(references, used)
    missing = sorted(name for name in OmegaConf.missing_keys(config) if name.partition(".")[0] in used)
    if missing:
        raise OptionError(missing[0], "has no value", f"give one, e.g. {missing[0]}=...")
    options = _plain(config, resolve=True)
    options["output_dir"] = _folder(options["output_dir"], is_fresh="${now" in references["output_dir"])
    has_run_folder = options["task"].pop("has_run_folder")
    choices = HydraConfig.get().runtime.choices
    plan = options.pop("plan")
    of_the_run = {key: value for key, value in options.items() if key in used or not isinstance(value, dict)}
    options["chosen"] = _drop_references(references, of_the_run, top=True)
    options["chosen"]["choices"] = {name: choice for name, choice in choices.items() if name in used}
    options |= {"has_run_folder": has_run_folder, "plan": plan}
    return options


def _used(references: dict[str, Any]) -> set[str]:
    """Top-level names that the run depends on: its task, where it happens, and all that these refer to."""
    used: set[str] = set()
    left = ["task", "tracking", "launcher", "runtime"]
    while left:
        name = left.pop()
        if name in references and name not in used:
            used.add(name)
            left += _REFERENCE.findall(str(references[name]))
    return used


def _warn_of_idle_options(references: dict[str, Any], used: set[str]) -> None:
    """Tell which typed options belong to a group that the task does not refer to."""
    groups = {name for name, value in references.items() if isinstance(value, dict)} - used - _OF_THE_COMMAND
    task = HydraConfig.get().runtime.choices["task"]
    for override in HydraConfig.get().overrides.task:
        name = override.partition("=")[0].lstrip("+~")
        group = name.partition(".")[0]
        if "." in name and group in groups:
            warnings.warn(f"{name} has no effect: task={task} uses no {group}", stacklevel=2)


def _plain(config: DictConfig, *, resolve: bool) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=resolve, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _folder(output_dir: str, *, is_fresh: bool) -> str:
    """Absolute path; a default name that exists already (two runs in one second) gets a number."""
    path = Path(output_dir).absolute()
    candidates = itertools.chain([path], (path.with_name(f"{path.name}_{number}") for number in itertools.count(2)))
    return str(next(each for each in candidates if not (is_fresh and each.exists())))


def _drop_references(raw: dict[Any, Any], plain: dict[str, Any], *, top: bool = False) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in plain.items():
        source = raw[key]
        is_reference = isinstance(source, str) and source.startswith("${") and source.endswith("}") and not top
        if is_reference or key in ("_target_", "_partial_"):
            continue
        kept[key] = _drop_references(source, value) if isinstance(value, dict) and isinstance(source, dict) else value
    return kept


def _refuse_unknown(node: DictConfig, prefix: str) -> None:
    kind = OmegaConf.get_type(node)
    known = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else None
    for key in map(str, node):
        name = f"{prefix}{key}"
        if known is not None and str(key) not in known:
            own = [f"{prefix}{each}" for each in known if not OmegaConf.is_interpolation(node, each)]
            raise OptionError(name, "no such option", remedy_for_unknown(name, own))
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig):
            _refuse_unknown(value, f"{name}.")


def remedy_for_unknown(name: str, known: list[str]) -> str:
    """What to type instead of the unknown option `name`, where its neighbours are `known`."""
    known = [each for each in known if not each.rsplit(".", 1)[-1].startswith("_") and each != "hydra"]
    elsewhere = _choices_that_know(name)
    if elsewhere:
        return f"it is an option of {' or '.join(elsewhere[:3])}"
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(sorted(known))}" if known else "this choice has no options; see python run.py --help"


def _names(schema: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(schema)}


def _choices_that_know(name: str) -> list[str]:
    """Other choices of the group, e.g. "launcher=gpus" for launcher.processes."""
    group, _, option = name.partition(".")
    modules = (models, augmentations, data, sampling, training, running, tasks)
    schemas = {name: schema for module in modules for name, schema in module.SCHEMAS.items()}
    owners = [schema for (each, schema), node in schemas.items() if each == group and option in _names(node)]
    presets = {file.stem: file.read_text() for file in sorted((_CONF / group).glob("*.yaml"))}
    return [f"{group}={preset}" for preset, text in presets.items() if any(f"/schema/{group}/{owner}@" in text for owner in owners)]
