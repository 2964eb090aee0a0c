"""The two halves of a DINO head, kept apart so that losses can work on embeddings instead of K-wide logits.

`ProjectionHead` ends at the unit bottleneck embedding, `Prototypes` is the matrix of the last linear layer. The original
keeps both in one module `head` (main_esvit.py, DINOHead): its `mlp.*` are the projection head's, its `last_layer.weight_g`
and `last_layer.weight_v` are the prototypes'.

Letters: B images, N regions, D backbone width, E embedding (bottleneck) width, K prototypes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esvit.errors import OptionError


class ProjectionHead(nn.Module):
    """Backbone features to unit embeddings: (B, D) -> (B, E) or (B, N, D) -> (B, N, E), by Linear layers with GELU between.

    With one layer `mlp` is a single Linear, without batch norm. Batch norm sees every row of the input (all images, crops and
    regions handed over in one call) as one batch. The result is float32 under autocast too: it is what the loss works on.

    Raises OptionError if `layers` is below 1.
    """

    def __init__(self, *, dim: int, hidden_dim: int, bottleneck_dim: int, layers: int, batch_norm: bool):
        super().__init__()
        if layers < 1:
            raise OptionError("head.layers", f"{layers} layers", "use 1 or more (the paper's head has 3)")
        self.mlp = _mlp(dim, hidden_dim, bottleneck_dim, layers, batch_norm)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        rows = features.flatten(0, -2)
        embeddings = self.mlp(rows)
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return F.normalize(embeddings, dim=-1).unflatten(0, features.shape[:-1])


class Prototypes(nn.Module):
    """K weight-normed prototypes: forward() -> (K, E) float32, row k is weight_g[k] * weight_v[k] / |weight_v[k]|.

    weight_v (K, E), weight_g (K, 1); `norm_last_layer` freezes weight_g at 1. `is_last_layer` tells the optimizer which
    parameters stay frozen in the first epochs.
    """

    is_last_layer = True

    def __init__(self, *, count: int, bottleneck_dim: int, norm_last_layer: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(count, bottleneck_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # what nn.Linear does, as in the original

    def forward(self) -> Tensor:
        with torch.autocast(self.weight_v.device.type, enabled=False):
            return self.weight_v * (self.weight_g / torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True))


def _mlp(dim: int, hidden_dim: int, bottleneck_dim: int, layers: int, batch_norm: bool) -> nn.Module:
    if layers == 1:
        return nn.Linear(dim, bottleneck_dim)
    modules: list[nn.Module] = []
    for width in [dim] + [hidden_dim] * (layers - 2):
        modules.append(nn.Linear(width, hidden_dim))
        if batch_norm:
            modules.append(nn.BatchNorm1d(hidden_dim))
        modules.append(nn.GELU())
    return nn.Sequential(*modules, nn.Linear(hidden_dim, bottleneck_dim))
