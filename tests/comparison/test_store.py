"""An MLflow store gives the runs that its folders would, and its registry gets the best checkpoint; on a real database."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from esvit.comparison.runs import Run, read_folder
from esvit.comparison.selection import gather
from esvit.comparison.store import register_best
from esvit.errors import OptionError
from esvit.tracking.mlflow import Mlflow, client_of
from tests.comparison.folders import PROTOCOL, make_run, options


def everything(name: str) -> bool:
    return True


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a pre-training run in experiment "leaves", an evaluation of it, and a failed run; `kept` has the first one's folder."""
    top = tmp_path_factory.mktemp("store")
    host = make_run(
        top / "host", options("host", seed=3), course={"loss/total": [3.0, 2.0]}, final={"loss/total": 2.0, "images_per_second": 5.0},
        tracking=tracking(top, None),
    )  # fmt: skip
    (host / "checkpoint.pt").write_bytes(b"weights")
    make_run(
        top / "knn", options("knn", of=str(host), choices__task="knn"), course={"a": [1.0]},
        final={"knn/top1_k20": 61.0, "evaluated_step": 20}, protocol=PROTOCOL, tracking=tracking(top, host),
    )  # fmt: skip
    make_run(top / "bad", options("bad", epochs=2), course={"loss/total": [9.0]}, final=None, status="FAILED", tracking=tracking(top, None))
    return top


def tracking(top: Path, host: Path | None) -> Any:
    return Mlflow(
        uri=uri_of(top), experiment_name="leaves", run_name=host.name if host else "run", tags={}, host=str(host) if host else None,
        close_timeout_seconds=60,
    )  # fmt: skip


def uri_of(top: Path) -> str:
    return f"sqlite:///{top}/mlflow.db"


def values(run: Run) -> dict[str, tuple[tuple[int, float], ...]]:
    """What was measured; the hours are of the clock here."""
    return {series.metric: series.points for series in run.series if series.metric != "hours"}


def test_an_experiment_is_read_from_the_folders_that_are_here(top):
    host, bad = gather([], experiment="leaves", uri=uri_of(top), wanted=everything).runs
    assert (host.name, host.folder, bad.status) == ("host", top / "host", "failed")
    assert values(host)["knn/top1_k20"] == ((20, 61.0),)


def test_a_store_alone_tells_the_same(top):
    """The folders are out of reach while the store is read."""
    before = {name: read_folder(top / name, wanted=everything) for name in ("host", "bad")}
    shutil.move(top / "host", top / "hidden_host")
    shutil.move(top / "bad", top / "hidden_bad")
    shutil.move(top / "knn", top / "hidden_knn")
    try:
        runs = gather([], experiment="leaves", uri=uri_of(top), wanted=everything).runs
    finally:
        for name in ("host", "bad", "knn"):
            shutil.move(top / f"hidden_{name}", top / name)
    assert len(runs) == 2
    for run, known in zip(runs, before.values(), strict=True):
        assert run.folder is None
        assert (run.status, run.steps) == (known.status, known.steps)
        assert values(run) == values(known)
        # A store has all values as text: the list, the number and the truth value come back.
        assert dict(run.options) == dict(known.options)
    (knn,) = [series for series in runs[0].series if series.metric == "knn/top1_k20"]
    assert knn.protocol is not None and knn.protocol["k"] == 20


def test_run_ids_and_folders_name_the_same_run_once(top):
    run_id = read_folder(top / "host", wanted=everything).run_id
    assert run_id is not None
    (run,) = gather([str(top / "host"), run_id, str(top / "knn")], experiment=None, uri=uri_of(top), wanted=everything).runs
    assert (run.folder, run.run_id) == (top / "host", run_id)


def test_the_best_checkpoint_becomes_a_version_with_an_alias_and_the_same_one_no_second(top):
    run = read_folder(top / "host", wanted=everything)
    first, again = (register_best(run, model="leaves", metric="knn/top1", value=61.0, protocol=PROTOCOL) for _ in range(2))
    assert (first, again) == ("1", "1")
    version = client_of(uri_of(top)).get_model_version_by_alias("leaves", "best")
    assert (version.run_id, version.tags["metric"], version.tags["value"], version.tags["step"]) == (run.run_id, "knn/top1", "61.0", "20")
    assert Path(version.source.removeprefix("file://")) == top / "host" / "registered" / "step_20"


def test_a_registered_checkpoint_stays_what_it_was(top, tmp_path):
    run = read_folder(top / "host", wanted=everything)
    version = register_best(run, model="kept", metric="knn/top1", value=61.0, protocol=None)
    (top / "host" / "other.pt").write_bytes(b"later weights")
    (top / "host" / "other.pt").replace(top / "host" / "checkpoint.pt")
    folder = Path(client_of(uri_of(top)).get_model_version_download_uri("kept", version).removeprefix("file://"))
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("checkpoint.pt", b"weights")]


def test_a_run_that_no_store_knows_is_not_registered(tmp_path):
    run = read_folder(make_run(tmp_path / "a", options("alone"), course={"loss/total": [1.0]}, final={"a": 1.0}), wanted=everything)
    with pytest.raises(OptionError, match=r"^task\.register: the best run, alone, was tracked nowhere"):
        register_best(run, model="leaves", metric="a", value=1.0, protocol=None)


def test_what_is_not_there_is_named(top, tmp_path):
    with pytest.raises(OptionError, match=r"^task\.experiment: .* has no experiment 'flowers'; there are: Default, leaves$"):
        gather([], experiment="flowers", uri=uri_of(top), wanted=everything)
    with pytest.raises(OptionError, match=r"^task\.runs: .* gives no run"):
        gather(["0" * 32], experiment=None, uri=uri_of(top), wanted=everything)
    with pytest.raises(OptionError, match=r"^tracking\.uri: there is no store"):
        gather([], experiment="leaves", uri=f"sqlite:///{tmp_path}/none.db", wanted=everything)
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(OptionError, match=r"^task\.runs: nothing to compare"):
        gather([], experiment=None, uri=uri_of(top), wanted=everything)
    with pytest.raises(OptionError, match=r"^task\.runs: no run in"):
        gather([str(tmp_path)], experiment=None, uri=uri_of(top), wanted=everything)
    with pytest.raises(OptionError, match=r"^task\.runs: 'nowhere' is neither a folder nor a run id"):
        gather(["nowhere"], experiment=None, uri=uri_of(top), wanted=everything)
