"""Time and memory of k-NN at the size of ImageNet, measured on a part of it: `python benchmarks/knn_scale.py --help`.

Unusual: features are random, since neither time nor memory depends on what they say, and lie in a memory-mapped file, as `task=knn` has
them. Time is proportional to training images x test images, so a part tells of the whole. Memory is that of the process without the
pages of the file, which the system keeps or drops as it likes; it grows with neither number but for 8 bytes per training label.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from esvit.evaluation.feature_files import read_rows, write_rows  # noqa: E402
from esvit.evaluation.knn import TEST_ROWS, WeightedKnn, tiles_of_rank  # noqa: E402

_WRITTEN_ROWS = 8192
_SAMPLE_SECONDS = 0.01


def main() -> None:
    arguments = parse(sys.argv[1:])
    torch.set_num_threads(arguments.threads)
    report = measure(arguments)
    print("\n".join(lines(report)))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=128_117, help="training images to measure with (%(default)s, a tenth of ImageNet's)")
    parser.add_argument("--test", type=int, default=5_000, help="test images to measure with (%(default)s, a tenth)")
    parser.add_argument("--whole-train", type=int, default=1_281_167, help="training images to extrapolate to (%(default)s)")
    parser.add_argument("--whole-test", type=int, default=50_000, help="test images to extrapolate to (%(default)s)")
    parser.add_argument("--width", type=int, default=768, help="features of an image (%(default)s)")
    parser.add_argument("--classes", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[10, 20, 100, 200], help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--folder", help="where the features lie meanwhile (a temporary folder)")
    parser.add_argument("--json", help="also write the numbers to this file")
    return parser.parse_args(words)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds by the clock and of the processor (all threads), peak memory in MB, and the seconds that the whole would take."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "train.npy"
        write_rows(path, count=arguments.train, width=arguments.width, batches=_random_rows(arguments, generator))
        train, _ = read_rows(path)
        knn = WeightedKnn(
            train_features=train,
            train_labels=torch.randint(arguments.classes, (arguments.train,), generator=generator),
            neighbours=arguments.neighbours,
            temperature=0.07,
            classes=arguments.classes,
            device=torch.device(arguments.device),
        )
        test = torch.randn(arguments.test, arguments.width, generator=generator)
        labels = torch.randint(arguments.classes, (arguments.test,), generator=generator)
        with PeakMemory() as memory:
            start, processor_start = time.perf_counter(), time.process_time()
            for tile in tiles_of_rank(arguments.test, rows=TEST_ROWS, rank=0, world_size=1):
                knn.hits(test[tile], labels[tile])  # waits for the device: the next line of a run reads the hits
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    factor = arguments.whole_train * arguments.whole_test / (arguments.train * arguments.test)
    return vars(arguments) | {
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "peak_memory_mb": memory.peak_mb,
        "peak_device_memory_mb": torch.cuda.max_memory_allocated() / 1e6 if arguments.device == "cuda" else None,
        "whole_seconds": seconds * factor,
        "whole_processor_seconds": processor_seconds * factor,
    }


class PeakMemory:
    """The largest memory of this process while inside, above what it had before; pages of mapped files are not counted. Linux only."""

    def __enter__(self) -> "PeakMemory":
        self._before = self._peak = _anonymous_kb()
        self._is_over = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._sampler.join()

    @property
    def peak_mb(self) -> float:
        return (self._peak - self._before) * 1024 / 1e6

    def _sample(self) -> None:
        while not self._is_over.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, _anonymous_kb())


def _anonymous_kb() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


def _random_rows(arguments: argparse.Namespace, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    for places in torch.arange(arguments.train).split(_WRITTEN_ROWS):
        yield torch.randn(len(places), arguments.width, generator=generator), places


def lines(report: dict[str, Any]) -> list[str]:
    where = f"{report['device']}, {report['threads']} CPU thread{'s' if report['threads'] > 1 else ''}"
    device_memory = "" if report["peak_device_memory_mb"] is None else f", {report['peak_device_memory_mb']:.0f} MB on the device"
    return [
        f"{report['test']} test images against {report['train']} x {report['width']} training features, on {where}",
        f"  {report['seconds']:.1f} s, {report['processor_seconds']:.1f} s of the processor",
        f"  {report['peak_memory_mb']:.0f} MB above features and labels{device_memory}",
        f"{report['whole_test']} against {report['whole_train']}: x {report['whole_seconds'] / report['seconds']:.1f}",
        f"  {report['whole_seconds'] / 60:.0f} min, {report['whole_processor_seconds'] / 60:.0f} min of the processor",
        f"  {report['whole_train'] * report['width'] * 4 / 1e9:.2f} GB of features in a file, mapped",
    ]


if __name__ == "__main__":
    main()
