"""Writes the images of any `data=` as tar shards with an index: few large files, read fast from any disk, shared file system or server.

Unusual: it makes no run. What it leaves in `folder` is a data set, and the same command goes on where it was stopped.
"""

import dataclasses
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from esvit.data.base import Data, ImageSet
from esvit.data.packing import BAD_NAME, Packing
from esvit.errors import Interrupted, OptionError

_NOT_OF_THE_IMAGES = ("batch_size", "workers", "max_bad_fraction", "index_cache", "cache", "cache_gb", "open_files")
_FOLDERS = {"train": "data.root", "val": "data.val_root"}  # split -> the option that names its folder
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(kw_only=True)
class Pack:
    """shard_images  images per shard, or None to go by `shard_mb`
    shard_mb      size of a shard (MB)
    verify        decode every image, and leave out those that cannot be
    folder        gets train/ and, where there are validation images, val/
    """

    data: Data
    shard_images: int | None
    shard_mb: float
    verify: bool
    folder: str

    def run(self, runtime: Any = None) -> None:
        """Write what is missing of both splits, and print the command that uses them.

        Raises OptionError for options that cannot work, and for a folder that holds something else; PackingStopped at the user's word.
        """
        if self.shard_images is not None and self.shard_images < 1:
            raise OptionError("task.shard_images", f"{self.shard_images}", "use 1 or more")
        if self.shard_mb <= 0:
            raise OptionError("task.shard_mb", f"{self.shard_mb}", "give a number of megabytes above 0")
        self._refuse_other_contents()
        splits = {"train": self.data.train()}
        if (validation := self.data.validation()) is not None:
            splits["val"] = validation
        packings = {split: self._packing(split, images) for split, images in splits.items()}
        try:
            for split, packing in packings.items():
                _pack(split, packing)
        except KeyboardInterrupt:
            raise PackingStopped(signal.SIGINT) from None
        options = " ".join(f"{_FOLDERS[split]}={packing.folder}" for split, packing in packings.items())
        print(f"to use them: python run.py data=shards {options}{self._pixels()}", flush=True)

    def _refuse_other_contents(self) -> None:
        """A folder of data sets would get one that nobody recognises."""
        folder = Path(self.folder)
        if folder.exists() and not folder.is_dir():
            raise OptionError("output_dir", f"'{folder}' is a file", "give a folder")
        others = sorted(path.name for path in folder.iterdir() if path.name not in _FOLDERS) if folder.exists() else []
        if others:
            raise OptionError("output_dir", f"'{folder}' holds other things ('{others[0]}')", "give a folder of its own")

    def _packing(self, split: str, images: ImageSet) -> Packing:
        return Packing(
            images,
            folder=Path(self.folder) / split,
            split=split,
            source=self._source(),
            shard_images=self.shard_images,
            shard_mb=self.shard_mb,
            verify=self.verify,
            processes=self.data.workers,
        )

    def _source(self) -> dict[str, Any]:
        """The options that say which images these are; workers and the like may be others when a packing goes on."""
        options = {field.name: getattr(self.data, field.name) for field in dataclasses.fields(self.data)}
        return {"format": type(self.data).__name__} | {name: value for name, value in options.items() if name not in _NOT_OF_THE_IMAGES}

    def _pixels(self) -> str:
        """Options that the images need in any format."""
        needed = {"channels": 3, "depth": 8}
        return "".join(f" data.{name}={getattr(self.data, name)}" for name, usual in needed.items() if getattr(self.data, name) != usual)


class PackingStopped(Interrupted):
    """Control and C."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number, 0)
        self.args = (signal_number,)  # the same as __init__'s, so that it pickles across processes

    def __str__(self) -> str:
        return "stopped; the shards that are done stay, and the same command goes on"


def _pack(split: str, packing: Packing) -> None:
    if not packing.is_complete:
        _say_how_it_goes(split, packing)
    total = packing.summary()
    size = f"{total.size / 1e9:.2f} GB" if total.size >= 1e9 else f"{total.size / 1e6:.1f} MB"
    shards = f"{total.number} shard{'' if total.number == 1 else 's'}"
    print(f"{split:<6} {total.images} images in {shards}, {size}: {packing.folder}", flush=True)
    if total.bad_images:
        print(f"       left out {len(total.bad_images)} that cannot be read, listed in {packing.folder / BAD_NAME}", flush=True)
    if total.images == 0:
        raise OptionError("data.root", "none of the images can be read", "check that it is intact")


def _say_how_it_goes(split: str, packing: Packing) -> None:
    """A bar on a terminal, a line now and then elsewhere."""
    if packing.images_done:
        print(f"{split:<6} goes on after {packing.images_done} images", flush=True)
    since = last = time.monotonic()
    begun = packing.images_done
    with tqdm(total=packing.plan.images, initial=begun, desc=split, unit="image", disable=not sys.stderr.isatty()) as bar:
        for shard in packing.run():
            bar.update(shard.images + len(shard.bad_images))
            now = time.monotonic()
            if bar.disable and now - last > _SECONDS_BETWEEN_LINES:
                last = now
                rate = (packing.images_done - begun) / (now - since)
                print(f"{split:<6} {packing.images_done} of {packing.plan.images} images, {rate:.0f} images/s", flush=True)
