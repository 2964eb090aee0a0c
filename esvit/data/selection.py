"""A part of the training images by option: some of the classes (`data.classes`), or a share of each (`data.label_fraction`).

The share is drawn by a seed of its own, so that every run, whatever its `seed`, learns from the same images; and it is drawn before classes
are chosen, so that fewer classes have the same images as they have among all. A smaller share is part of a larger one.

Letters: n images.
"""

import os
from collections.abc import Sequence

import numpy as np

from esvit.data.base import ImageSet
from esvit.data.subsets import Subset, random_fraction, stratified_fraction
from esvit.errors import OptionError

FRACTION_SEED = 0


def fraction_of(images: ImageSet, fraction: float) -> ImageSet:
    """`fraction` of each class of `images`, rounded, but at least one image; of all images where they have no classes."""
    if fraction == 1:
        return images
    if images.labels is None:
        return Subset(images, random_fraction(len(images), fraction, FRACTION_SEED))
    return Subset(images, stratified_fraction(images.labels, fraction, FRACTION_SEED))


def of_classes(images: ImageSet, classes: Sequence[str] | str | None) -> ImageSet:
    """The images of the named classes, which get new numbers in the order of the full list.

    classes  names, or a text file of names, one a line; None means all

    Raises OptionError naming data.classes for a name that is no class, and for images without classes.
    """
    if classes is None:
        return images
    names = _names_in(classes) if isinstance(classes, str) else [str(name) for name in classes]  # numbers are names too
    if images.labels is None:
        raise OptionError("data.classes", "the images have no classes to choose from", "leave it out")
    if not names:
        raise OptionError("data.classes", "no class is named", "name at least one, or leave it out")
    unknown = [name for name in names if name not in set(images.class_names)]
    if unknown:
        known = f"'{images.class_names[0]}' to '{images.class_names[-1]}'"
        found = f"'{unknown[0]}' is none of the {len(images.class_names)} classes ({known})"
        raise OptionError("data.classes", found, "use their names, as in data.classes=[cat,dog] or in a text file, one a line")
    chosen = np.isin(images.class_names, names)
    numbers = np.where(chosen, np.cumsum(chosen) - 1, -1)  # old number -> new number
    indices = np.flatnonzero(chosen[images.labels] & (images.labels >= 0))
    if not len(indices):
        raise OptionError("data.classes", f"there are no images of {', '.join(names[:5])}", "name other classes")
    part = Subset(images, indices)
    part.labels = numbers[images.labels[indices]]
    part.class_names = [name for name, is_chosen in zip(images.class_names, chosen, strict=True) if is_chosen]
    return part


def _names_in(path: str) -> list[str]:
    if not os.path.isfile(path):
        remedy = "give names as in data.classes=[cat,dog], or a text file of names, one a line"
        raise OptionError("data.classes", f"there is no file '{path}'", remedy)
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        return [line.strip() for line in lines if line.strip()]
