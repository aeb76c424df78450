# SPDX-License-Identifier: Apache-2.0
"""Inputs for the tests of vq, and what results are held to: distances in float64, not indices."""

from collections.abc import Callable

import torch
from torch import Tensor

from t2p_fast import reference
from t2p_fast.reference.vq import _distances as distances

__all__ = ["CASES", "HARD", "METRICS", "METRIC_CASES", "assert_nearest", "assert_nearest_by",
           "assert_same_for_any_number_of_threads", "case_of"]  # fmt: skip

# Sizes about the edges of tiles (8), panels (8, 24, 48), blocks (64, 256) and vectors (16).
CASES = [
    (1, 1, 1), (5, 3, 2), (63, 47, 17), (64, 48, 16), (65, 49, 15), (257, 1000, 8),
    (300, 100, 256), (7, 5000, 33), (1000, 64, 3), (9, 100, 1030), (3, 20, 4096),
]  # fmt: skip


METRICS = ("l2", "dot", "cosine")


def case_of(n: int, k: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


def assert_nearest(x: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor) -> None:
    """The chosen codes are nearest in float64, the distances theirs to float32 rounding."""
    assert indices.dtype == torch.int64
    assert ((indices >= 0) & (indices < len(codebook))).all()
    x64, codes64 = x.double().cpu(), codebook.double().cpu()
    _, best = reference.vq_nearest(x64, codes64, return_distance=True)
    chosen = (x64 - codes64[indices.cpu()]).square().sum(-1)
    # Two float64 sums of d terms in different orders.
    torch.testing.assert_close(chosen, best, rtol=x.shape[-1] * 2.0**-52, atol=0)
    torch.testing.assert_close(distance.double().cpu(), best, rtol=2.0**-22, atol=1e-44)


def assert_nearest_by(
    metric: str, x: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor
) -> None:
    """As `assert_nearest`, with the float64 rounding of products in units of |x| |c|."""
    x64, codes64 = x.double().cpu(), codebook.double().cpu()
    indices, distance = indices.cpu(), distance.double().cpu()
    _, best = reference.vq_nearest(x64, codes64, metric=metric, return_distance=True)
    chosen = torch.stack(
        [distances(row, codes64[i][None], metric)[0] for row, i in zip(x64, indices)]  # noqa: B905
    )
    scale = 1 if metric == "cosine" else (x64.norm(dim=1) * codes64.norm(dim=1).max()) + 1e-300
    error = x.shape[1] * 2.0**-50 * scale
    assert ((chosen - best).abs() <= error).all()
    assert ((distance - best).abs() <= 2.0**-23 * best.abs() + error + 1e-44).all()


def assert_same_for_any_number_of_threads(call: Callable[[], tuple[Tensor, ...]]) -> None:
    """The same bits from one thread, two, and more than there are cores."""
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            runs.append(call())
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# By how they go on CUDA: rows in registers, tensor cores, neither.
METRIC_CASES = [(40, 150, 3), (40, 120, 20), (60, 280, 33), (9, 100, 70)]

# What the coarse stage has to get right: its bounds, its formats, many candidates and none.
HARD: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rows of all sizes": lambda x, c: (x * 10 ** torch.linspace(-6, 6, len(x))[:, None], c),
    "codes of all sizes": lambda x, c: (x, c * 10 ** torch.linspace(-6, 6, len(c))[:, None]),
    "a few codes large": lambda x, c: (x, c * (1e-5 + (torch.arange(len(c)) % 60 == 0))[:, None]),
    "codes almost alike": lambda x, c: (x, c[:1] + 1e-5 * c),
    "rows near codes": lambda x, c: (c[torch.arange(len(x)) % len(c)] + 1e-3 * x, c),
    "rows that are codes": lambda x, c: (c[torch.arange(len(x)) % len(c)], c),
    "one channel large": lambda x, c: (x.index_fill(1, torch.tensor(0), 1e5), c),
    "far clusters": lambda x, c: (
        x + 100 * c[torch.arange(len(x)) % 7],
        c + 100 * c[torch.arange(len(c)) % 7],
    ),
    "an outlier": lambda x, c: (x, c.index_fill(0, torch.tensor(7), 1e9)),
    "rows of zeros": lambda x, c: (x * 0, c),
    "codes of zeros": lambda x, c: (x, c * 0),
    "all alike": lambda x, c: (x * 0 + 1, c * 0 + 1),
    "tiny": lambda x, c: (x * 1e-13, c * 1e-13),
    "large": lambda x, c: (x * 1e12, c * 1e12),
    "duplicates": lambda x, c: (x, c[torch.arange(len(c)) // 3]),
    "more duplicates than a list holds": lambda x, c: (x, c[torch.arange(len(c)) // 50]),
    "sorted, the nearest last": lambda x, c: (x, c[(x[0] - c).square().sum(1).argsort().flip(0)]),
    "far from the origin": lambda x, c: (x + 1e4, c + 1e4),
    "below what can be squared": lambda x, c: (x * 1e-30, c * 1e-30),
}
