"""How long training stands still for a checkpoint, written now and in the background: `python benchmarks/checkpoints.py --help`.

A state of tensors on the device is saved by the run's own writer while steps (matrix products) go on. Measured are the time that `save`
takes, which is what training waits, the time until the checkpoint is on the disk, and the steps in between beside steps without writing.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from esvit.checkpoint_writing import CheckpointWriter  # noqa: E402
from esvit.checkpoints import CheckpointFolder  # noqa: E402

_TENSORS = 200
_SIDE = 768  # of the matrices that a step multiplies
_PRODUCTS = 20


def main() -> None:
    arguments = parse(sys.argv[1:])
    torch.set_num_threads(arguments.threads)
    report = measure(arguments)
    print("\n".join(lines(report)))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500, help="size of the state (%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="checkpoints of each way, after one (%(default)s)")
    parser.add_argument("--folder", help="on the disk that is meant; a temporary one by default")
    parser.add_argument("--json", help="write the numbers here")
    return parser.parse_args(words)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians in seconds, of both ways."""
    rows = int(arguments.megabytes * 1e6 / 4 / _TENSORS)
    state = {"student": {f"weight_{number}": torch.randn(rows, device=arguments.device) for number in range(_TENSORS)}}
    matrix = torch.randn(_SIDE, _SIDE, device=arguments.device) / _SIDE
    report: dict[str, Any] = {"megabytes": arguments.megabytes, "device": arguments.device, "threads": arguments.threads}
    report["step"] = statistics.median(_step(matrix) for _ in range(20))
    for way in ("now", "background"):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            writer = CheckpointWriter(CheckpointFolder(Path(folder), keep=1), background=way == "background")
            measured = [_checkpoint(writer, state, step, matrix) for step in range(arguments.repeats + 1)][1:]
        report[way] = {
            "still": statistics.median(each["still"] for each in measured),
            "on_disk": statistics.median(each["on_disk"] for each in measured),
            "steps_meanwhile": statistics.median(each["steps"] for each in measured),
        }
    return report


def _checkpoint(writer: CheckpointWriter, state: dict[str, Any], step: int, matrix: torch.Tensor) -> dict[str, float]:
    since = time.perf_counter()
    writer.save(state, step, in_shares=False)
    still = time.perf_counter() - since
    file, steps = writer.folder.folder / f"checkpoint_{step}.pt", 0
    while not file.exists():
        _step(matrix)
        steps += 1
    writer.wait()
    return {"still": still, "on_disk": time.perf_counter() - since, "steps": steps}


def _step(matrix: torch.Tensor) -> float:
    since = time.perf_counter()
    product = matrix
    for _ in range(_PRODUCTS):
        product = product @ matrix
    product.sum().item()
    return time.perf_counter() - since


def lines(report: dict[str, Any]) -> list[str]:
    threads = f"{report['threads']} CPU thread{'s' if report['threads'] > 1 else ''}"
    found = [
        f"state of {report['megabytes']:.0f} MB on {report['device']}, {threads}; a step takes {report['step']:.3f} s",
        f"{'':<12}{'stands still':>14}{'on disk after':>15}{'steps meanwhile':>17}{'each slower by':>16}",
    ]
    for way in ("now", "background"):
        row = report[way]
        steps = row["steps_meanwhile"]
        slower = (row["on_disk"] - row["still"]) / steps / report["step"] - 1 if steps else None
        found.append(
            f"{way:<12}{row['still']:>12.2f} s{row['on_disk']:>13.2f} s{steps:>17.0f}" + ("" if slower is None else f"{slower:>15.0%} ")
        )
    return found


if __name__ == "__main__":
    main()
