"""Which runs a user means by folders, run ids and an experiment."""

import re
from collections.abc import Sequence
from pathlib import Path

from esvit.comparison.runs import Gathered, Run, Wanted, find_run_folders, read_folders
from esvit.comparison.store import read_experiment, read_runs
from esvit.errors import OptionError

_RUN_ID = re.compile(r"[0-9a-f]{32}")


def gather(places: Sequence[str], *, experiment: str | None, uri: str | None, wanted: Wanted) -> Gathered:
    """The runs, each once.

    places      run folders, folders with runs at any depth, or run ids of the store
    experiment  an experiment of the store, or None
    uri         the store, None where there is none

    Raises OptionError if a place is none of these, or there is no run at all.
    """
    if not places and experiment is None:
        raise OptionError(
            "task.runs", "nothing to compare", "give runs=[FOLDER or RUN_ID, ...], or experiment=NAME with tracking.uri=STORE"
        )
    folders: list[Path] = []
    run_ids: list[str] = []
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            found = list(find_run_folders(path))
            if not found:
                raise OptionError("task.runs", f"no run in '{place}'", "give a run folder (it holds config.yaml), or one above it")
            folders += found
        elif _RUN_ID.fullmatch(place):
            run_ids.append(place)
        else:
            raise OptionError("task.runs", f"'{place}' is neither a folder nor a run id", "give folders that exist, or ids of 32 digits")
    parts = [read_folders(folders, wanted=wanted)] if folders else []
    if run_ids or experiment is not None:
        if uri is None:
            raise OptionError("tracking.uri", "there is no store to read from", "give one, e.g. tracking.uri=sqlite:///outputs/mlflow.db")
        parts += [read_runs(uri, run_ids, wanted=wanted)] if run_ids else []
        parts += [read_experiment(uri, experiment, wanted=wanted)] if experiment is not None else []
    runs: dict[str, Run] = {}
    for run in (run for part in parts for run in part.runs):
        runs[str(run.folder or run.run_id)] = run  # the store's account of a folder named before comes last: it knows the run's id there
    gathered = Gathered(list(runs.values()), [note for part in parts for note in part.notes])
    if not gathered.runs:
        raise OptionError("task.runs" if places else "task.experiment", "no run in it can be compared", "give runs that have begun")
    return gathered
