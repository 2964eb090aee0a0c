"""The record of images that could not be read: each counted once in a run, kept over a resume, too many end the run."""

from collections.abc import Iterable
from pathlib import Path

from esvit.errors import OptionError


class BadImages:
    """Distinct names of unreadable images, kept in `<folder>/bad_images.txt`, one a line.

    folder            the run's folder; an earlier attempt's names are read from it
    image_count       how many images the set has
    max_bad_fraction  share of distinct bad images above which `add` raises
    writes            whether this process appends to the file (rank 0); the others only count
    """

    def __init__(self, *, folder: Path, image_count: int, max_bad_fraction: float, writes: bool):
        self.path = Path(folder) / "bad_images.txt"
        self._image_count = image_count
        self._max_bad_fraction = max_bad_fraction
        self._writes = writes
        # file names need not be valid UTF-8
        text = self.path.read_text(encoding="utf-8", errors="surrogateescape") if self.path.exists() else ""
        self._names = set(text.splitlines())

    @property
    def count(self) -> int:
        return len(self._names)

    def add(self, names: Iterable[str]) -> None:
        """Count and write the names not seen before. Raises OptionError once there are too many."""
        new = [name for name in dict.fromkeys(" ".join(name.splitlines()) for name in names) if name not in self._names]
        if not new:
            return
        self._names.update(new)
        if self._writes:
            with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(f"{name}\n" for name in new)
        if self.count > self._max_bad_fraction * self._image_count:
            share = f"more than the share of {self._max_bad_fraction:g}"
            found = f"{self.count} of {self._image_count} images cannot be read, {share} (see {self.path})"
            raise OptionError("data.max_bad_fraction", found, "repair or remove them, or raise the limit")
