"""Options of image sets."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class Folder:
    _target_: str = "esvit.data.folder.FolderData"
    root: str = MISSING  # folder of the training images: one sub-folder per class, or unlabelled
    val_root: str | None = None  # folder of the validation images, for k-NN
    batch_size: int = 64  # images per process in one forward pass
    workers: int = 8  # loading processes per training process; 0 loads in the training process
    max_bad_fraction: float = 0.1  # share of unreadable images above which the run stops


@dataclass
class Zip:
    _target_: str = "esvit.data.zip.ZipData"
    root: str = MISSING  # folder with train.zip and train_map.txt, and val.zip and val_map.txt for k-NN
    val_root: str | None = None  # folder with val.zip and val_map.txt; null means the same as root
    batch_size: int = 64  # images per process in one forward pass
    workers: int = 8  # loading processes per training process; 0 loads in the training process
    max_bad_fraction: float = 0.1  # share of unreadable images above which the run stops


@dataclass
class PhotoPatches:
    _target_: str = "esvit.data.patches.PhotoPatches"
    root: str | None = None  # folder of photos; null means those that come with the package
    val_root: str | None = None  # not used: validation patches come from the same photos, farther right
    batch_size: int = 32  # images per process in one forward pass
    workers: int = 1  # loading processes per training process; 0 loads in the training process
    max_bad_fraction: float = 0.1  # share of unreadable images above which the run stops
    patch_size: int = 40  # side of a patch (pixels)
    train_patches_per_photo: int = 400
    val_patches_per_photo: int = 60


SCHEMAS = {
    ("data", "folder"): Folder,
    ("data", "zip"): Zip,
    ("data", "photo_patches"): PhotoPatches,
}
