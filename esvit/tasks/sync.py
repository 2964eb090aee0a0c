"""Sends what MLflow stores lack of finished, killed and never tracked runs, after a server was away. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esvit.errors import OptionError
from esvit.tracking.mlflow import check_uri, find_runs, one_line, send_missing


@dataclass(kw_only=True)
class Sync:
    """folder  a run folder, or a folder of run folders at any depth
    uri     the store that gets them; None: each run's own
    """

    folder: str
    uri: str | None

    def run(self, runtime: Any = None) -> None:
        """Print one line per run. Raises OptionError if there is no run, or if any run could not be sent."""
        folder = Path(self.folder)
        if not folder.is_dir():
            raise OptionError("output_dir", f"folder {self.folder!r} does not exist", "give a run folder, or a folder of run folders")
        if self.uri is not None:
            check_uri(self.uri)
        runs = find_runs(folder)
        if not runs:
            raise OptionError("output_dir", f"no run in {self.folder!r}", "give a run folder (it holds tracking.json), or one above it")
        failures = 0
        for run in runs:
            try:
                outcome = send_missing(run, uri=self.uri)
            except Exception as error:  # one run's broken store must not keep the others from theirs
                failures += 1
                outcome = f"failed: {error if isinstance(error, OptionError) else one_line(error)}"
            print(f"{run}: {outcome}", flush=True)
        if failures:
            raise OptionError("tracking.uri", f"{failures} of {len(runs)} runs could not be sent", "see the lines above; run this again")
