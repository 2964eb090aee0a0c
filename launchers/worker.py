"""One rank: `python -m launchers.worker FOLDER`, with `job.json` in the folder. Leaves its failure there as `rank_N.txt`.

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
    _die_with_parent()
    scratch = Path(sys.argv[1])
    failure = scratch / f"rank_{os.environ['RANK']}.txt"
    try:
        Job.read(scratch / "job.json").call()
    except SystemExit as end:
        if isinstance(end.code, str):  # a message for the user, which the parent prints once for all ranks
            failure.write_text(end.code)
            sys.exit(1)
        raise
    except BaseException:
        failure.write_text(traceback.format_exc())
        sys.exit(1)


def _die_with_parent() -> None:
    """On Linux: be killed when the parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
