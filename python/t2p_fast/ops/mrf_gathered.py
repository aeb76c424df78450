# SPDX-License-Identifier: Apache-2.0
"""What mean field is to find in pictures on a GPU, without the host having to know what that is.

Sizes: `b` pictures, `n` positions, `v` labels, `u` rows of every picture.
"""

import torch
from torch import Tensor

__all__ = ["Gathered"]


class Gathered:
    """`Pictures` where some positions are known, with as many rows in every picture.

    They are the unknown positions in their order. Pictures with fewer than `u` of them fill up with
    known ones, which compute along, but nobody listens to them.
    """

    def __init__(self, unary: Tensor, known: Tensor, unknown: int | None) -> None:
        self.b, self.n, self.v = unary.shape
        free = known < 0
        self.u = rows_of(free, unknown)
        # Labels out of range must not be an index out of range: to raise would mean to wait.
        self.known = known.clamp_max(self.v - 1)
        # On trust alone, `unknown` could leave positions without a row.
        self.lost = free & (free.sum(1, keepdim=True) > self.u)
        position = torch.arange(self.n, device=known.device)
        order = torch.where(free, position, position + self.n).argsort(1)
        self.order = order[:, : self.u].contiguous()
        self.label = self.known.gather(1, self.order)
        picture = torch.arange(self.b, device=known.device)[:, None]
        self.row = (self.order + self.n * picture).flatten()
        place = (free.cumsum(1) - 1).clamp_max(self.u - 1) + self.u * picture
        self.slot = torch.where(free, place, -1 - self.known).flatten()
        scores = unary.reshape(-1, self.v).index_select(0, self.row).float()
        # Scores of known positions may be anything, also NaN.
        self.unary = torch.where(self.label.view(-1, 1) < 0, scores, 0)

    def listen(self, w_s: Tensor) -> None:
        """Sets the weights of `mix`, and with them what known positions say."""
        heard = w_s[self.order]
        within = heard.gather(2, self.order[:, None].expand(self.b, self.u, self.u))
        self.weights = torch.where((self.label < 0)[:, None], within, 0)
        others = torch.where((self.known >= 0)[:, None], heard, 0).float()
        said = others.new_zeros(self.b * self.u * self.v)
        row = torch.arange(self.b * self.u, device=w_s.device).view(self.b, self.u, 1)
        entry = row * self.v + self.known.clamp_min(0)[:, None]
        # Sorted, not by atomics: a sum that depends on the order of threads is another every time.
        said.index_put_((entry.flatten(),), others.flatten(), accumulate=True)
        self.said = said.view(self.b, self.u, self.v).to(w_s.dtype)

    def mix(self, q: Tensor, into: Tensor, threads: int) -> None:  # noqa: ARG002
        """``W_s q`` of the rows: what unknown positions say, and what known ones do."""
        shape = self.b, self.u, self.v
        torch.baddbmm(self.said, self.weights, q.view(shape), out=into.view(shape))

    def fill(self, q: Tensor) -> Tensor:
        """The rows in their places, and known labels one-hot; NaNs where there was no row."""
        full = q.new_zeros(self.b, self.n, self.v)
        ones = (self.known >= 0).to(q.dtype).masked_fill(self.lost, torch.nan)
        full.scatter_(2, self.known.clamp_min(0)[..., None], ones[..., None])
        found = torch.where(self.label.view(-1, 1) < 0, q, 0)
        full.view(-1, self.v).index_add_(0, self.row, found)
        return full


def rows_of(free: Tensor, unknown: int | None) -> int:
    """How many rows a picture has, of unknown positions `free` ``[b, n]``."""
    b, n = free.shape
    if unknown is not None:
        return min(unknown, n)
    if b == 0 or _is_capturing():  # what is replayed has to serve for any number
        return n
    return most_unknown(free)


def most_unknown(free: Tensor) -> int:
    """The number of the picture that has most: for this the host waits."""
    return int(free.sum(1).max())


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
