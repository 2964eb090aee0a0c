"""Which architecture and size a file holds, read from the shapes of its entries, so that an error can say more than which ones differ.

The answer is in the options that build the same shapes. Missing are in_channels and mlp_ratio, which the names of the entries that
differ tell, and what leaves no trace: heads and windows without tables of positions, a shift.

Unusual: a family is told by trying to read its entries. A missing one, or one with other axes, means that it is another family.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from math import isqrt, prod

from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Options = dict[str, int | bool | list[int] | list[bool]]


def recognise(state: dict[str, Tensor]) -> str | None:
    """ "a Swin with dim=96 depths=[2,2,6,2] ..." for a backbone's entries under our names, the original's, timm's or torchvision's
    (without prefixes); None for what is none of our architectures."""
    shapes = {name: tuple(value.shape) if isinstance(value, Tensor) else () for name, value in state.items()}
    for family, read in FAMILIES.items():
        try:
            options = read(shapes)
        except (LookupError, ValueError):
            continue
        return f"a {family} with {' '.join(f'{name}={_typed(value)}' for name, value in options.items())}"
    return None


def _swin(shapes: Shapes) -> Options:
    tables = _stages(shapes, r"(?:layers|features)\.(\d+)\.(?:blocks\.)?(\d+)\.attn\.relative_position_bias_table")
    dim, _, patch_size, _ = _first(shapes, "patch_embed.proj.weight", "features.0.0.weight")
    windows = [_side(stage[0]) for stage in tables]
    options: Options = {"dim": dim, "depths": _lengths(tables), "heads": [stage[0][1] for stage in tables], "window_size": max(windows)}
    options["patch_size"] = patch_size
    if min(windows) < max(windows):  # windows shrink to their maps, so they tell the (smallest) image
        image_size = max(window * patch_size * 2**stage for stage, window in enumerate(windows))
        if windows != [min(max(windows), image_size // patch_size // 2**stage) for stage in range(len(windows))]:
            raise LookupError("windows that no image size of ours gives")
        options["image_size"] = image_size
    return options


def _cvt(shapes: Shapes) -> Options:
    blocks = _stages(shapes, r"stage(\d+)\.1\.layers\.(\d+)\.0\.fn\.proj_out\.weight")
    residual_stem = "stage0.0.stem.0.weight" in shapes
    relative_position = "stage0.1.layers.0.0.fn.rel_pos_bias_table" in shapes
    options: Options = {"dims": [stage[0][0] for stage in blocks], "depths": _lengths(blocks)}
    if relative_position:
        tables = _stages(shapes, r"stage(\d+)\.1\.layers\.(\d+)\.0\.fn\.rel_pos_bias_table")
        options |= {"heads": [stage[0][1] for stage in tables], "window_sizes": [_side(stage[0]) for stage in tables]}
    return options | {"residual_stem": residual_stem, "relative_position": relative_position}


def _vil(shapes: Shapes) -> Options:
    blocks = _stages(shapes, r"layer(\d+)\.(\d+)\.attn\.proj\.weight")
    stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
    patches = [shapes[f"{stage}.0.proj.weight"] for stage in stages]  # each (dim, channels, side, side)
    patch_sizes = [side for _, _, side, _ in patches]
    sliding = [f"{stage}.1.attn.query.weight" in shapes for stage in stages]
    tables = [shapes.get(f"{stage}.1.attn.local_relative_position_bias_table") for stage in stages]
    positions = [shapes.get(f"{stage}.0.x_pos_embed") for stage in stages]
    options: Options = {"dims": [patch[0] for patch in patches], "depths": _lengths(blocks), "patch_sizes": patch_sizes, "sliding": sliding}
    options["global_tokens"] = [shapes.get(f"{stage}.0.cls_token", (1, 0))[1] for stage in stages]
    options["absolute_positions"] = [table is not None for table in positions]
    heads = [table[1] for table in tables if table is not None]
    if len(heads) == len(stages):
        options["heads"] = heads
    windows = {stage: _side(table, reach=2) for stage, table in enumerate(tables) if table is not None and sliding[stage]}
    if windows and len(windows) == sum(sliding):  # a stage that does not slide takes any window, so it gets a sliding one's
        options["window_sizes"] = [windows.get(stage, max(windows.values())) for stage in range(len(stages))]
    sides = {stage: _side(table) for stage, table in enumerate(tables) if table is not None and not sliding[stage]}
    sides |= {stage: table[1] for stage, table in enumerate(positions) if table is not None}
    if sides:  # of the nominal maps; the smallest image that has them
        options["image_size"] = max(side * prod(patch_sizes[: stage + 1]) for stage, side in sides.items())
    return options


def _vit(shapes: Shapes) -> Options:
    _first(shapes, "cls_token", "class_token")
    dim, _, patch_size, _ = _first(shapes, "patch_embed.proj.weight", "conv_proj.weight")
    _, tokens, _ = _first(shapes, "pos_embed", "encoder.pos_embedding")
    blocks = r"(?:blocks\.|encoder\.layers\.encoder_layer_)(\d+)\.(?:attn\.qkv\.|self_attention\.in_proj_)weight"
    depth = sum(re.fullmatch(blocks, name) is not None for name in shapes)
    if depth == 0:
        raise LookupError("no block")
    return {"dim": dim, "depth": depth, "patch_size": patch_size, "image_size": isqrt(tokens - 1) * patch_size}


def _resnet(shapes: Shapes) -> Options:
    blocks = _stages(shapes, r"layer(\d+)\.(\d+)\.conv3\.weight")  # of a bottleneck; basic blocks have two convolutions
    narrow = [shapes[f"layer{number}.0.conv2.weight"][:2] for number in range(1, len(blocks) + 1)]
    if "conv1.weight" not in shapes or narrow != [(64, 64), (128, 128), (256, 256), (512, 512)]:
        raise LookupError("another stem, wider blocks or groups")
    return {"depths": _lengths(blocks)}


FAMILIES: dict[str, Callable[[Shapes], Options]] = {"Swin": _swin, "CvT": _cvt, "ViL": _vil, "ViT": _vit, "ResNet": _resnet}


def _stages(shapes: Shapes, pattern: str) -> list[list[tuple[int, ...]]]:
    """Shapes of the entries that match, by stage and block, which are the pattern's two numbers. Raises LookupError if none matches."""
    found: defaultdict[int, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        if match := re.fullmatch(pattern, name):
            found[int(match[1])][int(match[2])] = shape
    if not found:
        raise LookupError(pattern)
    return [[blocks[block] for block in sorted(blocks)] for _, blocks in sorted(found.items())]


def _first(shapes: Shapes, *names: str) -> tuple[int, ...]:
    """The entry that has one of these names. Raises LookupError if there is none."""
    return shapes[next((name for name in names if name in shapes), names[0])]


def _side(table: tuple[int, ...], *, reach: int = 1) -> int:
    """w of a bias table ((2 r w - 1)^2, heads): offsets of cells less than r w apart, as in a window (r = 1) or to all neighbours (2)."""
    return (isqrt(table[0]) + 1) // (2 * reach)


def _lengths(stages: list[list[tuple[int, ...]]]) -> list[int]:
    return [len(blocks) for blocks in stages]


def _typed(value: object) -> str:
    """As an option is typed: [2,2,6,2], true."""
    return str(value).replace(" ", "").lower()
