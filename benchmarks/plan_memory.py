"""Memory of a pre-training step as `plan=true` counts it, against what a step really takes: `python benchmarks/plan_memory.py --help`.

Measured is the peak of a process of its own (benchmarks/pretrain_step.py --memory-of product): on a GPU what torch allocated at most, on
a CPU the process's high-water mark above its imports, which has what the C library's allocator keeps, too. The count is made for the same
device: on a CPU attention keeps its weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from conf import schema  # noqa: E402
from conf.composition import opened  # noqa: E402
from conf.plan import options_of_plan  # noqa: E402
from esvit.tasks.plan_step import count_step  # noqa: E402
from run import build  # noqa: E402

CASES = ("swin_tiny view_region 4", "swin_tiny view 4", "vit_small view 4", "resnet50 view_region 2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, help="'BACKBONE LOSS IMAGES' each (four that fit a small machine)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"], help="(%(default)s)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="(%(default)s)")
    arguments = parser.parse_args()
    schema.register()
    print(f"| backbone, loss, images | counted (GB) | measured (GB) | error |  {arguments.device}, {arguments.precision}")
    print("| --- | ---: | ---: | ---: |")
    for case in arguments.cases:
        counted, measured = count(case, arguments) / 1e9, measure(case, arguments) / 1e9
        print(f"| {case.replace(' ', ', ')} | {counted:.2f} | {measured:.2f} | {counted / measured - 1:+.1%} |", flush=True)


def count(case: str, arguments: argparse.Namespace) -> int:
    backbone, loss, images = case.split()
    with opened() as composer:
        options = options_of_plan(composer.compose([f"backbone={backbone}", f"loss={loss}", "task=pretrain"]))
    with torch.device("meta"):
        task = build(options["task"])
    cost = count_step(task, batch_size=int(images), precision=arguments.precision, device=torch.device(arguments.device))
    return cost.peak(keeps_gradients=False)


def measure(case: str, arguments: argparse.Namespace) -> int:
    backbone, loss, images = case.split()
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, str(ROOT / "benchmarks" / "pretrain_step.py"), "--backbone", backbone, "--loss", loss]
        command += ["--batch-size", images, "--device", arguments.device, "--precision", arguments.precision]
        subprocess.run([*command, "--memory-of", "product", "--json", file.name], check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(file.name).read_text())["step"]


if __name__ == "__main__":
    main()
