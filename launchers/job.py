"""What is shipped: the name of a function and a config of plain data. Nothing is pickled, so a job can be read and re-run by hand."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Call `module:function` with `config` in every rank.

    folder   the run folder, absolute
    root     the folder that `module` is imported from
    command  the command line that the job comes from; the ranks find it in `sys.argv`
    """

    function: str
    config: dict[str, Any]
    folder: str
    root: str
    command: list[str] = dataclasses.field(default_factory=lambda: list(sys.argv))

    def call(self) -> None:
        module, name = self.function.split(":")
        getattr(importlib.import_module(module), name)(self.config)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> "Job":
        return cls(**json.loads(path.read_text()))

    def filled(self, **values: str | int) -> "Job":
        """The job with "{name}" replaced in its folder and in every text of its config.

        A text that is nothing but "{name}" becomes the value itself.
        """
        return dataclasses.replace(self, config=_filled(self.config, values), folder=_filled(self.folder, values))


class Launcher(Protocol):
    """What `launcher=...` chooses.

    returns_at_once  whether `launch` returns before the job has run; then it has a `check` too, which ends this process with one line
                     where an option cannot work
    """

    returns_at_once: ClassVar[bool]

    def launch(self, job: Job, *, then: Sequence[Job] = (), saved: Job | None = None) -> None:
        """Run `job`, or see to it that it is run.

        then   jobs to run in order after it has succeeded, and only then
        saved  a template, one job for every file teachers/teacher_<step>.pt that `job` leaves in its folder: "{teacher}" stands for the
               file's path and "{step}" for its number
        """

    def launch_array(
        self,
        jobs: Sequence[Job],
        *,
        names: Sequence[str],
        folder: str | Path,
        then: Sequence[Sequence[Job]] = (),
        saved: Sequence[Job] = (),
    ) -> None:
        """Run the children of a sweep, remembered in `folder` under `names`; `then` and `saved` are as in `launch`, for each child."""


def _filled(value: Any, values: dict[str, str | int]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(each, values) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, values) for each in value]
    if not isinstance(value, str):
        return value
    for name, replacement in values.items():
        if value == f"{{{name}}}":
            return replacement
        value = value.replace(f"{{{name}}}", str(replacement))
    return value
