"""Shows what a pre-training would see before anybody waits for one: images, and every view of them with what was drawn for it.

Unusual: it makes no run. The views are those of the first positions of epoch 0, the very same that a run with this seed, data, sampler and
augmentation makes of them; but for images that cannot be read, which a run replaces by a neighbour and this task names.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esvit.augmentations.engines import size_of
from esvit.augmentations.mixing import Mixing
from esvit.augmentations.multicrop import Augmentation
from esvit.augmentations.parameters import ViewParameters
from esvit.data.base import BadImage, Data, ImageSet
from esvit.data.sampling import VIEWS, Sampler, generator
from esvit.errors import OptionError
from esvit.evaluation.preview_page import Preview as Shown
from esvit.evaluation.preview_page import draw_sheet, write_preview_page

_OF_COLOURS = ("saturation", "hue")
_TRIED_PER_IMAGE = 10  # positions that are tried for each image that is asked for


@dataclass(frozen=True)
class _Drawn:
    """An image that could be read, its number in the set, and its views before mixing."""

    index: int
    size: tuple[int, int]
    parameters: list[ViewParameters]
    views: list[Tensor]


@dataclass(kw_only=True)
class Preview:
    """images  how many are shown
    seed    of the run that is previewed
    folder  gets preview.png and preview.html
    """

    data: Data
    sampler: Sampler
    augmentation: Augmentation
    mixing: Mixing
    images: int
    seed: int
    folder: str

    def run(self, runtime: Any = None) -> None:
        """Write both files and print their paths. Raises OptionError for options that cannot work, or if no image can be read."""
        if self.images < 1:
            raise OptionError("task.images", f"{self.images}", "use at least 1")
        if self.seed < 0:
            raise OptionError("seed", f"{self.seed}", "use 0 or more")
        images = self.data.train()
        self.sampler.check(images)
        drawn, bad_images = self._draw(images)
        if not drawn:
            found = f"none of {len(bad_images)} images can be read, the first of them {bad_images[0]}"
            raise OptionError("data.root", found, "check that it is intact")
        shown = self._mixed(images, drawn)
        folder = Path(self.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draw_sheet(shown, global_count=self.augmentation.global_count).save(folder / "preview.png", optimize=True)
            write_preview_page(
                folder / "preview.html",
                title=f"Views of {self.data.root or 'the packaged photos'}",
                facts=self._facts(images),
                notes=[f"cannot be read: {each}" for each in bad_images],
                previews=shown,
                global_count=self.augmentation.global_count,
            )
        except OSError as error:
            found = f"cannot write to '{folder}' ({error.strerror})"
            raise OptionError("output_dir", found, "give a folder that can be written") from None
        for bad in bad_images:
            print(f"cannot be read: {bad}")
        print(f"{folder / 'preview.png'}\n{folder / 'preview.html'}", flush=True)

    def _draw(self, images: ImageSet) -> tuple[list[_Drawn], list[str]]:
        """Images and their views, and what cannot be read, with the reason."""
        order = self.sampler.order(images, images_per_step=self.data.batch_size, seed=self.seed, epoch=0)
        drawn, bad_images = [], []
        for position, index in enumerate(order[: _TRIED_PER_IMAGE * self.images].tolist()):
            try:
                image = images.read(index, self.augmentation.decode)
                images.read(index)  # as it will be shown
            except BadImage as error:
                bad_images.append(f"{images.name(index)} ({error})")
                continue
            parameters = self.augmentation.draw(size_of(image), generator(self.seed, VIEWS, 0, position))
            drawn.append(_Drawn(index, size_of(image), parameters, self.augmentation.apply(image, parameters)))
            if len(drawn) == self.images:
                break
        return drawn, bad_images

    def _mixed(self, images: ImageSet, drawn: list[_Drawn]) -> list[Shown]:
        """With what the student sees, where images are mixed: among those shown, as in a batch of them."""
        mixed: list[list[Tensor]] | None = None
        if self.mixing.is_on:
            crops = [torch.stack([each.views[view] for each in drawn]) for view in range(len(drawn[0].views))]
            most = 255 if crops[0].dtype == torch.uint8 else 65535
            blended, weights = self.mixing([crop.float() / most for crop in crops], np.random.default_rng(self.seed))
            mixed = [[(crop[row] * most).round().to(crops[0].dtype) for crop in blended] for row in range(len(drawn))]
        return [
            Shown(
                number=row + 1,
                name=images.name(each.index),
                label=_class_of(images, each.index),
                original=images.read(each.index),
                size=each.size,
                parameters=[_done(parameters, channels=each.views[0].shape[0]) for parameters in each.parameters],
                views=each.views,
                mixed=None if mixed is None else mixed[row],
                shares=[] if mixed is None else [_shares(matrix[row], row) for matrix in weights],
            )
            for row, each in enumerate(drawn)
        ]

    def _facts(self, images: ImageSet) -> dict[str, str]:
        views = self.augmentation
        local = [f"{views.crop_sizes.count(size)} x {size}" for size in dict.fromkeys(views.crop_sizes[views.global_count :])]
        return {
            "images": f"{len(images):,}",
            "classes": str(len(images.class_names)) if images.class_names else "none",
            "global views": f"{views.global_count} x {views.crop_sizes[0]} pixels",
            "local views": f"{', '.join(local)} pixels" if local else "none",
            "engine": views.engine,
            "mixing": f"with probability {self.mixing.describe()['probability']:g}" if self.mixing.is_on else "off",
            "seed": str(self.seed),
        }


def _class_of(images: ImageSet, index: int) -> str | None:
    if images.labels is None or images.labels[index] < 0 or not images.class_names:
        return None
    return images.class_names[int(images.labels[index])]


def _done(drawn: ViewParameters, *, channels: int) -> ViewParameters:
    """Without what is left out where there are no three colours, see esvit/augmentations/arrays.py."""
    if channels == 3:
        return drawn
    changes = tuple(change for change in drawn.changes if change.name not in _OF_COLOURS)
    return dataclasses.replace(drawn, changes=changes, grayscale=False, operations=())


def _shares(row: Tensor, own: int) -> str:
    """In words, what the mixed view of image `own` is made of; row (B,)."""
    others = [f"{share:.0%} of image {number + 1}" for number, share in enumerate(row.tolist()) if share > 0 and number != own]
    return ", ".join([f"{row[own]:.0%} of its own", *others])
