"""What SLURM says of jobs: squeue for those that wait or run, sacct for those that have ended."""

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

_SECONDS = 30


@dataclass(frozen=True)
class JobState:
    """state in SLURM's words (PENDING, RUNNING, COMPLETED, FAILED, ...); detail: why it waits, or its exit code"""

    state: str
    detail: str


def active_jobs() -> dict[str, JobState]:
    """The user's jobs in the queue, by id ("12", "12_3"); empty where there is no SLURM."""
    lines = _lines("squeue", "--noheader", "--array", "--user", _user(), "--format=%i|%T|%r")
    return {id_: JobState(state, "" if reason == "None" else reason) for id_, state, reason in (line.split("|") for line in lines)}


def ended_jobs(ids: Iterable[str]) -> dict[str, JobState]:
    """What accounting remembers of these jobs; empty where there is none."""
    if not (wanted := ",".join(ids)):
        return {}
    lines = _lines("sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State,ExitCode", "--jobs", wanted)
    ended = {}
    for id_, state, exit_code in (line.split("|") for line in lines):
        for each in _expanded(id_):
            ended[each] = JobState(state.split()[0], _in_words(exit_code))  # the state may be "CANCELLED by 0"
    return ended


def cancel(ids: Iterable[str]) -> None:
    """Ask SLURM to end these jobs, waiting ones too."""
    subprocess.run(["scancel", *ids], check=True, timeout=_SECONDS)


def requeue(job_id: str) -> str | None:
    """Put a job back into the queue, to be started again from its batch script; returns what speaks against it, or None."""
    try:
        subprocess.run(["scontrol", "requeue", job_id], check=True, timeout=_SECONDS, capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no scontrol on this node"
    except subprocess.CalledProcessError as error:
        return " ".join(error.stderr.split()) or str(error)
    except subprocess.TimeoutExpired:
        return "scontrol did not answer"
    return None


def state_of(job_id: str) -> JobState | None:
    """What squeue says of one job; None where it does not know it or does not answer."""
    lines = _lines("squeue", "--noheader", "--jobs", job_id, "--format=%T|%r")
    return JobState(*lines[0].split("|")) if lines else None


def is_here() -> bool:
    return shutil.which("squeue") is not None


def _in_words(exit_code: str) -> str:
    """ "0:0" -> "", "1:0" -> "exit code 1", "0:9" -> "signal 9" """
    code, _, number = exit_code.partition(":")
    return f"signal {number}" if number not in ("", "0") else f"exit code {code}" if code != "0" else ""


def _expanded(job_id: str) -> list[str]:
    """ "12_[3-5,7%2]" -> 12_3, 12_4, 12_5, 12_7: tasks of an array that were never started."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", job_id)
    if match is None:
        return [job_id]
    array, parts = match.groups()
    found = []
    for part in parts.split(","):
        first, _, last = part.partition("-")
        found += [f"{array}_{number}" for number in range(int(first), int(last or first) + 1)]
    return found


def _lines(*command: str) -> list[str]:
    """What a command printed; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user number without a name
        return str(os.getuid())
