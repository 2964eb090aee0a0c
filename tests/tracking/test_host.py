"""Runs that belong together in a store: an evaluation and the run that it evaluates, a job and its run, a sweep and its children."""

import json

from mlflow import MlflowClient

import conf.schema
from conf.sweep_launch import Program, launch
from esvit.tracking.mlflow import send_missing
from launchers.job import Job
from run import admit, build
from tests.tracking.conftest import mlflow_tracking

RESULT = {"knn/top1_k20": 61.5, "step": 3, "evaluated_step": 40}


def evaluate(uri, folder, host):
    tracking = mlflow_tracking(uri, run_name="knn", host=str(host))
    tracker = tracking.open(run_folder=folder, config={"choices": {"task": "knn"}}, is_main=True)
    tracker.resume(0)
    tracker.final(RESULT, 3)
    tracker.close("FINISHED")
    return tracker.run_id


def pretrain(uri, folder):
    tracker = mlflow_tracking(uri).open(run_folder=folder, config={"seed": 1}, is_main=True)
    tracker.resume(0)
    tracker.log(50, 0, {"loss/total": 2.0})
    tracker.close("FINISHED")
    return tracker.run_id


def points(uri, run_id, metric):
    return [(each.step, each.value) for each in MlflowClient(uri).get_metric_history(run_id, metric)]


def test_an_evaluation_is_a_child_of_the_run_that_it_evaluates_and_shows_in_it(store_uri, tmp_path):
    host_id = pretrain(store_uri, tmp_path / "run")
    child_id = evaluate(store_uri, tmp_path / "run" / "evaluations" / "knn", tmp_path / "run")

    assert points(store_uri, host_id, "knn/top1_k20") == [(40, 61.5)]
    assert points(store_uri, host_id, "evaluated_step") == []
    assert MlflowClient(store_uri).get_run(child_id).data.tags["mlflow.parentRunId"] == host_id
    (line,) = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["step"], record["task"], record["knn/top1_k20"]) == (40, "knn", 61.5)
    assert record["folder"] == str(tmp_path / "run" / "evaluations" / "knn")


def test_what_was_evaluated_before_the_store_knew_the_host_is_sent_later_and_once(store_uri, tmp_path):
    host, child = tmp_path / "run", tmp_path / "knn"
    host.mkdir()
    evaluate(store_uri, child, host)
    host_id = pretrain(store_uri, host)
    assert send_missing(child, uri=None) == "sent files or status"
    assert send_missing(child, uri=None) == "up to date"
    assert points(store_uri, host_id, "knn/top1_k20") == [(40, 61.5)]


def test_the_run_of_a_job_is_made_when_it_is_submitted_and_taken_up_when_it_starts(store_uri, tmp_path):
    made = mlflow_tracking(store_uri).create(run_folder=tmp_path / "run", config={"seed": 1}).run_id
    client = MlflowClient(store_uri)
    assert client.get_run(made).info.status == "SCHEDULED"
    send_missing(tmp_path / "run", uri=None)  # a job that waits has not been killed
    assert client.get_run(made).info.status == "SCHEDULED"
    assert pretrain(store_uri, tmp_path / "run") == made
    assert client.get_run(made).info.status == "FINISHED"
    assert points(store_uri, made, "loss/total") == [(50, 2.0)]


def test_the_children_of_a_sweep_belong_to_one_run(store_uri, tmp_path):
    """It is made before they are submitted, here by a scheduler that runs nothing, and has the description of the sweep."""
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "run.py").touch()

    def job(options):
        return Job(function="run:execute", config=options, folder=options["output_dir"], root=str(tmp_path / "program"))

    conf.schema.register()
    words = ["-m", "seed=1,2", "data.root=/images", f"output_dir={tmp_path / 'sweep'}", f"tracking.uri={store_uri}"]
    launch([*words, "launcher=command", "launcher.template='true'"], Program(admit=admit, job=job, build=build))
    jobs = [json.loads(path.read_text()) for path in (tmp_path / "sweep" / "launch").glob("*seed=?.json")]
    (parent,) = {each["config"]["tracking"]["tags"]["mlflow.parentRunId"] for each in jobs}
    assert len(jobs) == 2
    client = MlflowClient(store_uri)
    run = client.get_run(parent)
    assert (run.info.status, run.data.params) == ("SCHEDULED", {})  # the children will tell when it runs and how it ends
    assert "- seed: 1, 2" in run.data.tags["mlflow.note.content"]
    assert [each.path for each in client.list_artifacts(parent) if each.path != "git.diff"] == ["sweep.yaml"]
