"""What is shipped: the name of a function and a config of plain data. Nothing is pickled, so a job can be read and re-run by hand."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Call `module:function` with `config` in every rank.

    folder  the run folder, absolute
    root    the folder that `module` is imported from
    """

    function: str
    config: dict[str, Any]
    folder: str
    root: str

    def call(self) -> None:
        module, name = self.function.split(":")
        getattr(importlib.import_module(module), name)(self.config)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> "Job":
        return cls(**json.loads(path.read_text()))
