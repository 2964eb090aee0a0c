"""Runs command lines in processes that have torch and the program's modules imported already, since an import costs many times the work.

Each command is a real process, forked from this one: it has signal handlers, an exit code and standard streams of its own, can be
killed, and runs `run.py` from its first line as `__main__`. This process itself computes nothing, so no thread is lost in a fork.
Only the interpreter's own clean-up at the end is left out: it would touch, and so copy, all the memory that is shared.

Protocol: one JSON object per line. {"start": {...}} is answered with the process id, {"poll": id} with its exit code or null, negative
for a signal. The end of the input ends the server.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PRELOADED = ("hydra.main", "conf.schema", "conf.explain", "conf.resolve", "launchers.local", "launchers.gpus", "esvit.tasks.pretrain",
             "esvit.backbones.swin", "esvit.data.folder", "esvit.tracking.base", "torch._dynamo")  # fmt: skip


def serve() -> dict[str, Any] | None:
    """Answer requests; in a forked child, return what it is to run. None at the end of the input."""
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            child = os.fork()
            if child == 0:
                return request["start"]
            answer: int | None = child
        else:
            ended, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        print(json.dumps(answer), flush=True)
    return None


def become(command: dict[str, Any]) -> None:
    """Take on the streams, folder, environment and arguments of a command."""
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, command["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, command["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        descriptor = os.open(path, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(command["folder"])
    os.environ.clear()
    os.environ.update(command["environment"])
    sys.argv = [os.path.join(ROOT, "run.py"), *command["arguments"]]


def run_to_the_end() -> None:
    """Run `run.py` and end this process as the interpreter would."""
    code: object = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    sys.path[0] = ROOT
    for module in PRELOADED:
        importlib.import_module(module)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test runner's business
    gc.freeze()
    print(json.dumps("ready"), flush=True)
    to_run = serve()
    if to_run is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        become(to_run)
        run_to_the_end()
    os._exit(0)
