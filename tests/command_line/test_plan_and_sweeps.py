"""plan=true and -m from the command line, as far as one process goes."""

import sqlite3
from pathlib import Path

from tests.command_line.commands import TINY, succeeded


def test_a_plan_prints_the_script_and_writes_nothing(commands, tmp_path):
    """Without data, SLURM or a GPU."""
    slurm = ("launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=4", "planning.images=6400")
    outcome = succeeded(commands.run(*TINY, *slurm, "plan=true", "accumulation=2", folder=tmp_path))
    assert "6400 (planning.images), 64 per step (4 x 8 processes x 2 micro-batches)" in outcome.out
    assert "steps          200, 100 per epoch, 2 epochs" in outcome.out
    assert "#SBATCH --nodes=2" in outcome.out
    assert list(Path(tmp_path).iterdir()) == []


def test_a_sweep_without_values_is_one_line(commands):
    outcome = commands.run("-m", "data.root=/images")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "error: -m: nothing varies; give an option several values (seed=0,1,2), or a recipe (+sweeps=NAME)\n"


def test_a_search_needs_a_sweep(commands):
    outcome = commands.run("data.root=/images", "search.trials=3")
    assert outcome.code == 1 and outcome.err.startswith("error: search.trials: a search needs options that vary; add -m")


REFUSING = ("launcher=command", "launcher.template='echo full >&2; exit 3'")


def test_a_run_that_the_scheduler_refuses_leaves_nothing(commands, tiny, tmp_path):
    store = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    outcome = commands.run(*tiny, *REFUSING, "tracking=mlflow", store, f"output_dir={tmp_path / 'run'}")
    assert outcome.code == 1 and outcome.err.startswith("error: launcher.template: ")
    assert not (tmp_path / "run").exists()
    assert runs_in(tmp_path / "mlflow.db") == {}


def test_a_run_that_is_refused_when_it_goes_on_keeps_its_folder(commands, tiny, tmp_path):
    store = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    options = (*tiny, "tracking=mlflow", store, f"output_dir={tmp_path / 'run'}")
    succeeded(commands.run(*options, "max_steps=2"))
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert commands.run(*options, "max_steps=4", *REFUSING).code == 1
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log
    assert list(runs_in(tmp_path / "mlflow.db").values()) == ["FAILED"]


def test_a_sweep_that_the_scheduler_refuses_leaves_nothing(commands, tiny, tmp_path):
    store = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    outcome = commands.run("-m", *tiny, *REFUSING, "tracking=mlflow", store, "seed=0,1", f"output_dir={tmp_path / 'sweep'}")
    assert outcome.code == 1 and outcome.err.startswith("error: launcher.template: ")
    assert not (tmp_path / "sweep").exists()
    assert runs_in(tmp_path / "mlflow.db") == {}


def runs_in(database: Path) -> dict[str, str]:
    """Name -> status of the runs that a page of MLflow shows."""
    with sqlite3.connect(database) as connection:
        return dict(connection.execute("select name, status from runs where lifecycle_stage = 'active'"))
