"""Pooled features of a whole image set, one row per image in dataset order, whatever rank computed them.

Letters: B images of a batch, N images of the set, D backbone width.
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
    count: int,
) -> Tensor:
    """(N, D) float32 on the CPU, on every rank; row i is image i of the set.

    backbone   in whatever mode: runs in eval mode, and every submodule is back in its own mode afterwards
    batches    this rank's share: uint8 crops (B, C, h, w) and the images' places in the set (B,) int64; shares may differ in length
               and overlap (an image computed twice counts once)
    normalize  makes float crops of uint8 crops, on the device
    count      N

    Precision is the caller's autocast. Raises ValueError if a place is outside 0 .. N - 1 or was computed by no rank.
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
    return in_dataset_order(gather_rows(features).cpu(), gather_rows(indices).cpu(), count)


def in_dataset_order(rows: Tensor, places: Tensor, count: int) -> Tensor:
    """(N, D) whose row places[i] is rows[i]; ValueError if a place is outside 0 .. count - 1, or missing.

    rows    (n, D), n >= N
    places  (n,) int64, each of 0 .. N - 1 at least once
    """
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < count:
        raise ValueError(f"places from {int(places.min())} to {int(places.max())} in a set of {count} images")
    seen = torch.zeros(count, dtype=torch.bool)
    seen[places] = True
    if not seen.all():
        raise ValueError(f"{int((~seen).sum())} of {count} images were computed by no rank, the first is {int((~seen).int().argmax())}")
    ordered = rows.new_empty(count, rows.shape[1])
    ordered[places] = rows
    return ordered


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
