# SPDX-License-Identifier: Apache-2.0
"""k-means on the kernels of `vq`."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from t2p_fast._checks import check_choice
from t2p_fast.ops.vq import _vq_accumulate, _vq_nearest

__all__ = ["KMeansResult", "kmeans"]


class KMeansResult(NamedTuple):
    """What `kmeans` found."""

    centroids: Tensor  # [k, d]
    indices: Tensor  # [n], of the nearest centroid
    inertia: Tensor  # [], sum of squared distances to it


@torch.no_grad()
def kmeans(
    x: Tensor,
    k: int,
    *,
    iterations: int = 10,
    init: Literal["random", "kmeans++"] | Tensor = "random",
    generator: torch.Generator | None = None,
) -> KMeansResult:
    """Lloyd's algorithm: alternates nearest centroids and means of their rows.

    A centroid without rows moves to the row that is farthest from its own centroid, the next one to
    the next farthest. The result is the same for any number of threads.

    Args:
        x: `[n, d]`, float32, `n >= 1`.
        k: Number of centroids.
        iterations: Number of updates.
        init: `"random"` distinct rows of `x`; `"kmeans++"` (Arthur and Vassilvitskii 2007), rows
            drawn with probability proportional to the squared distance to those already drawn; or
            the centroids to start from, `[k, d]`.
        generator: Source of the random numbers, on the CPU.

    Returns:
        Centroids, indices and inertia, the latter two of the returned centroids. Each iteration
        takes O(n k d) time and O(n + k d) memory.

    Raises:
        ValueError: Shapes do not fit, or `init` is not supported.
        TypeError: `x` is not float32.
    """
    if x.ndim != 2 or x.shape[0] == 0:
        raise ValueError(f"kmeans: x must be [n >= 1, d], got {list(x.shape)}")
    if k < 1 or iterations < 0:
        raise ValueError(f"kmeans: k={k} must be positive and iterations={iterations} not negative")
    if isinstance(init, Tensor):
        if init.shape != (k, x.shape[1]):
            raise ValueError(f"kmeans: init must be [{k}, {x.shape[1]}], got {list(init.shape)}")
        centroids = init.detach().clone()
    else:
        check_choice("kmeans", "init", init, ("random", "kmeans++"))
        centroids = x[_initial_rows(x, k, init == "kmeans++", generator)]
    for _ in range(iterations):
        distance, indices = _vq_nearest(x, centroids, "l2", 1)
        counts, sums = _vq_accumulate(x, indices, k, 1)
        empty = counts == 0
        centroids = torch.where(empty[:, None], centroids, sums / counts[:, None])
        if torch.compiler.is_compiling() or empty.any():
            farthest = distance.argsort(descending=True, stable=True)
            place = empty.cumsum(0) - 1  # the how many-th empty one
            moved = (empty & (place < len(x)))[:, None]
            centroids = torch.where(moved, x[farthest[place.clamp(0, len(x) - 1)]], centroids)
    distance, indices = _vq_nearest(x, centroids, "l2", 1)
    return KMeansResult(centroids, indices, distance.sum())


def _initial_rows(x: Tensor, k: int, plus_plus: bool, generator: torch.Generator | None) -> Tensor:
    n = x.shape[0]
    if not plus_plus:
        rows = torch.randperm(n, generator=generator)
        return rows.repeat(-(-k // n))[:k].to(x.device)  # all of them several times where k > n
    chosen = torch.empty(k, dtype=torch.int64, device=x.device)
    distance = x.new_full([n], 1.0, dtype=torch.float64)
    uniform = torch.rand(k, generator=generator, dtype=torch.float64).to(x.device)
    for j in range(k):
        cumulative = distance.cumsum(0)
        at = torch.searchsorted(cumulative, cumulative[-1:] * uniform[j], right=True)
        chosen[j] = at[0].clamp(max=n - 1)
        to_new, _ = _vq_nearest(x, x[chosen[j]][None], "l2", 1)
        distance = to_new.double() if j == 0 else torch.minimum(distance, to_new)
    return chosen
