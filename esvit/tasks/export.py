"""Writes a checkpoint's backbone for other programs, compares what they compute with what it computes here, and says so in a model card.

Unusual: the format "checkpoint" is all of a checkpoint, for this program: one that each process wrote its shares of, as one file.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esvit import checkpoint_shares
from esvit.backbones.base import Backbone
from esvit.checkpoints import LATEST, latest, load_checkpoint_file
from esvit.download import checksum
from esvit.errors import OptionError
from esvit.export.card import Source, card, read_run
from esvit.export.formats import Export as Exported
from esvit.export.formats import Input, require, write
from esvit.published import load_backbone
from esvit.state_files import save_atomically

CHECKPOINT = "checkpoint"
TOLERANCE = 1e-4  # largest difference between features here and there, over the largest feature (or 1)


@dataclass(kw_only=True)
class Export:
    """One export.

    backbone    the network that the checkpoint fits
    checkpoint  file with the weights
    network     whose backbone: "teacher" or "student"
    format      see esvit.export.formats; or "checkpoint"
    image_size  side of the images that it will see (pixels)
    mean, std   of the normalisation that it was trained with, per channel
    folder      where the files go; it must not exist yet, or be empty
    name        title of the model card
    """

    backbone: Backbone
    checkpoint: str | None
    network: str
    format: str
    image_size: int
    mean: list[float]
    std: list[float]
    folder: str
    name: str

    def run(self, runtime: Any = None) -> None:
        """Write the files; all of them or none. Raises OptionError for options that cannot work, and if the features are not the same."""
        folder = Path(self.folder)
        checkpoint = self._check(folder)
        if self.format == CHECKPOINT:
            return self._as_one_file(checkpoint, folder)
        require(self.format)
        saved = load_backbone(self.backbone, checkpoint, which=self.network, resize_positions=False)
        self.backbone.eval().requires_grad_(False)
        config, metrics = read_run(checkpoint)
        source = Source(checkpoint, checksum(checkpoint), saved.origin, self.network, config, metrics)

        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            images = self._images()
            exported = write(self.format, self.backbone, Input(images, self.mean, self.std), unfinished)
            facts = self._facts(images) | {"max difference to eager": self._difference(exported, images)}
            text = card(name=self.name, format=self.format, facts=facts, source=source, usage=exported.usage, note=exported.note)
            (unfinished / "README.md").write_text(text)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        _tell_files(folder)
        print(f"max difference to eager: {facts['max difference to eager']}")
        return None

    def _as_one_file(self, checkpoint: Path, folder: Path) -> None:
        """The same as training would have written without shares."""
        if checkpoint.exists() and not checkpoint_shares.is_one(checkpoint):
            found = f"'{checkpoint}' is no folder of shares, which task.format=checkpoint makes one file of"
            raise OptionError("checkpoint", found, "give a folder, outputs/.../checkpoint_1000 for example")
        save_atomically(load_checkpoint_file(checkpoint), folder / LATEST)
        _tell_files(folder)

    def _check(self, folder: Path) -> Path:
        if self.checkpoint is None:
            raise OptionError("checkpoint", "has no value", "give what to export, e.g. checkpoint=outputs/.../checkpoint.pt")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OptionError("output_dir", f"'{folder}' is not empty", "give a folder that does not exist yet")
        if len(self.mean) != len(self.std):
            raise OptionError("task.std", f"{self.std} for means {self.mean}", "give one number for each channel")
        return latest(Path(self.checkpoint))

    def _images(self) -> Tensor:
        """(2, C, S, S) like normalised images, the same in every export."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, len(self.mean), self.image_size, self.image_size, generator=generator)

    def _facts(self, images: Tensor) -> dict[str, str]:
        parameters = sum(parameter.numel() for parameter in self.backbone.parameters())
        return {
            "backbone": f"{type(self.backbone).__name__}, {parameters / 1e6:.1f} M parameters, {self.backbone.dim} features",
            "input": f"(B, {', '.join(map(str, images.shape[1:]))}), values from 0 to 1 minus {self.mean}, divided by {self.std}",
        }

    def _difference(self, exported: Exported, images: Tensor) -> str:
        """Of pooled features and regions, in words. Raises OptionError if it is more than rounding."""
        if exported.outputs is None:
            return "not measured, its library was not at hand"
        three = torch.cat([images, images[:1].flip(3)])  # another batch size than the one that it was written with
        with torch.no_grad():
            here = self.backbone(three)
            pooled, regions = exported.outputs(three)
        pairs = [(pooled, here.pooled)] if regions is None else [(pooled, here.pooled), (regions, here.regions)]
        difference = max(float((theirs - ours).abs().max()) for theirs, ours in pairs)
        largest = max(1.0, *(float(ours.abs().max()) for _, ours in pairs))
        if not difference <= TOLERANCE * largest:
            found = f"'{self.format}' at {self.image_size} pixels gives features that differ by {difference:.2g}"
            raise OptionError("task.format", found, "use backbone or safetensors; please report this")
        return f"{difference:.1e} ({size_of(three)}; largest feature {largest:.1f}; float32 on the CPU)"


def _tell_files(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")


def size_of(images: Tensor) -> str:
    return f"{len(images)} random images of {images.shape[3]} pixels"
