# SPDX-License-Identifier: Apache-2.0
"""The two layers of a SANA block: linear attention, and a feed-forward network with convolutions.

E. Xie et al., "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers",
2024, section 2.2. Parameters have the names that diffusers gives them.
"""

from torch import Tensor, nn
from torch.nn import functional

from t2p_fast.ops import linear_attention


class LinearAttention(nn.Module):
    """Self-attention of tokens by :func:`t2p_fast.ops.linear_attention`.

    Args:
        dim: channels of a token.
        num_heads: of the attention.
        head_dim: channels of a head, at most 256; ``dim // num_heads`` if not given.
        feature: phi, as in the op.
        causal: whether a token sees only those before it and itself.
        bias: of the three input projections; the output projection always has one.
        eps: as in the op.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        feature: str = "relu",
        causal: bool = False,
        bias: bool = False,
        eps: float = 1e-15,
    ) -> None:
        super().__init__()
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(
                    f"LinearAttention: dim={dim} is not divisible by num_heads={num_heads}"
                )
            head_dim = dim // num_heads
        self.num_heads, self.feature, self.causal, self.eps = num_heads, feature, causal, eps
        self.to_q = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.to_k = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.to_v = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(num_heads * head_dim, dim))

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """`x` ``[b, n, dim]``, `key_mask` ``[b, n]`` bool; returns ``[b, n, dim]``."""
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1))
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        out = linear_attention(
            q, k, v, feature=self.feature, causal=self.causal, eps=self.eps, key_mask=key_mask,
            layout="bnhd",
        )  # fmt: skip
        projected: Tensor = self.to_out(out.flatten(2))
        return projected


class MixFFN(nn.Module):
    """SANA's Mix-FFN (GLUMBConv): 1x1 convolution, SiLU, depthwise 3x3, gate, 1x1 convolution.

    The depthwise convolution tells positions apart, so that SANA needs no positional encoding.

    Args:
        dim: channels of the picture.
        expansion: hidden channels per channel.
    """

    def __init__(self, dim: int, expansion: float = 2.5) -> None:
        super().__init__()
        hidden = int(expansion * dim)
        self.conv_inverted = nn.Conv2d(dim, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` ``[b, dim, h, w]``; returns the same shape, without the residual."""
        hidden, gate = self.conv_depth(functional.silu(self.conv_inverted(x))).chunk(2, dim=1)
        projected: Tensor = self.conv_point(hidden * functional.silu(gate))
        return projected
