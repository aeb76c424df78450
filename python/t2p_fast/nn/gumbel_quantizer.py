# SPDX-License-Identifier: Apache-2.0
"""Vector quantisation by drawing codes: the Gumbel-softmax quantiser."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2p_fast.ops import vq_lookup


class GumbelQuantizer(nn.Module):
    """Draws a code per position from a learned distribution, relaxed in training (Jang et al.,
    "Categorical Reparameterization with Gumbel-Softmax", 2017; Ramesh et al., "Zero-Shot
    Text-to-Image Generation", 2021, section 2.1).

    Args:
        num_embeddings: number of codes, ``k``.
        embedding_dim: their length, ``d``.
        input_dim: channels of the input; ``d`` if ``None``.
        temperature: of the relaxation; anneal it by setting ``quantizer.temperature``.
        kl_weight: weight of the divergence from the uniform distribution in the loss.
        hard: whether training, too, outputs single codes, with the gradient of the relaxation.
        channel_dim: dimension of the input that holds its channels.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        input_dim: int | None = None,
        temperature: float = 1.0,
        kl_weight: float = 5e-4,
        hard: bool = False,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"GumbelQuantizer: temperature is {temperature}, expected above 0")
        self.temperature, self.kl_weight, self.hard = temperature, kl_weight, hard
        self.channel_dim = channel_dim
        self.proj = nn.Linear(input_dim or embedding_dim, num_embeddings)
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)

    @property
    def codebook(self) -> Tensor:
        """The codes ``[k, d]``."""
        return self.embedding.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises ``x``, ``[b, c, h, w]`` or as ``channel_dim`` says.

        Returns:
            Codes, or in training mixtures of them, with ``d`` channels; the int64 indices of the
            most likely ones, with the noise in training; and the loss, a scalar.
        """
        logits = self.proj(x.float().movedim(self.channel_dim, -1))
        share = logits.softmax(-1)
        uniform = math.log(logits.shape[-1])
        loss = self.kl_weight * (uniform - torch.special.entr(share).sum(-1)).mean()
        if not self.training:
            indices = logits.argmax(-1)
            return self.lookup(indices), indices, loss
        weights = F.gumbel_softmax(logits, self.temperature, hard=self.hard)
        mixed = (weights @ self.codebook.float()).movedim(-1, self.channel_dim)
        return mixed, weights.argmax(-1), loss

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes by index, with the channels where ``channel_dim`` says."""
        return vq_lookup(indices, self.codebook.float(), channel_dim=self.channel_dim)
