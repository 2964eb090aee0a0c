"""Options of image sets, by format."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

INDEX_CACHE = "${oc.env:ESVIT_HOME,'~/.cache/esvit'}/index"


@dataclass
class Common:
    """What all formats share."""

    batch_size: int = 64  # images per process in one forward pass
    workers: int = 8  # loading processes per training process; 0 loads in the training process
    max_bad_fraction: float = 0.1  # share of unreadable images above which the run stops
    classes: Any = None  # names of the classes to use, as [cat,dog], or a text file of names; null means all
    label_fraction: float = 1.0  # share of each class's training images to use
    channels: int = 3  # channels of the images: 3 is RGB, 1 grey; others, up to many, from TIFF and .npy
    depth: int = 8  # bits per value that images are read with: 8 or 16
    max_pixels: int = 89478485  # larger images count as unreadable (pixels)
    index_cache: str | None = INDEX_CACHE  # folder that keeps the listings of large sets; null keeps none


@dataclass
class Folder(Common):
    _target_: str = "esvit.data.folder.FolderData"
    root: str = MISSING  # folder of the training images: one sub-folder per class, or unlabelled
    val_root: str | None = None  # folder of the validation images, for k-NN


@dataclass
class Images(Common):
    _target_: str = "esvit.data.images.ImagesData"
    root: str = MISSING  # folder of the training images, in sub-folders or not; they have no classes
    val_root: str | None = None  # not used: without classes there is nothing to validate


@dataclass
class ImageList(Common):
    _target_: str = "esvit.data.listed.ListData"
    train_list: str = MISSING  # list of the training images: .csv, .jsonl, or text with one path a line and perhaps a label
    val_list: str | None = None  # list of the validation images, for k-NN
    root: str | None = None  # folder that the paths in train_list begin in; null means the list's own
    val_root: str | None = None  # folder that the paths in val_list begin in; null means that of train_list
    path_column: str = "path"  # of CSV and JSONL
    label_column: str | None = None  # of CSV and JSONL; null means "label", if there is one


@dataclass
class Zip(Common):
    _target_: str = "esvit.data.zip.ZipData"
    root: str = MISSING  # folder with train.zip and train_map.txt, and val.zip and val_map.txt for k-NN
    val_root: str | None = None  # folder with val.zip and val_map.txt; null means the same as root


@dataclass
class Tsv(Common):
    _target_: str = "esvit.data.tsv.TsvData"
    root: str = MISSING  # folder with train.tsv, or with TSV files in train/; and val.tsv or val/ for k-NN
    val_root: str | None = None  # folder with val.tsv or val/; null means the same as root
    label_map: str | None = None  # file in root of lines name<tab>number: labels are such names; null: labels are numbers
    open_files: int = 16  # files that each process keeps open, of a set of many


@dataclass
class WebVision(Common):
    _target_: str = "esvit.data.webvision.WebVisionData"
    root: str = MISSING  # folder of WebVision v1, with info/, google/ and flickr/
    val_root: str | None = None  # folder with info/val_filelist.txt and val_images_256/; null means the same as root


@dataclass
class OpenImages(Common):
    _target_: str = "esvit.data.openimages.OpenImagesData"
    root: str = MISSING  # folder of OpenImages v4 as TSV, with train.tsv
    val_root: str | None = None  # not used: its images have several labels each
    line_index: str | None = "train.balance_min1000.lineidx"  # in root: which rows, some of them several times; null means each once
    label_file: str | None = "train.label.verify_20191102.tsv"  # in root: tags of each key; null means no labels
    label_map: str | None = "train.label.verify_20191102.6962.tag.labelmap"  # in root: one tag a line


@dataclass
class Parquet(Common):
    _target_: str = "esvit.data.parquet.ParquetData"
    root: str = MISSING  # folder of Parquet files: those named train*, or in a folder of such a name, else all
    val_root: str | None = None  # folder of Parquet files; null means those named val* or test* in root
    image_column: str = "image"  # bytes of image files, or records with bytes in them
    label_column: str | None = "label"  # null means no labels
    row_groups: int = 4  # row groups that each process keeps in memory


@dataclass
class PhotoPatches(Common):
    _target_: str = "esvit.data.patches.PhotoPatches"
    root: str | None = None  # folder of photos; null means those that come with the package
    val_root: str | None = None  # not used: validation patches come from the same photos, farther right
    batch_size: int = 32  # images per process in one forward pass
    workers: int = 1  # loading processes per training process; 0 loads in the training process
    channels: int = 3  # photos are RGB
    patch_size: int = 40  # side of a patch (pixels)
    train_patches_per_photo: int = 400
    val_patches_per_photo: int = 60


@dataclass
class Shards(Common):
    _target_: str = "esvit.data.shards.ShardsData"
    root: str = MISSING  # folder of WebDataset .tar files, 'train-*.tar', "'train-{000..099}.tar'", or the http:// or s3:// address of such
    val_root: str | None = None  # the same of the validation images, for k-NN
    cache: str = "${oc.env:ESVIT_HOME,'~/.cache/esvit'}/shards"  # folder for shards that are fetched from a server
    cache_gb: float = 100.0  # how much of them it may hold (GB); with sampler=chunk two windows of shards are enough


SCHEMAS = {
    ("data", "shards"): Shards,
    ("data", "folder"): Folder,
    ("data", "images"): Images,
    ("data", "list"): ImageList,
    ("data", "zip"): Zip,
    ("data", "tsv"): Tsv,
    ("data", "webvision"): WebVision,
    ("data", "openimages"): OpenImages,
    ("data", "parquet"): Parquet,
    ("data", "photo_patches"): PhotoPatches,
}
