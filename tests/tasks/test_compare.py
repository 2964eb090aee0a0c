"""task=compare: files for people and programs, the best checkpoint registered, and mistakes named; without torch."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esvit.errors import OptionError
from esvit.tasks.compare import Compare
from tests.command_line.commands import ROOT
from tests.comparison.folders import make_run, options

WRITTEN = ["compare.html", "compare.md", "groups.csv", "runs.csv"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two learning rates with two seeds each: 70 and 72, 60 and 62; and a run that failed."""
    top = tmp_path_factory.mktemp("sweep")
    for rate, start in ((0.1, 70.0), (0.2, 60.0)):
        for seed in (0, 1):
            value = start + 2 * seed
            config = options(f"lr{rate}", optimizer__learning_rate=rate, seed=seed)
            make_run(top / f"{rate}_{seed}", config, course={"knn/teacher": [40.0, value]}, final={"knn/teacher": value})
    config = options("lr0.1", optimizer__learning_rate=0.1, seed=2)
    make_run(top / "failed", config, course={"knn/teacher": [9.0]}, final=None, status="FAILED")
    return top


def compare(folder: Path, **changes: Any) -> None:
    chosen: dict[str, Any] = {
        "runs": [], "experiment": None, "uri": "sqlite:///nowhere.db", "metrics": ["knn/teacher", "loss/total"], "best": "auto",
        "rank_by": None, "cost": None, "register": None, "folder": str(folder), "title": "sweep",
    }  # fmt: skip
    Compare(**(chosen | changes)).run()


def test_a_sweep_becomes_a_page_and_tables(sweep, tmp_path, capsys):
    compare(tmp_path / "out", runs=[str(sweep)])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == WRITTEN
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["lr0.1", "2+1†", "71.00", "±", "1.41"]
    assert any(line.startswith("note: 1 of 5 runs has not finished") for line in out)
    with (tmp_path / "out" / "groups.csv").open() as file:
        first, second = csv.DictReader(file)
    columns = ["optimizer.learning_rate", "knn/teacher final mean", "runs", "finished"]
    assert [first[name] for name in columns] == ["0.1", "71.0", "3", "2"]
    assert [second[name] for name in columns] == ["0.2", "61.0", "2", "2"]


def test_mistakes_are_named_and_nothing_is_compared(sweep, tmp_path):
    for changes, message in (
        ({}, "task.runs: nothing to compare"),
        ({"runs": ["no_such_folder"]}, "task.runs: 'no_such_folder' is neither"),
        ({"experiment": "esvit"}, "tracking.uri: there is no store"),
        ({"experiment": "esvit", "uri": None}, "tracking.uri: there is no store to read from"),
        ({"runs": [str(sweep)], "rank_by": "linear/*"}, "task.rank_by: no run has a metric"),
    ):
        with pytest.raises(OptionError, match=f"^{message}"):
            compare(tmp_path / "out", **changes)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OptionError, match="^output_dir: cannot write to"):
        compare(file, runs=[str(sweep)])


def test_what_cannot_be_registered_is_told(sweep, tmp_path):
    with pytest.raises(OptionError, match=r"^task\.register: the best run, lr0\.1, was tracked nowhere"):
        compare(tmp_path, runs=[str(sweep)], register="sweep")
    make_run(tmp_path / "runs" / "a", options("a"), course={"loss/total": [3.0]}, final={"loss/total": 3.0})
    make_run(tmp_path / "runs" / "b", options("b", head__prototypes=9), course={"loss/total": [4.0]}, final={"loss/total": 4.0})
    with pytest.raises(OptionError, match=r"^task\.register: the values of loss/total do not compare \(head\.prototypes differ\)"):
        compare(tmp_path / "out", runs=[str(tmp_path / "runs")], register="sweep")


def test_the_command_imports_no_torch(sweep, tmp_path):
    program = "import sys; sys.argv[0] = 'run.py'; import run; run.main(); sys.exit('torch' in sys.modules)"
    arguments = ["task=compare", f"runs=[{sweep}]", "name=mine", f"output_dir={tmp_path / 'out'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<h1>mine</h1>" in (tmp_path / "out" / "compare.html").read_text()
