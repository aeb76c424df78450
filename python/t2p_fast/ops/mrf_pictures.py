# SPDX-License-Identifier: Apache-2.0
"""What mean field is to find in pictures, and what their positions hear from each other."""

import torch
from torch import Tensor

from t2p_fast._library import _C
from t2p_fast.ops.mrf_graph import check_labels_known

__all__ = ["Pictures"]

_HAS_TILES: bool = _C.mrf_has_mix()


class Pictures:
    """The positions that are to be found, as rows of one matrix, and which picture each is of.

    With known positions on a CPU alone: see `Gathered`.
    """

    def __init__(self, unary: Tensor, known: Tensor | None) -> None:
        self.b, self.n, self.v = unary.shape
        everywhere = torch.arange(self.b * self.n, device=unary.device)
        scores = unary.float().contiguous().view(-1, self.v)
        if known is None:
            self.known = None
            self.slot = self.row = everywhere
            self.unary = scores
            return
        check_labels_known(known, self.v)
        self.known = known
        flat = known.flatten()
        self.row = (flat < 0).nonzero()[:, 0]
        self.slot = torch.where(flat < 0, (flat < 0).cumsum(0) - 1, -1 - flat)
        self.unary = scores[self.row]
        self.counts = (known < 0).sum(1).tolist()

    def listen(self, w_s: Tensor) -> None:
        """Sets the weights of `mix`: a picture's, and those of its known positions with labels."""
        self.w_s, self.parts = w_s, []
        self.by_tiles = _HAS_TILES and w_s.dtype == torch.bfloat16 and not w_s.is_cuda
        none = torch.empty(0, dtype=torch.int64, device=w_s.device)
        if self.known is None:
            whole = w_s.contiguous(), w_s.new_empty(self.n, 0, dtype=torch.float32), none
            self.counts, self.parts = [self.n] * self.b, [whole] * self.b
            return
        for labels in self.known:
            free = labels < 0
            away, fixed = w_s[free], ~free
            weights, others = away[:, free], away[:, fixed]
            if self.by_tiles:
                weights, others = weights.contiguous(), others.float().contiguous()
            self.parts.append((weights, others, labels[fixed]))

    def mix(self, q: Tensor, into: Tensor, threads: int) -> None:
        """``W_s q`` of the unknown positions. A known one says a number for its label alone."""
        if self.known is None and not self.by_tiles:
            shape = self.b, self.n, self.v
            torch.matmul(self.w_s, q.view(shape), out=into.view(shape))
            return
        one = self.b == 1
        rows, places = ([q], [into]) if one else (q.split(self.counts), into.split(self.counts))
        parts = zip(self.parts, rows, places, strict=True)
        for (weights, others, labels), part, to in parts:
            if self.by_tiles:
                _C.mrf_mix(weights, part, others, labels, to, threads)
                continue
            torch.mm(weights, part, out=to)
            to.index_add_(1, labels, others)

    def fill(self, q: Tensor) -> Tensor:
        """The rows in their places, and known labels one-hot."""
        if self.known is None:
            return q.view(self.b, self.n, self.v)
        full = q.new_zeros(self.b * self.n, self.v)
        full[self.row] = q
        flat = self.known.flatten()
        fixed = (flat >= 0).nonzero()[:, 0]
        full[fixed, flat[fixed]] = 1
        return full.view(self.b, self.n, self.v)
