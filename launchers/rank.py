"""One rank of a SLURM job: what submitit calls in every process, from the snapshot of the code.

How a signal (preemption, or the time limit drawing near) becomes a requeue:

1. SLURM signals every rank. One that comes before the run has handlers of its own is kept and delivered once it has them.
2. The ranks agree, finish their step, write the checkpoint and end with 128 + signal number: that is the run's own business.
3. Only then does rank 0 ask SLURM to put the job back into the queue. The others end with 0, so that SLURM has no reason to kill it
   meanwhile. Signals that come now are ignored.

submitit's own way would requeue from the signal's handler in rank 0, while the other ranks go on computing. It is not used.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import submitit

from launchers import scheduler
from launchers.history import History, this_process
from launchers.job import Job
from launchers.submission import JobsFile, saved_teachers
from launchers.worker import call_and_keep_failure

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
_STOPPED = tuple(128 + number for number in _SIGNALS)
_FIRST_PORT, _PORTS = 20000, 12000  # below those that systems give to clients
_SECONDS_BETWEEN_LOOKS = 10.0  # for saved teachers


@dataclass(frozen=True)
class Rank:
    """folder        of the run or sweep
    name          of the job in its jobs.json
    max_requeues  how often the job may put itself back into the queue
    """

    folder: str
    name: str
    max_requeues: int

    def __call__(self) -> None:
        """Be one rank of the job; ends the process."""
        EarlySignals().keep()
        environment = submitit.JobEnvironment()
        os.environ.update(rank_variables(environment))
        file = JobsFile(self.folder)
        job = Job.read(file.job_file(self.name))
        sys.argv = list(job.command)
        if environment.global_rank == 0:
            code = self._lead(environment, file, job)
        else:
            code = _call(job, environment.global_rank)
            code = 0 if code in _STOPPED else code
        sys.exit(code)  # also where it is 0: submitit's pickles of results are of no use here

    def _lead(self, environment: submitit.JobEnvironment, file: JobsFile, job: Job) -> int:
        """Rank 0 also keeps the history, sees to saved teachers, and requeues. Returns the exit code."""
        history = file.history(self.name)
        job_id = environment.job_id
        attempt = 1 + sum(event["event"] == "started" for event in history.of(job_id))
        history.add(
            "started", id=job_id, launched=_launched_at(), nodes=list(environment.hostnames), ranks=environment.num_tasks, **this_process()
        )
        print(f"---- job {job_id}, attempt {attempt}, {environment.num_tasks} processes on {', '.join(environment.hostnames)}", flush=True)
        teachers = SavedTeachers(self.folder, self.name, Path(job.folder)) if file.template_file(self.name).exists() else None
        code = _call(job, 0)
        if teachers is not None:
            teachers.close()
        if code in _STOPPED and self._requeue(environment, history, job, code - 128):
            return 0
        history.add("ended", id=job_id, code=code)
        return code

    def _requeue(self, environment: submitit.JobEnvironment, history: History, job: Job, number: int) -> bool:
        """Put the job back into the queue, unless it was cancelled or has been put back too often; says what it does."""
        name = signal.Signals(number).name
        job_id = environment.job_id
        before = sum(event["event"] == "requeued" for event in history.of(job_id))
        if before >= self.max_requeues:
            return self._refuse(job, f"{name}: put back into the queue {before} times already (launcher.max_requeues)")
        if environment.cluster != "slurm":
            history.add("requeued", id=job_id, signal=name)
            environment._requeue(self.max_requeues - before - 1)  # ends this process
        state = scheduler.state_of(environment.raw_job_id)
        if state is not None and state.state != "RUNNING" and state.detail != "TimeLimit":
            print(f"{name}: SLURM has ended the job already ({state.state})", flush=True)
            return False
        if problem := scheduler.requeue(environment.raw_job_id):
            return self._refuse(job, f"{name}: cannot be put back into the queue ({problem})")
        history.add("requeued", id=job_id, signal=name)
        print(f"{name}: back into the queue, {before + 1} of at most {self.max_requeues} times", flush=True)
        return True

    def _refuse(self, job: Job, problem: str) -> bool:
        """Say why the job ends here, where `status` finds it too."""
        message = f"error: {problem}; python -m launchers retry-failed {self.folder} goes on"
        print(message, file=sys.stderr, flush=True)
        failure = _failure_file(job, 0)
        failure.parent.mkdir(parents=True, exist_ok=True)
        failure.write_text(message)
        return False


class EarlySignals:
    """Keeps signals that come before the job has handlers for them, and delivers them as soon as it has; later ones are ignored."""

    def __init__(self) -> None:
        self._kept: set[int] = set()

    def keep(self) -> None:
        """From now on; to be called in the main thread."""
        for number in _SIGNALS:
            signal.signal(number, self._note)
        threading.Thread(target=self._deliver, name="early-signals", daemon=True).start()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._kept.add(number)

    def _deliver(self) -> None:
        waiting = set(_SIGNALS)
        while waiting:
            time.sleep(0.05)
            for number in [each for each in waiting if signal.getsignal(each) != self._note]:
                waiting.remove(number)
                if number in self._kept:
                    os.kill(os.getpid(), number)


class SavedTeachers:
    """Looks for new files in teachers/ while the job runs, and has an evaluation of each submitted by `python -m launchers evaluate`."""

    def __init__(self, folder: str, name: str, run_folder: Path):
        self._command = [sys.executable, "-m", "launchers", "evaluate", folder if Path(folder) == run_folder else str(run_folder)]
        self._run_folder = run_folder
        self._seen = 0  # files that the last call saw
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="saved-teachers", daemon=True)
        self._has_warned = False
        self._thread.start()

    def close(self) -> None:
        """Look once more, and wait for it."""
        self._closing.set()
        self._thread.join()

    def _watch(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closing.wait(_SECONDS_BETWEEN_LOOKS)
            count = len(saved_teachers(self._run_folder))
            if count != self._seen and self._submit():
                self._seen = count

    def _submit(self) -> bool:
        """Whether the command succeeded; says once what is wrong, and what to type instead."""
        problem = "there is no sbatch on this node" if shutil.which("sbatch") is None else None
        if problem is None:
            # Signals for the job go to all of its processes.
            command = ["sh", "-c", 'trap "" USR2 TERM; exec "$@"', "sh", *self._command]
            done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
            if done.returncode == 0:
                return True
            problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if not self._has_warned:
            self._has_warned = True
            typed = f"python -m launchers evaluate {self._run_folder}"
            print(f"warning: saved teachers are not evaluated ({problem}); type on another machine: {typed}", file=sys.stderr, flush=True)
        return False


def rank_variables(environment: submitit.JobEnvironment) -> dict[str, str]:
    """What torchrun would have set."""
    return {
        "RANK": str(environment.global_rank),
        "WORLD_SIZE": str(environment.num_tasks),
        "LOCAL_RANK": str(environment.local_rank),
        "LOCAL_WORLD_SIZE": str(environment.num_tasks // environment.num_nodes),
        "MASTER_ADDR": environment.hostnames[0],
        "MASTER_PORT": str(_FIRST_PORT + int(environment.raw_job_id) % _PORTS),  # jobs may share a node
    }


def _call(job: Job, rank: int) -> int:
    """Run the job; what it failed with is in its folder's errors/, and in this rank's log."""
    failure = _failure_file(job, rank)
    for path in failure.parent.glob(f"*rank_{rank}.txt"):  # of an earlier attempt
        path.unlink()
    code = call_and_keep_failure(job, failure)
    if failure.exists():
        print(failure.read_text(), file=sys.stderr, flush=True)
    return code


def _launched_at() -> float:
    """When the batch script began, in seconds since 1970: before any rank."""
    return float(os.environ.get("LAUNCHED_AT", time.time()))


def _failure_file(job: Job, rank: int) -> Path:
    return Path(job.folder) / "errors" / f"rank_{rank}.txt"
