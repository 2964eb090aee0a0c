"""What a command line with `-m` becomes: children, their options, folders and names; and recipes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

import conf.schema
from conf.resolve import resolve
from conf.sweep import Child, is_sweep, open_sweep
from conf.sweep_launch import Program, launch
from esvit.errors import OptionError
from launchers.job import Job
from run import admit, build

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))
DATA = ("data.root=/images/train", "data.val_root=/images/val")
HERE = (*DATA, "tracking=none", "launcher=local")


@pytest.fixture(autouse=True, scope="module")
def schemas():
    conf.schema.register()
    yield
    HydraConfig.instance().cfg = None


def children(*words: str) -> list[Child]:
    with open_sweep([*words]) as sweep:
        return sweep.children()


def by_hydra(*words: str) -> dict:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", list(words), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return resolve(config)


def test_every_combination_is_a_child_with_a_folder_of_its_own(tmp_path):
    folder = tmp_path / "sweep"
    words = (*DATA, "backbone=swin_tiny,vit_small", "log_every=range(1,6,2)", f"output_dir={folder}")
    found = children("-m", *words)
    assert [child.name for child in found] == [
        "00_backbone=swin_tiny_log_every=1",
        "01_backbone=swin_tiny_log_every=3",
        "02_backbone=swin_tiny_log_every=5",
        "03_backbone=vit_small_log_every=1",
        "04_backbone=vit_small_log_every=3",
        "05_backbone=vit_small_log_every=5",
    ]
    last = found[-1]
    assert last.varied == {"backbone": "vit_small", "task.log_every": "5"}
    assert last.options["output_dir"] == str(folder / last.name)
    assert last.options["tracking"]["tags"] == {"sweep": "sweep"}
    assert not folder.exists()


def test_a_child_is_what_hydra_composes_of_its_words():
    """Whether its values are set on a copy or its files read anew."""
    fixed = (*DATA, "tracking=none", "seed=3", "epochs=7")
    for child in children("-m", *fixed, "loss=view,view_region", "optimizer.betas=[0.9,0.95],[0.8,0.99]")[::3]:
        own = (f"{key}={value}" for key, value in child.varied.items())
        assert child.options == by_hydra(*fixed, f"output_dir='{child.options['output_dir']}'", *own)


def test_a_typed_value_narrows_a_recipe_and_evaluations_come_along():
    found = children("+sweeps=ablation_region", *DATA, "loss=view", "seed=1,2", "then=[knn]", "evaluate_every=5")
    assert [child.varied for child in found] == [{"seed": "1"}, {"seed": "2"}]
    assert [child.options["loss"]["_target_"] for child in found] == ["esvit.losses.view.ViewLoss"] * 2
    for child in found:
        (evaluation,) = child.evaluations
        assert evaluation["task"]["_target_"].endswith("Knn")
        assert evaluation["output_dir"].startswith(child.options["output_dir"])
        assert child.teachers is not None


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_it_is_and_composes(recipe):
    head = (ROOT / "sweeps" / f"{recipe}.yaml").read_text()
    for title in ("Command", "Varies", "Cost", "Expect"):
        assert re.search(rf"^# {title}", head, re.MULTILINE), title
    assert f"+sweeps={recipe}" in head
    with open_sweep([f"+sweeps={recipe}", *DATA]) as sweep:
        first = sweep.child(0, {each.name: each.first() for each in sweep.space()})
        assert set(first.varied) == set(sweep.described())
        if sweep.search is not None:
            assert first.options["task"]["online_knn"]["every_epochs"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epochs=3"], "-m: nothing varies"),
        (["seed=range(3,3)"], r"seed: range\(3,3\) is empty"),
        (["optimizer.learning_rate=interval(1e-4,1e-2)"], "optimizer.learning_rate: an interval has no list of values"),
        (["optimizer.learning_rate=interval(2,1)", "search.trials=3"], "the interval from 2.0 to 1.0 is empty"),
        (["optimizer.learning_rate=tag(log,interval(0,1))", "search.trials=3"], "has no logarithm"),
        (["seed=1,2", "--cfg", "job"], "-m: cannot go together with --cfg"),
        (["seed=1,2", "output_dir=out_${seed}"], "output_dir: .* refers to other options"),
        (["seed=1,2", "backbone.dim=96,x"], "01_seed=1_dim=x: backbone.dim: Value 'x'"),
        (["seed=1,2", "then=[zoom]"], "00_seed=1: then: 'zoom' is no evaluation"),
    ],
)
def test_a_mistake_is_one_line_and_names_the_child(words, message):
    with pytest.raises(OptionError, match=message):
        children("-m", *DATA, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher=local,gpus"], "launcher: differs between 00_launcher=local and 01_launcher=gpus"),
        (["seed=1,2", "plan=true"], "plan: is for a single run"),
        (["seed=1,2", "search.trials=3"], "search.metric: 'knn/teacher' is not measured"),
    ],
)
def test_what_cannot_be_launched_is_refused_before_anything_is_written(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=message):
        launch(["-m", *HERE, *words], Program(admit=admit, job=lambda options: pytest.fail("no job"), build=build))
    assert list(tmp_path.iterdir()) == []


def test_children_run_once_and_values_may_be_added(tmp_path, program, capsys):
    """The same command finds them finished; a value at the end is one more child, another one at the same place a mistake."""
    folder = tmp_path / "sweep"

    def job(options: dict) -> Job:
        run_folder = options["output_dir"]
        config = {"folder": run_folder, "x": options["optimizer"]["learning_rate"], "seconds": 0, "config": options["chosen"]}
        return Job(function="run:train", config=config, folder=run_folder, root=str(program))

    def sweep(values: str) -> str:
        words = ["-m", *HERE, f"optimizer.learning_rate={values}", f"output_dir={folder}"]
        launch(words, Program(admit=admit, job=job, build=build))
        return capsys.readouterr().out

    sweep("0.1,0.2")
    assert yaml.safe_load((folder / "sweep.yaml").read_text())["children"] == {
        "00_learning_rate=0.1": {"optimizer.learning_rate": "0.1"},
        "01_learning_rate=0.2": {"optimizer.learning_rate": "0.2"},
    }
    assert len(list(folder.glob("*/metrics.json"))) == 2
    assert f"all 2 runs of {folder} have finished" in sweep("0.1,0.2")
    assert "02_learning_rate=0.3" in sweep("0.1,0.2,0.3")
    assert [path.read_text().count("\n") for path in sorted(folder.glob("*/attempts.jsonl"))] == [1, 1, 1]
    with pytest.raises(OptionError, match="holds a sweep whose run 00 is 00_learning_rate=0.1, not 00_learning_rate=0.5"):
        sweep("0.5,0.2")


def test_sweeps_are_recognised():
    assert all(map(is_sweep, (["-m", "a=1,2"], ["--multirun"], ["+sweeps=window"], ["epochs=3", "sweeps=window"])))
    assert not is_sweep(["epochs=3", "name=sweeps", "output_dir=outputs/-m"])


def test_composing_imports_no_torch():
    code = "import sys, conf.schema, conf.sweep_launch; conf.schema.register(); print('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
