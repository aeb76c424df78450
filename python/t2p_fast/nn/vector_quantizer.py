# SPDX-License-Identifier: Apache-2.0
"""Vector quantisation with a codebook learned by gradient or by moving averages."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from t2p_fast.nn._packed import WeightState, can_be_kept
from t2p_fast.ops import kmeans, vq_lookup, vq_nearest, vq_pack, vq_quantize


class CodebookUsage(NamedTuple):
    """How evenly codes are used; see :func:`codebook_usage`."""

    perplexity: Tensor  # scalar in [1, k], k if all codes are equally frequent
    used: Tensor  # scalar, share of the codes that occur


def codebook_usage(indices: Tensor, num_embeddings: int) -> CodebookUsage:
    """Perplexity ``exp(-sum_j p_j ln p_j)`` of the codes' frequencies, and the share that occurs.

    Args:
        indices: int64 of any shape; negative ones, which stand for no code, do not count.
        num_embeddings: number of codes, ``k``.
    """
    chosen = indices.flatten()
    counts = torch.bincount(chosen[chosen >= 0], minlength=num_embeddings).float()
    share = counts / counts.sum().clamp_min(1)
    return CodebookUsage(torch.special.entr(share).sum().exp(), (counts > 0).float().mean())


def rotate_gradient(x: Tensor, codes: Tensor, dim: int) -> Tensor:
    """``codes``, with the gradient of the rotation and scaling that takes ``x`` to them.

    The rotation trick (Fifty et al., "Restructuring Vector Quantization with the Rotation Trick",
    2024, section 4): ``|c|/|x| (x - 2 r (r.x) + 2 c' (x'.x))`` with ``x'`` and ``c'`` of length 1
    and ``r`` their normalised sum, all of them constants to the gradient.
    """
    with torch.no_grad():
        unit_x, unit_c = F.normalize(x, dim=dim), F.normalize(codes, dim=dim)
        middle = F.normalize(unit_x + unit_c, dim=dim)
        scale = codes.norm(dim=dim, keepdim=True) / x.norm(dim=dim, keepdim=True).clamp_min(1e-12)
    along_middle = (x * middle).sum(dim, keepdim=True)
    along_x = (x * unit_x).sum(dim, keepdim=True)
    rotated = scale * (x - 2 * along_middle * middle + 2 * along_x * unit_c)
    # The value is the codes' to the bit.
    result: Tensor = codes.detach() + (rotated - rotated.detach())
    return result


class _PackedCodes(NamedTuple):
    state: WeightState
    codes: Tensor
    packed: Tensor


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
        metric: ``"l2"``, or ``"cosine"`` for vectors and codes scaled to length 1 (Yu et al.,
            "Vector-quantized Image Modeling with Improved VQGAN", 2022, section 3.2).
        gradient: how it passes from the codes to the input: ``"straight_through"``, or
            ``"rotation"`` (see :func:`rotate_gradient`).
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
        metric: Literal["l2", "cosine"] = "l2",
        gradient: Literal["straight_through", "rotation"] = "straight_through",
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
        if metric not in ("l2", "cosine"):
            raise ValueError(f"VectorQuantizer: metric is {metric!r}, expected 'l2' or 'cosine'")
        if gradient not in ("straight_through", "rotation"):
            raise ValueError(
                f"VectorQuantizer: gradient is {gradient!r}, expected 'straight_through' or "
                "'rotation'"
            )
        self.metric = metric
        self.gradient = gradient
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
        self._packed: _PackedCodes | None = None
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            _keep_loaded_codes
        )

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, ema_decay={self.ema_decay}, "
            f"dead_code_threshold={self.dead_code_threshold}, metric={self.metric!r}, "
            f"gradient={self.gradient!r}"
        )

    @property
    def codebook(self) -> Tensor:
        """The codes ``[k, d]`` as they are learned; see :meth:`codes`."""
        return self.embedding.weight

    def codes(self) -> Tensor:
        """The codes ``[k, d]`` as they are used: fp32, and of length 1 for ``"cosine"``."""
        codes = self.codebook.float()
        return F.normalize(codes, dim=-1) if self.metric == "cosine" else codes

    def _vectors(self, x: Tensor) -> Tensor:
        x = x.float()
        return F.normalize(x, dim=self.channel_dim) if self.metric == "cosine" else x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises ``x``.

        Args:
            x: ``[b, d, h, w]`` (or ``[n, d]``, ``[b, n, d]`` with ``channel_dim=-1``).

        Returns:
            The codes in the shape of ``x``, fp32, with the gradient for ``x``; their int64 indices
            in that shape without the channels; and the loss, a scalar (equation 3's second and
            third terms; without the second for a moving-average codebook).
        """
        x = self._vectors(x)
        if self.training and self.needs_init:
            self.init_by_kmeans(x)
        learned = self.ema_decay is not None and self.training
        # The update below must not change what the backward pass needs.
        codes = self.codes().clone() if learned else self.codes()
        quantized, indices, loss, *statistics = vq_quantize(
            x, codes, beta=self.beta, channel_dim=self.channel_dim, return_statistics=learned,
            codebook_weight=1.0 if self.ema_decay is None else 0.0,
        )  # fmt: skip
        if learned:
            self._update_codebook(x.detach(), *statistics)
        if self.gradient == "rotation":
            quantized = rotate_gradient(x, quantized.detach(), self.channel_dim)
        return quantized, indices, loss

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """Indices of the nearest codes, without gradient.

        Outside of training, on the CPU, the packed codebook is kept for the next call until the
        weight changes, which its version counter tells; a change through ``.data`` does not count.
        """
        codes, packed = self._packed_codes()
        return vq_nearest(self._vectors(x), codes, channel_dim=self.channel_dim, packed=packed)

    def _packed_codes(self) -> tuple[Tensor, Tensor | None]:
        weight = self.codebook
        if not can_be_kept(self, weight):
            return self.codes(), None
        if self._packed is None or not self._packed.state.is_still(weight):
            codes = self.codes()
            self._packed = _PackedCodes(WeightState.of(weight), codes, vq_pack(codes))
        return self._packed.codes, self._packed.packed

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}  # type: ignore[no-untyped-call]

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes by index, with the channels where ``channel_dim`` says."""
        return vq_lookup(indices, self.codes(), channel_dim=self.channel_dim)

    @torch.no_grad()
    def _update_codebook(self, x: Tensor, count: Tensor, total: Tensor) -> None:
        assert self.ema_decay is not None
        if distributed():
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.ema_count.lerp_(count.to(self.ema_count.dtype), 1 - self.ema_decay)
        self.ema_sum.lerp_(total.to(self.ema_sum.dtype), 1 - self.ema_decay)
        # A code that nothing chose yet keeps its place.
        used = self.ema_count > 1e-6
        mean = self.ema_sum / self.ema_count.clamp_min(1e-6)[:, None]
        self.codebook.copy_(torch.where(used[:, None], mean, self.codebook))
        if self.dead_code_threshold > 0:
            self._revive(x)

    def _revive(self, x: Tensor) -> None:
        vectors = x.movedim(self.channel_dim, -1).reshape(-1, x.shape[self.channel_dim])
        dead = self.ema_count < self.dead_code_threshold
        if len(vectors) == 0 or not (torch.compiler.is_compiling() or dead.any()):
            return
        chosen = vectors[torch.randint(len(vectors), (len(dead),), device=x.device)]
        if distributed():
            dist.broadcast(chosen, src=0)
        where = dead[:, None]
        self.codebook.copy_(torch.where(where, chosen.to(self.codebook.dtype), self.codebook))
        self.ema_sum.copy_(torch.where(where, chosen.to(self.ema_sum.dtype), self.ema_sum))
        self.ema_count.masked_fill_(dead, 1.0)

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
        if distributed():
            dist.broadcast(centroids, src=0)
        self.codebook.copy_(centroids)
        if self.ema_decay is not None:
            # As if each code had been chosen once: soon outweighed by what training sees.
            self.ema_count.fill_(1.0)
            self.ema_sum.copy_(centroids)
        self.needs_init = False


def _keep_loaded_codes(quantizer: nn.Module, incompatible: Any) -> None:
    """A loaded codebook is not to be overwritten by k-means on the next batch."""
    assert isinstance(quantizer, VectorQuantizer)
    if not any(key.endswith("embedding.weight") for key in incompatible.missing_keys):
        quantizer.needs_init = False


def distributed() -> bool:
    """Whether there are other processes to keep the codebook alike with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
