# SPDX-License-Identifier: Apache-2.0
"""pytorch-fast-transformers' causal product, which need not be installed."""

from torch import Tensor

from t2p_fast.ops import linear_attention

__all__ = ["causal_dot_product"]


def causal_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``o_i = sum_(j <= i) (q_i . k_j) v_j``; takes the place of `causal_dot_product` there.

    Args:
        q: ``[n, h, l, d]``, mapped by phi; float32, and here bfloat16 and float16 too.
        k: ``[n, h, l, d]``, likewise.
        v: ``[n, h, l, e]``.

    Returns:
        ``[n, h, l, e]``, not normalised.
    """
    return linear_attention(q, k, v, feature="identity", causal=True, normalize=False)
