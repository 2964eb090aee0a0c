"""Runs a submitted job where no scheduler starts its ranks: `python -m launchers.start [--with-parent] FOLDER NAME`.

Main jobs are followed by the evaluations of the teachers that they saved, and by what comes after them. With RANK in the environment
this is one rank of several that something else has started (torchrun, a Kubernetes PyTorchJob).
"""

import os
import sys
from pathlib import Path

from launchers import children, submission
from launchers.gpus import Gpus
from launchers.history import this_process
from launchers.job import Job
from launchers.kinds import launcher_of
from launchers.local import Local
from launchers.submission import Entry, JobsFile, Submission
from launchers.worker import call_and_keep_failure, die_with_parent


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[0] == "--with-parent":
        die_with_parent()
        arguments = arguments[1:]
    folder, name = arguments
    file = JobsFile(folder)
    content = file.read()
    os.chdir(content.cwd)
    entry = content.entry(name)
    code = _run(file, content, entry)
    if entry.role == "main" and not code:
        code = _follow(file, entry)
    sys.exit(code)


def _follow(file: JobsFile, main_entry: Entry) -> int:
    """Run the evaluations of a main job that has succeeded; returns the exit code of the last one that failed, or 0."""
    submission.claim_saved(file, main_entry.name)
    with file.changing() as content:
        for entry in content.of_role("saved", main_entry.name):
            if entry.id is None:
                children.renew(entry, file)
    code = 0
    for entry in [*content.of_role("saved", main_entry.name), *content.of_role("then", main_entry.name)]:
        if not children.has_finished(Job.read(file.job_file(entry.name))):
            code = _run(file, content, entry) or code
    return code


def _run(file: JobsFile, content: Submission, entry: Entry) -> int:
    """Run one job, and write down what became of it."""
    job = Job.read(file.job_file(entry.name))
    sys.argv = list(job.command)
    launcher = launcher_of(content.launcher)
    rank = int(os.environ.get("RANK", "0"))
    history = file.history(entry.name)
    if rank == 0:
        history.add("started", id=entry.id, **this_process())
    if isinstance(launcher, Local) or "RANK" in os.environ:
        code = _call_here(job, rank)
    else:
        code = _call_in_processes(Gpus(processes=launcher.processes, grace_seconds=launcher.grace_seconds, parallel=1), job)
    if rank == 0:
        history.add("ended", id=entry.id, code=code)
    return code


def _call_here(job: Job, rank: int) -> int:
    failure = Path(job.folder) / "errors" / f"rank_{rank}.txt"
    code = call_and_keep_failure(job, failure)
    if failure.exists():
        print(failure.read_text(), file=sys.stderr, flush=True)
    return code


def _call_in_processes(launcher: Gpus, job: Job) -> int:
    try:
        launcher.launch(job)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


if __name__ == "__main__":
    main()
