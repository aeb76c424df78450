# SPDX-License-Identifier: Apache-2.0
"""Group normalisation, and what follows it in a U-Net or an autoencoder, in plain PyTorch.

Y. Wu and K. He, "Group Normalization", ECCV 2018, equations 2 to 6; scale and shift as in
P. Dhariwal and A. Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, section 3.
"""

import torch
from torch import Tensor

__all__ = ["group_norm_silu"]


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """`silu(((x - mean) / sqrt(var + eps) weight + bias) (1 + scale) + shift) + residual`."""

    def per_channel(values: Tensor) -> Tensor:
        return values.reshape(-1, x.shape[1], *[1] * (x.ndim - 2))

    grouped = x.reshape(len(x), num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    y = (centred * torch.rsqrt(variance + eps)).reshape(x.shape)
    if weight is not None:
        y = y * per_channel(weight)
    if bias is not None:
        y = y + per_channel(bias)
    if scale is not None:
        y = y * (1 + per_channel(scale))
    if shift is not None:
        y = y + per_channel(shift)
    if activation == "silu":
        y = y * torch.sigmoid(y)
    return y if residual is None else y + residual
