"""The evaluations that go with a pre-training: that of each kept teacher while it goes on, and those after its end.

They are composed before the training is launched, like command lines of their own: a mistake in one shows before any work.
"""

from typing import Any

from hydra.core.hydra_config import HydraConfig

from conf import shorthand
from conf.composition import Composer
from conf.resolve import resolve
from conf.schema import tasks
from esvit.errors import OptionError

Options = dict[str, Any]


def after_training(options: Options, composer: Composer | None = None) -> list[Options]:
    """One for each entry of `then`, in folders below the run's. Raises OptionError for an entry that is no evaluation.

    composer  composes them; one that has composed such evaluations before is faster
    """
    evaluations: dict[str, Options] = {}
    for entry in options["then"]:
        task = _task(entry, option="then")
        name = task if task not in evaluations else f"{task}_{sum(each.startswith(task) for each in evaluations) + 1}"
        evaluations[name] = _evaluation(options, entry, folder=name, composer=composer)
    return list(evaluations.values())


def of_kept_teachers(options: Options, composer: Composer | None = None) -> Options | None:
    """The evaluation of each kept teacher, None if none is kept; "{teacher}" in it stands for the file, "{step}" for its step."""
    if options["evaluate_every"] <= 0:
        return None
    task = _task(options["evaluate"], option="evaluate")
    return _evaluation(options, options["evaluate"], "checkpoint='{teacher}'", folder=f"{task}_step_{{step}}", composer=composer)


def _task(entry: str, *, option: str) -> str:
    task = (entry.split() or [""])[0]
    if ("task", task) not in tasks.SCHEMAS or task == "pretrain":
        raise OptionError(
            option, f"'{entry}' is no evaluation", "write a task such as knn, with its options after spaces: 'linear epochs=50'"
        )
    return task


def _evaluation(options: Options, entry: str, *own: str, folder: str, composer: Composer | None) -> Options:
    """`entry` is a task and, after spaces, options, which come last and so win."""
    task, *overrides = entry.split()
    run = options["output_dir"]
    as_the_run = [f"{name}={options[name]}" for name in ("device", "precision", "seed")]
    arguments = [f"task={task}", f"of='{run}'", f"output_dir='{run}/evaluations/{folder}'", *as_the_run, *own, *overrides]
    return composed(shorthand.expand(arguments, planned={run: options["chosen"]}), composer or Composer())


def composed(overrides: list[str], composer: Composer) -> Options:
    """Another command line of this program as plain data, while the first one is at work."""
    holder = HydraConfig.instance()
    before = holder.cfg
    try:
        return resolve(composer.compose(overrides))
    finally:
        holder.cfg = before
