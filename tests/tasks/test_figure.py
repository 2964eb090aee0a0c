"""task=figure: both files, with and without runs."""

from pathlib import Path
from typing import Any

import pytest

from esvit.errors import OptionError
from esvit.tasks.figure import Figure
from tests.comparison.folders import make_run, options


def figure(folder: Path, **changes: Any) -> None:
    chosen: dict[str, Any] = {
        "runs": [], "experiment": None, "uri": "sqlite:///nowhere.db", "linear": ["linear/top1"], "knn": ["knn/teacher"],
        "published": True, "dataset": None, "folder": str(folder),
    }  # fmt: skip
    Figure(**(chosen | changes)).run()


def test_runs_are_drawn_beside_the_published_models(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a", options("mine"), course={"knn/teacher": [61.0]}, final={"knn/teacher": 61.0})
    make_run(
        tmp_path / "runs" / "cost", options("cost", choices__task="throughput"), course={"images_per_second": [100.0]},
        final={"images_per_second": 100.0, "parameters": 2e6, "flops": 1e8},
        protocol={"task": "throughput", "machine": "Some CPU", "precision": "fp32"},
    )  # fmt: skip
    figure(tmp_path / "out", runs=[str(tmp_path / "runs")], published=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["efficiency.png", "efficiency.svg"]
    svg = (tmp_path / "out" / "efficiency.svg").read_text()
    assert "mine, 2 M" in svg and "ours, throughput on Some CPU, fp32" in svg
    assert "efficiency.png" in capsys.readouterr().out


def test_runs_without_a_measured_throughput_are_refused(tmp_path):
    make_run(tmp_path / "a", options("mine"), course={"knn/teacher": [61.0]}, final={"knn/teacher": 61.0})
    with pytest.raises(OptionError, match=r"^task\.runs: no finished run among them .* task=throughput"):
        figure(tmp_path / "out", runs=[str(tmp_path / "a")])
    assert not (tmp_path / "out").exists()


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"^task\.runs: there is nothing to draw"):
        figure(tmp_path / "out", published=False)
