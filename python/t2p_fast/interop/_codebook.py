# SPDX-License-Identifier: Apache-2.0
"""The codebook of `t2p_fast.interop.vector_quantize_pytorch`: its search, averages and revival.

Vectors are ``[..., d, ...]``, their channels in dimension `dim`; with several heads ``[..., h, d,
...]``, the heads in the dimension before it. There is one codebook for all heads, or one for each.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from t2p_fast.ops import vq_lookup, vq_nearest
from t2p_fast.ops.vq import _vq_accumulate

Weight = Tensor | float | Callable[[Tensor, Tensor], Tensor] | None


def unit(x: Tensor, dim: int = -1) -> Tensor:
    return F.normalize(x, dim=dim, eps=1e-6)


class Codebook(nn.Module):
    """Codes ``[g, k, d]`` with moving averages of how many vectors chose each, and of their sums.

    The names of the buffers, and what is in them, are those of vector-quantize-pytorch.
    """

    initted: Tensor  # [], whether k-means has placed the codes
    cluster_size: Tensor  # [g, k], moving average of the vectors per step
    embed_avg: Tensor  # [g, k, d], of their sums
    embed: Tensor  # [g, k, d]

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        num_codebooks: int,
        heads: int,
        kmeans_init: bool,
        kmeans_iters: int,
        sync_kmeans: bool,
        decay: float,
        eps: float,
        threshold_ema_dead_code: float,
        use_ddp: bool,
        learnable_codebook: bool,
        ema_update: bool,
        manual_ema_update: bool,
        use_cosine_sim: bool,
        vq_bridge: nn.Module | None,
    ) -> None:
        super().__init__()
        self.codebook_size, self.num_codebooks, self.heads = codebook_size, num_codebooks, heads
        self.kmeans_iters, self.decay, self.eps = kmeans_iters, decay, eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.use_ddp, self.sync_samples = use_ddp, use_ddp and sync_kmeans
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.use_cosine_sim = use_cosine_sim
        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = unit(embed) if use_cosine_sim else embed
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        self.learnable_codebook = learnable_codebook
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.vq_bridge = vq_bridge

    def codes(self) -> Tensor:
        """The codes as they are searched and returned, float32, with their gradient if any."""
        embed = (self.embed if self.learnable_codebook else self.embed.detach()).float()
        if self.vq_bridge is not None:
            bridged: Tensor = self.vq_bridge(embed)
            return bridged
        return embed

    def forward(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """The nearest codes in the shape of `x`, and their indices, without `dim`."""
        codes, vectors = self.codes(), x.detach().float()
        metric = "dot" if self.use_cosine_sim else "l2"
        if self.num_codebooks == 1:
            one = codes[0]
            indices = vq_nearest(vectors, one.detach(), metric=metric, channel_dim=dim)
            return vq_lookup(indices, one, channel_dim=dim), indices
        groups = dim - 1  # of channels, one after the other
        vectors = vectors.flatten(groups, dim)
        indices = vq_nearest(vectors, codes.detach(), metric=metric, channel_dim=groups)
        quantized = vq_lookup(indices, codes, channel_dim=groups)
        return quantized.unflatten(groups, (self.num_codebooks, -1)), indices

    def rows(self, x: Tensor, dim: int, mask: Tensor | None = None) -> Tensor:
        """The vectors ``[g, n, d]`` of each codebook, in the order in which samples are drawn.

        Args:
            x: the vectors.
            dim: of their channels; the last one where there is a mask.
            mask: ``[b, n]``, which of ``[b, n, (h), d]`` count.
        """
        x = x.detach().float().movedim(dim, -1)
        if self.heads == 1:
            return (x.flatten(0, -2) if mask is None else x[mask])[None]
        own = self.num_codebooks > 1
        x = x.movedim(dim - 1, 0 if own else 1)
        if mask is None:
            return x.flatten(1, -2) if own else x.flatten(0, -2)[None]
        if own:
            return x[:, mask]
        return x[mask[:, None].expand(x.shape[:-1])][None]

    @torch.no_grad()
    def place_by_kmeans(self, rows: Tensor) -> None:
        """Lloyd's algorithm on ``[g, n, d]``; a cluster without vectors keeps its place."""
        means = torch.stack([self._sample(part, self.codebook_size) for part in rows])
        counts = torch.zeros_like(self.cluster_size)
        for _ in range(self.kmeans_iters):
            metric = "dot" if self.use_cosine_sim else "l2"
            for mean, count, part in zip(means, counts, rows, strict=True):
                found = _vq_accumulate(
                    part, vq_nearest(part, mean, metric=metric), self.codebook_size, 1
                )
                if self.sync_samples:
                    for total in found:
                        dist.all_reduce(total)
                count.copy_(found[0])
                new = found[1] / found[0].clamp_min(1)[:, None]
                new = unit(new) if self.use_cosine_sim else new
                mean.copy_(torch.where(found[0][:, None] > 0, new, mean))
        self.embed_avg.data.copy_(means * counts[..., None])
        self.cluster_size.data.copy_(counts)
        self.update_ema()
        self.initted.data.fill_(True)

    def _sample(self, rows: Tensor, count: int) -> Tensor:
        """`count` rows of ``[n, d]``, different ones if there are as many."""
        n = len(rows)
        if n >= count and not self.sync_samples:
            return rows[torch.randperm(n, device=rows.device)[:count]]
        chosen = rows[torch.randint(n, (count,), device=rows.device)]
        if self.sync_samples:
            dist.broadcast(chosen, src=0)
        return chosen

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        dim: int,
        indices: Tensor,
        mask: Tensor | None = None,
        weight: Weight = None,
        accumulate: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """Takes the vectors of a step and their indices into the averages, the averages into the
        codes, and gives codes that have died new places.
        """
        ema_update = self.ema_update if ema_update is None else ema_update
        if not ema_update and self.threshold_ema_dead_code <= 0:
            return
        counts, sums = self._statistics(x, dim, indices, mask)
        if callable(weight):
            weight = weight(sums, counts)
        for average, new in ((self.cluster_size, counts), (self.embed_avg, sums)):
            if accumulate:
                average.grad = new if average.grad is None else average.grad.add_(new)
                continue
            if average.grad is not None:
                new += average.grad
                average.grad = None
            _lerp(average, new.to(average), 1 - self.decay, weight)
        if accumulate:
            return
        if ema_update and not self.manual_ema_update:
            self.update_ema()
        if self.training:
            self.expire_codes_(x, dim, mask)

    def _statistics(
        self, x: Tensor, dim: int, indices: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """How many vectors chose each code ``[g, k]``, and their sums ``[g, k, d]``."""
        x = x.detach().float()
        if mask is not None:
            x, indices = x[mask], indices[mask]
            dim = x.ndim - 1
        parts = [(x, indices, dim)]
        if self.num_codebooks > 1:
            pairs = zip(x.unbind(dim - 1), indices.unbind(dim - 1), strict=True)
            parts = [(*pair, dim - 1) for pair in pairs]
        found = [_vq_accumulate(x, i, self.codebook_size, dim) for x, i, dim in parts]
        counts, sums = (torch.stack(tensors) for tensors in zip(*found, strict=True))
        if self.use_ddp:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        return counts, sums

    @torch.no_grad()
    def update_ema(self) -> None:
        """Moves the codes to the averages, their counts smoothed by `eps` (Laplace)."""
        total = self.cluster_size.sum(-1, keepdim=True)
        share = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps)
        embed = self.embed_avg / (share * total)[..., None]
        self.embed.data.copy_(unit(embed) if self.use_cosine_sim else embed)

    @torch.no_grad()
    def expire_codes_(self, x: Tensor, dim: int, mask: Tensor | None = None) -> None:
        """Puts codes that fewer vectors choose than the threshold where some vector is."""
        dead = self.cluster_size < self.threshold_ema_dead_code
        if not dead.any():
            return
        rows = self.rows(x, dim, mask)
        rows = unit(rows) if self.use_cosine_sim else rows
        for i, (part, where) in enumerate(zip(rows, dead, strict=True)):
            places = where.nonzero()[:, 0]
            if not self.sync_samples:
                if len(part) < len(places):  # the others wait, so that no two get the same
                    order = torch.randperm(len(places), device=places.device)
                    places = places[order[: len(part)]].sort().values
                if len(part) == 0:
                    continue
            sampled = self._sample(part, len(places)).to(self.embed.dtype)
            self.embed.data[i, places] = sampled
            self.cluster_size.data[i, places] = self.threshold_ema_dead_code
            self.embed_avg.data[i, places] = sampled * self.threshold_ema_dead_code


def _lerp(average: Tensor, new: Tensor, share: float, weight: Tensor | float | None) -> None:
    """Moves an average ``[g, k, ...]`` towards `new`, by as much of `share` as `weight` says."""
    if isinstance(weight, Tensor):
        wanted = average.shape[:2]
        if weight.shape not in (wanted, wanted[1:]):
            raise ValueError(
                f"VectorQuantize: ema_update_weight is {list(weight.shape)}, expected "
                f"{list(wanted)}"
            )
        weight = weight.expand(wanted).reshape(*wanted, *(1 for _ in average.shape[2:]))
        average.data.lerp_(new, share * weight.to(new))
    else:
        average.data.lerp_(new, share * (1.0 if weight is None else weight))
