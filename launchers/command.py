"""Any other scheduler: a command of the user's, which gets the command line that runs the job.

The job's code and config lie in the run folder, so the machine that runs it must see that folder under the same path. What became of
the job is known from the history that it writes there; the scheduler itself is never asked.
"""

import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from launchers import children, status, submission
from launchers.job import Job
from launchers.submission import RUN, Entry, JobsFile, Main, Submission


@dataclass(kw_only=True)
class Command:
    """template       the shell command that submits a job; {command}, {script}, {folder} and {name} are replaced in it
    cancel         the shell command that ends one, or None; {id} is what the template's command printed last
    processes      ranks on the machine that runs the job; 0 means one per GPU there
    grace_seconds  how long ranks may go on after one has ended on a signal
    python         the Python of that machine; None means this one
    """

    returns_at_once: ClassVar[bool] = True
    template: str
    cancel: str | None
    processes: int
    grace_seconds: float
    python: str | None

    def check(self, folder: str | Path, names: Sequence[str]) -> None:
        """End this process with one line if one of these jobs of the folder still runs."""
        refuse_running(folder, names)

    def launch(self, job: Job, *, then: Sequence[Job] = (), saved: Job | None = None) -> None:
        """Submit a run; what follows it is run by the same command."""
        self.check(job.folder, [RUN])
        file = submission.prepare(job.folder, [Main(name=RUN, job=job, then=then, saved=saved)], launcher=submission.options_of(self))
        self.submit(file, [RUN])
        submission.tell({"submitted": file.read().entry(RUN).printed or RUN} | submission.place_lines(file, file.read()))

    def launch_array(
        self,
        jobs: Sequence[Job],
        *,
        names: Sequence[str],
        folder: str | Path,
        then: Sequence[Sequence[Job]] = (),
        saved: Sequence[Job] = (),
    ) -> None:
        """Submit the children of a sweep one by one; how many run at once is the scheduler's business."""
        self.check(folder, names)
        file = submission.prepare(folder, submission.children(jobs, names, then, saved), launcher=submission.options_of(self))
        self.submit(file, names)
        submission.tell({"submitted": f"{len(names)} runs"} | submission.place_lines(file, file.read()))

    def submit(self, file: JobsFile, names: Sequence[str]) -> None:
        """Submit these jobs, main ones with what follows them; ends this process with one line where the template's command fails."""
        for name in names:
            with file.changing() as content:
                entry = content.entry(name)
                script = self._write_script(file, content, entry)
                for each in (entry, *content.of_role("then", name)):
                    children.renew(each, file)
            try:
                printed = self._send(file, entry, script)
            except SystemExit:  # there is no such job
                with file.changing() as content:
                    for each in (content.entry(name), *content.of_role("then", name)):
                        each.id = None
                raise
            with file.changing() as content:
                content.entry(name).printed = printed

    def end(self, file: JobsFile, entry: Entry) -> None:
        """Ask the scheduler to end a job; ends this process with one line where the user has not said how."""
        if self.cancel is None:
            sys.exit(f"error: launcher.cancel: is not set; end {entry.printed or entry.name} by hand")
        _shell(self.cancel, {"id": entry.printed or "", "name": _scheduler_name(file, entry), "folder": str(file.folder)})

    def _write_script(self, file: JobsFile, content: Submission, entry: Entry) -> Path:
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in children.python_path(content.code).items())
        start = shlex.join(
            [*shlex.split(self.python or shlex.quote(sys.executable)), "-m", "launchers.start", str(file.folder), entry.name]
        )
        log = shlex.quote(str(file.launch_folder / f"{entry.name}.log"))
        script = file.launch_folder / f"{entry.name}.sh"
        script.write_text(f"#!/bin/sh\ncd {shlex.quote(content.cwd)}\nexport {variables}\nexec {start} >> {log} 2>&1\n")
        script.chmod(0o755)
        return script

    def _send(self, file: JobsFile, entry: Entry, script: Path) -> str:
        """Run the template's command; returns the last line that it printed."""
        values = {"command": f"sh {shlex.quote(str(script))}", "script": str(script)}
        values |= {"folder": str(file.folder), "name": _scheduler_name(file, entry)}
        printed = _shell(self.template, values).strip().splitlines()
        return printed[-1][:200] if printed else ""


def refuse_running(folder: str | Path, names: Sequence[str]) -> None:
    """End this process with one line if one of these jobs is known to run."""
    for each in status.states(folder):
        if each.entry.name in names and each.state == "RUNNING":
            sys.exit(f"error: output_dir: {each.entry.name} still runs in {folder} {each.detail}; wait for it, or end it")


def _shell(template: str, values: dict[str, str]) -> str:
    text = template
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    # Files instead of pipes, and a session of its own: what the command leaves in the background must hold neither us nor the terminal.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        done = subprocess.run(text, shell=True, stdin=subprocess.DEVNULL, stdout=out, stderr=err, check=False, start_new_session=True)
        for file in (out, err):
            file.seek(0)
        printed, complained = out.read(), err.read()
    if done.returncode:
        said = (complained or printed).strip().splitlines()
        sys.exit(f"error: launcher.template: '{text}' failed with exit code {done.returncode}{': ' + said[-1] if said else ''}")
    return printed


def _scheduler_name(file: JobsFile, entry: Entry) -> str:
    """Letters, digits and dashes, as Kubernetes has it."""
    name = file.folder.name if entry.name == RUN else f"{file.folder.name}-{entry.name}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[-60:].strip("-")
