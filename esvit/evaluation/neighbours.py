"""The images that a network takes to be most alike: nearest neighbours by the cosine of their pooled features.

Letters: n images of a set, m of them queries, k neighbours, D feature width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Neighbours:
    """rows        (m, k) int64, the nearest images of each query, the most similar first; a query is no neighbour of itself
    similarity  (m, k) float32, their cosines
    """

    rows: Tensor
    similarity: Tensor


def nearest(features: Tensor, queries: Tensor, count: int) -> Neighbours:
    """Among the features (n, D) of a set, for its rows `queries` (m,) int64; `count` (k) is at most n - 1."""
    alike = F.normalize(features[queries].float(), dim=1) @ F.normalize(features.float(), dim=1).T
    alike[torch.arange(len(queries)), queries] = -torch.inf
    similarity, rows = alike.topk(count, dim=1)
    return Neighbours(rows=rows, similarity=similarity)


def same_class_percent(neighbours: Neighbours, queries: Tensor, labels: Tensor) -> float:
    """Percent of the neighbours that have their query's class, by the labels (n,) of the set."""
    same = labels[neighbours.rows] == labels[queries][:, None]
    return 100 * float(same.double().mean())
