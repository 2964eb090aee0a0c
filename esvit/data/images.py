"""Every image below a folder, whatever its sub-folders are called: a set without classes.

For trees whose sub-folders are no classes (dates, cameras, patients, pieces of a download), which `data=folder` would take for such.
"""

from esvit.data.base import Data, FileImages, ImageSet, existing_folder
from esvit.data.decoding import Pixels
from esvit.data.index import IndexCache
from esvit.data.listing import list_images
from esvit.errors import OptionError


class ImagesData(Data):
    """`root/**/*.jpg`, unlabelled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_root is not None:
            raise OptionError("data.val_root", f"'{self.val_root}' is not used: images without classes validate nothing", "use data=folder")

    def open_train(self) -> ImageSet:
        return UnlabelledImages(self.root, option="data.root", pixels=self.pixels, index=self.index)

    def open_validation(self) -> ImageSet | None:
        return None


class UnlabelledImages(FileImages):
    """Every image below `root`: those directly in it, then those of each sub-folder, sorted by their paths.

    index  where the listing of a large folder is kept

    Raises OptionError naming `option`.
    """

    labels = None

    def __init__(self, root: str | None, *, option: str, pixels: Pixels, index: IndexCache):
        self.root = existing_folder(option, root)
        self.pixels = pixels
        self.class_names: list[str] = []
        self._names = list_images(self.root, extensions=pixels.extensions, index=index, option=option).names
        if not len(self._names):
            raise OptionError(option, f"folder '{self.root}' holds no images", "give a folder with images in it, or in folders below it")
