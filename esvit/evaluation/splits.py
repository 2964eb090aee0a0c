"""The labelled images that an evaluation needs."""

from dataclasses import dataclass

from esvit.data.base import Data, ImageSet
from esvit.errors import OptionError


@dataclass(frozen=True)
class Splits:
    """Labelled images of the same classes: to learn from, and to be judged on."""

    train: ImageSet
    validation: ImageSet
    class_names: list[str]


def labelled_splits(data: Data) -> Splits:
    """Training and validation images. Raises OptionError where either, or its labels, is missing, or where their classes differ."""
    train = data.train()
    validation = data.validation()
    if validation is None:
        raise OptionError("data.val_root", "is not set, but the evaluation needs validation images", "give the validation folder")
    for option, images in (("data.root", train), ("data.val_root", validation)):
        if images.labels is None:
            raise OptionError(option, "its images have no labels", "give a folder with one sub-folder per class")
    if validation.class_names != train.class_names:
        raise OptionError("data.val_root", "its classes are not those of data.root", "give both the same class folders")
    return Splits(train, validation, train.class_names)
