# SPDX-License-Identifier: Apache-2.0
"""Vector quantisation in plain PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KMeansResult", "kmeans", "vq_lookup", "vq_nearest", "vq_quantize"]


def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    channel_dim: int = -1,
    return_distance: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    assert metric == "l2"
    rows = x.movedim(channel_dim, -1).flatten(0, -2)
    # A loop over the rows: n x k x d differences of a large case do not fit in memory.
    nearest = [(row - codebook).square().sum(-1).min(0) for row in rows]
    shape = x.movedim(channel_dim, -1).shape[:-1]
    if not nearest:
        indices, distance = x.new_empty(shape, dtype=torch.int64), x.new_empty(shape)
    else:
        indices = torch.stack([n.indices for n in nearest]).view(shape)
        distance = torch.stack([n.values for n in nearest]).view(shape)
    return (indices, distance) if return_distance else indices


def vq_lookup(indices: Tensor, codebook: Tensor, *, channel_dim: int = -1) -> Tensor:
    return codebook[indices].movedim(-1, channel_dim)


def vq_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    beta: float = 0.25,
    metric: str = "l2",
    channel_dim: int = -1,
    codebook_weight: float = 1.0,
    return_statistics: bool = False,
) -> tuple[Tensor, ...]:
    with torch.no_grad():
        indices = vq_nearest(x, codebook, metric=metric, channel_dim=channel_dim)
        assert isinstance(indices, Tensor)
    codes = vq_lookup(indices, codebook, channel_dim=channel_dim)
    loss = codebook_weight * F.mse_loss(x.detach(), codes) + beta * F.mse_loss(x, codes.detach())
    if x.numel() == 0:
        loss = x.sum()
    quantized = x + (codes - x).detach()  # the gradient of the codes goes straight to x
    if not return_statistics:
        return quantized, indices, loss
    rows = x.detach().movedim(channel_dim, -1).flatten(0, -2)
    counts = torch.bincount(indices.flatten(), minlength=len(codebook)).to(x.dtype)
    sums = torch.zeros_like(codebook).index_add(0, indices.flatten(), rows)
    return quantized, indices, loss, counts, sums


class KMeansResult(NamedTuple):
    centroids: Tensor
    indices: Tensor
    inertia: Tensor


def kmeans(x: Tensor, centroids: Tensor, *, iterations: int = 10) -> KMeansResult:
    """Lloyd's algorithm from given centroids; an empty cluster moves to the worst-served row."""
    for _ in range(iterations):
        indices = torch.cdist(x, centroids).min(1).indices
        distance = (x - centroids[indices]).square().sum(-1)
        counts = torch.bincount(indices, minlength=len(centroids))
        sums = torch.zeros_like(centroids).index_add(0, indices, x)
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None], centroids)
        empty = (counts == 0).nonzero().flatten()[: len(x)]
        centroids[empty] = x[distance.argsort(descending=True, stable=True)[: len(empty)]]
    indices = torch.cdist(x, centroids).min(1).indices
    return KMeansResult(centroids, indices, (x - centroids[indices]).square().sum())
