"""Pictures of a run: a sheet of augmented crops, and curves of what was logged.

Letters: B images, V crops, C channels, h and w pixels of a crop.
Figures are drawn without pyplot: nothing global, safe in any thread and without a display. Curves are SVG, sharp at any width.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
COLORS = ("#1f6fb2", "#d9772b", "#2e9467", "#8a5cb8", "#c2445a")
SMOOTH_FROM = 80  # points from which a noisy curve also gets a running mean
GLOBAL_PIXELS = 128  # side at which the largest crop is shown


def crops_grid(crops: Sequence[Tensor], *, images: int = 8) -> bytes:
    """PNG sheet: one row per image, global crops then local ones, at their true relative sizes.

    crops   V tensors (B, C, h_v, w_v) uint8 or uint16, largest first; those of the largest size are titled global, the others local.
            Of channels other than three, the first one is shown in grey
    images  at most so many rows
    """
    rows = min(images, crops[0].shape[0])
    areas = [crop.shape[2] * crop.shape[3] for crop in crops]
    scale = GLOBAL_PIXELS / max(max(crop.shape[2:]) for crop in crops)
    sizes = [(round(crop.shape[3] * scale), round(crop.shape[2] * scale)) for crop in crops]  # width, height
    row_height = max(height for _, height in sizes)
    gap, head, margin = 8, 30, 12
    titles = _titles([area == max(areas) for area in areas])

    font = ImageFont.load_default(13)
    widths = [max(width, round(font.getlength(title))) for (width, _), title in zip(sizes, titles, strict=True)]
    sheet = Image.new("RGB", (2 * margin + sum(widths) + gap * (len(crops) - 1), head + rows * (row_height + gap) + margin - gap), "white")
    draw = ImageDraw.Draw(sheet)
    left = margin
    for crop, (width, height), column, title in zip(crops, sizes, widths, titles, strict=True):
        draw.text((left + column / 2, head / 2), title, fill=MUTED, font=font, anchor="mm")
        pixels = _shown(crop[:rows].permute(0, 2, 3, 1).cpu().numpy())
        method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS  # enlarged pixels stay visible as they are
        for row in range(rows):
            tile = Image.fromarray(pixels[row]).resize((width, height), method)
            corner = (left + (column - width) // 2, head + row * (row_height + gap) + (row_height - height) // 2)
            sheet.paste(tile, corner)
            draw.rectangle((corner[0] - 1, corner[1] - 1, corner[0] + width, corner[1] + height), outline=GRID)  # white crops on white
        left += column + gap
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _shown(pixels: np.ndarray) -> np.ndarray:
    """(B, h, w, 3) uint8."""
    if pixels.shape[3] != 3:
        pixels = pixels[:, :, :, :1].repeat(3, axis=3)
    return pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)


def _titles(is_global: list[bool]) -> list[str]:
    return [f"{'global' if large else 'local'} {is_global[: place + 1].count(large)}" for place, large in enumerate(is_global)]


@dataclass(frozen=True)
class Panel:
    """One figure of lines over optimizer steps.

    title, caption  for the page around it
    unit            label of the vertical axis
    lines           legend label -> metric: its key in the log records, or the last part of it ("learning_rate")
    from_zero       whether the vertical axis begins at 0
    levels          label -> value of dashed lines to compare with
    """

    title: str
    caption: str
    unit: str
    lines: dict[str, str]
    from_zero: bool = False
    levels: dict[str, float] = field(default_factory=dict)


def curves_svg(panel: Panel, records: Sequence[dict]) -> bytes | None:
    """The panel as SVG, or None if none of its metrics is in two records.

    records  the lines of log.jsonl: "step", and metrics by name; a record need not hold every metric
    """
    curves = {label: _points(records, metric) for label, metric in panel.lines.items()}
    curves = {label: points for label, points in curves.items() if len(points[0]) > 1}
    if not curves:
        return None

    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for color, (label, (steps, values)) in zip(COLORS, curves.items(), strict=False):
        if _is_noisy(values):
            axes.plot(steps, values, color=color, alpha=0.35, linewidth=0.8)
            values = _running_mean(values, len(values) // 25)
        axes.plot(steps, values, color=color, linewidth=1.8, marker="o" if len(steps) <= 25 else None, markersize=3.5, label=label)
    for place, (label, level) in enumerate(panel.levels.items()):
        axes.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(  # side by side, so that names of nearly equal levels do not cover each other
            f"{label} {level:.1f}",
            xy=(1 - 0.33 * (place % 3), level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8.5,
            color=MUTED,
        )

    quiet(axes)
    axes.set_xlabel("optimizer step", color=MUTED, size=9.5)
    axes.set_ylabel(panel.unit, color=MUTED, size=9.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(y=0.12)
    axes.set_xlim(0, max(record["step"] for record in records) * 1.02)  # the same for every panel of a run
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if len(curves) > 1:
        figure.legend(loc="outside upper left", ncols=len(curves), frameon=False, fontsize=9.5, labelcolor=INK)
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": panel.title}):  # the same records give the same file
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def quiet(axes: Axes) -> None:
    """No frame, and lines and numbers that stay behind the data."""
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0)


def _points(records: Sequence[dict], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that hold `metric`; null (a value that was not finite) is a gap in the line."""
    steps, values = [], []
    for record in records:
        key = next((key for key in record if key == metric or key.endswith("/" + metric)), None)
        if key is not None:
            steps.append(record["step"])
            values.append(np.nan if record[key] is None else record[key])
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def _is_noisy(values: np.ndarray) -> bool:
    """Many points that go up and down: a schedule is smooth, and a short run has too few points to average."""
    turns = np.diff(values)
    return len(values) >= SMOOTH_FROM and bool((turns[1:] * turns[:-1] < 0).mean() > 0.25)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over about `width` points, of fewer at the ends; NaN where a value in reach is."""
    ones = np.ones(width | 1)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")
