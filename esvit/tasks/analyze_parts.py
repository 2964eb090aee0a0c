"""The parts of `task=analyze` that are drawn photo by photo: attention maps, coloured region maps, matched regions.

Each part checks its options before any work, and then draws its pictures into the run folder, one file for each photo or one for all.

Letters: B images, C channels, N regions, D backbone width.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from esvit.augmentations.multicrop import to_tensor
from esvit.data.base import BadImage, ImageSet, decode_rgb, existing_folder, file_bytes
from esvit.errors import OptionError, Stopped
from esvit.evaluation.analysis_report import Picture
from esvit.evaluation.attention import Query, attention_map, head_entropy, mass_mask
from esvit.evaluation.correspondence import Cells, CroppedViews, Pair, match, most_similar
from esvit.evaluation.frozen import FrozenBackbone
from esvit.evaluation.photos import Photo, as_picture, open_photos, read_photos
from esvit.evaluation.pictures import (
    Marker,
    RegionPair,
    Sheet,
    Tile,
    heat_legend,
    heat_over,
    mark,
    matches_picture,
    paint,
    spotlight,
)
from esvit.evaluation.region_colors import color_map
from esvit.records import Features

_TILE = 180  # side of a photo on a sheet (pixels)
_HEADS_WIDTH = 960  # of a sheet on which every head has a tile (pixels)
_LARGEST_HEAD = 130
_HEAD_GAP = 6
_BLOCKS_ACROSS = 6
_HEADS_ACROSS = 12
_COLORED_ACROSS = 6


@dataclass(frozen=True)
class _BlockMaps:
    """maps (heads, rows, columns) that sum to 1 each, and bits (heads,) of entropy."""

    maps: Tensor
    bits: Tensor

    @property
    def mean(self) -> Tensor:
        return self.maps.mean(dim=0)

    @property
    def grid(self) -> str:
        return f"{self.maps.shape[1]} × {self.maps.shape[2]}"


@dataclass(kw_only=True)
class AttentionMaps:
    """Where each block and head looks.

    query      [row, column] of the cell that is asked, as shares of the image; None asks the pooled feature
    threshold  share of the attention that the lit cells of a mask hold
    """

    query: list[float] | None
    threshold: float

    def check(self) -> None:
        if self.query is not None and (len(self.query) != 2 or not all(0 <= share <= 1 for share in self.query)):
            remedy = "give a row and a column as shares of the image, such as [0.5,0.5]"
            raise OptionError("task.attention.query", f"{self.query}", remedy)
        if not 0 < self.threshold < 1:
            raise OptionError("task.attention.threshold", f"{self.threshold}", "use a share between 0 and 1, such as 0.6")

    @torch.no_grad()
    def asked(self, network: FrozenBackbone) -> str:
        """Whose attention the maps of this backbone show, as a sentence."""
        if self.query is not None:
            row, column = self.query
            return f"The ring marks the region that is asked, {row:.0%} from the top and {column:.0%} from the left."
        received = "what each region receives from all of them on average, for the image's feature is the mean of its regions"
        class_token = "the attention of the class token, which stands for the image"
        side = network.options.crop
        one = torch.zeros(1, len(network.normalize.mean), side, side, device=network.runtime.device)
        has_class_token = [block.class_tokens > 0 for block in network.backbone.looks(one)]
        if not any(has_class_token):
            return f"Shown is {received}."
        if all(has_class_token):
            return f"Shown is {class_token}."
        return f"Shown is {class_token}; in blocks without one, {received}."

    def draw(self, photo: Photo, network: FrozenBackbone, folder: Path) -> tuple[Picture, Picture]:
        """`attention/<photo>.png`, every block, and `attention_heads/<photo>.png`, every head of every block."""
        blocks = self._look(photo, network)
        shown = as_picture(_square(photo, network, _TILE))
        every_block = _save(self._blocks_sheet(shown, blocks).draw(), folder / "attention" / f"{photo.name}.png")
        every_head = _save(self._heads_sheet(photo, network, blocks).draw(), folder / "attention_heads" / f"{photo.name}.png")
        return Picture(photo.name, every_block), Picture(photo.name, every_head)

    @torch.no_grad()
    def _look(self, photo: Photo, network: FrozenBackbone) -> list[_BlockMaps]:
        query = None if self.query is None else Query(*self.query)
        blocks = []
        with network.runtime.autocast():
            for block in network.backbone.looks(_normalised([network.transform(photo.image)], network)):
                maps, bits = attention_map(block, query)[0], head_entropy(block.windows).bits[0]
                blocks.append(_BlockMaps(maps.cpu(), bits.cpu()))
        return blocks

    def _blocks_sheet(self, shown: Image.Image, blocks: list[_BlockMaps]) -> Sheet:
        rows: list[list[Tile | None]] = []
        for start in range(0, len(blocks), _BLOCKS_ACROSS):
            heat: list[Tile | None] = [Tile(self._marked(shown), "photo") if start == 0 else None]
            lit: list[Tile | None] = [None]
            for number, block in enumerate(blocks[start : start + _BLOCKS_ACROSS], start + 1):
                mean = block.mean.numpy()
                heat.append(Tile(self._marked(heat_over(shown, mean)), f"block {number} · up to {mean.max() * mean.size:.1f} ×"))
                mask = mass_mask(block.mean, self.threshold)
                lit.append(Tile(self._marked(spotlight(shown, mask.numpy())), f"{float(mask.double().mean()):.0%} of {block.grid} cells"))
            rows += [heat, lit]
        return Sheet(rows=rows, legend=heat_legend(self._legend()), font_size=16)

    def _heads_sheet(self, photo: Photo, network: FrozenBackbone, blocks: list[_BlockMaps]) -> Sheet:
        across = min(_HEADS_ACROSS, max(len(block.bits) for block in blocks))
        shown = as_picture(_square(photo, network, min(_LARGEST_HEAD, _HEADS_WIDTH // across - _HEAD_GAP)))
        rows: list[list[Tile | None]] = []
        titles = []
        for number, block in enumerate(blocks, 1):
            heads = block.bits.argsort(descending=True, stable=True).tolist()
            for start in range(0, len(heads), _HEADS_ACROSS):
                line = heads[start : start + _HEADS_ACROSS]
                rows.append(
                    [Tile(heat_over(shown, block.maps[head].numpy()), f"{head + 1}: {float(block.bits[head]):.1f}") for head in line]
                )
                titles.append(f"block {number}" if start == 0 else "")
        legend = heat_legend("none … the most, or twice an even share if that is more. Below: number of the head: its entropy (bits)")
        return Sheet(rows=rows, row_titles=titles, legend=legend, font_size=12, gap=_HEAD_GAP)

    def _marked(self, picture: Image.Image) -> Image.Image:
        return picture if self.query is None else mark(picture, (self.query[0], self.query[1]))

    def _legend(self) -> str:
        return f"none … the most, or twice an even share (2 ×) if that is more. Lit: the fewest cells that hold {self.threshold:.0%}."


@dataclass(kw_only=True)
class RegionColors:
    """Which regions have like features: like colours.

    sizes       sides of the images (pixels); None means the evaluation crop and twice that
    foreground  colour only the foreground
    """

    sizes: list[int] | None
    foreground: bool

    def check(self, network: FrozenBackbone) -> None:
        """Raises OptionError for a size that the backbone cannot take."""
        if self.sizes == []:
            raise OptionError("task.colors.sizes", "an empty list", "give at least one size, or null")
        for size in self.sizes_of(network):
            try:
                if size < 1:
                    raise RuntimeError("no image is that small")
                regions(torch.zeros(1, len(network.normalize.mean), size, size), network)
            except (RuntimeError, OptionError, ValueError, AssertionError) as error:
                found = f"the backbone cannot take images of {size} pixels ({(str(error).splitlines() or [''])[0]})"
                raise OptionError("task.colors.sizes", found, f"use others, such as [{network.options.crop}]") from None

    def sizes_of(self, network: FrozenBackbone) -> list[int]:
        return sorted([network.options.crop, 2 * network.options.crop] if self.sizes is None else set(self.sizes))

    def draw(self, photos: Sequence[Photo], network: FrozenBackbone, folder: Path) -> tuple[Picture, float]:
        """`region_colors.png`, and the percent of the features' variance that the three components hold."""
        sizes = self.sizes_of(network)
        maps = {size: [self._map(photo, network, size) for photo in photos] for size in sizes}
        colors = color_map(maps[sizes[-1]], only_foreground=self.foreground)
        groups = [
            [
                Tile(as_picture(_square(photo, network, _TILE)), photo.name),
                *(self._tile(maps[size][number], size, colors.colors(maps[size][number])) for size in sizes),
            ]
            for number, photo in enumerate(photos)
        ]
        across = max(1, _COLORED_ACROSS // (1 + len(sizes)))
        rows = [[tile for group in groups[start : start + across] for tile in group] for start in range(0, len(groups), across)]
        path = _save(Sheet(rows=rows, font_size=15).draw(), folder / "region_colors.png")
        percent = 100 * float(colors.components.shares.sum())
        text = f"The three components hold {percent:.0f}% of the variance of the region features."
        if self.foreground:
            text += " Dark is the background: the side of a first principal component that has more of the photos' borders."
        return Picture("Regions in colour", path, text), percent

    @torch.no_grad()
    def _map(self, photo: Photo, network: FrozenBackbone, size: int) -> Tensor:
        """(rows, columns, D) on the CPU."""
        found = regions(_normalised([_square(photo, network, size)], network), network)
        return found.regions[0].float().cpu().unflatten(0, found.grid)

    @staticmethod
    def _tile(found: Tensor, size: int, colors: Tensor) -> Tile:
        return Tile(paint(colors.numpy(), (_TILE, _TILE)), f"{size} px: {found.shape[0]} × {found.shape[1]}")


@dataclass(frozen=True)
class MatchedPhoto:
    """A picture of matched regions and, of its pairs: mean cosine, percent that are mutual, and how many of `known` are right."""

    picture: Picture
    similarity: float
    mutual: float
    right: int
    known: int


@dataclass(kw_only=True)
class RegionMatches:
    """Which regions of one view find which regions of another.

    pairs        most similar pairs that are drawn
    photos       two photos whose regions are matched with each other too
    scale        smallest and largest share of a photo's area that a view shows
    photometric  whether the second view has other colours
    saved        folder with the views of an earlier analysis, which are taken instead of new ones
    """

    pairs: int
    photos: list[str] | None
    scale: list[float]
    photometric: bool
    saved: str | None

    def check(self) -> None:
        if self.pairs < 1:
            raise OptionError("task.matches.pairs", f"{self.pairs} pairs", "use at least 1")
        if self.photos is not None and len(self.photos) != 2:
            raise OptionError("task.matches.photos", f"{len(self.photos)} photos", "give two, such as [one.jpg,two.jpg]")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise OptionError("task.matches.scale", f"{self.scale}", "give [smallest,largest] with 0 < smallest <= largest <= 1")
        self.two_photos()

    def check_saved(self, photos: Sequence[Photo], side: int) -> None:
        """Raises OptionError unless there are saved views, if any are to be taken, of every photo, and `side` pixels large."""
        if self.saved is not None:
            existing_folder("task.matches.saved", self.saved)
            for photo in photos:
                self._saved_views(photo, side)

    def two_photos(self) -> list[Photo]:
        """The photos that are matched with each other, none or two."""
        if self.photos is None:
            return []
        return read_photos(open_photos(self.photos, option="task.matches.photos"), [0, 1], option="task.matches.photos")

    def draw_views(self, photo: Photo, images: ImageSet, network: FrozenBackbone, folder: Path) -> MatchedPhoto:
        """Two views of a photo: `matches/<photo>.png`, and the views themselves as `views/<photo>_1.png` and `_2.png`."""
        cells = _cells(network)
        pair = self._views(photo, images, cells, network)
        for number, view in enumerate((pair.one, pair.two), 1):
            _save(as_picture(view), folder / "views" / _view_name(photo, number))
        return self._draw(pair, cells, ("one view", "another view"), photo.name, network, folder)

    def draw_photos(self, photos: Sequence[Photo], network: FrozenBackbone, folder: Path) -> MatchedPhoto:
        """Two photos, as evaluations crop them: `matches/<one>_and_<two>.png`."""
        one, two = (network.transform(photo.image) for photo in photos)
        cells = _cells(network)
        return self._draw(
            _pair(one, two, cells), cells, (photos[0].name, photos[1].name), f"{photos[0].name}_and_{photos[1].name}", network, folder
        )

    def _views(self, photo: Photo, images: ImageSet, cells: Cells, network: FrozenBackbone) -> Pair:
        if self.saved is None:
            smallest, largest = self.scale
            draw = CroppedViews(
                images=images, cells=cells, scale=(smallest, largest), photometric=self.photometric, seed=network.runtime.seed
            )
            return draw(photo.index)
        return _pair(*self._saved_views(photo, cells.side), cells)

    def _saved_views(self, photo: Photo, side: int) -> tuple[Tensor, Tensor]:
        one, two = (self._saved_view(_view_name(photo, number), side) for number in (1, 2))
        return one, two

    def _saved_view(self, name: str, side: int) -> Tensor:
        path = os.path.join(self.saved or "", name)
        if not os.path.exists(path):
            raise OptionError("task.matches.saved", f"there is no '{path}'", "give the folder views/ of an analysis of the same photos")
        try:
            view = decode_rgb(file_bytes(path))
        except BadImage as error:
            raise OptionError(
                "task.matches.saved", f"view '{path}' cannot be read ({error})", "draw new ones: leave the option out"
            ) from None
        if view.size != (side, side):
            found = f"view '{path}' has {view.width} x {view.height} pixels, and frozen.crop is {side}"
            raise OptionError("task.matches.saved", found, f"use frozen.crop={view.width}")
        return to_tensor(view)

    @torch.no_grad()
    def _draw(self, pair: Pair, cells: Cells, titles: tuple[str, str], name: str, network: FrozenBackbone, folder: Path) -> MatchedPhoto:
        found = regions(_normalised([pair.one, pair.two], network), network)
        one, two = found.regions.float().cpu()
        pooled = found.pooled.float().cpu()
        matches = match(one.unsqueeze(0), two.unsqueeze(0))
        chosen = most_similar(matches.similarity, torch.ones_like(matches.mutual), self.pairs)[0].nonzero()[:, 0]
        best, mutual, similarity = matches.best[0, chosen], matches.mutual[0, chosen], matches.similarity[0, chosen]
        order = similarity.argsort(descending=True, stable=True)

        columns = found.grid[1]
        pairs = [RegionPair(divmod(int(chosen[n]), columns), divmod(int(best[n]), columns), bool(mutual[n])) for n in order]
        png = matches_picture(
            (as_picture(pair.one), as_picture(pair.two)),
            titles=titles, grids=(found.grid, found.grid), pairs=pairs, markers=_closest_to_pooled(one, two, pooled, found.grid),
        )  # fmt: skip
        path = folder / "matches" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)

        points = pair.points[chosen]
        known = cells.inside(points)
        offset = (cells.places(best) - cells.containing(points.nan_to_num(0.0)))[known]
        right = int((offset.square().sum(dim=1) <= 1).sum())
        result = f"{int(mutual.sum())} of {len(pairs)} choose each other, mean cosine {float(similarity.mean()):.2f}"
        if len(offset):
            result += f"; right to within one cell: {right} of {len(offset)} whose place is in both views"
        return MatchedPhoto(
            picture=Picture(name, path, result + "."),
            similarity=float(similarity.mean()),
            mutual=100 * float(mutual.double().mean()),
            right=right,
            known=len(offset),
        )


def _view_name(photo: Photo, number: int) -> str:
    return f"{photo.name}_{number}.png"


def _pair(one: Tensor, two: Tensor, cells: Cells) -> Pair:
    """Views of which nobody knows where a region of one is in the other."""
    return Pair(one, two, torch.full((cells.count, 2), torch.nan, dtype=torch.float64))


def _closest_to_pooled(one: Tensor, two: Tensor, pooled: Tensor, grid: tuple[int, int]) -> list[Marker]:
    """In each view (N, D) the region most similar to its own pooled feature, and to that of the other; pooled (2, D)."""
    markers = []
    for view, of_view in enumerate((one, two)):
        for source, shape, color, label in (
            (view, "o", "#1f6fb2", "closest to the view's own pooled feature"),
            (1 - view, "^", "#e03131", "closest to the other view's pooled feature"),
        ):
            closest = int(F.cosine_similarity(of_view, pooled[source : source + 1]).argmax())
            markers.append(Marker(view, divmod(closest, grid[1]), shape, color, label))
    return markers


@torch.no_grad()
def regions(images: Tensor, network: FrozenBackbone) -> Features:
    """Of normalised images (B, C, h, w)."""
    with network.runtime.autocast():
        return network.backbone(images.to(network.runtime.device))


def _normalised(images: Sequence[Tensor], network: FrozenBackbone) -> Tensor:
    """uint8 (C, h, w) each -> (B, C, h, w) on the device."""
    return network.normalize(torch.stack(list(images)).to(network.runtime.device))


def _square(photo: Photo, network: FrozenBackbone, side: int) -> Tensor:
    return photo.square(resize=network.options.resize, crop=network.options.crop, side=side)


def _cells(network: FrozenBackbone) -> Cells:
    """Of a view as large as the evaluation crop."""
    side = network.options.crop
    return Cells(grid=regions(torch.zeros(1, len(network.normalize.mean), side, side), network).grid, side=side)


def _save(picture: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def go_on(network: FrozenBackbone, doing: str) -> None:
    """Tell the watchdog what comes next. Raises Stopped on a signal."""
    network.runtime.beat(doing)
    if signal := network.runtime.stop_signal_here():
        raise Stopped(signal)
