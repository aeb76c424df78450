# SPDX-License-Identifier: Apache-2.0
"""diffusers' default attention processor, on `attention`."""

from typing import Any

from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention
from torch import Tensor

from t2p_fast.ops import attention

__all__ = ["AttnProcessor2_0", "is_key_bias"]


def is_key_bias(mask: Tensor | None, b: int, n: int) -> bool:
    """Whether a mask, if there is one, is floats ``[b, 1, n]``: one for all queries and heads."""
    return mask is None or (mask.shape == (b, 1, n) and mask.is_floating_point())


class AttnProcessor2_0:
    """Takes the place of diffusers' class of that name::

        unet.set_attn_processor(AttnProcessor2_0())

    Self- and cross-attention of U-Nets, autoencoders and transformers. `before` is called where
    masks differ between queries or heads.
    """

    def __init__(self, before: attention_processor.AttnProcessor2_0 | None = None) -> None:
        self.before = attention_processor.AttnProcessor2_0() if before is None else before

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """`hidden_states` ``[b, m, c]`` or ``[b, c, h, w]``, `encoder_hidden_states` ``[b, n, c]``,
        `attention_mask` ``[b, 1, n]`` added to the scores.
        """
        x = hidden_states
        n = x.shape[1] if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        if not is_key_bias(attention_mask, x.shape[0], n) or args or kwargs:
            result: Tensor = self.before(
                attn, x, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return result
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        shape = x.shape
        if x.ndim == 4:
            x = x.flatten(2).mT
        if attn.group_norm is not None:
            x = attn.group_norm(x.mT).mT
        source = encoder_hidden_states
        if source is None:
            source = x
        elif attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)

        q, k, v = attn.to_q(x), attn.to_k(source), attn.to_v(source)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)) for y in (q, k, v))  # [b, n, heads, channels]
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        bias = None if attention_mask is None else attention_mask[:, 0]
        out = attention(q, k, v, bias=bias, layout="bnhd").flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.mT.reshape(shape)
        if attn.residual_connection:
            out = out + hidden_states
        scaled: Tensor = out / attn.rescale_output_factor
        return scaled
