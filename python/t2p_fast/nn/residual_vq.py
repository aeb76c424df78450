# SPDX-License-Identifier: Apache-2.0
"""Residual vector quantisation: every quantiser codes what those before it left."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2p_fast.nn.vector_quantizer import VectorQuantizer, distributed, rotate_gradient


class ResidualVQ(nn.Module):
    """A sum of codes, one per quantiser, each nearest to what is left (Zeghidour et al.,
    "SoundStream", 2021, section III.C; Lee et al., "Autoregressive Image Generation using Residual
    Quantization", 2022, section 3.1).

    Args:
        num_quantizers: number of quantisers, ``q``.
        num_embeddings, embedding_dim: codes of each, and their length.
        quantizer_dropout: in training, the share of batches that use only the first few quantisers
            (a number drawn uniformly), so that fewer can be used later.
        **options: of :class:`VectorQuantizer`.
    """

    def __init__(
        self,
        num_quantizers: int,
        num_embeddings: int,
        embedding_dim: int,
        *,
        quantizer_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_quantizers < 1:
            raise ValueError(f"ResidualVQ: num_quantizers is {num_quantizers}, expected at least 1")
        if not 0 <= quantizer_dropout <= 1:
            raise ValueError(
                f"ResidualVQ: quantizer_dropout is {quantizer_dropout}, expected 0 to 1"
            )
        if options.get("metric", "l2") != "l2":
            raise ValueError("ResidualVQ: metric is 'cosine', but only 'l2' leaves a residual")
        self.quantizer_dropout = quantizer_dropout
        self.gradient = options.pop("gradient", "straight_through")
        self.channel_dim: int = options.get("channel_dim", 1)
        self.quantizers = nn.ModuleList(
            VectorQuantizer(num_embeddings, embedding_dim, **options) for _ in range(num_quantizers)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises ``x``.

        Args:
            x: as :class:`VectorQuantizer` takes it.

        Returns:
            The sums of codes in the shape of ``x``, fp32, with the gradient for ``x``; their int64
            indices, in that shape without the channels and with ``q`` as the last dimension, -1
            for quantisers that were dropped; and the losses ``[q]``, 0 for those.
        """
        x = x.float()
        total, residual = torch.zeros_like(x), x
        indices: list[Tensor] = []
        losses: list[Tensor] = []
        used = self._used()
        for i, quantizer in enumerate(self.quantizers):
            if i < used:
                codes, chosen, loss = quantizer(residual)
                codes = codes.detach()
                total, residual = total + codes, residual - codes
            else:
                chosen, loss = torch.full_like(indices[0], -1), torch.zeros_like(losses[0])
            indices.append(chosen)
            losses.append(loss)
        if self.gradient == "rotation":
            total = rotate_gradient(x, total, self.channel_dim)
        else:
            total = total + (x - x.detach())
        return total, torch.stack(indices, -1), torch.stack(losses)

    def _used(self) -> int:
        count = len(self.quantizers)
        if not self.training or self.quantizer_dropout == 0:
            return count
        dropped = torch.rand(()) < self.quantizer_dropout
        used = torch.where(dropped, torch.randint(1, count + 1, ()), count)
        if distributed():
            # Moving averages are added up over the processes, so all must use as many.
            used = used.to(next(self.buffers(), used).device)
            dist.broadcast(used, src=0)
        return int(used)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The indices of ``x``, with ``q`` as the last dimension."""
        residual, indices = x.float(), []
        for quantizer in self.quantizers:
            assert isinstance(quantizer, VectorQuantizer)
            indices.append(quantizer.nearest(residual))
            residual = residual - quantizer.lookup(indices[-1])
        return torch.stack(indices, -1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Sums of codes by index.

        Args:
            indices: with ``q``, or fewer for the first quantisers alone, as the last dimension;
                -1 adds nothing.
        """
        if not 1 <= indices.shape[-1] <= len(self.quantizers):
            raise ValueError(
                f"ResidualVQ.lookup: indices are {list(indices.shape)}, expected 1 to "
                f"{len(self.quantizers)} in the last dimension"
            )
        parts = []
        for quantizer, chosen in zip(self.quantizers, indices.unbind(-1), strict=False):
            assert isinstance(quantizer, VectorQuantizer)
            codes = quantizer.lookup(chosen.clamp_min(0))
            dim = self.channel_dim % codes.ndim
            parts.append(codes.masked_fill((chosen < 0).unsqueeze(dim), 0.0))
        return torch.stack(parts).sum(0)


class GroupedResidualVQ(nn.Module):
    """Groups of channels, each with a :class:`ResidualVQ` of its own (Yang et al., "HiFi-Codec",
    2023, section 2.2).

    Args:
        num_groups: number of groups, ``g``; it divides ``embedding_dim``.
        num_quantizers, num_embeddings, **options: of each :class:`ResidualVQ`.
        embedding_dim: channels of all groups.
    """

    def __init__(
        self,
        num_groups: int,
        num_quantizers: int,
        num_embeddings: int,
        embedding_dim: int,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_groups < 1 or embedding_dim % num_groups:
            raise ValueError(
                f"GroupedResidualVQ: embedding_dim is {embedding_dim}, expected a multiple of "
                f"num_groups, {num_groups}, which is at least 1"
            )
        self.channel_dim: int = options.get("channel_dim", 1)
        self.groups = nn.ModuleList(
            ResidualVQ(num_quantizers, num_embeddings, embedding_dim // num_groups, **options)
            for _ in range(num_groups)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :class:`ResidualVQ`; indices begin with ``g``, losses are ``[g, q]``."""
        parts = [
            group(part)
            for group, part in zip(
                self.groups, x.chunk(len(self.groups), self.channel_dim), strict=True
            )
        ]
        quantized, indices, losses = zip(*parts, strict=True)
        return torch.cat(quantized, self.channel_dim), torch.stack(indices), torch.stack(losses)

    def lookup(self, indices: Tensor) -> Tensor:
        """Sums of codes by index, ``[g, ..., q]``."""
        if indices.shape[0] != len(self.groups):
            raise ValueError(
                f"GroupedResidualVQ.lookup: indices are {list(indices.shape)}, expected "
                f"{len(self.groups)} in the first dimension"
            )
        parts = [g.lookup(i) for g, i in zip(self.groups, indices, strict=True)]  # type: ignore[operator]
        return torch.cat(parts, self.channel_dim)
