# SPDX-License-Identifier: Apache-2.0
"""diffusers' processor of SANA's self-attention, on `linear_attention`."""

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from t2p_fast.ops import linear_attention

__all__ = ["SanaLinearAttnProcessor2_0"]


class SanaLinearAttnProcessor2_0:
    """Takes the place of diffusers' class of that name::

    for block in transformer.transformer_blocks:
        block.attn1.set_processor(SanaLinearAttnProcessor2_0())
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """`hidden_states` ``[b, m, c]``, `encoder_hidden_states` ``[b, n, c]``, in any dtype."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if not q.dtype == k.dtype == v.dtype or q.dtype == torch.float64:
            q, k, v = q.float(), k.float(), v.float()  # what diffusers computes in
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        out = linear_attention(q, k, v, layout="bnhd").flatten(2).to(hidden_states.dtype)
        projected: Tensor = attn.to_out[1](attn.to_out[0](out))
        if hidden_states.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max
            projected = projected.clip(-largest, largest)
        return projected
