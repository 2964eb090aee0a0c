"""Run in the calling process; the children of a sweep in processes of their own, some at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from launchers import children
from launchers.job import Job


@dataclass(kw_only=True)
class Local:
    """parallel  how many children of a sweep run at once"""

    returns_at_once: ClassVar[bool] = False
    parallel: int

    def launch(self, job: Job, *, then: Sequence[Job] = (), saved: Job | None = None) -> None:
        for each in children.in_order(job, then, saved):
            each.call()

    def launch_array(
        self,
        jobs: Sequence[Job],
        *,
        names: Sequence[str],
        folder: str | Path,
        then: Sequence[Sequence[Job]] = (),
        saved: Sequence[Job] = (),
    ) -> None:
        """Run the children to their ends; ends this process with exit code 1 if one of them failed."""
        children.run_array(self, jobs, names=names, folder=folder, then=then, saved=saved, gpus_each=1)
