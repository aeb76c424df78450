# SPDX-License-Identifier: Apache-2.0
"""The quantisers of taming-transformers (VQGAN), on the kernels of `vq`; it need not be installed.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021, section 3.1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from t2p_fast.nn.vector_quantizer import codebook_usage
from t2p_fast.ops import vq_lookup, vq_quantize

__all__ = ["VectorQuantizer", "VectorQuantizer2"]


class VectorQuantizer2(nn.Module):
    """Takes the place of `taming.modules.vqvae.quantize.VectorQuantizer2`::

        from t2p_fast.interop.taming import VectorQuantizer2

    Arguments, results and state dict are those of that class. The index is that of a true nearest
    code where rounding decides there, the codes are returned to the bit, and the loss is float32.

    Args:
        n_e: number of codes.
        e_dim: their channels.
        beta: weight of a term of the loss; see `legacy`.
        remap: a ``.npy`` file with the codes that are in use; indices count those.
        unknown_index: what a code that is not in use gets: ``"random"``, one of those in use;
            ``"extra"``, an index of its own after them; or an integer.
        sane_index_shape: whether indices are ``[b, h, w]``; otherwise ``[b h w]``, or ``[b h w,
            1]`` with `remap`.
        legacy: whether `beta` weighs the codebook's term, ``mean((sg(z) - e)^2)``, as published
            checkpoints were trained; otherwise, as in the paper, ``mean((z - sg(e))^2)``.

    Attributes:
        re_embed: how many indices there are.
    """

    used: Tensor  # [m], codes that are in use; only with `remap`

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1 / n_e, 1 / n_e)
        self.remap, self.sane_index_shape = remap, sane_index_shape
        self.re_embed = n_e
        if remap is None:
            return
        import numpy

        self.register_buffer("used", torch.tensor(numpy.load(remap)))
        if self.used.ndim != 1 or not ((self.used >= 0) & (self.used < n_e)).all():
            raise ValueError(
                f"VectorQuantizer2: remap {remap} holds {list(self.used.shape)} {self.used.dtype}, "
                f"expected a list of indices below {n_e}"
            )
        self.re_embed = len(self.used)
        if unknown_index == "extra":
            unknown_index = self.re_embed
            self.re_embed += 1
        elif unknown_index != "random" and not isinstance(unknown_index, int):
            raise ValueError(
                f"VectorQuantizer2: unknown_index is {unknown_index!r}, expected 'random', 'extra' "
                "or an integer"
            )
        self.unknown_index = unknown_index

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Indices of codes, of any shape, as indices into those in use: O(k + n)."""
        used = self.used.to(inds)
        places = torch.arange(len(used), device=inds.device, dtype=inds.dtype)
        table = inds.new_full((self.n_e,), len(used))
        table.scatter_reduce_(0, used, places, "amin")  # the first of equals
        new = table[inds]
        unknown = new == len(used)
        if self.unknown_index == "random":
            drawn = torch.randint(self.re_embed, (int(unknown.sum()),))
            new[unknown] = drawn.to(new)
        else:
            new[unknown] = int(self.unknown_index)
        return new

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """The way back; the extra index becomes the first code in use."""
        used = self.used.to(inds)
        if self.re_embed > len(used):
            inds = inds.masked_fill(inds >= len(used), 0)
        return used[inds]

    def forward(
        self,
        z: Tensor,
        temp: float | None = None,
        rescale_logits: bool = False,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, tuple[Any, Any, Tensor]]:
        """Quantises `z` ``[b, e_dim, h, w]``.

        Args:
            z: float32, bfloat16 or float16.
            temp: None or 1, like the next two there for the sake of the Gumbel quantiser.
            rescale_logits: False.
            return_logits: False.

        Returns:
            The codes in the shape of `z`, with its gradient; the loss; and None, None (perplexity
            and one-hot codes, which that class leaves out too) and the indices.

        Raises:
            ValueError: `z` is of another shape, or an argument is not for this quantiser.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError(
                f"VectorQuantizer2: temp={temp}, rescale_logits={rescale_logits}, return_logits="
                f"{return_logits}; expected temp=1 and neither: they are for the Gumbel quantiser"
            )
        quantized, loss, indices = self._quantize(z)
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if not self.sane_index_shape:
            indices = indices.reshape(-1) if self.remap is None else indices.reshape(-1, 1)
        return quantized, loss, (None, None, indices)

    def _quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if z.ndim != 4 or z.shape[1] != self.e_dim:
            raise ValueError(
                f"{type(self).__name__}: z is {list(z.shape)}, expected [b, {self.e_dim}, h, w]"
            )
        codebook = self.embedding.weight
        z = z.to(torch.promote_types(z.dtype, codebook.dtype))
        commitment, movement = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        quantized, indices, loss = vq_quantize(
            z, codebook, beta=commitment, codebook_weight=movement, channel_dim=1
        )
        return quantized.contiguous(), loss, indices

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None) -> Tensor:
        """Codes by index.

        Args:
            indices: as `forward` returns them, in any shape that holds as many as `shape`.
            shape: ``(b, h, w, e_dim)``, or None for codes in the shape of the indices.

        Returns:
            ``[b, e_dim, h, w]``, or the codes in the last dimension if `shape` is None.
        """
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        if shape is None:
            return vq_lookup(indices, self.embedding.weight)
        return vq_lookup(indices.reshape(*shape[:3]), self.embedding.weight, channel_dim=1)


class VectorQuantizer(VectorQuantizer2):
    """Takes the place of `taming.modules.vqvae.quantize.VectorQuantizer`, the older class.

    It also returns the codes' perplexity and the one-hot matrix ``[b h w, n_e]``; who does not need
    them is better served by `VectorQuantizer2`, whose state dict is the same.

    Args:
        n_e: number of codes.
        e_dim: their channels.
        beta: weight of the codebook's term of the loss.
    """

    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__(n_e, e_dim, beta)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:  # type: ignore[override]
        """Quantises `z` ``[b, e_dim, h, w]``.

        Returns:
            The codes, the loss, and the perplexity, the one-hot codes and the indices ``[b h w,
            1]``.
        """
        quantized, loss, indices = self._quantize(z)
        column = indices.reshape(-1, 1)
        one_hot = quantized.new_zeros(len(column), self.n_e).scatter_(1, column, 1)
        perplexity = codebook_usage(indices, self.n_e).perplexity
        return quantized, loss, (perplexity, one_hot, column)
