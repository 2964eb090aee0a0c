"""The parts of `task=analyze` that are measured over a set of images: attention entropy of every head, and nearest neighbours."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from esvit.data.base import ImageSet
from esvit.evaluation.analysis_report import EntropyLine, Picture
from esvit.evaluation.attention import EntropySummary, entropy_row, heads_per_block, summarise_entropy
from esvit.evaluation.feature_files import FeatureSet
from esvit.evaluation.frozen import Describe, FrozenBackbone
from esvit.evaluation.neighbours import nearest, same_class_percent
from esvit.evaluation.photos import Photo, as_picture, evenly_spaced
from esvit.evaluation.pictures import LIKE, UNLIKE, Sheet, Tile, entropy_figure

ENTROPY = Describe("attention_entropy", entropy_row)
_THUMBNAIL = 104  # side of a neighbour (pixels)


@dataclass(frozen=True)
class Entropy:
    """grids and blocks  of every block, rows and columns, and its entropies
    images            how many were measured
    """

    grids: list[tuple[int, int]]
    blocks: list[EntropySummary]
    images: int

    def metrics(self) -> dict[str, float]:
        """Of every block: mean bits, mean share of the most possible, and standard deviation over the images, averaged over heads."""
        metrics = {}
        for number, block in enumerate(self.blocks, 1):
            metrics[f"analyze/entropy_block_{number}"] = block.mean_bits
            metrics[f"analyze/entropy_share_block_{number}"] = block.mean_share
            metrics[f"analyze/entropy_spread_block_{number}"] = float(block.bits_spread.mean())
        return metrics

    def lines(self) -> list[EntropyLine]:
        return [
            EntropyLine(
                block=number,
                grid=f"{rows} × {columns}",
                heads=len(block.bits),
                bits=block.mean_bits,
                share=block.mean_share,
                lowest=float(block.bits.min()),
                highest=float(block.bits.max()),
            )
            for number, (block, (rows, columns)) in enumerate(zip(self.blocks, self.grids, strict=True), 1)
        ]

    def draw(self, folder: Path) -> Picture:
        """`attention_entropy.png`, and every head in `attention_entropy.csv`."""
        path = folder / "attention_entropy.png"
        path.write_bytes(
            entropy_figure(
                bits=[block.bits.numpy() for block in self.blocks],
                spreads=[block.bits_spread.numpy() for block in self.blocks],
                shares=[block.share.numpy() for block in self.blocks],
                stages=self.grids,
            )
        )
        (folder / "attention_entropy.csv").write_text(self._table())
        return Picture("Attention entropy of every block and head", path)

    def _table(self) -> str:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["block", "head", "rows", "columns", "bits", "bits_spread", "share"])
        for number, (block, (rows, columns)) in enumerate(zip(self.blocks, self.grids, strict=True), 1):
            for head, values in enumerate(zip(block.bits, block.bits_spread, block.share, strict=True), 1):
                writer.writerow([number, head, rows, columns, *(f"{float(value):.6f}" for value in values)])
        return table.getvalue()


def measure_entropy(images: ImageSet, network: FrozenBackbone, *, batch_size: int, workers: int) -> Entropy:
    """By all ranks together. Raises NoAttention for a backbone without attention."""
    rows = network.features(images, batch_size=batch_size, workers=workers, describe=ENTROPY).features
    side = network.options.crop
    one = torch.zeros(1, len(network.normalize.mean), side, side, device=network.runtime.device)
    with torch.no_grad():
        grids = [block.grid for block in network.backbone.looks(one)]
        heads = heads_per_block(network.backbone, one)
    return Entropy(grids, summarise_entropy(rows, heads), len(rows))


@dataclass(frozen=True)
class NeighboursSheet:
    """same_class  percent of the neighbours shown that have their query's class; None without classes."""

    picture: Picture
    same_class: float | None


def draw_neighbours(
    images: ImageSet, pooled: FeatureSet, network: FrozenBackbone, *, queries: int, count: int, folder: Path
) -> NeighboursSheet:
    """`neighbours.png`: a row for each of `queries` images, evenly spaced, with the `count` images most similar to it.

    pooled  features of `images`, at least two
    """
    labels = pooled.labels
    asked = torch.from_numpy(evenly_spaced(len(pooled.features), queries))
    found = nearest(pooled.features, asked, min(count, len(pooled.features) - 1))

    def thumbnail(row: int) -> Image.Image:
        place = int(pooled.places[row])
        options = network.options
        return as_picture(Photo(place, "", images.read(place)).square(resize=options.resize, crop=options.crop, side=_THUMBNAIL))

    def name(row: int) -> str:
        return Path(images.name(int(pooled.places[row]))).stem if labels is None else images.class_names[int(labels[row])]

    def neighbour(query: int, row: int, cosine: float) -> Tile:
        if labels is None:
            return Tile(thumbnail(row), f"{cosine:.2f}")
        return Tile(thumbnail(row), f"{cosine:.2f} {name(row)}", LIKE if labels[row] == labels[query] else UNLIKE)

    rows = []
    for query, alike, cosines in zip(asked.tolist(), found.rows.tolist(), found.similarity.tolist(), strict=True):
        neighbours = [neighbour(query, row, cosine) for row, cosine in zip(alike, cosines, strict=True)]
        rows.append([Tile(thumbnail(query), name(query)), *neighbours])
    path = folder / "neighbours.png"
    titles = ["query", *(str(number) for number in range(1, found.rows.shape[1] + 1))]
    Sheet(rows=rows, column_titles=titles, font_size=12, gap=14).draw().save(path)

    if labels is None:
        return NeighboursSheet(Picture("Nearest neighbours", path), None)
    percent = same_class_percent(found, asked, labels)
    frames = "Frames are green where the class is the query's, and red where it is another"
    return NeighboursSheet(Picture("Nearest neighbours", path, f"{frames}: {percent:.0f}% of those shown have the query's class."), percent)
