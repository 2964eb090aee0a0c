"""One rank of `launcher=gpus`: `python -m launchers.worker FOLDER`, with `job.json` in it. Leaves its failure there as `rank_N.txt`.

It never outlives its parent, so that no orphan goes on writing into a run folder.
"""

import ctypes
import os
import signal
import sys
import traceback
from pathlib import Path

from launchers.job import Job

_PR_SET_PDEATHSIG = 1


def main() -> None:
    die_with_parent()
    scratch = Path(sys.argv[1])
    job = Job.read(scratch / "job.json")
    sys.argv = list(job.command)
    sys.exit(call_and_keep_failure(job, scratch / f"rank_{os.environ['RANK']}.txt"))


def call_and_keep_failure(job: Job, failure: Path) -> int:
    """Run the job in this process and return its exit code; its message for the user, or its traceback, goes into `failure`."""
    failure.unlink(missing_ok=True)  # of an earlier attempt
    try:
        job.call()
    except SystemExit as end:
        if isinstance(end.code, str):
            return _keep(failure, end.code)
        return end.code or 0
    except BaseException:
        return _keep(failure, traceback.format_exc())
    return 0


def _keep(failure: Path, text: str) -> int:
    failure.parent.mkdir(parents=True, exist_ok=True)
    failure.write_text(text)
    return 1


def die_with_parent() -> None:
    """On Linux: be killed when the parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
