"""The folder and the tracking run of a job that starts later: made before it is submitted, and taken back if the scheduler refuses it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from esvit.run_folder import RunFolder


@contextmanager
def announced(options: dict[str, Any], tracking: Any) -> Iterator[dict[str, Any]]:
    """The job's options, with id and page of its run in the tracking store; the job is submitted inside the block.

    tracking  the store's options, built
    """
    if not options["has_run_folder"]:
        yield options
        return
    folder = RunFolder(options["output_dir"])
    is_new = not folder.path.exists()
    created = tracking.create(run_folder=folder.path, config=options["chosen"])
    folder.begin(options["chosen"])
    try:
        yield options | {"tracking_run": asdict(created) if created else None}
    except SystemExit:
        if is_new:
            tracking.withdraw(run_folder=folder.path)
            shutil.rmtree(folder.path)
        else:
            tracking.open(run_folder=folder.path, config=options["chosen"], is_main=True).close("FAILED")
        raise
