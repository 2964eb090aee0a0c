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


def without_labels(images: ImageSet) -> tuple[str, str]:
    """What is to be said of images whose `labels` are None: what was found, and the remedy."""
    if images.class_names:
        return "its images may have several labels each, the evaluation needs one of each", "evaluate with other images"
    return "its images have no labels", "give a folder with one sub-folder per class"


def require_rgb(data: Data, *, task: str) -> None:
    """Raises OptionError for images other than RGB of 8 bits."""
    if not data.pixels.is_rgb:
        option = "data.channels" if data.channels != 3 else "data.depth"
        raise OptionError(option, f"{getattr(data, option[5:])}, but {task} works on RGB images of 8 bits", f"leave {option} out")


def labelled_splits(data: Data) -> Splits:
    """Training and validation images. Raises OptionError where either, or its labels, is missing, or where their classes differ."""
    train = data.train()
    if train.labels is None:
        raise OptionError("data.root", *without_labels(train))
    validation = data.validation()
    if validation is None:
        raise OptionError("data.val_root", "is not set, but the evaluation needs validation images", "give the validation folder")
    if validation.labels is None:
        raise OptionError("data.val_root", *without_labels(validation))
    if validation.class_names != train.class_names:
        raise OptionError("data.val_root", "its classes are not those of data.root", "give both the same class folders")
    return Splits(train, validation, train.class_names)
