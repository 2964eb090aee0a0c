"""Run folders are read as they are: finished, interrupted, killed, damaged, and with what evaluations found."""

import json
import math
import shutil
from pathlib import Path

import pytest

from esvit.comparison.runs import Run, find_run_folders, images_of, read_folder, read_folders
from esvit.tracking.base import NoTracking
from tests.comparison.folders import PROTOCOL, make_run, options


def everything(name: str) -> bool:
    return True


def read(folder: Path) -> Run:
    return read_folder(folder, wanted=everything)


def course(run: Run, metric: str, **protocol: object) -> list[tuple[int, float]]:
    """The points of the metric, of the one series that has it."""
    (series,) = [each for each in run.series if each.metric == metric]
    return list(series.points)


def test_a_finished_run_has_its_options_its_course_and_its_final_values(tmp_path):
    run = read(
        make_run(tmp_path / "a", options("one"), course={"loss/total": [3.0, 2.0]}, final={"loss/total": 2.0, "images_per_second": 5.0})
    )
    assert (run.name, run.status, run.steps, run.task) == ("one", "finished", 20, "pretrain")
    assert run.options["optimizer.learning_rate"] == 0.1
    assert course(run, "loss/total") == [(10, 3.0), (20, 2.0)]
    assert course(run, "images_per_second") == [(20, 5.0)]


def test_only_wanted_metrics_are_kept(tmp_path):
    folder = make_run(tmp_path / "a", options("one"), course={"loss/total": [3.0], "memory/peak_gb": [1.0]}, final={"loss/total": 3.0})
    run = read_folder(folder, wanted=lambda name: name == "loss/total")
    assert {series.metric for series in run.series} == {"loss/total"}


def test_hours_are_those_of_training_where_the_run_measured_its_speed(tmp_path):
    final = {"images_seen": 7200.0, "images_per_second": 2.0}
    assert read(make_run(tmp_path / "a", options("one"), course={"loss/total": [1.0]}, final=final)).final["hours"] == 1.0


@pytest.mark.parametrize(("status", "told"), [("KILLED", "interrupted"), ("FAILED", "failed")])
def test_a_run_that_did_not_come_to_its_end_has_its_last_values(tmp_path, status, told):
    run = read(make_run(tmp_path / "a", options("one"), course={"loss/total": [3.0, 2.5]}, final=None, status=status))
    assert (run.status, run.is_finished, run.final["loss/total"]) == (told, False, 2.5)


def test_a_run_whose_process_is_gone_was_killed(tmp_path):
    folder = make_run(tmp_path / "a", options("one"), course={"loss/total": [3.0]}, final=None, status="RUNNING")
    assert read(folder).status == "killed"


def test_values_that_are_not_finite_are_read_as_such_and_are_not_the_best(tmp_path):
    run = read(make_run(tmp_path / "a", options("one"), course={"loss/total": [3.0, math.nan]}, final={"loss/total": math.nan}))
    (series,) = [each for each in run.series if each.metric == "loss/total"]
    assert math.isnan(series.final)
    assert series.best(lower=True) == 3.0


def test_an_evaluation_counts_for_the_run_that_it_evaluated_at_the_step_of_the_weights(tmp_path):
    host = make_run(tmp_path / "host", options("host"), course={"loss/total": [3.0, 2.0]}, final={"loss/total": 2.0})
    for step, top1 in ((10, 50.0), (20, 60.0)):
        final = {"knn/top1_k20": top1, "evaluated_step": step}
        make_run(tmp_path / f"knn_{step}", options("knn"), course={"knn/top1_k20": [top1]}, final=final, protocol=PROTOCOL, host=host)
    gathered = read_folders([tmp_path / "knn_10", tmp_path / "host"], wanted=everything)
    (run,) = gathered.runs
    assert run.name == "host"
    assert course(run, "knn/top1_k20") == [(10, 50.0), (20, 60.0)]


def test_evaluations_by_different_protocols_stay_apart(tmp_path):
    host = make_run(tmp_path / "host", options("host"), course={"loss/total": [3.0]}, final={"loss/total": 3.0})
    for crop in (96, 128):
        protocol = {**PROTOCOL, "frozen": {"crop": crop}}
        make_run(tmp_path / f"{crop}", options("knn"), course={"a": [1]}, final={"knn/top1_k20": crop / 2}, protocol=protocol, host=host)
    values = {series.protocol["frozen"]["crop"]: series.final for series in read(host).series if series.protocol}
    assert values == {96: 48.0, 128: 64.0}


def test_a_repeated_evaluation_counts_once_and_the_last_time(tmp_path):
    host = make_run(tmp_path / "host", options("host"), course={"loss/total": [3.0]}, final={"loss/total": 3.0})
    lines = [{"step": 10, "task": "knn", "time": 0.0, "folder": str(tmp_path / "gone"), "knn/top1_k20": top1} for top1 in (50.0, 55.0)]
    (host / "evaluations.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 20, "ta')
    assert course(read(host), "knn/top1_k20") == [(10, 55.0)]


def test_evaluations_are_found_where_their_host_was_moved_to(tmp_path):
    host = make_run(tmp_path / "host", options("host"), course={"loss/total": [3.0]}, final={"loss/total": 3.0})
    make_run(host / "evaluations" / "knn", options("knn"), course={"a": [1]}, final={"knn/top1_k20": 1.0}, protocol=PROTOCOL, host=host)
    moved = shutil.move(host, tmp_path / "elsewhere")
    (series,) = [each for each in read(Path(moved)).series if each.metric == "knn/top1_k20"]
    assert series.protocol is not None and series.protocol["k"] == 20


def test_the_images_of_an_evaluation_are_those_of_its_own_options(tmp_path):
    host = make_run(tmp_path / "host", options("host"), course={"loss/total": [3.0]}, final={"loss/total": 3.0})
    config = options("knn", data__val_root="/data/stones/val")
    make_run(tmp_path / "knn", config, course={"a": [1]}, final={"knn/top1_k20": 1.0}, protocol=PROTOCOL, host=host)
    names = {series.metric: images_of(read(host), series) for series in read(host).series}
    assert (names["loss/total"], names["knn/top1_k20"]) == ("leaves", "stones")


def test_run_folders_are_found_at_any_depth_but_not_inside_of_each_other(tmp_path):
    for place in ("sweep/1", "sweep/0", "sweep/0/evaluations/knn", "other"):
        make_run(tmp_path / place, options("run"), course={"a": [1]}, final=None)
    (tmp_path / "other" / "code" / "conf").mkdir(parents=True)
    (tmp_path / "other" / "code" / "conf" / "config.yaml").write_text("{}")
    artifacts = tmp_path / "mlartifacts" / "id" / "artifacts"
    artifacts.mkdir(parents=True)
    for name in ("config.yaml", "metrics.json"):
        (artifacts / name).write_text("{}")
    found = [str(folder.relative_to(tmp_path)) for folder in find_run_folders(tmp_path)]
    assert found == ["other", "sweep/0", "sweep/1"]


def test_a_damaged_run_is_left_out_and_named(tmp_path):
    good = make_run(tmp_path / "good", options("good"), course={"a": [1]}, final={"a": 1.0})
    bad = make_run(tmp_path / "bad", options("bad"), course={"a": [1]}, final={"a": 1.0})
    (bad / "metrics.json").write_text("{")
    gathered = read_folders([good, bad], wanted=everything)
    assert [run.name for run in gathered.runs] == ["good"]
    assert len(gathered.notes) == 1 and str(bad) in gathered.notes[0]


def test_a_run_that_still_writes_is_running(tmp_path):
    """Asked from another process, since a process's own lock never keeps it out."""
    import subprocess
    import sys

    folder = make_run(tmp_path / "a", options("one"), course={"loss/total": [3.0]}, final=None, status="RUNNING")
    tracker = NoTracking(host=None).open(run_folder=folder, config={}, is_main=True)
    program = "import sys; from pathlib import Path; from esvit.comparison.runs import read_folder; " \
        "print(read_folder(Path(sys.argv[1]), wanted=lambda name: True).status, 'torch' in sys.modules)"  # fmt: skip
    asked = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    tracker.close("KILLED")
    assert asked.stdout.split() == ["running", "False"]
