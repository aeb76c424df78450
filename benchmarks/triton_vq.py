# SPDX-License-Identifier: Apache-2.0
"""A peer for vq on a GPU: nearest codes in Triton, with the argmin beside the matrix product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["nearest"]


@triton.jit  # type: ignore[untyped-decorator]
def _nearest_kernel(  # type: ignore[no-untyped-def]
    x, codes, half_norms, indices, n, k, d: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The nearest code of ROWS rows: codes in blocks, channels in steps, a running minimum."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = tl.arange(0, DEPTH)
    best = tl.full([ROWS], float("inf"), tl.float32)
    index = tl.zeros([ROWS], tl.int32)
    for first in range(0, k, CODES):
        code = first + tl.arange(0, CODES)
        product = tl.zeros([ROWS, CODES], tl.float32)
        for step in range(0, CHANNELS, DEPTH):
            channel = step + here
            a = tl.load(
                x + row[:, None].to(tl.int64) * d + channel[None, :],
                mask=(row[:, None] < n) & (channel[None, :] < d),
                other=0.0,
            )
            b = tl.load(
                codes + code[None, :] * d + channel[:, None],
                mask=(code[None, :] < k) & (channel[:, None] < d),
                other=0.0,
            )
            product += tl.dot(a, b)
        half = tl.load(half_norms + code, mask=code < k, other=float("inf"))
        score = half[None, :] - product
        least = tl.min(score, 1)
        where = tl.argmin(score, 1) + first
        index = tl.where(least < best, where, index)
        best = tl.minimum(least, best)
    tl.store(indices + row, index, mask=row < n)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest code, ``[n]`` int32, by ``|c|^2 / 2 - x.c``.

    Products are those of tensor cores, TF32 for float32: not exact.

    Args:
        x: ``[n, d]``.
        codebook: ``[k, d]``, of the same dtype.
    """
    n, d = x.shape
    k = codebook.shape[0]
    half_norms = 0.5 * codebook.float().square().sum(1)
    indices = torch.empty(n, dtype=torch.int32, device=x.device)
    channels = max(16, triton.next_power_of_2(d))
    depth = min(channels, 64)
    rows, codes = (128, 128) if n >= 128 * 256 else (64, 64)
    _nearest_kernel[(triton.cdiv(n, rows),)](
        x, codebook, half_norms, indices, n, k, d,
        ROWS=rows, CODES=codes, DEPTH=depth, CHANNELS=channels, num_warps=8, num_stages=3,
    )  # fmt: skip
    return indices
