"""What was submitted for a run or a sweep: `jobs.json` in its folder, one entry per job, and beside it `launch/` with the jobs themselves.

Everything that acts on jobs later (status, logs, cancel, retry-failed, evaluate) starts from this file. It is only ever replaced whole,
under a lock, because a running job adds entries too: one for each saved teacher that it has evaluated. A child of a sweep has a
jobs.json that only names its sweep.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launchers import snapshot
from launchers.history import History
from launchers.job import Job

RUN = "run"  # the name of a run's own job
Role = Literal["main", "then", "saved"]


@dataclass(kw_only=True)
class Entry:
    """One job.

    role     "main": a run or a child of a sweep; "then": to be run after it; "saved": evaluates a teacher that it saved
    of       "then" and "saved": the name of that main job
    folder   its run folder
    id       the scheduler's id ("12", or "12_3" in an array), or when it was started where there is no scheduler; None until then
    earlier  ids that it had before it was submitted anew
    log      the file of its output, %t standing for the rank
    ranks    how many processes it has
    printed  launcher=command: what the command that submitted it printed last
    """

    name: str
    role: Role
    of: str | None = None
    folder: str
    id: str | None = None
    earlier: list[str] = field(default_factory=list)
    log: str | None = None
    ranks: int = 1
    printed: str | None = None


@dataclass(kw_only=True)
class Submission:
    """launcher      {"kind": name of its class, and its options}
    command       the command line
    commit        of the code, None without git; dirty: whether it was changed since
    code          the snapshot's folder
    cwd           where the command was typed: what relative paths in options begin at
    tracking_run  {"run_id", "url"} of the run in MLflow, or None
    process       what works through it, where that is no scheduler; None once it has ended
    """

    launcher: dict[str, Any]
    command: str
    commit: str | None
    dirty: bool
    code: str
    cwd: str
    tracking_run: dict[str, Any] | None
    submitted: str
    process: dict[str, Any] | None = None
    jobs: list[Entry] = field(default_factory=list)

    def entry(self, name: str) -> Entry:
        return next(each for each in self.jobs if each.name == name)

    def has(self, name: str) -> bool:
        return any(each.name == name for each in self.jobs)

    def of_role(self, role: Role, of: str | None = None) -> list[Entry]:
        return [each for each in self.jobs if each.role == role and (of is None or each.of == of)]


class JobsFile:
    """jobs.json of a run or a sweep."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()
        self.path = self.folder / "jobs.json"
        self.launch_folder = self.folder / "launch"

    def read(self) -> Submission:
        content = json.loads(self.path.read_text())
        return Submission(**{**content, "jobs": [Entry(**each) for each in content["jobs"]]})

    @contextlib.contextmanager
    def changing(self) -> Iterator[Submission]:
        """What is in it, to be changed; written when the block ends without an exception. One process at a time."""
        with self._lock():
            submission = self.read()
            yield submission
            self._write(submission)

    def create(self, submission: Submission) -> None:
        with self._lock():
            self._write(submission)

    def job_file(self, name: str) -> Path:
        return self.launch_folder / f"{name}.json"

    def template_file(self, name: str) -> Path:
        """The template for the teachers that a main job saves."""
        return self.launch_folder / f"{name}.saved.json"

    def history(self, name: str) -> History:
        return History.read(self.launch_folder / f"{name}.history.jsonl")

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self.launch_folder.mkdir(parents=True, exist_ok=True)
        with (self.launch_folder / "jobs.lock").open("ab") as file:
            with contextlib.suppress(OSError):  # a file system without locks must not stop a run
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(self, submission: Submission) -> None:
        write_atomically(self.path, json.dumps(dataclasses.asdict(submission), indent=1))


@dataclass(frozen=True)
class Selection:
    """The jobs that a folder stands for: all of a run's or a sweep's, or those of one child of a sweep.

    file   the jobs.json with the entries
    child  the child's name, or None
    """

    file: JobsFile
    child: str | None

    def entries(self) -> list[Entry]:
        return [each for each in self.file.read().jobs if self.child is None or self.child in (each.name, each.of)]


def find(folder: str | Path) -> Selection | None:
    """Where the jobs of a run folder or sweep folder are remembered; None if none were submitted."""
    file = JobsFile(folder)
    if not file.path.exists():
        return None
    content = json.loads(file.path.read_text())
    if "sweep" in content:
        return Selection(JobsFile(content["sweep"]), content["name"])
    return Selection(file, None)


@dataclass(frozen=True, kw_only=True)
class Main:
    """A run, or a child of a sweep, with what follows it."""

    name: str
    job: Job
    then: Sequence[Job] = ()
    saved: Job | None = None


def prepare(folder: str | Path, mains: Sequence[Main], *, launcher: dict[str, Any], process: dict[str, Any] | None = None) -> JobsFile:
    """Take a snapshot of the code and write down everything that is to be submitted; entries of other names stay as they are."""
    file = JobsFile(folder)
    file.launch_folder.mkdir(parents=True, exist_ok=True)
    copy = snapshot.take(Path(mains[0].job.root), file.folder)
    before = file.read() if file.path.exists() else None
    submission = Submission(
        launcher=launcher,
        command=shlex.join(mains[0].job.command),
        commit=copy.commit,
        dirty=copy.dirty,
        code=str(copy.root),
        cwd=str(Path.cwd()),
        tracking_run=mains[0].job.config.get("tracking_run"),
        submitted=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        process=process,
        jobs=before.jobs if before else [],
    )
    for main in mains:
        _add_main(file, submission, main, copy.root)
    file.create(submission)
    return file


def add(file: JobsFile, mains: Sequence[Main]) -> None:
    """Write down more jobs, to be run with the code that is there already."""
    with file.changing() as content:
        for main in mains:
            _add_main(file, content, main, Path(content.code))


def _add_main(file: JobsFile, submission: Submission, main: Main, code: Path) -> None:
    is_child = Path(main.job.folder) != file.folder
    _add(file, submission, Entry(name=main.name, role="main", folder=main.job.folder), main.job, code)
    if is_child:
        Path(main.job.folder).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(main.job.folder) / "jobs.json", json.dumps({"sweep": str(file.folder), "name": main.name}, indent=1))
    old = {each.folder: each.name for each in submission.of_role("then", main.name)}
    wanted = {each.folder for each in main.then}
    submission.jobs = [each for each in submission.jobs if not (each.role == "then" and each.of == main.name and each.folder not in wanted)]
    for job in main.then:
        name = old.get(job.folder) or free_name(submission, main.name, Path(job.folder).name)
        _add(file, submission, Entry(name=name, role="then", of=main.name, folder=job.folder), job, code)
    file.template_file(main.name).unlink(missing_ok=True)
    if main.saved is not None:
        dataclasses.replace(main.saved, root=str(code)).write(file.template_file(main.name))


def _add(file: JobsFile, submission: Submission, entry: Entry, job: Job, code: Path) -> None:
    """Put an entry into the place of the one of its name, whose id it remembers."""
    dataclasses.replace(job, root=str(code)).write(file.job_file(entry.name))
    for index, old in enumerate(submission.jobs):
        if old.name == entry.name:
            entry.earlier = old.earlier + ([old.id] if old.id else [])
            submission.jobs[index] = entry
            return
    submission.jobs.append(entry)


def free_name(submission: Submission, of: str, name: str) -> str:
    """A name for an evaluation of `of`, that no other job has."""
    wanted = name if of == RUN else f"{of}.{name}"
    candidates = [wanted, *(f"{wanted}_{number}" for number in range(2, len(submission.jobs) + 3))]
    return next(each for each in candidates if each != RUN and not submission.has(each))


def claim_saved(file: JobsFile, of: str) -> list[Entry]:
    """New entries, with job files, for the teachers that `of` has saved since the last call, oldest first; no teacher gets two."""
    template_file = file.template_file(of)
    if not template_file.exists():
        return []
    template = Job.read(template_file)
    with file.changing() as submission:
        known = {each.folder for each in submission.of_role("saved", of)}
        claimed = []
        for teacher in saved_teachers(submission.entry(of).folder):
            job = template.filled(teacher=str(teacher.path), step=teacher.step)
            if job.folder in known:
                continue
            entry = Entry(name=free_name(submission, of, Path(job.folder).name), role="saved", of=of, folder=job.folder)
            job.write(file.job_file(entry.name))
            submission.jobs.append(entry)
            claimed.append(entry)
    return claimed


@dataclass(frozen=True)
class SavedTeacher:
    path: Path
    step: int


def saved_teachers(folder: str | Path) -> list[SavedTeacher]:
    """The files teachers/teacher_<step>.pt of a run folder, by step."""
    found = []
    for path in Path(folder, "teachers").glob("teacher_*.pt"):
        step = path.stem.removeprefix("teacher_")
        if step.isdigit():
            found.append(SavedTeacher(path, int(step)))
    return sorted(found, key=lambda teacher: teacher.step)


def children(jobs: Sequence[Job], names: Sequence[str], then: Sequence[Sequence[Job]], saved: Sequence[Job]) -> list[Main]:
    """The children of a sweep. Raises ValueError where the lists do not belong together."""
    if not jobs:
        raise ValueError("a sweep without children")
    if len(names) != len(jobs) or len(set(names)) != len(names):
        raise ValueError(f"{len(jobs)} jobs need as many different names, there are {sorted(names)}")
    if bad := [name for name in names if not name or "/" in name or name.startswith(".") or name == "jobs"]:
        raise ValueError(f"{bad[0]!r} is not fit for a file name")
    if len(then) not in (0, len(jobs)) or len({len(each) for each in then}) > 1:
        raise ValueError("every child needs the same number of jobs to follow it")
    if len(saved) not in (0, len(jobs)):
        raise ValueError("every child needs a template for its saved teachers, or none does")
    return [
        Main(name=name, job=job, then=then[index] if then else (), saved=saved[index] if saved else None)
        for index, (name, job) in enumerate(zip(names, jobs, strict=True))
    ]


def options_of(launcher: Any) -> dict[str, Any]:
    """What `launcher_of` makes the same launcher of."""
    return {"kind": type(launcher).__name__.lower(), **dataclasses.asdict(launcher)}


def write_atomically(path: Path, text: str) -> None:
    """Whole or not at all, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def tell(lines: Mapping[str, str]) -> None:
    """Print labelled lines; an empty label goes on with the one before."""
    for label, text in lines.items():
        print(f"{label.strip():14} {text}", flush=True)


def place_lines(file: JobsFile, content: Submission) -> dict[str, str]:
    """Where a submission's results go, and the commands that follow it."""
    lines = {"folder": str(file.folder)}
    if content.tracking_run:
        lines["MLflow run"] = " ".join(filter(None, (content.tracking_run.get("run_id"), content.tracking_run.get("url"))))
    return lines | command_lines(file.folder)


def command_lines(folder: Path) -> dict[str, str]:
    """The commands that follow a submission."""
    shown = shlex.quote(str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder))
    python = Path(sys.executable)
    program = shlex.quote(str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else "python"))
    return {
        "go on with": f"{program} -m launchers status {shown}",
        " ": f"{program} -m launchers logs {shown} --follow",
        "  ": f"{program} -m launchers cancel {shown}",
    }
