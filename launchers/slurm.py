"""Jobs for SLURM, through submitit: submits and returns at once.

submitit writes the batch script, submits it and calls `launchers.rank.Rank` in every process. What happens there on a signal is ours, not
submitit's: see `launchers.rank`.
"""

import contextlib
import io
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths
from submitit.slurm import slurm as submitit_slurm

from launchers import scheduler, submission
from launchers.job import Job
from launchers.rank import RANK_VARIABLES, Rank
from launchers.submission import RUN, Entry, JobsFile, Main, Submission

_SECONDS_TO_START = 30  # of a job, at least, before it is told that its time limit draws near
# Signals that arrive while Python starts would kill it. Ignored ones are lost: SLURM requeues a preempted job itself, and none is at its
# time limit when it starts.
_PYTHON_SAFE_FROM_SIGNALS = """sh -c 'trap "" USR2 TERM; exec "$@"' sh"""


@dataclass(kw_only=True)
class Slurm:
    """The options of `launcher=slurm`; they are explained in conf/schema/running.py."""

    returns_at_once: ClassVar[bool] = True

    nodes: int
    gpus_per_node: int
    tasks_per_node: int | None
    cpus_per_task: int
    memory: str | None
    timeout_minutes: int
    signal_delay_seconds: int
    max_requeues: int
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    exclude: str | None
    comment: str | None
    array_parallelism: int
    evaluation_nodes: int
    evaluation_gpus_per_node: int | None
    evaluation_timeout_minutes: int | None
    extra: list[str]
    setup: list[str]
    container_image: str | None
    container_runtime: str
    container_mounts: list[str]
    python: str | None

    def launch(self, job: Job, *, then: Sequence[Job] = (), saved: Job | None = None) -> None:
        """Submit a run and what follows it; ends this process with one line where that cannot be."""
        self.check(job.folder, [RUN])
        file = submission.prepare(job.folder, [Main(name=RUN, job=job, then=then, saved=saved)], launcher=submission.options_of(self))
        self._submit_new(file, [RUN])

    def launch_array(
        self,
        jobs: Sequence[Job],
        *,
        names: Sequence[str],
        folder: str | Path,
        then: Sequence[Sequence[Job]] = (),
        saved: Sequence[Job] = (),
    ) -> None:
        """Submit the children of a sweep as one array, and what follows them as further ones."""
        self.check(folder, names)
        mains = submission.children(jobs, names, then, saved)
        file = submission.prepare(folder, mains, launcher=submission.options_of(self))
        self._submit_new(file, names)

    def _submit_new(self, file: JobsFile, names: Sequence[str]) -> None:
        """Submit what was just prepared, and say so; a snapshot that no job got goes again."""
        try:
            self.submit(file, names)
        except SystemExit:
            content = file.read()
            if all(content.entry(name).id is None for name in names):
                shutil.rmtree(content.code)
            raise
        self._tell(file, names)

    def submit(self, file: JobsFile, names: Sequence[str]) -> None:
        """Submit these main jobs, and after them those that follow them."""
        content = file.read()
        main_ids = self._submit_together(file, content, [content.entry(name) for name in names], after=None)
        followers = [content.of_role("then", name) for name in names]
        try:
            for place in range(len(followers[0])):
                self._submit_together(file, content, [each[place] for each in followers], after=main_ids)
        except SystemExit:  # all of it, or nothing
            scheduler.cancel(main_ids)
            raise

    def submit_alone(self, file: JobsFile, names: Sequence[str]) -> None:
        """Submit evaluations that wait for nothing."""
        content = file.read()
        self._submit_together(file, content, [content.entry(name) for name in names], after=None)

    def evaluate(self, file: JobsFile, of: str) -> list[Entry]:
        """Submit an evaluation of every teacher that the main job `of` has saved since; none is submitted twice."""
        claimed = submission.claim_saved(file, of)
        if claimed:
            try:
                self.submit_alone(file, [each.name for each in claimed])
            except SystemExit:  # not submitted: another call may try
                with file.changing() as content:
                    names = {each.name for each in claimed}
                    content.jobs = [each for each in content.jobs if not (each.name in names and each.id is None)]
                raise
        return claimed

    def script(self, job: Job) -> str:
        """The batch script of a run; needs no SLURM."""
        launch_folder = JobsFile(job.folder).launch_folder
        code = Path(job.folder) / "code"
        parameters = self._parameters(name=Path(job.folder).name, code=code, cwd=str(Path.cwd()), role="main", after=None)
        command = f"{self._python(Path(job.folder), str(Path.cwd()))} -u -m submitit.core._submit {shlex.quote(str(launch_folder))}"
        return submitit_slurm._make_sbatch_string(command=command, folder=launch_folder, **parameters)

    def _submit_together(self, file: JobsFile, content: Submission, entries: Sequence[Entry], *, after: list[str] | None) -> list[str]:
        """Submit one job, or several as an array; `after`: the ids that each of them waits for. Returns their ids and remembers them."""
        name, code = self._name(file, entries), Path(content.code)
        parameters = self._parameters(name=name, code=code, cwd=content.cwd, role=entries[0].role, after=after)
        ranks = [Rank(folder=str(file.folder), name=each.name, max_requeues=self.max_requeues) for each in entries]
        with _outside_of_any_job(), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            try:
                executor = submitit.SlurmExecutor(file.launch_folder, python=self._python(file.folder, content.cwd))
                executor.update_parameters(**parameters)
                jobs = executor.submit_array(ranks)
            except (FailedJobError, FailedSubmissionError) as error:
                sys.exit(f"error: launcher: sbatch refused the job: {_reason(error)}")
        with file.changing() as now:
            for entry, job in zip(entries, jobs, strict=True):
                entry = now.entry(entry.name)
                entry.earlier += [entry.id] if entry.id else []
                entry.id = job.job_id
                entry.log = str(JobPaths(file.launch_folder, job_id=job.job_id).folder / f"{job.job_id}_%t_log.out")
                entry.ranks = parameters["nodes"] * parameters["ntasks_per_node"]
        return [job.job_id for job in jobs]

    def _name(self, file: JobsFile, entries: Sequence[Entry]) -> str:
        """What squeue shows."""
        if entries[0].role == "main":
            return file.folder.name
        return f"{Path(entries[0].folder).name} {file.folder.name}"

    def _parameters(self, *, name: str, code: Path, cwd: str, role: str, after: list[str] | None) -> dict[str, Any]:
        """In submitit's words."""
        is_main = role == "main"
        nodes = self.nodes if is_main else self.evaluation_nodes
        gpus = self.gpus_per_node if is_main or self.evaluation_gpus_per_node is None else self.evaluation_gpus_per_node
        tasks = self.tasks_per_node if is_main else None
        additional: dict[str, Any] = {"requeue": True, "chdir": cwd}
        if after is not None:
            additional |= {"dependency": _dependency(after), "kill-on-invalid-dep": "yes"}
        if self.memory is not None:
            additional["mem"] = self.memory
        parameters: dict[str, Any] = {
            "job_name": name,
            "nodes": nodes,
            "gpus_per_node": gpus or None,
            "ntasks_per_node": tasks or gpus or 1,
            "cpus_per_task": self.cpus_per_task,
            "time": self.timeout_minutes if is_main else self.evaluation_timeout_minutes or self.timeout_minutes,
            "signal_delay_s": self.signal_delay_seconds,
            "array_parallelism": self.array_parallelism,
            "stderr_to_stdout": True,
            "additional_parameters": additional | _as_parameters(self.extra),
            "setup": [*self.setup, f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"', *_SETUP],
            "srun_args": self._srun_arguments(code.parent, cwd),
        }
        for option in ("partition", "account", "qos", "constraint", "exclude", "comment"):
            parameters[option] = getattr(self, option)
        given = {key: value for key, value in parameters.items() if value is not None}
        return given | {"wckey": None}  # submitit's default names a project that the cluster may not know

    def _srun_arguments(self, folder: Path, cwd: str) -> list[str]:
        # A rank that fails ends the others at once; one that ends well waits for them. srun does not take cpus-per-task from the job.
        arguments = ["--kill-on-bad-exit=1", "--wait=0", "--open-mode=append", f"--cpus-per-task={self.cpus_per_task}"]
        if self.container_image is not None and self.container_runtime == "pyxis":
            mounts = ",".join(f"{each}:{each}" if ":" not in each else each for each in self._mounts(folder, cwd))
            arguments += [f"--container-image={self.container_image}", f"--container-mounts={mounts}", f"--container-workdir={cwd}"]
        return arguments

    def _python(self, folder: Path, cwd: str) -> str:
        """How a rank's Python is started, as a shell command."""
        python = shlex.split(self.python) if self.python else ["python3" if self.container_image else sys.executable]
        if self.container_image is not None and self.container_runtime == "apptainer":
            binds = [argument for mount in self._mounts(folder, cwd) for argument in ("--bind", mount)]
            gpus = ["--nv"] if self.gpus_per_node else []
            python = ["apptainer", "exec", *gpus, *binds, "--pwd", cwd, self.container_image, *python]
        return f"{_PYTHON_SAFE_FROM_SIGNALS} {shlex.join(python)}"

    def _mounts(self, folder: Path, cwd: str) -> list[str]:
        """The user's, the folder of the run or sweep, and the one that relative paths begin at."""
        return list(dict.fromkeys([*self.container_mounts, str(folder), cwd]))

    def check(self, folder: str | Path, names: Sequence[str]) -> None:
        """End this process with one line where an option cannot work, or one of these jobs of the folder still waits or runs."""
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            sys.exit("error: launcher: 'slurm', but there is no sbatch here; submit where SLURM's commands are, or use launcher=gpus")
        least = {"nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "timeout_minutes": 1, "signal_delay_seconds": 1, "max_requeues": 0}
        least |= {"array_parallelism": 1, "evaluation_nodes": 1}
        for option, smallest in least.items():
            if (value := getattr(self, option)) < smallest:
                sys.exit(f"error: launcher.{option}: {value} is too small; use {smallest} or more")
        for option in ("timeout_minutes", "evaluation_timeout_minutes"):
            minutes = getattr(self, option)
            if minutes is not None and self.signal_delay_seconds + _SECONDS_TO_START > 60 * minutes:
                found = f"{self.signal_delay_seconds} of the {60 * minutes} seconds of {option} leave too little for the start"
                sys.exit(f"error: launcher.signal_delay_seconds: {found}; lower it, or raise the time limit")
        for each in self.extra:
            if not each.startswith("--"):
                sys.exit(f"error: launcher.extra: '{each}' is no option of sbatch; write '--name=value'")
        refuse_active(folder, names)

    def _tell(self, file: JobsFile, names: Sequence[str]) -> None:
        content = file.read()
        mains = [content.entry(name) for name in names]
        count, what = (self.gpus_per_node, "GPU") if self.gpus_per_node else (mains[0].ranks // self.nodes, "process")
        plural = "" if count == 1 else "es" if what == "process" else "s"
        size = f"{self.nodes} x {count} {what}{plural}" + (f", partition {self.partition}" if self.partition else "")
        if file.job_file(RUN).exists():
            lines = {"submitted": f"job {mains[0].id} ({size})"}
        else:
            array = str(mains[0].id).partition("_")[0]
            lines = {"submitted": f"job {array}: {len(mains)} runs of {size}, at most {self.array_parallelism} at once"}
        followers = [each for each in content.of_role("then") if each.of == names[0]]
        if followers:
            lines["then"] = ", ".join(f"{str(each.id).partition('_')[0]} {Path(each.folder).name}" for each in followers)
        submission.tell(lines | submission.place_lines(file, content))


_SETUP = [
    "export PYTHONSAFEPATH=1  # or the folder that the job runs in would come before the snapshot",
    "export LAUNCHED_AT=$(date +%s)",
]


def refuse_active(folder: str | Path, names: Sequence[str]) -> None:
    """End this process with one line if one of these jobs still waits or runs."""
    file = JobsFile(folder)
    if not file.path.exists():
        return
    active = scheduler.active_jobs()
    for entry in file.read().jobs:
        if entry.id in active and (entry.name in names or entry.of in names):
            command = submission.command_lines(file.folder)["  "]
            found = f"job {entry.id} ({entry.name}) is still {active[entry.id].state} in {folder}"
            sys.exit(f"error: output_dir: {found}; wait for it, or {command}")


def _dependency(after: list[str]) -> str:
    """Wait for one job, or task by task for those of an array."""
    if len(after) == 1:
        return f"afterok:{after[0]}"
    return f"aftercorr:{after[0].partition('_')[0]}"


def _as_parameters(options: Sequence[str]) -> dict[str, Any]:
    """["--reservation=x", "--exclusive"] -> {"reservation": "x", "exclusive": True}"""
    pairs = [each.removeprefix("--").partition("=") for each in options]
    return {name: value if equals else True for name, equals, value in pairs}


@contextlib.contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """Hide the variables of a job that this process runs in: sbatch would hand them on, and srun in the new job obey them."""
    inherited = {name: value for name, value in os.environ.items() if _is_of_a_job(name)}
    for name in inherited:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(inherited)


def _is_of_a_job(name: str) -> bool:
    return (name.startswith("SLURM_") and name != "SLURM_CONF") or name.startswith("SUBMITIT_") or name in RANK_VARIABLES


def _reason(error: Exception) -> str:
    """sbatch's own words, which submitit puts somewhere into its message."""
    lines = [line for line in str(error).splitlines() if line.startswith("sbatch: error:")]
    return " ".join(line.removeprefix("sbatch: error:").strip() for line in lines) or " ".join(str(error).split())
