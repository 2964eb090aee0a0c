"""Pooled features of a whole image set, one row per image in dataset order, whatever rank computed them.

Letters: B images of a batch, D backbone width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esvit.backbones.base import Backbone
from esvit.distributed import gather_rows


@torch.no_grad()
def extract_features(
    *,
    backbone: Backbone,
    batches: Iterable[tuple[Tensor, Tensor]],
    normalize: Callable[[Tensor], Tensor],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(n, D) float32 features and the n places that they belong to, in rising order, on the CPU, on every rank.

    backbone   in whatever mode: runs in eval mode, and every submodule is back in its own mode afterwards
    batches    this rank's share: uint8 crops (B, C, h, w) and the images' places in the set (B,) int64; shares may differ in length
               and overlap (an image computed twice counts once)
    normalize  makes float crops of uint8 crops, on the device

    Images that could not be read are in no batch, hence n may be less than the size of the set. Precision is the caller's autocast.
    """
    rows: list[Tensor] = []
    places: list[Tensor] = []
    with _eval_mode(backbone):
        for crops, indices in batches:
            rows.append(backbone(normalize(crops.to(device, non_blocking=True))).pooled.float())
            places.append(indices)
    # a rank whose share is empty still takes part in the gathering
    features = torch.cat(rows) if rows else torch.zeros(0, backbone.dim, device=device)
    indices = torch.cat(places).to(device) if places else torch.zeros(0, dtype=torch.int64, device=device)
    return in_dataset_order(gather_rows(features).cpu(), gather_rows(indices).cpu())


def in_dataset_order(rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (n, D) sorted by their places (n,), each place once."""
    sorted_places, order = places.sort(stable=True)
    first = torch.ones_like(sorted_places, dtype=torch.bool)
    first[1:] = sorted_places[1:] != sorted_places[:-1]
    return rows[order[first]], sorted_places[first]


@contextmanager
def _eval_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule has the flag that it had (a teacher may mix modes), which `train(True)` would not do."""
    flags = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
