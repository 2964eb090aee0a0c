"""What a user waits for when submitting to SLURM, and what logging costs a training step: `python benchmarks/submit.py --help`.

Submitting is timed as a user meets it: from the command to the prompt, in processes of their own, on the SLURM that SLURM_CONF names
(`eval "$(tests/slurm/slurm_up.sh)"` brings one up). The jobs are held and cancelled, so nothing runs.

Logging is timed inside of steps that compute for about 100 ms on the CPU and then log 12 metrics. Every store is on this machine; the slow
one is a real MLflow server behind a proxy that holds every answer back. A thread of the training process fills the store, so besides the
time that `log` takes, the processor time of that thread is shown: a training on a GPU leaves as much idle, one on the CPU pays for it.
"""

import argparse
import contextlib
import http.client
import http.server
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from esvit.tracking.base import NoTracking, Tracker  # noqa: E402
from esvit.tracking.mlflow import Mlflow  # noqa: E402

HEAVY = ("torch", "torchvision", "timm")
STEP_SECONDS = 0.1
SECONDS_AT_FIRST = 5  # at least, before anything is measured
SECONDS_TO_CONNECT = 60  # at most; a store that is down never gives a run
SECONDS_FOR_A_SERVER = 180
_WITHOUT_HEAVY = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("heavy:", *sorted(set(sys.modules) & {heavy}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("submit", "logging", "all"), default="all")
    parser.add_argument("--children", type=int, default=100, help="runs of the sweep")
    parser.add_argument("--repeats", type=int, default=3, help="submissions of one run; the median is shown")
    parser.add_argument("--steps", type=int, default=100, help="steps per store")
    parser.add_argument("--delay", type=float, default=3.0, help="seconds by which the slow server answers later")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.part in ("submit", "all"):
            numbers["submit"] = submissions(Path(scratch), children=arguments.children, repeats=arguments.repeats)
        if arguments.part in ("logging", "all"):
            numbers["logging"] = logging_costs(Path(scratch), steps=arguments.steps, delay=arguments.delay)
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1))


# ---------------------------------------------------------------------- from the command to the prompt


def submissions(scratch: Path, *, children: int, repeats: int) -> dict[str, Any]:
    """Seconds of each kind of submission, and whether one imported what it need not."""
    if subprocess.run(["sinfo"], capture_output=True).returncode:
        sys.exit('no SLURM answers here; eval "$(tests/slurm/slurm_up.sh)" brings one up')
    (scratch / "images" / "train" / "cat").mkdir(parents=True)
    first = submit(scratch, "first", store="new")
    single = statistics.median(submit(scratch, f"single_{number}", store="new") for number in range(repeats))
    untracked = statistics.median(submit(scratch, f"untracked_{number}", store=None) for number in range(repeats))
    sweep = submit(scratch, "sweep", "-m", f"seed=range({children})", store="new")
    heavy = imported(scratch)
    for label, seconds in (
        ("one run, MLflow store made first", first),
        ("one run", single),
        ("one run, tracking=none", untracked),
        (f"a sweep of {children} runs", sweep),
    ):
        print(f"{label:40} {seconds:6.1f} s")
    print(f"imported of {', '.join(HEAVY)}: {', '.join(heavy) or 'nothing'}")
    return {"first": first, "single": single, "untracked": untracked, "sweep": sweep, "children": children, "heavy": heavy}


def arguments_of(scratch: Path, name: str, *, store: str | None) -> list[str]:
    tracking = ["tracking=none"] if store is None else [f"tracking.uri=sqlite:///{scratch / store}.db"]
    small = ["launcher.gpus_per_node=0", "launcher.cpus_per_task=1", "launcher.extra=[--hold]", "device=cpu"]
    return [f"data.root={scratch / 'images' / 'train'}", f"output_dir={scratch / name}", "launcher=slurm", *small, *tracking]


def submit(scratch: Path, name: str, *extra: str, store: str | None) -> float:
    """Seconds until the command has ended; its jobs are cancelled then."""
    command = [sys.executable, str(ROOT / "run.py"), *extra, *arguments_of(scratch, name, store=store)]
    since = time.perf_counter()
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    seconds = time.perf_counter() - since
    if done.returncode:
        sys.exit(done.stderr)
    subprocess.run([sys.executable, "-m", "launchers", "cancel", str(scratch / name)], cwd=ROOT, check=True, capture_output=True)
    return seconds


def imported(scratch: Path) -> list[str]:
    """The heavy packages that a submission has imported."""
    command = [sys.executable, "-c", _WITHOUT_HEAVY.replace("{heavy}", repr(set(HEAVY))), str(ROOT / "run.py")]
    command += arguments_of(scratch, "imports", store="new")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=True)
    subprocess.run([sys.executable, "-m", "launchers", "cancel", str(scratch / "imports")], cwd=ROOT, check=True, capture_output=True)
    return next(line for line in done.stdout.splitlines() if line.startswith("heavy:")).split()[1:]


# ---------------------------------------------------------------------- logging


def logging_costs(scratch: Path, *, steps: int, delay: float) -> dict[str, dict[str, float]]:
    """Of each store, by name."""
    found = {}
    print(f"import of MLflow, by the thread, once a run: {seconds_to_import():.1f} s of processor time")
    work = calibrated()
    print(f"{'store':24} {'log, mean':>11} {'of a step':>10} {'log, worst':>11} {'thread, a step':>16} {'thread, at first':>18}")
    with server(scratch / "server") as address, proxy(address, delay=delay) as slow, closed_port() as closed:
        for name, uri in (
            ("none (log.jsonl only)", None),
            ("sqlite file", f"sqlite:///{scratch}/log.db"),
            ("server", address),
            (f"server, {delay:g} s slower", slow),
            ("server down", closed),
        ):
            is_up = uri not in (None, closed)
            cost = logging_cost(scratch / name.replace(" ", "_"), uri=uri, is_up=is_up, steps=steps, work=work)
            found[name] = cost
            print(
                f"{name:24} {1e3 * cost['mean']:8.3f} ms {cost['mean'] / STEP_SECONDS:10.2%} {1e3 * cost['worst']:8.2f} ms "
                f"{1e3 * cost['thread']:13.2f} ms {cost['thread_at_first']:16.2f} s"
            )
    return found


def logging_cost(folder: Path, *, uri: str | None, is_up: bool, steps: int, work: int) -> dict[str, float]:
    """Mean and worst seconds in `log`, and processor seconds of the thread that fills the store: per step, and before that."""
    options: dict[str, Any] = {"experiment_name": "benchmark", "run_name": "benchmark", "tags": {}, "host": None}
    tracking = NoTracking(host=None) if uri is None else Mlflow(uri=uri, close_timeout_seconds=1.0, **options)
    tracker = tracking.open(run_folder=folder, config={"seed": 0}, is_main=True)
    tracker.resume(0)
    first = 0.0
    numbers = itertools.count(1)
    since = time.perf_counter()
    while (waited := time.perf_counter() - since) < SECONDS_AT_FIRST or (is_up and tracker.run_id is None and waited < SECONDS_TO_CONNECT):
        first += logged_step(tracker, next(numbers), work).thread
    measured = [logged_step(tracker, next(numbers), work) for _ in range(steps)]
    tracker.close("FINISHED")
    times = [each.log for each in measured]
    thread = statistics.mean(each.thread for each in measured)
    return {"mean": statistics.mean(times), "worst": max(times), "thread": thread, "thread_at_first": first}


@dataclass(frozen=True)
class Step:
    """Seconds that `log` took, and processor seconds of other threads during the step."""

    log: float
    thread: float


def logged_step(tracker: Tracker, number: int, work: int) -> Step:
    process, thread = time.process_time(), time.thread_time()
    compute(work)
    since = time.perf_counter()
    tracker.log(number, number // 10, {f"group/metric_{each}": number / (each + 1) for each in range(12)})
    log = time.perf_counter() - since
    return Step(log=log, thread=time.process_time() - process - (time.thread_time() - thread))


def compute(work: int) -> int:
    """Arithmetic that shares the interpreter with other threads, as the host's part of a step does."""
    total = 0
    for number in range(work):
        total += number & 3
    return total


def seconds_to_import() -> float:
    """Processor seconds."""
    since = time.process_time()
    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.tracking  # noqa: F401

    return time.process_time() - since


def calibrated() -> int:
    """How much `compute` takes STEP_SECONDS of processor time."""
    work = 1_000_000
    since = time.thread_time()
    compute(work)
    return int(work * STEP_SECONDS / (time.thread_time() - since))


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """A real MLflow server's address."""
    folder.mkdir()
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--workers",
        "1",
        "--port",
        str(port),
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + SECONDS_FOR_A_SERVER
            while not answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"MLflow's server did not start:\n{(folder / 'log').read_text()}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)
            process.wait()


def answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


@contextlib.contextmanager
def proxy(address: str, *, delay: float) -> Iterator[str]:
    """The same server, `delay` seconds slower."""
    target = urllib.parse.urlsplit(address)

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            self.forward()

        def do_POST(self) -> None:  # noqa: N802
            self.forward()

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            time.sleep(delay)
            connection = http.client.HTTPConnection(str(target.hostname), target.port, timeout=60)
            connection.request(self.command, self.path, body, {"Content-Type": self.headers.get("Content-Type", "application/json")})
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # the client's patience had an end
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as slow:
        threading.Thread(target=slow.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{slow.server_address[1]}"
        slow.shutdown()


@contextlib.contextmanager
def closed_port() -> Iterator[str]:
    """An address that refuses connections."""
    yield f"http://127.0.0.1:{free_port()}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
