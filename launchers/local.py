"""Run in the calling process."""

from dataclasses import dataclass

from launchers.job import Job


@dataclass(kw_only=True)
class Local:
    processes: int = 1

    def launch(self, job: Job) -> None:
        job.call()
