# SPDX-License-Identifier: Apache-2.0
"""Linear attention in plain PyTorch, by the matrix of all pairs.

A. Katharopoulos et al., "Transformers are RNNs", ICML 2020, equations 5 to 12; with ReLU as in
E. Xie et al., "SANA", 2024, and H. Cai et al., "EfficientViT", 2023.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["linear_attention"]


def _feature(x: Tensor, feature: str) -> Tensor:
    if feature == "relu":
        return x.relu()
    return functional.elu(x) + 1 if feature == "elu+1" else x


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: str = "relu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-15,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`t2p_fast.ops.linear_attention` for ``[b, h, n, d]``: the result and the state after it."""
    q, k = scale * _feature(q, feature), _feature(k, feature)
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # the last channel is the normaliser
    if key_mask is not None:
        k = k * key_mask[:, None, :, None]
    pairs = q @ k.mT
    numerator = (pairs.tril() if causal else pairs) @ v
    state = k.mT @ v
    if initial_state is not None:
        numerator, state = numerator + q @ initial_state, state + initial_state
    out = numerator[..., :-1]
    return (out / (numerator[..., -1:] + eps) if normalize else out), state
