"""Compose a config, hand its task to a launcher: `python run.py [group=choice ...] [option=value ...]`."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing paragraphs; conf.explain says it in one line
warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        from conf import help

        return print(help.text())
    import hydra

    import conf.schema
    from conf import shorthand, sweep
    from conf.explain import mistakes_in_one_line

    conf.schema.register()
    with mistakes_in_one_line():
        if sweep.is_sweep(sys.argv[1:]):
            from conf import sweep_launch

            return sweep_launch.launch(sys.argv[1:], sweep_launch.Program(admit=admit, job=job, build=build))
        sys.argv[1:] = shorthand.expand(sys.argv[1:])
        hydra.main(version_base="1.3", config_path="conf", config_name="config")(launch)()


def launch(config: Any) -> None:
    """Turn the composed config into plain data, admit it to its run folder, and hand it to the launcher."""
    from conf import chain
    from conf.explain import mistakes_in_one_line
    from conf.resolve import resolve
    from esvit.errors import OptionError

    with mistakes_in_one_line():
        if config.plan:
            return print_plan(config)
        if config.search.trials:
            raise OptionError("search.trials", "a search needs options that vary", "add -m and values, e.g. seed=0,1,2")
        options = resolve(config)
        if "RANK" in os.environ:  # plain torchrun: every rank has composed for itself, see `run_rank`
            return execute(options)
        launcher = build(options["launcher"])
        teachers = chain.of_kept_teachers(options)
        evaluations = chain.after_training(options)
        training = admit(options)
        left = [each for each in (training, *map(admit, evaluations)) if each is not None]
        if not left:
            return None
        saved = job(teachers) if training and teachers else None
        with prepared(left[0], launcher) as first:
            launcher.launch(job(first), then=[job(each) for each in left[1:]], saved=saved)
    return None


def prepared(options: dict[str, Any], launcher: Any) -> Any:
    """A context with the options of the first job: where it starts later, its folder and its run in the tracking store are made now."""
    from contextlib import nullcontext

    from conf.announcement import announced
    from launchers.submission import RUN

    if not launcher.returns_at_once:
        return nullcontext(options)
    launcher.check(options["output_dir"], [RUN])
    return announced(options, build(options["tracking"]))


def print_plan(config: Any) -> None:
    """What the run would be and cost; see esvit/tasks/plan_ahead.py."""
    from conf.plan import options_of_plan

    options = options_of_plan(config)
    launcher = build(options["launcher"])
    script = launcher.script(job(options)) if hasattr(launcher, "script") else None

    from esvit.tasks.plan_ahead import Surroundings, plan_ahead

    around = Surroundings(
        name=options["name"],
        backbone=options["backbone_name"],
        precision=options["precision"],
        processes=options["processes"],
        script=script,
        **options["planning"],
    )
    print("\n".join(plan_ahead(lambda: build(options["task"]), around)))


def job(options: dict[str, Any]) -> Any:
    from launchers.job import Job

    return Job(function="run:execute", config=options, folder=options["output_dir"], root=str(ROOT))


def admit(options: dict[str, Any]) -> dict[str, Any] | None:
    """Check the run folder, if the task has one; None if the run in it has finished already."""
    from esvit.run_folder import RunFolder

    if options["has_run_folder"]:
        folder = RunFolder(options["output_dir"])
        folder.admit(options["chosen"])
        if folder.is_finished(options["chosen"]):
            return print(f"{folder.path} holds a finished run, its results are in metrics.json; nothing to do")
    return options | {"admitted": True}


def execute(options: dict[str, Any]) -> None:
    """Be one rank; end this process with one line and an exit code where the user or a signal is the cause."""
    from esvit.errors import Interrupted, OptionError

    try:
        run_rank(options)
    except OptionError as error:
        sys.exit(f"error: {error}")
    except Interrupted as interruption:
        if os.environ.get("RANK", "0") == "0":
            print(interruption, file=sys.stderr)
        sys.exit(interruption.exit_code)
    except BrokenPipeError:
        end_unread()


def end_unread() -> None:
    """The reader of our output has seen enough: `| head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain once more at its end
    sys.exit(1)


def run_rank(options: dict[str, Any]) -> None:
    """Turn options into objects and run the task."""
    if not options["has_run_folder"]:
        return build(options["task"]).run()

    from esvit import distributed
    from esvit.run_folder import RunFolder

    with build(options["runtime"]) as runtime:
        if "admitted" not in options:
            options = distributed.from_rank_zero(lambda: admit(options))
        if options is not None:
            runtime.records_to(RunFolder(options["output_dir"]), tracking=build(options["tracking"]), config=options["chosen"])
            build(options["task"]).run(runtime)
    return None


def build(node: dict[str, Any]) -> Any:
    """The object that `_target_` names, with its parts."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise error.__cause__ or error from None  # what the class itself had to say


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        end_unread()
