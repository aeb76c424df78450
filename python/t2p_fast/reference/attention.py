# SPDX-License-Identifier: Apache-2.0
"""Attention in plain PyTorch, by the matrix of all pairs.

A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 1.
"""

from torch import Tensor

__all__ = ["attention"]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """`t2p_fast.ops.attention` for ``[b, h, n, d]``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * q @ k.mT
    if bias is not None:
        scores = scores + bias[:, None, None]
    # Where every score is -inf, softmax is NaN, and the result 0.
    return scores.softmax(-1).nan_to_num(0.0) @ v if bias is not None else scores.softmax(-1) @ v
