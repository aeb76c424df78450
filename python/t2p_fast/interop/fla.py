# SPDX-License-Identifier: Apache-2.0
"""flash-linear-attention's entry to causal linear attention; it need not be installed."""

import torch
from torch import Tensor
from torch.nn import functional

from t2p_fast.ops import linear_attention

__all__ = ["chunk_linear_attn"]


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention in the layout of `fla.ops.linear_attn`.

    As there, the normaliser sums the keys of this call alone, without those of `initial_state`.

    Args:
        q: ``[b, t, h, k]``, mapped by phi; float32, bfloat16 or float16.
        k: ``[b, t, h, k]``, likewise.
        v: ``[b, t, h, v]``.
        scale: of the queries; ``k ** -0.5`` if not given.
        initial_state: ``[s, h, k, v]`` float32.
        output_final_state: whether to return the state too.
        normalize: whether to divide by the sum of the weights and 1e-10.
        cu_seqlens: ``[s + 1]`` integers, for a batch of 1.

    Returns:
        ``[b, t, h, v]``, and the state ``[s, h, k, v]`` or None.
    """
    out, state = linear_attention(
        q, k, v, feature="identity", causal=True, normalize=normalize, eps=1e-10,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int64),
        initial_state=None if initial_state is None else functional.pad(initial_state, (0, 1)),
        return_state=True, layout="bnhd",
    )  # fmt: skip
    return out, state[..., :-1] if output_final_state else None
