"""Options and classes say the same: every schema against its target's signature, every preset and experiment against the schemas."""

import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import MISSING, OmegaConf, open_dict

import conf.schema
from conf.resolve import resolve
from conf.schema import augmentations, data, models, root, running, sampling, tasks, training
from run import build
from tests.command_line.commands import ROOT

CONF = ROOT / "conf"
GROUPS = sorted(path.name for path in CONF.iterdir() if any(path.glob("*.yaml")))
AT_RUN_TIME = {"esvit.schedules.Schedules": {"epochs", "steps_per_epoch", "learning_rate"}}  # given by the task, not by an option


def presets(group: str) -> list[str]:
    return sorted(str(path.relative_to(CONF / group).with_suffix("")) for path in (CONF / group).rglob("*.yaml"))


def schemas() -> Iterator[Any]:
    """Every registered schema and those inside of them, once each."""
    open_ones = [node for module in (models, augmentations, data, sampling, training, running, tasks) for node in module.SCHEMAS.values()]
    seen = []
    while open_ones:
        schema = open_ones.pop()
        if schema in seen:
            continue
        seen.append(schema)
        for each in dataclasses.fields(schema):
            if dataclasses.is_dataclass(each.type) and isinstance(each.type, type):
                open_ones.append(each.type)
    return iter(sorted(seen, key=lambda schema: schema.__name__))


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """Composes command lines in this process, as plain data; options without a default get a value."""
    conf.schema.register()
    folder = str(tmp_path_factory.mktemp("schema"))
    values = {"data.root": folder, "data.train_list": f"{folder}/list.csv"}
    values |= {"backbone.name": "convnextv2_atto", "launcher.template": "{command}"}

    def options(*overrides: str) -> dict:
        config = compose("config", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        for name in OmegaConf.missing_keys(config) & set(values):
            OmegaConf.update(config, name, values[name])
        return resolve(config)

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield options
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize("schema", schemas(), ids=lambda schema: schema.__name__)
def test_a_schema_has_the_options_of_its_class(schema):
    """Options without a default have to be options; an option that the class does not know would fail at the start of every run."""
    fields = {each.name: each for each in dataclasses.fields(schema)}
    target = str(fields["_target_"].default)
    parameters = inspect.signature(get_object(target)).parameters
    required = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    given = set(fields) - {"_target_", "_partial_", "has_run_folder"}
    assert required - given - AT_RUN_TIME.get(target, set()) == set()
    assert given - set(parameters) == set()


@pytest.mark.parametrize("schema", [*schemas(), root.Root], ids=lambda schema: schema.__name__)
def test_every_option_has_a_comment_or_a_telling_name(schema):
    """The comment is the help text. Without one: groups, references, and plain words such as `brightness`."""
    source = [line for part in schema.__mro__[:-1] for line in inspect.getsource(part).splitlines()]
    for each in dataclasses.fields(schema):
        line = next(line for line in source if line.strip().startswith(f"{each.name}:"))
        if each.name.startswith("_") or each.default is MISSING or "${" in line or "#" in line:
            continue
        assert len(each.name) > 2, line


def test_every_preset_composes_and_resolves(composed):
    """One choice of each group at a time, so that all choices take as many compositions as the longest group has."""
    by_group = {group: presets(group) for group in GROUPS if group not in ("experiment", "task")}
    for choices in itertools.zip_longest(*by_group.values()):
        chosen = [f"{group}={choice}" for group, choice in zip(by_group, choices, strict=True) if choice is not None]
        options = composed(*chosen)
        assert set(by_group) <= set(options)


@pytest.mark.parametrize("task", presets("task"))
def test_every_task_composes_and_resolves(task, composed):
    options = composed(f"task={task}")
    assert isinstance(options["has_run_folder"], bool)
    assert "_target_" not in str(options["chosen"])


@pytest.mark.parametrize("experiment", presets("experiment"))
def test_every_experiment_composes_and_its_task_can_be_built(experiment, composed):
    options = composed(f"experiment={experiment}")
    assert type(build(options["task"])).__module__ == options["task"]["_target_"].rpartition(".")[0]
    build(options["launcher"])
    build(options["tracking"])


@pytest.mark.parametrize("experiment", presets("experiment"))
def test_every_experiment_says_what_it_is(experiment):
    head = list(
        itertools.takewhile(lambda line: line.startswith("#"), (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines())
    )
    assert head[0] == "# @package _global_"
    assert "python run.py" in "".join(head)


def test_a_default_lives_in_the_schema_only():
    """Classes that options configure have no defaults for them, but for those that stand alone in other programs too."""
    for schema in schemas():
        target = next(str(each.default) for each in dataclasses.fields(schema) if each.name == "_target_")
        options = {each.name for each in dataclasses.fields(schema)}
        parameters = inspect.signature(get_object(target)).parameters
        assert [name for name in options & set(parameters) if parameters[name].default is not inspect.Parameter.empty] == [], target


def test_the_documented_groups_are_those_that_exist():
    contract = {
        "task",
        "backbone",
        "head",
        "loss",
        "augmentation",
        "data",
        "sampler",
        "optimizer",
        "schedule",
        "tracking",
        "launcher",
        "runtime",
        "experiment",
    }
    assert set(GROUPS) == contract
    assert {each.name for each in dataclasses.fields(root.Root)} >= contract - {"experiment"}


def test_presets_hold_no_targets():
    """One grep of the schemas shows which class an option configures."""
    files: list[Path] = sorted(CONF.rglob("*.yaml"))
    assert [file for file in files if "_target_" in file.read_text()] == []
