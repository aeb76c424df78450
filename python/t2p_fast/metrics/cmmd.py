# SPDX-License-Identifier: Apache-2.0
"""CMMD, a distance between two sets of pictures, given their embeddings.

S. Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation",
CVPR 2024, arXiv 2401.09603.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 2048  # rows at a time: memory does not grow with the number of pairs


def cmmd(x: Tensor, y: Tensor, *, sigma: float = 10.0, unbiased: bool = True) -> float:
    """1000 times the squared maximum mean discrepancy under ``exp(-|x - y|^2 / (2 sigma^2))``.

    Args:
        x: ``[m, d]`` embeddings, usually unit vectors; a row per picture.
        y: ``[n, d]``.
        sigma: of the kernel; 10 in the paper.
        unbiased: leave out the pairs of a row with itself. The published implementation keeps them,
            which makes it larger, by less than ``0.02`` of ``1000 (1/m + 1/n)`` for unit vectors.

    Returns:
        The distance; an unbiased one of equal distributions may be below zero.

    Raises:
        ValueError: sizes do not fit, there are fewer than two rows, or sigma is not positive.

    Complexity:
        ``O((m + n)^2 d)`` time, in float64; memory for ``2048`` rows of distances.
    """
    for name, value in (("x", x), ("y", y)):
        if value.ndim != 2 or value.shape[0] < 2:
            raise ValueError(
                f"cmmd: {name} is {list(value.shape)}, expected [rows, d] with at least 2 rows"
            )
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"cmmd: x is {list(x.shape)} and y {list(y.shape)}, expected the same d")
    if not sigma > 0:
        raise ValueError(f"cmmd: sigma is {sigma}, expected more than 0")
    x, y = x.double(), y.double()
    m, n = x.shape[0], y.shape[0]
    # Means of kernel - 1: the kernel is nearly 1 everywhere, and the ones cancel. A row with itself
    # adds nothing to the sum, so only the count of the pairs depends on whether it is in.
    own = (m * (m - 1), n * (n - 1)) if unbiased else (m * m, n * n)
    within = _sum(x, x, sigma) / own[0] + _sum(y, y, sigma) / own[1]
    return 1000 * (within - 2 * _sum(x, y, sigma) / (m * n))


def _sum(x: Tensor, y: Tensor, sigma: float) -> float:
    """The sum of ``exp(-|x - y|^2 / (2 sigma^2)) - 1`` over all pairs."""
    total = 0.0
    for rows in x.split(_BLOCK):
        distance = torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        total += float(torch.expm1(distance * (-0.5 / sigma**2)).sum())
    return total
