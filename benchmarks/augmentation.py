"""Processor time of making views by each engine, decoding included: `python benchmarks/augmentation.py --help`.

Unusual: one image at a time passes through the real loader in this process, on one thread, and the engines take turns, so that whatever
else the machine does meets all of them. A photo's time is the shortest of several rounds, the figure is the median over the photos. All
engines make the views of the same draws. JPEG files are made in memory from the packaged photos.
"""

import argparse
import io
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from PIL import Image  # noqa: E402

from conf.schema import augmentations  # noqa: E402
from esvit.augmentations.multicrop import Augmentation  # noqa: E402
from esvit.data.base import EncodedImages  # noqa: E402
from esvit.data.loading import TrainLoader  # noqa: E402
from esvit.data.patches import PACKAGED_PHOTOS  # noqa: E402

ENGINES = ("reference", "fast", "device")
_MB = 2**20


def main() -> None:
    arguments = parse(sys.argv[1:])
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    report = measure(arguments)
    print("\n".join(lines(report)))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=0, help="use so many of the packaged photos; 0 means all")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[500, 375], metavar=("WIDTH", "HEIGHT"), help="of the JPEG files (%(default)s)"
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files (%(default)s)")
    parser.add_argument("--local-crops", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="loading processes to measure the loader with (%(default)s)")
    parser.add_argument("--batches", type=int, default=12, help="timed for each number of loading processes, of 32 images (%(default)s)")
    parser.add_argument("--json", help="also write the numbers to this file")
    return parser.parse_args(words)


class Encoded(EncodedImages):
    """JPEG files in memory."""

    def __init__(self, files: list[bytes], *, repeats: int = 1):
        self._files = files
        self._count = len(files) * repeats
        self.labels, self.class_names = None, []

    def __len__(self) -> int:
        return self._count

    def encoded(self, index: int) -> bytes:
        return self._files[index % len(self._files)]

    def name(self, index: int) -> str:
        return f"photo {index}"


def encode_photos(count: int, *, size: tuple[int, int], quality: int) -> list[bytes]:
    """The first `count` packaged photos (0: all), resized to (width, height), as JPEG files with the usual halved colour (4:2:0)."""
    files = []
    for path in sorted(PACKAGED_PHOTOS.glob("*.jpg"))[: count or None]:
        buffer = io.BytesIO()
        with Image.open(path) as image:
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
        files.append(buffer.getvalue())
    return files


def make_augmentation(engine: str, *, local_crops: int) -> Augmentation:
    """The published policy, as `augmentation=dino`."""
    options = OmegaConf.structured(augmentations.MultiCrop(engine=augmentations.Engine(engine), local_crops_number=local_crops))
    return instantiate(OmegaConf.to_container(options, enum_to_str=True))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    files = encode_photos(arguments.photos, size=tuple(arguments.size), quality=arguments.quality)
    engines = {engine: make_augmentation(engine, local_crops=arguments.local_crops) for engine in ENGINES}
    milliseconds = processor_times(engines, files, rounds=arguments.rounds)
    views = make_loader(engines["fast"], Encoded(files), batch_size=1, workers=0).redraw(0, [0])
    report: dict[str, Any] = {f"{engine}_cpu_ms": milliseconds[engine] for engine in ("reference", "fast")}
    report["device_worker_cpu_ms"] = milliseconds["device"]
    report["ratio"] = milliseconds["reference"] / milliseconds["fast"]
    report["device_worker_ratio"] = milliseconds["reference"] / milliseconds["device"]
    report["bytes_to_device"] = sum(crop.nbytes for crop in views.crops)
    report["bytes_to_device_float32"] = 4 * report["bytes_to_device"]
    report["loader"] = [
        {"engine": engine, **loader_speed(engines[engine], files, workers=workers, batches=arguments.batches)}
        for engine in ENGINES
        for workers in arguments.workers
    ]
    report["images"] = {
        "photos": len(files),
        "size": list(arguments.size),
        "quality": arguments.quality,
        "local_crops": arguments.local_crops,
    }
    report["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": Image.__version__,
        "cv2": cv2.__version__,
    }
    report["machine"] = {"cores": psutil.cpu_count(), "processor": _processor()}
    return report


def make_loader(augmentation: Augmentation, images: Encoded, *, batch_size: int, workers: int) -> TrainLoader:
    return TrainLoader(
        images=images,
        transform=augmentation,
        batch_size=batch_size,
        workers=workers,
        seed=0,
        rank=0,
        world_size=1,
        accumulation=1,
        max_bad_fraction=0.0,
    )


def processor_times(engines: dict[str, Augmentation], files: list[bytes], *, rounds: int) -> dict[str, float]:
    """Milliseconds for an image, by engine: from the bytes of the file to a batch of views."""
    loaders = {name: make_loader(engine, Encoded(files), batch_size=1, workers=0) for name, engine in engines.items()}
    for loader in loaders.values():
        loader.redraw(0, [0])
    shortest = {name: np.full(len(files), np.inf) for name in loaders}
    for _ in range(rounds):
        for position in range(len(files)):
            for name, loader in loaders.items():
                begin = time.process_time()
                loader.redraw(0, [position])
                shortest[name][position] = min(shortest[name][position], time.process_time() - begin)
    return {name: 1000 * float(np.median(times)) for name, times in shortest.items()}


def loader_speed(augmentation: Augmentation, files: list[bytes], *, workers: int, batches: int) -> dict[str, Any]:
    """Images per second by the clock, and MB of memory that a loading process has to itself."""
    loader = make_loader(augmentation, Encoded(files, repeats=1 + 64 // len(files)), batch_size=32, workers=workers)
    stream = loader.from_step(0)
    for _ in range(2 * workers + 2):  # what is made ahead
        next(stream)
    begin = time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds = time.perf_counter() - begin
    children = psutil.Process().children()
    memory = [child.memory_full_info().uss / _MB for child in children]
    del stream  # ends the loading processes
    return {
        "workers": workers,
        "images_per_second": 32 * batches / seconds,
        "memory_per_worker_mb": float(np.median(memory)) if memory else 0.0,
    }


def lines(report: dict[str, Any]) -> list[str]:
    """What is printed: a table in Markdown, and the ratio."""
    images, machine = report["images"], report["machine"]
    width, height = images["size"]
    texts = [
        f"{images['photos']} photos, JPEG of {width} x {height} pixels, quality {images['quality']}; "
        f"2 x 224 and {images['local_crops']} x 96 pixels",
        f"{machine['cores']} cores, {machine['processor']}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
        "| engine | processor time (ms an image) | images/s on one core | reference / it |",
        "|---|---|---|---|",
    ]
    for engine, name in (("reference", "reference_cpu_ms"), ("fast", "fast_cpu_ms"), ("device (workers' part)", "device_worker_cpu_ms")):
        spent = report[name]
        texts.append(f"| {engine} | {spent:.2f} | {1000 / spent:.0f} | {report['reference_cpu_ms'] / spent:.2f} |")
    if report["loader"]:
        texts += ["", "| engine | loading processes | images/s by the clock | memory of a process (MB) |", "|---|---|---|---|"]
    for each in report["loader"]:
        texts.append(f"| {each['engine']} | {each['workers']} | {each['images_per_second']:.0f} | {each['memory_per_worker_mb']:.0f} |")
    megabytes = report["bytes_to_device"] / 1e6
    texts += ["", f"to the device: {megabytes:.2f} MB an image; as float32 it would be {4 * megabytes:.2f} MB"]
    return [*texts, f"ratio (reference / fast): {report['ratio']:.2f}"]


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    named = (
        [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    )
    return named[0] if named else platform.machine()


if __name__ == "__main__":
    main()
