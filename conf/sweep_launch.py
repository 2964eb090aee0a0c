"""From the children of a sweep to jobs: one array for the launcher, or one trial after the other for a search.

Everything is composed and checked first; nothing is written before. Then the sweep's folder gets `sweep.yaml`, which says what varies,
and the tracking store a run that is the parent of all children.
"""

import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conf.chain import Options
from conf.sweep import Child, Sweep, open_sweep
from esvit.errors import OptionError
from esvit.run_folder import write_atomically
from esvit.tracking.base import Status
from esvit.tracking.mlflow import CHILDREN_TAG, PARENT_TAG
from launchers.job import Job
from launchers.submission import JobsFile, Main

DESCRIPTION_NAME = "sweep.yaml"


@dataclass(frozen=True, kw_only=True)
class Program:
    """What `run.py` does with options: `admit` them to their folder, make a `job` of them, `build` what `_target_` names."""

    admit: Callable[[Options], Options | None]
    job: Callable[[Options], Job]
    build: Callable[[dict[str, Any]], Any]


def launch(arguments: list[str], program: Program) -> None:
    """Run the sweep of a command line. Raises OptionError for what cannot work."""
    if "RANK" in os.environ:
        raise OptionError("-m", "is for one process, and torchrun starts several", "leave torchrun away, and use launcher=gpus")
    with open_sweep(arguments) as sweep:
        if sweep.search is None:
            _launch_all(sweep, sweep.children(), program)
        else:
            _search(sweep, sweep.search, program)


def _launch_all(sweep: Sweep, children: list[Child], program: Program) -> None:
    launcher = _common_launcher(children)
    description = _Description(sweep, children)
    description.check()
    admitted = [_Admitted.of(child, program) for child in children]
    unfinished = [each for each in admitted if each is not None]
    if not unfinished:
        return print(f"all {len(children)} runs of {sweep.folder} have finished; nothing to do")
    built = program.build(launcher)
    if built.returns_at_once:
        built.check(sweep.folder, [each.child.name for each in unfinished])
    is_new = not sweep.folder.exists()
    description.write()
    parent = _Parent(sweep, children[0].options, program)
    siblings = len(children) if built.returns_at_once else None
    groups = list(_of_equal_length([each.main(program, parent.id, sweep.folder, siblings) for each in unfinished]))
    with parent.submitted(is_new) if built.returns_at_once else parent.ended():
        for group in groups:
            built.launch_array(
                [main.job for main in group],
                names=[main.name for main in group],
                folder=sweep.folder,
                then=[main.then for main in group],
                saved=[main.saved for main in group if main.saved is not None],
            )
    return None


@dataclass(frozen=True)
class _Admitted:
    """What is left to do of a child: its training, if that has not finished, and evaluations."""

    child: Child
    options: list[Options]

    @classmethod
    def of(cls, child: Child, program: Program) -> "_Admitted | None":
        admitted = [program.admit(options) for options in (child.options, *child.evaluations)]
        left = [options for options in admitted if options is not None]
        return cls(child, left) if left else None

    def main(self, program: Program, parent: str | None, folder: Path, siblings: int | None = None) -> Main:
        """A job of the launcher.

        parent    id of the sweep's run in the tracking store, or None
        folder    the sweep's
        siblings  how many children there are, where they have to tell how the sweep ended
        """
        if parent is not None:
            for node in (self.child.options, self.child.options["chosen"]):
                node["tracking"]["tags"][PARENT_TAG] = parent
                if siblings is not None:
                    node["tracking"]["tags"][CHILDREN_TAG] = str(siblings)
        jobs = [program.job(options) for options in self.options]
        if not self.child.options["has_run_folder"]:  # it writes where it was told to; what becomes of the job is noted here
            jobs = [dataclasses.replace(jobs[0], folder=str(folder / self.child.name))]
        trains = self.options[0]["output_dir"] == self.child.options["output_dir"]
        saved = program.job(self.child.teachers) if trains and self.child.teachers is not None else None
        return Main(name=self.child.name, job=jobs[0], then=jobs[1:], saved=saved)


def _of_equal_length(mains: list[Main]) -> Iterator[list[Main]]:
    """An array's children are followed by equally many evaluations."""
    shapes = sorted({(len(main.then), main.saved is not None) for main in mains}, reverse=True)
    for shape in shapes:
        yield [main for main in mains if (len(main.then), main.saved is not None) == shape]


def _common_launcher(children: list[Child]) -> dict[str, Any]:
    """Raises OptionError if the children do not have the same."""
    first = children[0].options["launcher"]
    for child in children:
        if child.options["launcher"] != first:
            raise OptionError("launcher", f"differs between {children[0].name} and {child.name}", "launch these as two sweeps")
        if child.options["plan"]:
            raise OptionError("plan", "is for a single run", "leave -m away, and give every option one value")
    return first


class _Description:
    """`sweep.yaml`: the command, what varies, and the options of every child."""

    def __init__(self, sweep: Sweep, children: list[Child]):
        self.path = sweep.folder / DESCRIPTION_NAME
        self.sweep = sweep
        self.children = {child.name: child.varied for child in children}

    def check(self) -> None:
        """Raises OptionError if the folder holds other children under these names."""
        if self.sweep.folder.exists() and not self.sweep.folder.is_dir():
            raise OptionError("output_dir", f"'{self.sweep.folder}' is a file", "give a folder")
        if not self.path.exists():
            return
        before = yaml.safe_load(self.path.read_text())["children"]
        for name, varied in self.children.items():
            number = name.partition("_")[0]
            same = next((each for each in before if each.partition("_")[0] == number), name)
            if before.get(same, varied) != varied:
                found = f"'{self.sweep.folder}' holds a sweep whose run {number} is {same}, not {name}"
                raise OptionError("output_dir", found, "name another folder; values may only be added at the end")

    def write(self) -> None:
        self.sweep.folder.mkdir(parents=True, exist_ok=True)
        before = yaml.safe_load(self.path.read_text())["children"] if self.path.exists() else {}
        content = {
            "name": self.sweep.name,
            "command": shlex.join(sys.argv),
            "varied": self.sweep.described(),
            "children": before | self.children,
        }
        write_atomically(self.path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


class _Parent:
    """The run in the tracking store that the children belong to, where they have a store; without params, as it computes nothing.

    id  None without a store, or if it cannot be reached
    """

    def __init__(self, sweep: Sweep, options: Options, program: Program):
        self.sweep = sweep
        self.id: str | None = None
        self.tracking = None
        if "run_name" in options["tracking"] and options["has_run_folder"]:
            varied = (f"- {name}: {values if isinstance(values, str) else ', '.join(values)}" for name, values in sweep.described().items())
            tags = {"sweep": sweep.folder.name, "mlflow.note.content": "\n".join(["What varies:", "", *varied])}
            own = {"run_name": f"{sweep.name} ({sweep.folder.name})", "tags": tags, "host": None}
            self.tracking = program.build(options["tracking"] | own)
            created = self.tracking.create(run_folder=sweep.folder, config={})
            self.id = created.run_id if created else None

    @contextlib.contextmanager
    def ended(self, *results: str) -> Iterator[None]:
        """Tells the store how the block ended, and gives it the files `results` of the sweep's folder."""
        try:
            yield
        except SystemExit as end:
            self._close("KILLED" if isinstance(end.code, int) and end.code > 128 else "FAILED", results)
            raise
        self._close("FINISHED", results)

    @contextlib.contextmanager
    def submitted(self, is_new: bool) -> Iterator[None]:
        """The children are submitted in the block, and will tell the store how the sweep ends.

        is_new  whether the sweep's folder goes again if they are refused
        """
        self._close("SCHEDULED", ())  # before the children can have told anything
        try:
            yield
        except SystemExit:
            if is_new and self._is_without_jobs():
                if self.tracking is not None:
                    self.tracking.withdraw(run_folder=self.sweep.folder)
                shutil.rmtree(self.sweep.folder)
            else:
                self._close("FAILED", ())
            raise

    def _is_without_jobs(self) -> bool:
        file = JobsFile(self.sweep.folder)
        return not file.path.exists() or all(entry.id is None for entry in file.read().jobs)

    def _close(self, status: Status, results: Sequence[str]) -> None:
        if self.tracking is None:
            return
        tracker = self.tracking.open(run_folder=self.sweep.folder, config={}, is_main=True)
        for name in (DESCRIPTION_NAME, *results):
            if (self.sweep.folder / name).exists():
                tracker.artifact(self.sweep.folder / name)
        tracker.close(status)
        (self.sweep.folder / "log.jsonl").unlink(missing_ok=True)  # empty: this run has no steps


def _search(sweep: Sweep, search: dict[str, Any], program: Program) -> None:
    try:
        from launchers.search import RESULT_NAME, SearchOptions
        from launchers.search import search as run_search
    except ModuleNotFoundError as error:
        raise OptionError("search.trials", f"a search needs {error.name}", "pip install 'esvit[search]', or leave it away") from None
    first = sweep.child(0, {each.name: each.first() for each in sweep.space()})
    _check_metric(first.options, search)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    _Description(sweep, []).write()
    parent = _Parent(sweep, first.options, program)

    def make(number: int, typed: dict[str, str]) -> Main:
        child = sweep.child(number, typed)
        _common_launcher([first, child])
        admitted = _Admitted.of(child, program)
        if admitted is None:
            raise ValueError(f"{child.name}: has finished already")
        _Description(sweep, [child]).write()
        return admitted.main(program, parent.id, sweep.folder)

    launcher = program.build(first.options["launcher"])
    with parent.ended(RESULT_NAME):
        run_search(launcher=launcher, folder=sweep.folder, space=sweep.space(), make=make, options=SearchOptions(**search))


def _check_metric(options: Options, search: dict[str, Any]) -> None:
    knn = options["task"].get("online_knn")
    if knn is not None and search["metric"].startswith("knn/") and knn["every_epochs"] <= 0:
        found = f"'{search['metric']}' is not measured while task.online_knn.every_epochs is 0"
        raise OptionError("search.metric", found, "set it to 1, and give data.val_root; or search another metric")
