"""A backbone with its heads, applied to crops of several sizes: the student, and what the teacher is a copy of.

Letters as in records.py: B images, N regions, D backbone width, E embedding width, K prototypes.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esvit.backbones.base import Backbone
from esvit.heads import ProjectionHead, Prototypes
from esvit.records import Features, NetworkOutput, PrototypeWeights


class MultiCropNetwork(nn.Module):
    """Backbone, view head and prototypes, and the same once more for regions where the loss asks for them."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        view_head: ProjectionHead,
        view_prototypes: Prototypes,
        region_head: ProjectionHead | None,
        region_prototypes: Prototypes | None,
    ):
        super().__init__()
        self.backbone = backbone
        self.view_head = view_head
        self.view_prototypes = view_prototypes
        self.region_head = region_head
        self.region_prototypes = region_prototypes

    def passes(self, crops: list[Tensor], *, parts: int) -> list[slice]:
        """Groups of crops that may pass the network one after the other with the same result: `parts` of the adjacent ones of one size.

        Batch norm sees the same crops together as in the paper's code: in the backbone all of one size, in the heads all there are.
        """
        if any(_has_batch_norm(head) for head in (self.view_head, self.region_head)):
            return [slice(0, len(crops))]
        groups = _of_equal_size(crops)
        return groups if _has_batch_norm(self.backbone) else [part for group in groups for part in _in_parts(group, parts)]

    def forward(self, crops: list[Tensor]) -> list[NetworkOutput]:
        """One output per crop (B, C, H_v, W_v). Adjacent crops of one size pass the backbone together, and all crops each head."""
        features = [part for group in _of_equal_size(crops) for part in _encode_group(self.backbone, crops[group])]
        views = self.view_head(torch.cat([each.pooled for each in features])).chunk(len(crops))
        regions = self._embed_regions(features)
        return [
            NetworkOutput(
                view=view,
                region=region,
                features=None if region is None else each.regions.detach(),
                pooled=each.pooled.detach(),
            )
            for view, region, each in zip(views, regions, features, strict=True)
        ]

    def prototypes(self) -> PrototypeWeights:
        """The weight-normed prototype matrices, to be made once a step."""
        return PrototypeWeights(
            view=self.view_prototypes(),
            region=None if self.region_prototypes is None else self.region_prototypes(),
        )

    def _embed_regions(self, features: list[Features]) -> list[Tensor | None]:
        if self.region_head is None:
            return [None] * len(features)
        rows = torch.cat([each.regions.flatten(0, 1) for each in features])
        counts = [each.regions.shape[0] * each.regions.shape[1] for each in features]
        parts = self.region_head(rows).split(counts)
        return [part.unflatten(0, each.regions.shape[:2]) for part, each in zip(parts, features, strict=True)]


def _has_batch_norm(module: nn.Module | None) -> bool:
    return module is not None and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Shape of the projection heads and prototypes; view and region heads are alike and share no weights.

    hidden_dim       width of the hidden layers
    bottleneck_dim   E, width of the embedding
    layers           linear layers of the projection head
    batch_norm       batch norm before every GELU
    prototypes       K
    norm_last_layer  keep every prototype at unit norm
    """

    hidden_dim: int
    bottleneck_dim: int
    layers: int
    batch_norm: bool
    prototypes: int
    norm_last_layer: bool

    def attach(self, backbone: Backbone, *, regions: bool) -> MultiCropNetwork:
        """The network of `backbone` with fresh heads, with a region head if `regions`."""
        return MultiCropNetwork(
            backbone=backbone,
            view_head=self._head(backbone.dim),
            view_prototypes=self._prototypes(),
            region_head=self._head(backbone.dim) if regions else None,
            region_prototypes=self._prototypes() if regions else None,
        )

    def _head(self, dim: int) -> ProjectionHead:
        return ProjectionHead(
            dim=dim, hidden_dim=self.hidden_dim, bottleneck_dim=self.bottleneck_dim, layers=self.layers, batch_norm=self.batch_norm
        )

    def _prototypes(self) -> Prototypes:
        return Prototypes(count=self.prototypes, bottleneck_dim=self.bottleneck_dim, norm_last_layer=self.norm_last_layer)


def _of_equal_size(crops: list[Tensor]) -> list[slice]:
    begins = [number for number, crop in enumerate(crops) if number == 0 or crop.shape != crops[number - 1].shape]
    return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(crops)], strict=True)]


def _in_parts(group: slice, parts: int) -> list[slice]:
    """As equal as they can be, and none empty."""
    count = group.stop - group.start
    ends = [group.start + count * part // parts for part in range(parts + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(ends) if begin < end]


def _encode_group(backbone: Backbone, group: list[Tensor]) -> list[Features]:
    together: Features = backbone(torch.cat(group))
    return [
        Features(pooled=pooled, regions=regions, grid=together.grid)
        for pooled, regions in zip(together.pooled.chunk(len(group)), together.regions.chunk(len(group)), strict=True)
    ]
