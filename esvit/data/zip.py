"""Images in one zip archive with a text file of labels: the original's zip mode, for file systems that dislike small files.

Members are read with `os.pread` at the place that the archive's directory gives: forked loading processes share the open file without
sharing a position, and none of them parses the directory (a million entries, seconds and hundreds of megabytes) again.
"""

import io
import os
import stat
import struct
import zipfile
import zlib

import numpy as np

from esvit.data.base import BadImage, Data, EncodedImages, PackedStrings, existing_folder, is_image_name
from esvit.data.decoding import Pixels
from esvit.data.index import CACHED_FROM, IndexCache
from esvit.errors import OptionError

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature; lengths of the name and of the extra field that follow the 30 bytes


class ZipData(Data):
    """`root/train.zip` with `root/train_map.txt`, and `val.zip` with `val_map.txt` in `val_root` or else, if present, in `root`."""

    def open_train(self) -> "ZipImages":
        return self._images(existing_folder("data.root", self.root), "train", "data.root")

    def open_validation(self) -> "ZipImages | None":
        root = existing_folder("data.root", self.root)
        if self.val_root is not None:
            validation = self._images(existing_folder("data.val_root", self.val_root), "val", "data.val_root")
        elif os.path.exists(os.path.join(root, "val.zip")):
            validation = self._images(root, "val", "data.val_root")
        else:
            return None
        classes = self.open_train().class_names
        largest = int(validation.labels.max())
        if largest >= len(classes):
            found = f"'{validation.path}' has label {largest}, data.root has {len(classes)} classes"
            raise OptionError("data.val_root", found, "give both archives the same classes")
        validation.class_names = classes
        return validation

    def _images(self, folder: str, split: str, option: str) -> "ZipImages":
        return ZipImages(folder, split, option=option, pixels=self.pixels, index=self.index)


class ZipImages(EncodedImages):
    """The images of `<folder>/<split>.zip` that `<folder>/<split>_map.txt` gives a label, in the archive's order.

    As in the original, empty members and hidden files are left out.

    index  where the directory of a large archive is kept

    Raises OptionError naming `option`.
    """

    labels: np.ndarray

    def __init__(self, folder: str, split: str, *, option: str, pixels: Pixels, index: IndexCache):
        self.path = os.path.join(folder, f"{split}.zip")
        map_path = os.path.join(folder, f"{split}_map.txt")
        for path in (self.path, map_path):
            if not os.path.isfile(path):
                raise OptionError(option, f"file '{path}' does not exist", f"give the folder that holds {split}.zip and {split}_map.txt")
        kind = "zip" if pixels.is_rgb else "zip_with_arrays"
        state = np.array([number for path in (self.path, map_path) for number in _state(path)], dtype=np.int64)
        directory = index.load(kind, self.path)
        if directory is None or not np.array_equal(directory["state"], state):
            directory = {**_read_directory(self.path, map_path, pixels, option), "state": state}
            if len(directory["labels"]) >= CACHED_FROM:
                index.save(kind, self.path, directory)
        self._names = PackedStrings.from_arrays(directory["names"], directory["name_ends"])
        self._offsets, self._sizes = directory["offsets"], directory["sizes"]
        self._deflated, self._checksums = directory["deflated"], directory["checksums"]
        self.labels = directory["labels"]
        self.class_names = [str(label) for label in range(int(self.labels.max()) + 1)]
        self._file: io.FileIO | None = None

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{os.path.basename(self.path)}@/{self._names[index]}"

    def encoded(self, index: int) -> bytes:
        """The unpacked member `index`. Raises BadImage if the archive is damaged there."""
        try:
            if self._file is None:
                self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (stays open for the run)
            start, size = int(self._offsets[index]), int(self._sizes[index])
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(os.pread(self._file.fileno(), _LOCAL_HEADER.size, start))
            if signature != b"PK\x03\x04":
                raise BadImage("no zip member where the archive's directory says")
            content = os.pread(self._file.fileno(), size, start + _LOCAL_HEADER.size + name_length + extra_length)
            content = zlib.decompress(content, -zlib.MAX_WBITS) if self._deflated[index] else content
        except (OSError, struct.error, zlib.error) as error:
            raise BadImage(f"{type(error).__name__}: {error}") from error
        if zlib.crc32(content) != self._checksums[index]:
            raise BadImage("the checksum in the archive differs")
        return content

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}


def _read_directory(path: str, map_path: str, pixels: Pixels, option: str) -> dict[str, np.ndarray]:
    """Names, places and labels of the members of an archive that are images and have a label."""
    label_of = _read_map(map_path, option)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if _is_wanted(member, pixels) and member.filename in label_of]
    except (zipfile.BadZipFile, OSError) as error:
        raise OptionError(option, f"'{path}' is not a readable zip archive ({error})", "make or copy the archive again") from error
    if not members:
        raise OptionError(
            option,
            f"no image in '{path}' has a line in '{map_path}'",
            "write one line '<archive>@/<path in the archive><tab><label>' for each image",
        )
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
            raise OptionError(
                option,
                f"'{member.filename}' in '{path}' is encrypted or packed by a rare method",
                "pack the archive again without compression (zip -0)",
            )
    names = PackedStrings(member.filename for member in members)
    return {
        "names": names.text,
        "name_ends": names.ends,
        "offsets": np.array([member.header_offset for member in members], dtype=np.int64),
        "sizes": np.array([member.compress_size for member in members], dtype=np.int64),
        "deflated": np.array([member.compress_type == zipfile.ZIP_DEFLATED for member in members]),
        "checksums": np.array([member.CRC for member in members], dtype=np.uint32),
        "labels": np.array([label_of[member.filename] for member in members], dtype=np.int64),
    }


def _state(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _is_wanted(member: zipfile.ZipInfo, pixels: Pixels) -> bool:
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    is_image = is_image_name(member.filename.rpartition("/")[2], pixels.extensions)
    return not member.is_dir() and not is_link and member.file_size > 0 and is_image


def _read_map(path: str, option: str) -> dict[str, int]:
    """Label by path in the archive, from lines `<anything>@/<path in the archive>\\t<label>`; more columns are ignored.

    Raises OptionError with file and line number for a malformed line or a second, different label.
    """
    label_of: dict[str, int] = {}
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place, *columns = line.rstrip("\r\n").split("\t")
            _, at, member = place.partition("@")
            label = columns[0].strip() if columns else ""
            if not at or not label.isdecimal():
                raise OptionError(
                    option,
                    f"{path} line {number} is malformed: '{line.strip()[:80]}'",
                    "write '<archive>@/<path in the archive><tab><label>' with a label from 0 upwards",
                )
            member = member.removeprefix("/")
            if label_of.setdefault(member, int(label)) != int(label):
                raise OptionError(
                    option,
                    f"{path} line {number} gives '{member}' label {label}, an earlier line {label_of[member]}",
                    "give each image one label",
                )
    return label_of
