"""Submitted jobs from the command line: `python -m launchers status|logs|cancel|retry-failed|evaluate FOLDER`.

FOLDER is a run folder or a sweep folder. Works without torch, and within a second or two.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from launchers import children, logs, scheduler, status, submission
from launchers.history import is_alive
from launchers.kinds import launcher_of
from launchers.status import JobStatus
from launchers.submission import Selection


def main() -> None:
    arguments = _parser().parse_args()
    folder = Path(arguments.folder).absolute()
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        arguments.act(folder, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launchers", description="Submitted jobs of a run folder or a sweep folder.")
    commands = parser.add_subparsers(required=True, metavar="status|logs|cancel|retry-failed|evaluate")
    for name, act, what in (
        ("status", _status, "states, restarts, last steps and errors"),
        ("logs", _logs, "output of the ranks"),
        ("cancel", _cancel, "end what waits or runs"),
        ("retry-failed", _retry_failed, "start again what ended without finishing, cancelled jobs too"),
        ("evaluate", _evaluate, "submit an evaluation of every saved teacher that has none yet"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("folder", help="a run folder or a sweep folder")
        command.set_defaults(act=act)
        if name == "logs":
            command.add_argument("--job", help="which one, by its name in `status`; the first, if not given")
            command.add_argument("--rank", type=int, default=0, help="which rank's output (default: 0)")
            command.add_argument("--all", action="store_true", help="every rank's output")
            command.add_argument("--lines", type=int, default=0, help="only the last so many lines of each rank")
            command.add_argument("--follow", "-f", action="store_true", help="go on until the job has ended")
    return parser


def _status(folder: Path, arguments: argparse.Namespace) -> None:
    found = status.states(folder)
    if not found:
        return print(status.of_folder(folder) or _fail(f"{folder}: no run; give a run folder or a sweep folder"))
    print("\n".join(status.table(found)))
    if len(found) > 2:
        print(status.summary(found))
    return None


def _logs(folder: Path, arguments: argparse.Namespace) -> None:
    _selected(folder)
    found = status.states(folder)
    if arguments.job is not None and arguments.job not in [each.entry.name for each in found]:
        _fail(f"--job: there is no '{arguments.job}'; there are {', '.join(each.entry.name for each in found)}")
    job = next(each for each in found if arguments.job in (None, each.entry.name))
    ranks = range(job.entry.ranks) if arguments.all else [arguments.rank]
    paths = [path for rank in ranks if (path := status.log_file(job.entry, rank)) is not None]
    if not arguments.follow and not any(path.exists() for path in paths):
        _fail(f"{folder}: {job.entry.name} has no output yet, it is {job.state}; see python -m launchers status")
    logs.show(job, ranks=ranks, lines=arguments.lines, follow=arguments.follow, folder=folder)


def _cancel(folder: Path, arguments: argparse.Namespace) -> None:
    selection = _selected(folder)
    content = selection.file.read()
    kind = content.launcher["kind"]
    active = [each for each in status.states(folder) if each.is_active]
    if not active:
        return print("nothing waits or runs")
    if kind == "slurm":
        try:
            scheduler.cancel(str(each.entry.id) for each in active)
        except (OSError, subprocess.SubprocessError) as error:
            _fail(f"scancel failed: {error}")
    elif kind == "command":
        for each in active:
            if each.entry.role == "main":
                launcher_of(content.launcher).end(selection.file, each.entry)
    else:
        _end_processes(selection, active)
    return print(f"cancelled {', '.join(each.entry.name for each in active)}")


def _end_processes(selection: Selection, active: list[JobStatus]) -> None:
    """End one child, or, for a whole sweep, the process that works through it."""
    process = selection.file.read().process
    if selection.child is None and process is not None and is_alive(process):
        return os.kill(process["pid"], signal.SIGTERM)
    for each in active:
        started = selection.file.history(each.entry.name).of(each.entry.id)
        if started and is_alive(started[-1]):
            os.kill(started[-1]["pid"], signal.SIGTERM)
    return None


def _retry_failed(folder: Path, arguments: argparse.Namespace) -> None:
    selection = _selected(folder)
    content = selection.file.read()
    launcher = launcher_of(content.launcher)
    failed = [each.entry for each in status.states(folder) if not (each.is_active or each.has_finished)]
    mains = [each.name for each in failed if each.role == "main"]
    alone = [each.name for each in failed if each.role != "main" and not (each.role == "then" and each.of in mains)]
    if not failed:
        return print("nothing failed")
    kind = content.launcher["kind"]
    if kind == "slurm":
        if mains:
            launcher.submit(selection.file, mains)
        if alone:
            launcher.submit_alone(selection.file, alone)
    elif kind == "command":
        launcher.submit(selection.file, mains + alone)
    else:
        children.refuse_active(selection.file)
        gpus_each = 1 if kind == "local" else launcher.gpus_each()
        return children.run(selection.file, mains + alone, parallel=launcher.parallel, gpus_each=gpus_each)
    now = {each.name: each.id for each in selection.file.read().jobs}
    return print("submitted again: " + ", ".join(f"{each.name} ({now[each.name]})" for each in failed))


def _evaluate(folder: Path, arguments: argparse.Namespace) -> None:
    selection = _selected(folder)
    content = selection.file.read()
    if content.launcher["kind"] != "slurm":
        _fail(f"{folder}: evaluations of saved teachers are submitted with launcher=slurm only; here they come after the training")
    launcher = launcher_of(content.launcher)
    mains = [each.name for each in selection.entries() if each.role == "main"]
    submitted = [entry for name in mains for entry in launcher.evaluate(selection.file, name)]
    now = {each.name: each.id for each in selection.file.read().jobs}
    print("submitted " + ", ".join(f"{each.name} ({now[each.name]})" for each in submitted) if submitted else "no new saved teacher")


def _selected(folder: Path) -> Selection:
    selection = submission.find(folder)
    if selection is None:
        _fail(f"{folder}: no jobs were submitted for it ({status.of_folder(folder) or 'no run'}); give a folder with a jobs.json")
    return selection


def _fail(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


if __name__ == "__main__":
    main()
