"""Searches for good options with Optuna: each trial is a run, started through the launcher, watched by its log, stopped if it is poor.

Everything that the search knows is in the sweep's folder: Optuna's `search.db`, and the runs. When this process dies, the same command
goes on: trials that have ended meanwhile are read, those that still run are watched, those that died start again from their checkpoints.

Trials are asked for one at a time, as soon as there is room, and not in batches that would wait for their slowest member.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from launchers import children, scheduler, status, submission
from launchers.history import this_process
from launchers.space import Dimension
from launchers.submission import JobsFile, Main

RESULT_NAME = "search.json"
_STORE_NAME = "search.db"
_LOCK_NAME = "search.lock"
_STUDY = "search"
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_SECONDS_BETWEEN_LOOKS = 0.3  # at processes of this machine and their logs
_STORE_SECONDS = 60  # how long a busy file may be waited for
_SECONDS_BETWEEN_QUESTIONS = 15.0  # to a scheduler
_MOST_FAILURES = 3  # in a row, before the search gives up
_SIGNIFICANT_DIGITS = 4  # of a number that is tried
_NAME, _OPTIONS, _STOPPED, _SPACE = "name", "options", "stopped", "space"  # what is kept with a trial, and with the study

Make = Callable[[int, dict[str, str]], Main]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of `search`; they are explained in conf/schema/sweeps.py."""

    trials: int
    metric: str
    direction: Literal["maximize", "minimize"]
    sampler: str
    startup_trials: int
    seed: int
    at_once: int | None
    prune: bool
    prune_startup_trials: int
    prune_from_epoch: int


def search(*, launcher: Any, folder: str | Path, space: Sequence[Dimension], make: Make, options: SearchOptions) -> dict[str, Any]:
    """Run all trials, also those that an earlier process left; returns what `search.json` holds.

    make  a trial's run, of its number and its options as typed; a ValueError means that these options cannot be

    Ends this process with one line where the search makes no sense, and with 128 + signal number if a signal ends it.
    """
    _check(options)
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _alone(folder):
        study = _study(folder, options, space)
        place = _place(launcher, JobsFile(folder), options)
        return _Search(study, place, {each.name: _distribution(each) for each in space}, make, options, folder).run()


@dataclass
class _Running:
    """A trial at work.

    offset    where its log is to be read on
    reported  epochs whose metric Optuna has
    """

    trial: Trial
    name: str
    log: Path
    offset: int = 0
    reported: set[int] = field(default_factory=set)


class _Search:
    def __init__(
        self,
        study: optuna.Study,
        place: "_Place",
        space: dict[str, BaseDistribution],
        make: Make,
        options: SearchOptions,
        folder: Path,
    ):
        self.study = study
        self.place = place
        self.space = space
        self.make = make
        self.options = options
        self.folder = folder
        self.running: list[_Running] = []
        self.signal = 0

    def run(self) -> dict[str, Any]:
        handlers = {number: signal.signal(number, self._on_signal) for number in _FORWARDED}
        try:
            self._adopt()
            while not self.signal:
                self._look()
                self._fill()
                if not self.running:
                    break
                self.place.wait()
            if self.signal:
                self.place.leave()
        finally:
            self.place.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self._conclude()

    # ------------------------------------------------------------------ trials begin

    def _adopt(self) -> None:
        """Go on with the trials of a process that died."""
        left = [each for each in self.study.trials if each.state == TrialState.RUNNING]
        active = self.place.active()
        for frozen in left:
            trial = Trial(self.study, frozen._trial_id)
            name: str | None = frozen.user_attrs.get(_NAME)
            if name is None:  # it died between the question and the answer
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            run_folder = self.folder / name
            running = _Running(trial, name, run_folder / "log.jsonl", reported=set(frozen.intermediate_values))
            if name not in active and not _has_ended(run_folder) and _STOPPED not in frozen.user_attrs:
                self._begin(running, frozen.user_attrs[_OPTIONS])
            else:
                self.running.append(running)

    def _fill(self) -> None:
        """Begin as many trials as there is room for."""
        while len(self.running) < self.place.at_once and len(self.study.trials) < self.options.trials and not self._has_given_up():
            trial = self.study.ask(self.space)
            self._begin(_Running(trial, "", Path()), {name: _typed(value) for name, value in trial.params.items()})

    def _begin(self, running: _Running, typed: dict[str, str]) -> None:
        trial = running.trial
        trial.set_user_attr(_OPTIONS, typed)
        try:
            main = self.make(trial.number, typed)
        except ValueError as error:
            print(f"trial {trial.number}: {error}", file=sys.stderr, flush=True)
            self.study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_user_attr(_NAME, main.name)
        running.name, running.log = main.name, Path(main.job.folder) / "log.jsonl"
        self.place.start(main)
        self.running.append(running)
        print(f"{trial.number + 1} of {self.options.trials}  {main.name}", flush=True)

    def _has_given_up(self) -> bool:
        ended = [each for each in self.study.trials if each.state.is_finished()]
        return len(ended) >= _MOST_FAILURES and all(each.state == TrialState.FAIL for each in ended[-_MOST_FAILURES:])

    # ------------------------------------------------------------------ trials go on and end

    def _look(self) -> None:
        """Read what the runs have logged, stop the poor ones, and take the results of those that have ended."""
        active = self.place.active()
        for running in list(self.running):
            is_poor = self._report(running)
            if running.name not in active:
                self.running.remove(running)
                self._tell(running)
            elif is_poor and _STOPPED not in running.trial.user_attrs:
                running.trial.set_user_attr(_STOPPED, True)
                print(f"{running.name}: worse than the median, stopped", flush=True)
                self.place.stop(running.name)

    def _report(self, running: _Running) -> bool:
        """Tell Optuna the metric of every epoch that has one; returns whether the run is poor."""
        is_poor = False
        for record in _new_records(running):
            value, epoch = record.get(self.options.metric), int(record.get("epoch", 0))
            if isinstance(value, int | float) and math.isfinite(value) and epoch not in running.reported:
                running.reported.add(epoch)
                running.trial.report(float(value), epoch)
                is_poor = self.options.prune and running.trial.should_prune()
        return is_poor

    def _tell(self, running: _Running) -> None:
        run_folder = running.log.parent
        if _has_ended(run_folder):
            value = self._result(run_folder)
            if math.isfinite(value):
                self.study.tell(running.trial, value)
                print(f"{running.name}: {self.options.metric} {value:.6g}", flush=True)
            else:
                self._fail(running, f"{self.options.metric} is {value}")
        elif _STOPPED in running.trial.user_attrs:
            self.study.tell(running.trial, state=TrialState.PRUNED)
        else:
            self._fail(running, self.place.failure(running.name))
        self._write()

    def _fail(self, running: _Running, reason: str) -> None:
        self.study.tell(running.trial, state=TrialState.FAIL)
        print(f"{running.name}: failed: {reason}", file=sys.stderr, flush=True)

    def _result(self, run_folder: Path) -> float:
        metrics = json.loads((run_folder / "metrics.json").read_text())
        if self.options.metric not in metrics:
            self.place.leave()
            names = ", ".join(sorted(name for name in metrics if "/" in name))
            sys.exit(f"error: search.metric: '{self.options.metric}' is not in {run_folder / 'metrics.json'}; there are {names}")
        return float(metrics[self.options.metric])

    def _on_signal(self, number: int, _: Any) -> None:
        """The second one waits for no checkpoint."""
        if self.signal:
            self.place.close()
        self.signal = number

    # ------------------------------------------------------------------ results

    def _conclude(self) -> dict[str, Any]:
        result = self._write()
        print("\n".join(_table(result)), flush=True)
        if self.signal:
            print("the same command with this output_dir goes on", file=sys.stderr)
            sys.exit(128 + self.signal)
        if self._has_given_up() and len(self.study.trials) < self.options.trials:
            sys.exit(f"error: search: {_MOST_FAILURES} runs in a row failed, see python -m launchers status {self.folder}")
        if result["best"] is None:
            sys.exit(f"error: search: no run gave {self.options.metric}, see python -m launchers status {self.folder}")
        return result

    def _write(self) -> dict[str, Any]:
        trials = [_described(each) for each in self.study.trials]
        sign = -1 if self.options.direction == "maximize" else 1
        complete = sorted((each for each in trials if each["state"] == "COMPLETE"), key=lambda each: sign * each["value"])
        result = {
            "metric": self.options.metric,
            "direction": self.options.direction,
            "best": complete[0] if complete else None,
            "trials": complete + [each for each in trials if each not in complete],
        }
        submission.write_atomically(self.folder / RESULT_NAME, json.dumps(result, indent=1))
        return result


# ---------------------------------------------------------------------- where trials run


class _Place(Protocol):
    """Where trials run. `leave`: this process ends before them; `close`: at once."""

    at_once: int

    def start(self, main: Main) -> None: ...
    def active(self) -> set[str]: ...
    def stop(self, name: str) -> None: ...
    def leave(self) -> None: ...
    def failure(self, name: str) -> str: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


def _place(launcher: Any, file: JobsFile, options: SearchOptions) -> _Place:
    kind = submission.options_of(launcher)["kind"]
    return _Here(launcher, file, options.at_once) if kind in ("local", "gpus") else _Elsewhere(launcher, file, options.at_once)


class _Jobs:
    """The trials' jobs in the sweep's jobs.json, all with the code of the first."""

    def __init__(self, launcher: Any, file: JobsFile):
        self.launcher = launcher
        self.file = file

    def write_down(self, main: Main) -> None:
        launcher = submission.options_of(self.launcher)
        if not self.file.path.exists():
            submission.prepare(self.file.folder, [main], launcher=launcher, process=this_process())
            return
        submission.add(self.file, [main])
        with self.file.changing() as content:
            content.launcher, content.process = launcher, this_process()

    def status(self, name: str) -> status.JobStatus:
        return next(each for each in status.states(self.file.folder) if each.entry.name == name)

    def failure(self, name: str) -> str:
        found = self.status(name)
        return found.error or f"{found.state} {found.detail}".strip()


class _Here(_Jobs):
    """Processes of this machine, which end with this one."""

    def __init__(self, launcher: Any, file: JobsFile, at_once: int | None):
        super().__init__(launcher, file)
        self.at_once = int(at_once or launcher.parallel)
        gpus_each = launcher.gpus_each() if hasattr(launcher, "gpus_each") else 1
        self._slots = children.slots(self.at_once, gpus_each)
        self._processes: dict[str, tuple[subprocess.Popen, int]] = {}

    def start(self, main: Main) -> None:
        self.write_down(main)
        with self.file.changing() as content:
            for entry in content.jobs:
                if main.name in (entry.name, entry.of):
                    children.renew(entry, self.file)
        slot = min(set(range(len(self._slots))) - {slot for _, slot in self._processes.values()})
        self._processes[main.name] = (children.start(self.file, main.name, self._slots[slot]), slot)

    def active(self) -> set[str]:
        self._processes = {name: pair for name, pair in self._processes.items() if pair[0].poll() is None}
        return set(self._processes)

    def stop(self, name: str) -> None:
        self._processes[name][0].send_signal(signal.SIGTERM)

    def leave(self) -> None:
        """Each writes its checkpoint and ends; the same command starts it again."""
        for name in self.active():
            self.stop(name)
        while self.active():
            self.wait()

    def wait(self) -> None:
        time.sleep(_SECONDS_BETWEEN_LOOKS)

    def close(self) -> None:
        for process, _ in self._processes.values():
            process.kill()


class _Elsewhere(_Jobs):
    """Jobs of a scheduler, which go on without this process."""

    def __init__(self, launcher: Any, file: JobsFile, at_once: int | None):
        super().__init__(launcher, file)
        parallelism: int = getattr(launcher, "array_parallelism", 1)
        self.at_once = at_once or parallelism

    def start(self, main: Main) -> None:
        self.write_down(main)
        self.launcher.submit(self.file, [main.name])

    def active(self) -> set[str]:
        return {each.entry.name for each in status.states(self.file.folder) if each.is_active and each.entry.role == "main"}

    def stop(self, name: str) -> None:
        entry = self.status(name).entry
        if submission.options_of(self.launcher)["kind"] == "slurm":
            scheduler.cancel([str(entry.id)])
        else:
            self.launcher.end(self.file, entry)

    def leave(self) -> None:
        """They go on; the same command watches them again."""

    def wait(self) -> None:
        time.sleep(_SECONDS_BETWEEN_QUESTIONS)

    def close(self) -> None:
        pass


# ---------------------------------------------------------------------- Optuna


def _study(folder: Path, options: SearchOptions, space: Sequence[Dimension]) -> optuna.Study:
    """The folder's study, or a new one. Ends this process with one line where that is of another search."""
    path = folder / _STORE_NAME
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": _STORE_SECONDS}})
    study = optuna.create_study(storage=storage, study_name=_STUDY, direction=options.direction, load_if_exists=True)
    described = {each.name: dataclasses.asdict(each) | {"choices": list(each.choices)} for each in space}
    before = study.user_attrs.get(_SPACE, described)
    if study.direction.name.lower() != options.direction or before != described:
        changed = sorted(name for name in described | before if described.get(name) != before.get(name)) or ["search.direction"]
        sys.exit(f"error: output_dir: '{folder}' holds another search ({', '.join(changed)} differ); name another folder, or go back")
    study.set_user_attr(_SPACE, described)
    study.sampler = _sampler(options, seed=options.seed + len(study.trials))  # a search that goes on must not draw the same again
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=options.prune_startup_trials, n_warmup_steps=options.prune_from_epoch)
    return study


def _sampler(options: SearchOptions, *, seed: int) -> optuna.samplers.BaseSampler:
    if options.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():  # constant_liar, which keeps trials that run together apart, is "experimental"
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=options.startup_trials, constant_liar=True)


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.choices:
        return CategoricalDistribution(list(dimension.choices))
    low, high, log = dimension.low, dimension.high, dimension.is_logarithmic
    if dimension.is_whole:
        return IntDistribution(int(low), int(high), log=log, step=dimension.step)
    return FloatDistribution(low, high, log=log)


def _typed(value: Any) -> str:
    return f"{value:.{_SIGNIFICANT_DIGITS}g}" if isinstance(value, float) else str(value)


def _described(trial: FrozenTrial) -> dict[str, Any]:
    epochs = trial.intermediate_values
    return {
        "name": trial.user_attrs.get(_NAME),
        "state": trial.state.name,
        "value": trial.value if trial.state == TrialState.COMPLETE else None,
        "last_epoch": max(epochs, default=None),
        "last_value": epochs[max(epochs)] if epochs else None,
        "options": trial.user_attrs.get(_OPTIONS, {}),
    }


# ---------------------------------------------------------------------- files


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Ends this process with one line if another one searches in this folder."""
    with (folder / _LOCK_NAME).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            sys.exit(f"error: output_dir: {file.read().strip() or 'another process'} searches in '{folder}'; wait for it, or end it")
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _has_ended(run_folder: Path) -> bool:
    return (run_folder / "metrics.json").exists()


def _new_records(running: _Running) -> list[dict[str, Any]]:
    """What the run has logged since the last look; a resumed run begins its log anew from its checkpoint."""
    try:
        with running.log.open("rb") as file:
            if os.fstat(file.fileno()).st_size < running.offset:
                running.offset = 0
            file.seek(running.offset)
            content = file.read()
    except FileNotFoundError:
        return []
    complete = content[: content.rfind(b"\n") + 1]
    running.offset += len(complete)
    records = []
    for line in complete.splitlines():
        with contextlib.suppress(ValueError):  # torn by a kill
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def _table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'':<2}{result['metric']:>14}  state"]
    for number, trial in enumerate(result["trials"]):
        value = trial["value"] if trial["value"] is not None else trial["last_value"]
        shown = "" if value is None else f"{value:.6g}"
        mark = "*" if number == 0 and trial["state"] == "COMPLETE" else ""
        state = {"PRUNED": f"stopped after epoch {trial['last_epoch']}"}.get(trial["state"], trial["state"].lower())
        lines.append(f"{mark:<2}{shown:>14}  {state:<24}{trial['name'] or ''}")
    return lines


def _check(options: SearchOptions) -> None:
    least = {"trials": 1, "startup_trials": 0, "prune_startup_trials": 0, "prune_from_epoch": 0}
    for option, smallest in (least | {"at_once": 1}).items():
        value = getattr(options, option)
        if value is not None and value < smallest:
            sys.exit(f"error: search.{option}: {value} is too small; use {smallest} or more")
