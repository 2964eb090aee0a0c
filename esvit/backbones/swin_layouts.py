"""Swin's weights under the names, in the order and at the scale of other libraries.

Unusual:
* Our LayerNorms divide by sqrt(variance + 1e-6), those of the libraries by sqrt(variance + 1e-5). Where a library can be told, it is.
  Hugging Face fixes it in two places. There every weight that writes into the residual stream is multiplied by s = sqrt(10): each norm
  then sees s^2 times the variance, and (s x) / sqrt(s^2 variance + 1e-5) = x / sqrt(variance + 1e-6). What leaves the last norm is the
  same; weights and earlier hidden states are not.
* timm rolls a map before it pads it, we pad before we roll: the same only where no shifted map is padded, as at the nominal size.
"""

import re
from math import sqrt
from typing import Any, cast

from torch import Tensor

from esvit.backbones.layouts import Layout
from esvit.backbones.swin import Swin, SwinBlock
from esvit.errors import OptionError

OUR_EPS = 1e-6
THEIR_EPS = 1e-5
STREAM_SCALE = sqrt(THEIR_EPS / OUR_EPS)
# Into the residual stream write these; the patch projection, because it has a norm of its own between it and the stream
_INTO_STREAM = re.compile(r"^patch_embed\.|\.attn\.proj\.|\.mlp\.fc2\.|\.downsample\.reduction\.")

TIMM_MODELS: dict[str, dict[str, Any]] = {
    name: {
        "img_size": 224,
        "patch_size": 4,
        "in_chans": 3,
        "embed_dim": dim,
        "depths": depths,
        "num_heads": heads,
        "window_size": 7,
        "mlp_ratio": 4.0,
    }
    for name, dim, depths, heads in (
        ("swin_tiny_patch4_window7_224", 96, [2, 2, 6, 2], [3, 6, 12, 24]),
        ("swin_small_patch4_window7_224", 96, [2, 2, 18, 2], [3, 6, 12, 24]),
        ("swin_base_patch4_window7_224", 128, [2, 2, 18, 2], [4, 8, 16, 32]),
        ("swin_large_patch4_window7_224", 192, [2, 2, 18, 2], [6, 12, 24, 48]),
    )
}


def to_timm(backbone: Swin, image_size: int) -> Layout:
    """timm's SwinTransformer: a merging belongs to the stage that it leads to."""
    shape = _shape(backbone, image_size)
    _check_windows(backbone, shape, library="timm", may_shrink=True)
    model = min(TIMM_MODELS, key=lambda name: len(_other_than(TIMM_MODELS[name], shape)))

    def rename(name: str) -> str:
        return re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", name)

    return Layout(
        weights={rename(name): weight for name, weight in backbone.state_dict().items()},
        names={name: [rename(name)] for name in backbone.state_dict()},
        config={"model": model, "norm_eps": OUR_EPS, "arguments": _other_than(TIMM_MODELS[model], shape)},
        note="Images must have this size, or build it with strict_img_size=False. Without norm_layer, timm's LayerNorms add 1e-5 to the "
        "variance instead of 1e-6.",
    )


def to_huggingface(backbone: Swin, image_size: int) -> Layout:
    """transformers' SwinModel, as its files are named (query, key and value apart); its own eps, see the top of this file."""
    shape = _shape(backbone, image_size)
    _check_windows(backbone, shape, library="Hugging Face", may_shrink=False)
    weights: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for name, weight in backbone.state_dict().items():
        scaled = weight * STREAM_SCALE if _INTO_STREAM.search(name) else weight
        if ".attn.qkv." in name:
            stem, kind = _renamed(name, _HUGGINGFACE).split(".attn.qkv.")
            names[name] = [f"{stem}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
            weights |= dict(zip(names[name], scaled.chunk(3), strict=True))
        else:
            names[name] = [_renamed(name, _HUGGINGFACE)]
            weights[names[name][0]] = scaled
    config = {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "image_size": image_size,
        "patch_size": shape["patch_size"],
        "num_channels": shape["in_chans"],
        "embed_dim": shape["embed_dim"],
        "hidden_size": backbone.dim,
        "depths": shape["depths"],
        "num_heads": shape["num_heads"],
        "window_size": shape["window_size"],
        "mlp_ratio": shape["mlp_ratio"],
        "qkv_bias": True,
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "layer_norm_eps": THEIR_EPS,
    }
    note = (
        "Weights that write into the residual stream are multiplied by sqrt(10), because SwinModel's LayerNorms add 1e-5 to the variance "
        "where ours add 1e-6; last_hidden_state and pooler_output stay the same, earlier hidden states are sqrt(10) times ours."
    )
    return Layout(weights=weights, names=names, config=config, note=note)


def to_mmdet(backbone: Swin, image_size: int) -> Layout:
    """mmdet's SwinTransformer: its merging unfolds 2 x 2 tokens channel by channel, with columns before rows."""
    last = len(backbone.layers) - 1
    weights: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for name, weight in backbone.state_dict().items():
        names[name] = [_renamed(name, _MMDET).replace("norm.", f"norm{last}.") if name.startswith("norm.") else _renamed(name, _MMDET)]
        weights[names[name][0]] = _unfold_order(weight) if ".downsample." in name else weight
    note = (
        "For SwinTransformer(init_cfg=dict(type='Pretrained', checkpoint=...), norm_cfg=dict(type='LN', eps=1e-6)). Only the last stage "
        f"has an output norm, norm{last}; those of other out_indices start fresh. Not loaded into mmdet here."
    )
    return Layout(weights=weights, names=names, config={}, note=note)


def to_detectron2(backbone: Swin, image_size: int) -> Layout:
    """The Swin of detectron2 and of the official detection code: our names but for the output norm."""
    last = len(backbone.layers) - 1

    def rename(name: str) -> str:
        return f"norm{last}.{name.removeprefix('norm.')}" if name.startswith("norm.") else name

    note = (
        "For SwinTransformer with norm_layer=partial(nn.LayerNorm, eps=1e-6). Only the last stage has an output norm, "
        f"norm{last}; those of other out_features start fresh. Not loaded into detectron2 here."
    )
    weights = {rename(name): weight for name, weight in backbone.state_dict().items()}
    return Layout(weights=weights, names={name: [rename(name)] for name in backbone.state_dict()}, config={}, note=note)


_HUGGINGFACE = {
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^patch_embed\.norm\.": "embeddings.norm.",
    r"^layers\.": "encoder.layers.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.attn\.relative_position_bias_table": ".attention.self.relative_position_bias_table",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
    r"^norm\.": "layernorm.",
}
_MMDET = {
    r"^patch_embed\.proj\.": "patch_embed.projection.",
    r"^layers\.": "stages.",
    r"\.attn\.": ".attn.w_msa.",
    r"\.mlp\.fc1\.": ".ffn.layers.0.0.",
    r"\.mlp\.fc2\.": ".ffn.layers.1.",
}


def _renamed(name: str, changes: dict[str, str]) -> str:
    for pattern, replacement in changes.items():
        name = re.sub(pattern, replacement, name)
    return name


def _unfold_order(weight: Tensor) -> Tensor:
    """(..., 4 d), tokens (0,0) (1,0) (0,1) (1,1) of d channels each -> d channels of tokens (0,0) (0,1) (1,0) (1,1) each."""
    tokens = weight.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return tokens.transpose(-1, -2).flatten(-2)


def _shape(backbone: Swin, image_size: int) -> dict[str, Any]:
    """The sizes of the network, under timm's names."""
    projection = backbone.patch_embed.proj
    stages = _stages(backbone)
    return {
        "img_size": image_size,
        "patch_size": projection.kernel_size[0],
        "in_chans": projection.in_channels,
        "embed_dim": projection.out_channels,
        "depths": [len(blocks) for blocks in stages],
        "num_heads": [blocks[0].attn.heads for blocks in stages],
        "window_size": max(blocks[0].window for blocks in stages),
        "mlp_ratio": stages[0][0].mlp.fc1.out_features / projection.out_channels,
    }


def _stages(backbone: Swin) -> list[list[SwinBlock]]:
    return cast(list[list[SwinBlock]], backbone.attention_blocks())


def _other_than(standard: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in shape.items() if standard[key] != value}


def _check_windows(backbone: Swin, shape: dict[str, Any], *, library: str, may_shrink: bool) -> None:
    """Raise OptionError unless the library would choose the windows and shifts that the backbone has."""
    window = shape["window_size"]
    for stage, blocks in enumerate(_stages(backbone)):
        side = -(-(shape["img_size"] // shape["patch_size"]) // 2**stage)
        if side < window and not may_shrink:
            found = f"{library}'s Swin cannot have windows of {window} where the map of stage {stage + 1} is {side} tokens wide"
            raise OptionError("task.format", found, "use task.format=timm, which can")
        theirs = (min(window, side), window // 2 if side > window else 0)
        ours = (blocks[-1].window, blocks[1].shift if len(blocks) > 1 else theirs[1])  # every second block is shifted
        if theirs != ours:
            found = (
                f"at {shape['img_size']} pixels {library} would use windows of {theirs[0]} shifted by {theirs[1]} in stage {stage + 1}, "
                f"the backbone has {ours[0]} shifted by {ours[1]}"
            )
            raise OptionError("task.image_size", found, "give the size that the backbone was made for, backbone.image_size")
