"""Other schedulers: a template that gets the job's command line. Here the scheduler is a shell."""

import json
import time
from pathlib import Path

import pytest

from launchers.command import Command
from launchers.job import Job
from launchers.status import states

ROOT = Path(__file__).parents[2]


def job(function: str, folder: Path, **config) -> Job:
    return Job(function=f"tests.launchers.jobs:{function}", config={"folder": str(folder), **config}, folder=str(folder), root=str(ROOT))


def command(template: str, cancel: str | None = None) -> Command:
    return Command(template=template, cancel=cancel, processes=2, grace_seconds=5, python=None)


def wait_for_end(folder: Path) -> dict[str, str]:
    deadline = time.monotonic() + 60
    while any(each.is_active for each in states(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return {each.entry.name: each.state for each in states(folder)}


def test_the_command_runs_the_job_in_its_ranks_and_then_what_follows(tmp_path, capsys):
    folder = tmp_path / "My Run_1"
    (folder / "knn").mkdir(parents=True)
    launcher = command(f"({{command}} & ) ; echo sent {{name}} > '{tmp_path}/scheduler'; echo 'job 77'")
    launcher.launch(job("tell", folder), then=[job("tell", folder / "knn")])
    assert "submitted      job 77" in capsys.readouterr().out
    assert (tmp_path / "scheduler").read_text() == "sent my-run-1\n"
    assert wait_for_end(folder) == {"run": "COMPLETED", "knn": "COMPLETED"}
    assert [json.loads((folder / f"told_{rank}.json").read_text())["WORLD_SIZE"] for rank in (0, 1)] == ["2", "2"]
    assert (folder / "knn" / "told_1.json").exists()


def test_what_the_command_leaves_in_the_background_holds_nobody(tmp_path):
    """It goes on until it is told that the launcher has returned."""
    returned = tmp_path / "returned"
    command(f"echo '{{name}}'; (while [ ! -e {returned} ]; do sleep 0.05; done; touch {tmp_path}/ended) &").launch(
        job("tell", tmp_path / "run")
    )
    (waiting,) = states(tmp_path / "run")
    assert waiting.entry.printed == "run" and not (tmp_path / "ended").exists()
    returned.touch()


def test_a_template_that_fails_is_told_in_one_line(tmp_path):
    with pytest.raises(SystemExit) as end:
        command("echo no room >&2; false {name}").launch(job("tell", tmp_path / "run"))
    assert end.value.code == "error: launcher.template: 'echo no room >&2; false run' failed with exit code 1: no room"


def test_a_job_is_ended_by_the_users_command_with_what_was_printed_at_its_submission(tmp_path):
    folder = tmp_path / "run"
    launcher = command("echo job-31", cancel=f"echo {{id}} {{name}} > {tmp_path}/ended")
    launcher.launch(job("tell", folder))
    (waiting,) = states(folder)
    assert waiting.state == "PENDING"
    from launchers.submission import JobsFile

    launcher.end(JobsFile(folder), waiting.entry)
    assert (tmp_path / "ended").read_text() == "job-31 run\n"
