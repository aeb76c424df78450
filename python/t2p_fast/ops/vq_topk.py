# SPDX-License-Identifier: Apache-2.0
"""The several nearest codes, in torch's own operations."""

import torch
from torch import Tensor

from t2p_fast._checks import check_choice
from t2p_fast.ops.vq import METRICS, check_tensors, check_x, without_channels

__all__ = ["vq_topk"]

_TOPK_BYTES = 32 << 20  # of the scores that are held at a time


@torch.no_grad()
def vq_topk(
    x: Tensor, codebook: Tensor, count: int, *, metric: str = "l2", channel_dim: int = -1
) -> tuple[Tensor, Tensor]:
    """The `count` nearest codes for every row, the nearest first.

    Exact as `vq_nearest`: float32 scores choose a few more codes than wanted, float64 distances
    order them, and rows for which the rounding of the scores could matter are done in float64.

    Args:
        x, metric, channel_dim: As in `vq_nearest`.
        codebook: `[k, d]`.
        count: Number of codes, at most `k`.

    Returns:
        `(distance, indices)`, float32 and int64, in the shape of `x` without `channel_dim` and with
        `count` as the last dimension. Of equal distances the lower index comes first. A row with a
        NaN or an infinity has distances of NaN. O(n k d) time, O(n count + k d) memory.

    Raises:
        ValueError, TypeError: As in `vq_nearest`, or `count` is not from 1 to `k`.
    """
    check_choice("vq_topk", "metric", metric, METRICS)
    dim = check_x("vq_topk", x, codebook, channel_dim)
    check_tensors("vq_topk", x=x, codebook=codebook)
    if codebook.ndim != 2 or x.shape[dim] != codebook.shape[1]:
        raise ValueError(
            f"vq_topk: x has {x.shape[dim]} channels but codebook is {list(codebook.shape)}"
        )
    k, d = codebook.shape
    if not 1 <= count <= k:
        raise ValueError(f"vq_topk: count is {count}, expected 1 to {k}, the number of codes")
    rows, codes = x.movedim(dim, -1).reshape(-1, d).float(), codebook.float()
    parts = [
        _topk_of_rows(part, codes, count, metric)
        for part in rows.split(max(1, _TOPK_BYTES // (4 * k)))
    ]
    shape = [*without_channels(x, dim), count]
    distance, indices = (torch.cat(p).view(shape) for p in zip(*parts, strict=True))
    return distance, indices


def _topk_of_rows(x: Tensor, codebook: Tensor, count: int, metric: str) -> tuple[Tensor, Tensor]:
    k, d = codebook.shape
    codes = torch.nn.functional.normalize(codebook.double(), dim=1).float()
    codes = codes if metric == "cosine" else codebook
    # As in the kernels: |c|^2 / 2 - x.c, or -x.c, about the mean of the codes, errs by at most E.
    center = codes.mean(0).nan_to_num(0.0, 0.0, 0.0)
    codes = codes - center
    rows = x - center if metric == "l2" else x
    half_norms = codes.square().sum(1) / 2 if metric == "l2" else codes.new_zeros(k)
    scores = torch.addmm(half_norms, rows, codes.T, alpha=-1).nan_to_num(torch.inf)
    kept = min(k, count + 8)
    best, chosen = scores.topk(kept, largest=False)
    chosen = chosen.sort().values  # so that of equal distances the lowest index comes first
    radius = codes.norm(dim=1).nan_to_num(0.0).max()
    twice_error = 3 * (d + 16) * 2.0**-24 * radius * (rows.norm(dim=1) + radius)
    if metric == "cosine":  # directions were rounded
        twice_error += 3 * 2.0**-24 * rows.norm(dim=1)
    decided = best[:, -1] - best[:, count - 1] > twice_error + d * 2.0**-118
    doubtful = (~decided).nonzero().flatten() if kept < k else chosen.new_empty(0)
    distance, indices = _topk_by_distance(x, codebook[chosen], chosen, count, metric)
    for part in doubtful.split(max(1, _TOPK_BYTES // (8 * k * d))):
        every = torch.arange(k, device=x.device).expand(len(part), k)
        found = _topk_by_distance(x[part], codebook.expand(len(part), k, d), every, count, metric)
        distance[part], indices[part] = found
    return distance, indices


def _topk_by_distance(
    x: Tensor, codes: Tensor, numbers: Tensor, count: int, metric: str
) -> tuple[Tensor, Tensor]:
    """The nearest of `codes` `[n, m, d]`, whose `numbers` `[n, m]` rise, in float64."""
    a, b = x.double()[:, None], codes.double()
    if metric == "l2":
        distance = (a - b).square().sum(-1)
    else:
        distance = -(a * b).sum(-1)
        if metric == "cosine":
            norms = a.norm(dim=-1) * b.norm(dim=-1)
            distance = 1 + torch.where(norms > 0, distance / norms, 0.0)
    finite = x.isfinite().all(1)[:, None]
    distance = distance.where(codes.isfinite().all(-1) | ~finite, torch.inf)
    distance = distance.where(finite, torch.nan)
    distance, order = distance.sort(dim=1, stable=True)
    return distance[:, :count].float(), numbers.gather(1, order[:, :count])
