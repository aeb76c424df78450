# SPDX-License-Identifier: Apache-2.0
"""diffusers' processors of SANA: self-attention on `linear_attention`, of a text on `attention`."""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers import sana_transformer
from torch import Tensor

from t2p_fast.interop.attention_processor import is_key_bias
from t2p_fast.ops import attention, linear_attention

__all__ = ["SanaAttnProcessor2_0", "SanaLinearAttnProcessor2_0"]


class SanaAttnProcessor2_0:
    """Takes the place of diffusers' class of that name, which attends to the text::

    for block in transformer.transformer_blocks:
        block.attn2.set_processor(SanaAttnProcessor2_0())

    `before` is called where masks differ between queries or heads.
    """

    def __init__(self, before: sana_transformer.SanaAttnProcessor2_0 | None = None) -> None:
        self.before = sana_transformer.SanaAttnProcessor2_0() if before is None else before

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """`hidden_states` ``[b, m, c]``, `encoder_hidden_states` ``[b, n, c]``, `attention_mask`
        ``[b, 1, n]`` added to the scores.
        """
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if not is_key_bias(attention_mask, source.shape[0], source.shape[1]):
            other: Tensor = self.before(attn, hidden_states, encoder_hidden_states, attention_mask)
            return other
        q, k, v = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        bias = None if attention_mask is None else attention_mask[:, 0]
        out = attention(q, k, v, bias=bias, layout="bnhd").flatten(2)
        projected: Tensor = attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor
        return projected


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
