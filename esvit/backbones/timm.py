"""Any network of timm by its name, seen through timm's own interfaces: forward_intermediates, forward_head, feature_info.

Letters: B images, N cells of the last map, P prefix tokens (class, distillation, register), T = P + N, D width of the features.

Unusual:
* pooled features are timm's own (`forward_head` before the classifier), and a region is what they would be if the image were that
  one cell: it passes the same norm and the same hidden layers. Where timm only averages, regions are the cells of the last map;
* `last_blocks` counts what timm calls intermediate features: every block of a plain transformer, every stage of other networks;
* timm does not tell what enters a stage, so `encode` gives the tokens that leave each, and nothing else;
* attention is what timm's attention layers computed, caught before its dropout, where each looks at the whole image.
"""

import contextlib
import difflib
import re
from collections.abc import Iterator
from typing import Any, cast

import timm
import torch
from timm.layers import DropPath as TimmDropPath
from timm.models import group_parameters
from torch import Tensor, nn

from esvit.backbones.base import AttentionWindows, Backbone, BlockAttention, NoAttention, Stage
from esvit.errors import OptionError
from esvit.records import Features

# How networks of fixed image size are asked to take others, the most capable first; not every network knows each word.
ANY_SIZE: list[dict[str, Any]] = [
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
]


class Timm(Backbone):
    """A network of timm without its classifier.

    name            as in timm.list_models(), with or without the tag of its weights: "convnextv2_tiny", "vit_small_patch14_dinov2.lvd142m"
    pretrained      start from timm's published weights, downloaded where they are not cached; otherwise from random ones
    in_channels     channels of the images
    image_size      nominal image side in pixels, for networks whose position embeddings or windows depend on it; None is timm's own
    drop_path_rate  stochastic depth as timm spreads it over the blocks

    Raises OptionError for an unknown name (with near ones), for options that the network lacks, and, from `forward`, for images of
    a size that the network cannot take.
    """

    model: Any

    def __init__(self, *, name: str, pretrained: bool, in_channels: int, image_size: int | None, drop_path_rate: float):
        super().__init__()
        _check(name, pretrained, drop_path_rate)
        self.name = name
        self.model = _create(name, pretrained, in_channels, image_size, drop_path_rate)
        self.nominal_side = image_size or self.model.pretrained_cfg["input_size"][-1]
        self.dim = self.model.head_hidden_size
        self.block_dims = [stage["num_chs"] for stage in self.model.feature_info]
        self.norm = nn.Identity()  # timm applies its own

    def encode(self, images: Tensor, *, last_only: bool = False) -> list[Stage]:
        final, maps = self._intermediates(images, indices=1 if last_only else None)
        if last_only:
            tokens, grid = self._tokens(final, maps[-1])
            return [Stage([tokens], grid)]
        return [Stage([stage.flatten(2).transpose(1, 2)], (stage.shape[2], stage.shape[3])) for stage in maps]

    def forward(self, images: Tensor) -> Features:
        final, maps = self._intermediates(images, indices=1)
        tokens, grid = self._tokens(final, maps[-1])
        pooled = self.model.forward_head(final, pre_logits=True)
        cells = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]
        return Features(pooled=pooled, regions=self._regions(cells, final), grid=grid)

    def last_blocks_and_regions(self, images: Tensor, count: int) -> tuple[list[Tensor], Tensor]:
        if not 1 <= count <= len(self.block_dims):
            raise ValueError(f"features of the last {count} blocks were asked for; give a number from 1 to {len(self.block_dims)}")
        with_class_token = self._pools_class_token()
        options: dict[str, Any] = {"return_prefix_tokens": True} if with_class_token else {}
        final, stages = self._intermediates(images, indices=count, norm=True, **options)
        tokens, grid = self._tokens(final, stages[-1][0] if with_class_token else stages[-1])
        cells = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]
        blocks = [stage[1][:, 0] if with_class_token else stage.mean(dim=(2, 3)) for stage in stages]
        return blocks, self._regions(cells, final).mean(dim=1)

    def parameters_by_depth(self) -> list[list[str]]:
        """By timm's own grouping, which has the final norm with the last block; one entry for all of a network that timm does not group."""
        if not hasattr(self.model, "group_matcher"):
            return super().parameters_by_depth()
        layers = group_parameters(self.model, self.model.group_matcher(coarse=False))
        return [[f"model.{name}" for name in layers[depth]] for depth in sorted(layers)] + [[]]

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From timm, without the classifier."""
        classifiers = self.model.pretrained_cfg.get("classifier") or ()
        prefixes = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
        theirs = {name: value for name, value in state.items() if not name.startswith("model.")}
        ours = {name: value for name, value in state.items() if name.startswith("model.")}
        return ours | {f"model.{name}": value for name, value in theirs.items() if not name.startswith(prefixes)}

    def repeated_parts(self) -> list[nn.Module]:
        """What timm calls `blocks`, of the whole network or of each of its stages."""
        return [
            part
            for module in self.model.modules()
            if isinstance(blocks := getattr(module, "blocks", None), nn.Module)
            for part in blocks.children()
        ]

    def disable_drop_path(self) -> None:
        super().disable_drop_path()
        for module in self.modules():
            if isinstance(module, TimmDropPath):
                module.drop_prob = 0.0

    def _pools_class_token(self) -> bool:
        return getattr(self.model, "global_pool", None) == "token" and getattr(self.model, "num_prefix_tokens", 0) > 0

    def _intermediates(self, images: Tensor, *, indices: int | None, norm: bool = False, **options) -> tuple[Tensor, list]:
        """What timm's head pools, and maps (B, d, rows, columns) of the intermediate features: the last `indices`, or all."""
        try:
            final, maps = self.model.forward_intermediates(images, indices=indices, norm=norm, output_fmt="NCHW", **options)
        except (AssertionError, RuntimeError) as error:
            if norm and "norm" in str(error):  # how timm says that a network has no norm for its intermediate features
                return self._intermediates(images, indices=indices, **options)
            if self._is_about_size(error, images):
                raise self._wrong_size(error, images) from error
            raise
        if not isinstance(final, Tensor):
            raise OptionError("backbone.name", f"{self.name} ends in several maps", "choose a network that ends in one")
        return final, maps

    def _is_about_size(self, error: Exception, images: Tensor) -> bool:
        """timm asserts nothing else in a forward. Any failure is about the size where timm calls its size fixed and this is another."""
        if isinstance(error, AssertionError):
            return True
        is_nominal = tuple(images.shape[2:]) == (self.nominal_side, self.nominal_side)
        return self.model.pretrained_cfg["fixed_input_size"] and not is_nominal and not isinstance(error, torch.OutOfMemoryError)

    def _wrong_size(self, error: Exception, images: Tensor) -> OptionError:
        reason = f" ({str(error).splitlines()[0].rstrip('.')})" if str(error) else ""
        found = f"{self.name} cannot take images of {images.shape[2]} x {images.shape[3]} pixels{reason}"
        return OptionError("backbone.name", found, f"use images of {self.nominal_side} x {self.nominal_side} pixels, or another network")

    def _tokens(self, final: Tensor, last_map: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """timm's final features in any of its layouts -> (B, T, d), prefix tokens first, and the grid of its cells."""
        if final.dim() == 3:
            return final, (last_map.shape[2], last_map.shape[3])
        channels_first = final.shape[1] == self.model.num_features
        final = final if channels_first else final.permute(0, 3, 1, 2)
        return final.flatten(2).transpose(1, 2), (final.shape[2], final.shape[3])

    def _regions(self, cells: Tensor, final: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, D): each cell pooled as if it were the whole image, in the layout of `final`."""
        alone = cells.flatten(0, 1).unsqueeze(1)  # (B * N, 1, d)
        if final.dim() == 3:
            prefix_tokens = final.shape[1] - cells.shape[1]
            alone = alone.expand(-1, 1 + prefix_tokens, -1)  # whichever token timm's head takes, it is this cell
        elif final.shape[1] == self.model.num_features:
            alone = alone.transpose(1, 2).unsqueeze(3)
        else:
            alone = alone.unsqueeze(1)
        return self.model.forward_head(alone, pre_logits=True).unflatten(0, cells.shape[:2])

    def looks(self, images: Tensor) -> Iterator[BlockAttention]:
        layers = [module for module in self.model.modules() if hasattr(module, "fused_attn") and hasattr(module, "attn_drop")]
        with _softmax_weights(layers) as weights:
            final, maps = self._intermediates(images, indices=1)
        tokens, grid = self._tokens(final, maps[-1])
        slots, cells = tokens.shape[1], grid[0] * grid[1]
        if not weights or any(len(block) != len(images) or block.shape[2:] != (slots, slots) for block in weights):
            found = f"{self.name} has no blocks of attention over the whole image, in timm's usual form"
            raise NoAttention("backbone", found, "choose a plain vision transformer, or a transformer of ours, such as backbone=swin_tiny")
        places = torch.arange(cells - slots, cells, device=images.device).clamp(min=-1).unsqueeze(0)
        class_tokens = slots - cells if self._pools_class_token() else 0
        for block in weights:
            yield BlockAttention(AttentionWindows(block.unsqueeze(1), places), grid, class_tokens)


@contextlib.contextmanager
def _softmax_weights(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The attention weights (B, heads, T, T) of each call of `layers`, which for the while compute them explicitly."""
    weights: list[Tensor] = []
    with contextlib.ExitStack() as undo:
        for layer in layers:
            undo.callback(setattr, layer, "fused_attn", layer.fused_attn)
            layer.fused_attn = cast(Any, False)
            dropout = cast(nn.Module, layer.attn_drop)
            handle = dropout.register_forward_pre_hook(lambda _, entering: weights.append(entering[0]))
            undo.callback(handle.remove)
        yield weights


def _create(name: str, pretrained: bool, in_channels: int, image_size: int | None, drop_path_rate: float) -> Any:
    options: dict[str, Any] = {"pretrained": pretrained, "in_chans": in_channels, "num_classes": 0}
    if image_size is not None:
        options["img_size"] = image_size
    if drop_path_rate > 0:
        options["drop_path_rate"] = drop_path_rate
    try:
        model = _create_for_any_size(name, options)
    except TypeError as error:
        if _unknown_keyword(error) == "img_size":
            raise OptionError("backbone.image_size", f"{name} has no nominal size", "leave this option out") from error
        if _unknown_keyword(error) == "drop_path_rate":
            raise _no_drop_path(name) from error
        raise
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise _no_weights(f"those of {name} cannot be had ({str(error).splitlines()[0].rstrip('.')})") from error
    drops = [module.drop_prob for module in model.modules() if isinstance(module, TimmDropPath)]
    if drop_path_rate > 0 and not any(drops):
        raise _no_drop_path(name)
    if not hasattr(model, "forward_intermediates"):
        raise OptionError("backbone.name", f"{name} does not offer its intermediate features", "choose another network")
    return model


def _create_for_any_size(name: str, options: dict[str, Any]) -> Any:
    for any_size in ANY_SIZE:
        try:
            return timm.create_model(name, **options, **any_size)
        except TypeError as error:
            if _unknown_keyword(error) not in any_size:
                raise
    raise AssertionError("the last of ANY_SIZE asks for nothing")


def _unknown_keyword(error: TypeError) -> str | None:
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return found.group(1) if found else None


def _no_drop_path(name: str) -> OptionError:
    return OptionError("backbone.drop_path_rate", f"{name} has no stochastic depth", "give 0")


def _no_weights(found: str) -> OptionError:
    return OptionError("backbone.pretrained", found, "choose another network, or false for random weights")


def _check(name: str, pretrained: bool, drop_path_rate: float) -> None:
    architecture, _, tag = name.partition(".")
    known = timm.list_pretrained(f"{architecture}.*") if tag and timm.is_model(architecture) else timm.list_models()
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3))
        raise OptionError("backbone.name", f"timm has no '{name}'", f"did you mean {near}?" if near else "choose from timm.list_models()")
    published = timm.get_pretrained_cfg(name)
    if pretrained and (published is None or not published.has_weights):
        raise _no_weights(f"timm has none for {name}")
    if not 0 <= drop_path_rate < 1:
        raise OptionError("backbone.drop_path_rate", f"{drop_path_rate}", "choose a probability from 0 to below 1")
