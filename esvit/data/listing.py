"""The image files below a folder, listed once and, where there are many, kept for the next time.

A kept listing holds as long as no folder of the tree has changed: a folder's modification time is that of the last file added, removed or
renamed in it. A file that is overwritten under its name leaves the listing as it is, and right.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from esvit import distributed
from esvit.data.base import PackedStrings, is_image_name
from esvit.data.index import CACHED_FROM, IndexCache
from esvit.errors import OptionError

_SECONDS_UNTIL_SHOWN = 2
_SECONDS_UNTIL_SETTLED = 2  # a folder that changed later than this before it was listed may change again within one tick of its clock


@dataclass(frozen=True)
class Listing:
    """The images below a folder, those directly in it first, then those of each of its sub-folders, sorted by their paths.

    folders    names of the sub-folders, sorted, those without images too
    names      paths of the images, relative to the folder
    folder_of  (len(names),) int32 number of the sub-folder of each image, -1 for those directly in the folder
    """

    folders: PackedStrings
    names: PackedStrings
    folder_of: np.ndarray

    @property
    def loose(self) -> int:
        """How many images are directly in the folder."""
        return int(np.searchsorted(self.folder_of, 0))


def list_images(root: str, *, extensions: frozenset[str], index: IndexCache, option: str) -> Listing:
    """The images below the folder `root`, by the ending of their names; hidden files and folders are left out.

    Raises OptionError naming `option` if a folder cannot be listed.
    """
    kind = "images" if ".npy" not in extensions else "images_and_arrays"
    kept = index.load(kind, root)
    if kept is not None and _is_current(root, kept):
        folders = PackedStrings.from_arrays(kept["folders"], kept["folder_ends"])
        return Listing(folders, PackedStrings.from_arrays(kept["names"], kept["name_ends"]), kept["folder_of"])
    walk = _Walk(root, extensions, option)
    listing = walk.listing()
    if len(listing.names) >= CACHED_FROM and walk.is_settled():
        visited = PackedStrings(walk.times)
        index.save(
            kind,
            root,
            {
                "visited": visited.text,
                "visited_ends": visited.ends,
                "times": np.array(list(walk.times.values()), dtype=np.int64),
                "folders": listing.folders.text,
                "folder_ends": listing.folders.ends,
                "folder_of": listing.folder_of,
                "names": listing.names.text,
                "name_ends": listing.names.ends,
            },
        )
    return listing


def folders_and_images(folder: str, *, extensions: frozenset[str], option: str) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the images directly in `folder`, without hidden ones."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():  # costs no system call but for symbolic links
                    folders.append(entry.name)
                elif is_image_name(entry.name, extensions):
                    images.append(entry.name)
    except OSError as error:
        raise OptionError(option, f"folder '{folder}' cannot be listed ({error.strerror})", "check its permissions and links") from error
    return sorted(folders), sorted(images)


def _is_current(root: str, kept: dict[str, np.ndarray]) -> bool:
    """Whether every folder of the tree still has the modification time that it had."""
    visited = PackedStrings.from_arrays(kept["visited"], kept["visited_ends"])
    times = kept["times"].tolist()
    try:
        return all(os.stat(os.path.join(root, folder)).st_mtime_ns == then for folder, then in zip(visited, times, strict=True))
    except OSError:
        return False


class _Walk:
    """One walk through the tree. times  modification time (ns) of each folder, by its path relative to `root`, from before it was listed"""

    def __init__(self, root: str, extensions: frozenset[str], option: str):
        self._root = root
        self._extensions = extensions
        self._option = option
        self.times: dict[str, int] = {}
        self._began = time.time_ns()

    def listing(self) -> Listing:
        with tqdm(
            desc=f"listing {self._root}", unit=" images", delay=_SECONDS_UNTIL_SHOWN, leave=False, disable=distributed.rank() > 0
        ) as progress:
            folders, loose = self._list("")
            progress.update(len(loose))
            names, sizes = list(loose), []
            for folder in folders:
                found = sorted(self._below(folder, progress))
                names += found
                sizes.append(len(found))
        numbers = np.arange(-1, len(folders), dtype=np.int32)
        return Listing(PackedStrings(folders), PackedStrings(names), np.repeat(numbers, [len(loose), *sizes]))

    def is_settled(self) -> bool:
        return max(self.times.values()) < self._began - _SECONDS_UNTIL_SETTLED * 10**9

    def _below(self, folder: str, progress: tqdm) -> Iterator[str]:
        """Paths of all images below `folder`, both relative to the root."""
        folders, images = self._list(folder)
        progress.update(len(images))
        for image in images:
            yield f"{folder}/{image}"
        for inner in folders:
            yield from self._below(f"{folder}/{inner}", progress)

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        path = os.path.join(self._root, folder)
        try:
            self.times[folder] = os.stat(path).st_mtime_ns
        except OSError as error:
            found = f"folder '{path}' cannot be listed ({error.strerror})"
            raise OptionError(self._option, found, "check its permissions and links") from error
        return folders_and_images(path, extensions=self._extensions, option=self._option)
