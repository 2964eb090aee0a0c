"""Jobs without torch on real SLURM daemons: preemption, time limit, requeue, failures, cancellation, chains, arrays, snapshots.

What a training makes of the same events is in test_training.py.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.status import states
from tests.slurm.cluster import ROOT, Cluster, job, lines, run, slurm, state, steps, wait_for_end, wait_for_state, wait_until

pytestmark = pytest.mark.usefixtures("cluster")


def launchers(command: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`python -m launchers COMMAND FOLDER`."""
    return subprocess.run([sys.executable, "-m", "launchers", command, str(folder), *options], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def project(tmp_path) -> Path:
    """A checkout of its own with the launchers and the tests' jobs, and a file that git ignores."""
    root = tmp_path / "project"
    for folder in ("launchers", "tests/launchers"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests" / "__init__.py").touch()
    (root / ".gitignore").write_text("ignored.txt\n__pycache__/\n")
    (root / "ignored.txt").touch()
    git = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    (root / "untracked.txt").write_text("not committed")
    return root


def test_a_preempted_job_goes_on_where_it_was_and_with_the_code_as_submitted(cluster: Cluster, project, tmp_path):
    """The high partition takes the nodes; meanwhile the code is edited."""
    folder = tmp_path / "run"
    slurm().launch(job("count", folder, root=project, steps=40, seconds=0.2))
    jobs = project / "tests" / "launchers" / "jobs.py"
    jobs.write_text(jobs.read_text().replace('VERSION = "as submitted"', 'VERSION = "edited"'))
    wait_until(lambda: len(steps(folder)) >= 5, "five steps")
    cluster.occupy(seconds=1)
    cluster.nudge(str(state(folder).entry.id))
    ended = wait_for_state(folder, "COMPLETED", "FAILED", "CANCELLED")
    assert (ended.state, ended.restarts, ended.step) == ("COMPLETED", 1, 40)
    assert steps(folder) == list(range(1, 41))
    first, second = lines(folder / "attempts.jsonl")
    assert 5 <= second["from"] < 40 and first["from"] == 0
    assert first["version"] == second["version"] == "as submitted"
    assert first["command"] == ["run.py", "as=typed"]
    assert (folder / "code" / "untracked.txt").exists() and not (folder / "code" / "ignored.txt").exists()
    assert [event["event"] for event in lines(folder / "launch" / "run.history.jsonl")] == ["started", "requeued", "started", "ended"]


def test_a_job_at_its_time_limit_goes_on_until_it_may_not_any_more(cluster: Cluster, tmp_path):
    """Three minutes less 150 seconds of warning: the signal comes after about half a minute. The second time the job has to end."""
    folder = tmp_path / "run"
    slurm(timeout_minutes=3, signal_delay_seconds=150, max_requeues=1).launch(job("count", folder, steps=10_000, seconds=0.1))
    cluster.nudge(
        wait_until(lambda: state(folder).entry.id if state(folder).detail == "BeginTime" else None, "the requeue at the time limit")
    )
    ended = wait_for_state(folder, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    assert (ended.state, ended.restarts) == ("FAILED", 1)
    assert "put back into the queue 1 times already (launcher.max_requeues)" in str(ended.error)
    first, second = lines(folder / "attempts.jsonl")
    assert steps(folder) == list(range(1, len(steps(folder)) + 1)) and 0 < second["from"] < len(steps(folder))


def test_a_job_requeued_from_outside_starts_again(cluster: Cluster, tmp_path):
    """`scontrol requeue`, as after the failure of a node: its own limit of requeues does not count."""
    folder = tmp_path / "run"
    slurm(max_requeues=0).launch(job("count", folder, steps=30, seconds=0.2))
    wait_until(lambda: len(steps(folder)) >= 3, "three steps")
    job_id = str(state(folder).entry.id)
    cluster.requeue(job_id)
    cluster.nudge(job_id)
    ended = wait_for_state(folder, "COMPLETED", "FAILED", "CANCELLED")
    assert (ended.state, ended.restarts) == ("COMPLETED", 1)
    assert steps(folder)[-1] == 30


def test_a_rank_that_fails_ends_the_job_and_the_status_says_why(tmp_path):
    """Rank 0 would wait for a minute. What was to follow is cancelled."""
    folder = tmp_path / "run"
    slurm().launch(job("fail_in_rank_1", folder), then=[job("tell", folder / "knn")])
    ended = wait_for_end(folder)
    assert (ended["run"].state, ended["knn"].state) == ("FAILED", "CANCELLED")
    assert str(ended["run"].error).startswith("RuntimeError: the second rank fell")
    assert "fail_in_rank_1" in (folder / "errors" / "rank_1.txt").read_text()
    printed = launchers("status", folder).stdout
    assert f"RuntimeError: the second rank fell ({folder / 'errors' / 'rank_1.txt'}" in printed
    assert "the second rank fell" in launchers("logs", folder, "--rank", "1").stdout


def test_a_cancelled_job_does_not_come_back(tmp_path):
    folder = tmp_path / "run"
    slurm().launch(job("count", folder, steps=1000, seconds=0.1), then=[job("tell", folder / "knn")])
    wait_until(lambda: len(steps(folder)) >= 1, "the first step")
    assert launchers("cancel", folder).stdout == "cancelled run, knn\n"
    ended = wait_for_end(folder)
    assert (ended["run"].state, ended["knn"].state, ended["run"].restarts) == ("CANCELLED", "CANCELLED", 0)
    assert launchers("cancel", folder).stdout == "nothing waits or runs\n"


def test_what_follows_a_run_waits_for_it_and_saved_teachers_are_evaluated_meanwhile(tmp_path):
    folder = tmp_path / "run"
    for name in ("knn", "linear"):
        (folder / name).mkdir(parents=True)
    slurm().launch(
        job("count", folder, steps=20, seconds=0.2, teacher_every=8),
        then=[job("tell", folder / "knn"), job("tell", folder / "linear")],
        saved=job("look_at_teacher", folder / "teacher_{step}", teacher="{teacher}", step="{step}"),
    )
    waiting = {each.entry.name: each for each in states(folder)}
    assert (waiting["knn"].state, waiting["knn"].detail) == ("PENDING", "Dependency")
    ended = wait_for_end(folder)
    assert set(ended) == {"run", "knn", "linear", "teacher_8", "teacher_16"}
    assert all(each.has_finished for each in ended.values())
    assert (folder / "linear" / "told_0.json").stat().st_mtime > (folder / "metrics.json").stat().st_mtime
    assert (folder / "teacher_16" / "metrics.json").read_text() == '{"step": 16, "teacher": "teacher of step 16"}'
    assert launchers("evaluate", folder).stdout == "no new saved teacher\n"


def test_an_array_of_six_with_two_at_once_and_one_that_fails(tmp_path, capsys):
    """Each child has a successor, which only the failed one's has to do without; then what failed is retried."""
    sweep = tmp_path / "sweep"
    folders = [sweep / str(number) for number in range(6)]
    for folder in folders:
        (folder / "knn").mkdir(parents=True)
    (tmp_path / "mended").touch()
    for folder in [*folders[:4], folders[5]]:
        (folder / "mended").touch()
    single = slurm(nodes=1, tasks_per_node=1)
    single.launch_array(
        [job("fail_once", folder) for folder in folders],
        names=[f"child_{number}" for number in range(6)],
        folder=sweep,
        then=[[job("tell", folder / "knn")] for folder in folders],
    )
    assert "6 runs" in capsys.readouterr().out
    at_once = []
    wait_until(lambda: at_once.append(_running(sweep)) or not any(each.is_active for each in states(sweep)), "end of the sweep")
    ended = wait_for_end(sweep)
    assert max(at_once) == 2
    assert [ended[f"child_{number}"].state for number in range(6)] == ["COMPLETED"] * 4 + ["FAILED", "COMPLETED"]
    assert [ended[f"child_{number}.knn"].state for number in range(6)] == ["COMPLETED"] * 4 + ["CANCELLED", "COMPLETED"]
    assert ended["child_4"].error is not None and "not mended yet" in ended["child_4"].error
    assert len(states(folders[4])) == 2 and "not mended yet" in launchers("status", folders[4]).stdout

    (folders[4] / "mended").touch()
    assert launchers("retry-failed", sweep).stdout.startswith("submitted again: child_4 (")
    ended = wait_for_end(sweep)
    assert all(each.has_finished for each in ended.values())
    assert len(ended["child_4"].entry.earlier) == 1 and ended["child_3"].entry.earlier == []


def test_a_second_submission_of_a_run_that_waits_is_refused(tmp_path):
    folder = tmp_path / "run"
    slurm(extra=["--hold"]).launch(job("tell", folder))
    with pytest.raises(SystemExit) as end:
        slurm().launch(job("tell", folder))
    assert "is still PENDING" in str(end.value)
    run("scancel", str(state(folder).entry.id))


def test_what_sbatch_does_not_like_is_told_in_its_words(tmp_path):
    with pytest.raises(SystemExit) as end:
        slurm(partition="nowhere").launch(job("tell", tmp_path / "run"))
    assert str(end.value).startswith("error: launcher: sbatch refused the job: ")
    assert "partition" in str(end.value)
    assert not (tmp_path / "run" / "code").exists()
    assert state(tmp_path / "run").state == "NOT SUBMITTED"


def test_ranks_are_numbered_over_nodes_and_get_gpus(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    slurm(gpus_per_node=2, tasks_per_node=None).launch(job("tell", folder))
    wait_for_end(folder)
    told = [lines(folder / f"told_{rank}.json")[0] for rank in range(4)]
    assert [(each["RANK"], each["LOCAL_RANK"]) for each in told] == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
    assert {(each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"], each["MASTER_ADDR"]) for each in told} == {("4", "2", "n1")}
    assert {each["CUDA_VISIBLE_DEVICES"] for each in told} == {"0,1"}


def _running(sweep: Path) -> int:
    return sum(each.state == "RUNNING" and each.entry.role == "main" for each in states(sweep))
