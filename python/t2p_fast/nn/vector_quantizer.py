# SPDX-License-Identifier: Apache-2.0
"""Vector quantisation with a codebook learned by gradient or by moving averages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2p_fast.ops import kmeans, vq_lookup, vq_nearest, vq_quantize


class VectorQuantizer(nn.Module):
    """Replaces every vector by its nearest code (van den Oord et al., "Neural Discrete
    Representation Learning", 2017, section 3; appendix A.1 for the moving averages).

    Args:
        num_embeddings: number of codes, ``k``.
        embedding_dim: their length, ``d``.
        beta: weight of the commitment loss.
        ema_decay: decay of the moving averages that make the codebook; ``None`` learns the
            codebook by gradient instead.
        dead_code_threshold: in training, a moving-average code that fewer vectors than this
            chose (a moving count per step) is replaced by a random input vector; 0 never does.
        kmeans_init: whether the first training batch places the codes by k-means.
        channel_dim: dimension of the input that holds the vectors, 1 for ``[b, d, h, w]``.

    Every code is replicated over the processes of ``torch.distributed``: counts and sums are
    added up over them, and revived codes come from rank 0.
    """

    ema_count: Tensor  # [k], vectors per step that chose the code; moving-average codebooks only
    ema_sum: Tensor  # [k, d], their sum

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        beta: float = 0.25,
        ema_decay: float | None = None,
        dead_code_threshold: float = 0.0,
        kmeans_init: bool = False,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(
                f"VectorQuantizer: the codebook is [{num_embeddings}, {embedding_dim}], "
                "expected at least one code of at least one dimension"
            )
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"VectorQuantizer: ema_decay is {ema_decay}, expected 0 <= decay < 1")
        self.beta = beta
        self.ema_decay = ema_decay
        self.dead_code_threshold = dead_code_threshold
        self.channel_dim = channel_dim
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_embeddings, 1 / num_embeddings)
        if ema_decay is not None:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("ema_count", torch.zeros(num_embeddings))
            self.register_buffer("ema_sum", torch.zeros(num_embeddings, embedding_dim))
        self.needs_init = kmeans_init
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            _keep_loaded_codes
        )

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, ema_decay={self.ema_decay}, "
            f"dead_code_threshold={self.dead_code_threshold}"
        )

    @property
    def codebook(self) -> Tensor:
        """The codes ``[k, d]``."""
        return self.embedding.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises ``x``.

        Args:
            x: ``[b, d, h, w]`` (or ``[n, d]``, ``[b, n, d]`` with ``channel_dim=-1``), fp32.

        Returns:
            The codes in the shape of ``x``, with the straight-through gradient; their int64
            indices in that shape without the channels; and the loss, a scalar (equation 3's
            second and third terms; without the second for a moving-average codebook).
        """
        x = x.float()
        if self.training and self.needs_init:
            self.init_by_kmeans(x)
        if self.ema_decay is None or not self.training:
            quantized, indices, loss = vq_quantize(
                x, self.codebook.float(), beta=self.beta, channel_dim=self.channel_dim,
                codebook_weight=1.0 if self.ema_decay is None else 0.0,
            )  # fmt: skip
            return quantized, indices, loss
        quantized, indices, loss, count, total = vq_quantize(
            x, self.codebook.clone(), beta=self.beta, channel_dim=self.channel_dim,
            codebook_weight=0.0, return_statistics=True,
        )  # fmt: skip
        self._update_codebook(x.detach(), count, total)
        return quantized, indices, loss

    def nearest(self, x: Tensor) -> Tensor:
        """Indices of the nearest codes, without gradient."""
        return vq_nearest(x.detach().float(), self.codebook.float(), channel_dim=self.channel_dim)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes by index, with the channels where ``channel_dim`` says."""
        return vq_lookup(indices, self.codebook.float(), channel_dim=self.channel_dim)

    @torch.no_grad()
    def _update_codebook(self, x: Tensor, count: Tensor, total: Tensor) -> None:
        assert self.ema_decay is not None
        if _distributed():
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.ema_count.lerp_(count.to(self.ema_count.dtype), 1 - self.ema_decay)
        self.ema_sum.lerp_(total, 1 - self.ema_decay)
        # A code that nothing chose yet keeps its place.
        used = self.ema_count > 1e-6
        mean = self.ema_sum / self.ema_count.clamp_min(1e-6)[:, None]
        self.codebook.copy_(torch.where(used[:, None], mean, self.codebook))
        if self.dead_code_threshold > 0:
            self._revive(x)

    def _revive(self, x: Tensor) -> None:
        dead = (self.ema_count < self.dead_code_threshold).nonzero().flatten()
        if len(dead) == 0:
            return
        vectors = x.movedim(self.channel_dim, -1).reshape(-1, x.shape[self.channel_dim])
        chosen = vectors[torch.randint(len(vectors), (len(dead),), device=x.device)]
        if _distributed():
            dist.broadcast(chosen, src=0)
        self.codebook[dead] = chosen
        self.ema_sum[dead] = chosen
        self.ema_count[dead] = 1.0

    @torch.no_grad()
    def init_by_kmeans(self, x: Tensor) -> None:
        """Places the codes at the k-means centres of the vectors in ``x``."""
        vectors = x.movedim(self.channel_dim, -1).reshape(-1, x.shape[self.channel_dim])
        k = len(self.codebook)
        if len(vectors) < k:
            raise ValueError(
                f"VectorQuantizer: k-means needs at least {k} vectors, x has {len(vectors)}"
            )
        centroids = kmeans(vectors.detach().float(), k, iterations=10, init="kmeans++").centroids
        if _distributed():
            dist.broadcast(centroids, src=0)
        self.codebook.copy_(centroids)
        if self.ema_decay is not None:
            # As if each code had been chosen once: soon outweighed by what training sees.
            self.ema_count.fill_(1.0)
            self.ema_sum.copy_(centroids)
        self.needs_init = False


def _keep_loaded_codes(quantizer: nn.Module, _: object) -> None:
    """A loaded codebook is not to be overwritten by k-means on the next batch."""
    assert isinstance(quantizer, VectorQuantizer)
    quantizer.needs_init = False


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
