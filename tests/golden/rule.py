"""The rule that regenerates weights and inputs of the golden cases from names, shapes and the seed of the cases (numpy only)."""

import zlib

import numpy as np


def noise(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normal float64 values that belong to `name`."""
    mixed = (zlib.crc32(name.encode("utf-8")) ^ seed) & 0xFFFFFFFF
    return np.random.Generator(np.random.PCG64(mixed)).standard_normal(shape)


def untied(name: str) -> str:
    """ViL shares its global projections with the local ones: both names stand for one tensor."""
    for part in ("query", "kv", "proj"):
        name = name.replace(f".{part}_global.", f".{part}.")
    return name


def weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 value of the floating-point state-dict entry `name` of the original's layout (no `module.` prefix)."""
    z = noise(untied(name), shape, seed)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        value = 1 + np.abs(0.1 * z)
    elif leaf == "running_mean":
        value = 0.1 * z
    elif leaf == "weight_g":
        value = 1 + 0.1 * z
    elif "bias_table" in leaf or "relative_position_bias" in leaf or leaf.endswith("pos_embed") or leaf == "cls_token":
        value = 0.5 * z
    elif leaf == "bias":
        value = 0.1 * z
    elif len(shape) <= 1:
        value = 1 + 0.1 * z
    else:
        value = z / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32)


def tensor_input(tag: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 standard normal input named by a tag, e.g. ("img224", (2, 3, 224, 224))."""
    return noise(f"input:{tag}", shape, seed).astype(np.float32)
