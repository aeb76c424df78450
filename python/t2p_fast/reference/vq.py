# SPDX-License-Identifier: Apache-2.0
"""Vector quantisation in plain PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KMeansResult", "kmeans", "vq_lookup", "vq_nearest", "vq_quantize", "vq_topk"]


def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    channel_dim: int = -1,
    return_distance: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if codebook.ndim == 3:
        parts = [
            vq_nearest(part, codes, metric=metric, channel_dim=channel_dim, return_distance=True)
            for part, codes in zip(x.chunk(len(codebook), channel_dim), codebook, strict=True)
        ]
        dim = channel_dim % x.ndim
        indices, distance = (torch.stack(p, dim) for p in zip(*parts, strict=True))
        return (indices, distance) if return_distance else indices
    rows = x.movedim(channel_dim, -1).flatten(0, -2)
    # A loop over the rows: n x k x d differences of a large case do not fit in memory.
    nearest = [_distances(row, codebook, metric).min(0) for row in rows]
    shape = x.movedim(channel_dim, -1).shape[:-1]
    if not nearest:
        indices, distance = x.new_empty(shape, dtype=torch.int64), x.new_empty(shape)
    else:
        indices = torch.stack([n.indices for n in nearest]).view(shape)
        distance = torch.stack([n.values for n in nearest]).view(shape)
    return (indices, distance) if return_distance else indices


def vq_topk(
    x: Tensor, codebook: Tensor, count: int, *, metric: str = "l2", channel_dim: int = -1
) -> tuple[Tensor, Tensor]:
    rows = x.movedim(channel_dim, -1)
    distance = torch.stack([_distances(row, codebook, metric) for row in rows.flatten(0, -2)])
    distance, indices = distance.sort(dim=1, stable=True)
    shape = [*rows.shape[:-1], count]
    return distance[:, :count].reshape(shape), indices[:, :count].reshape(shape)


def _distances(row: Tensor, codebook: Tensor, metric: str) -> Tensor:
    if metric == "l2":
        return (row - codebook).square().sum(-1)
    if metric == "dot":
        return -(codebook @ row)
    norms = row.norm() * codebook.norm(dim=-1)
    return 1 - torch.where(norms > 0, (codebook @ row) / norms.where(norms > 0, 1), 0)


def vq_lookup(indices: Tensor, codebook: Tensor, *, channel_dim: int = -1) -> Tensor:
    if codebook.ndim == 3:
        dim = channel_dim % indices.ndim
        groups = zip(indices.unbind(dim), codebook, strict=True)
        return torch.cat([vq_lookup(i, codes, channel_dim=dim) for i, codes in groups], dim)
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
