# SPDX-License-Identifier: Apache-2.0
"""Quantisers without a learned codebook: every channel is rounded by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _straight_through(x: Tensor, value: Tensor) -> Tensor:
    return value.detach() + (x - x.detach())


def _to_last(x: Tensor, channel_dim: int, channels: int, name: str) -> Tensor:
    if x.ndim < 2 or x.shape[channel_dim] != channels:
        raise ValueError(
            f"{name}: x is {list(x.shape)}, expected {channels} channels in dimension {channel_dim}"
        )
    return x.float().movedim(channel_dim, -1)


class FSQ(nn.Module):
    """Finite scalar quantisation (Mentzer et al., 2023, section 3.1): channel ``i`` is squashed by
    a tanh and rounded to ``levels[i]`` values in [-1, 1].

    Args:
        levels: numbers of values, each at least 2; the codebook has their product of codes, and an
            index counts them with the first channel fastest.
        channel_dim: dimension of the input that holds the ``len(levels)`` channels.
    """

    levels: Tensor
    strides: Tensor

    def __init__(self, levels: Sequence[int], *, channel_dim: int = 1) -> None:
        super().__init__()
        if not levels or min(levels) < 2 or math.prod(levels) >= 1 << 62:
            raise ValueError(
                f"FSQ: levels are {list(levels)}, expected numbers of at least 2 whose product is "
                "less than 2**62"
            )
        self.channel_dim = channel_dim
        self.num_embeddings = math.prod(levels)
        strides = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)

    def extra_repr(self) -> str:
        return f"levels={self.levels.tolist()}"

    def _squash(self, x: Tensor) -> Tensor:
        """To the open interval in which rounding gives ``levels`` integers."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = (1 - self.levels % 2) / 2  # even numbers of levels are not symmetric
        return torch.tanh(x + torch.atanh(offset / half)) * half - offset

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds ``x``, ``[b, c, h, w]`` or as ``channel_dim`` says.

        Returns:
            The values in the shape of ``x``, fp32, with the straight-through gradient of rounding,
            and the int64 indices in that shape without the channels.
        """
        squashed = self._squash(_to_last(x, self.channel_dim, len(self.levels), "FSQ"))
        rounded = squashed.round()
        half = self.levels // 2
        indices = ((rounded.detach().long() + half) * self.strides).sum(-1)
        values = _straight_through(squashed, rounded) / half
        return values.movedim(-1, self.channel_dim), indices

    def lookup(self, indices: Tensor) -> Tensor:
        """Values by index, with the channels where ``channel_dim`` says."""
        _check_indices("FSQ.lookup", indices, self.num_embeddings)
        digits = indices.unsqueeze(-1) // self.strides % self.levels
        half = self.levels // 2
        return ((digits - half) / half).float().movedim(-1, self.channel_dim)


class LFQ(nn.Module):
    """Lookup-free quantisation (Yu et al., "Language Model Beats Diffusion", 2023, section 3.1):
    every channel becomes its sign, so ``c`` channels make ``2 ** c`` codes.

    Args:
        channels: number of channels, at most 62; an index has a bit for each, the first lowest.
        beta: weight of the commitment loss.
        entropy_weight: weight of the entropy loss ``H(code | x) - diversity_weight H(code)``. The
            bits of a code are independent given ``x``, so the first term is a sum over bits; of
            the second, that sum is an upper bound, which is what is used.
        diversity_weight: see above.
        inverse_temperature: of the bits' probabilities ``sigmoid(4 t x)``, those of a softmax over
            the squared distances to the codes, times ``t``.
        channel_dim: dimension of the input that holds the channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        beta: float = 0.25,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        inverse_temperature: float = 100.0,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= channels <= 62:
            raise ValueError(f"LFQ: channels is {channels}, expected 1 to 62")
        self.channels, self.channel_dim = channels, channel_dim
        self.beta, self.entropy_weight = beta, entropy_weight
        self.diversity_weight, self.inverse_temperature = diversity_weight, inverse_temperature
        self.num_embeddings = 1 << channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rounds ``x``, ``[b, c, h, w]`` or as ``channel_dim`` says.

        Returns:
            The signs (that of 0 is -1) in the shape of ``x``, fp32, with the straight-through
            gradient; the int64 indices in that shape without the channels; and the loss, a scalar.
        """
        z = _to_last(x, self.channel_dim, self.channels, "LFQ")
        signs = torch.where(z > 0, 1.0, -1.0)
        bits = 1 << torch.arange(self.channels, device=x.device)
        indices = ((z > 0) * bits).sum(-1)
        loss = self.beta * (z - signs).square().mean()
        if self.entropy_weight > 0:
            logits = (4 * self.inverse_temperature * z).flatten(0, -2)
            probability = logits.sigmoid()
            conditional = (F.softplus(logits) - logits * probability).sum(-1).mean()
            share = probability.mean(0).clamp(1e-7, 1 - 1e-7)
            marginal = (torch.special.entr(share) + torch.special.entr(1 - share)).sum()
            loss = loss + self.entropy_weight * (conditional - self.diversity_weight * marginal)
        return _straight_through(z, signs).movedim(-1, self.channel_dim), indices, loss

    def lookup(self, indices: Tensor) -> Tensor:
        """Signs by index, with the channels where ``channel_dim`` says."""
        _check_indices("LFQ.lookup", indices, self.num_embeddings)
        places = torch.arange(self.channels, device=indices.device)
        bits: Tensor = indices.unsqueeze(-1) >> places & 1
        return (bits * 2.0 - 1.0).movedim(-1, self.channel_dim)


def _check_indices(name: str, indices: Tensor, count: int) -> None:
    if torch.compiler.is_compiling() or indices.numel() == 0 or indices.is_cuda:
        return  # finding out would mean to wait for the device
    low, high = indices.aminmax()
    if low < 0 or high >= count:
        raise IndexError(f"{name}: indices are {int(low)} to {int(high)}, expected [0, {count})")
