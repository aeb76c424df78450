# SPDX-License-Identifier: Apache-2.0
"""Mean field whose label weights are of low rank, on a CPU.

Sizes: `b` pictures, `n` positions, `v` labels, `k` the rank.
"""

import torch
from torch import Tensor

from t2p_fast._library import _C
from t2p_fast.memory import empty_like
from t2p_fast.ops.mrf_graph import Edges, all_edges, bad_unary
from t2p_fast.ops.mrf_rounds import counts, surest

__all__ = ["LowRankField"]

_MOST_RANK = 256  # that the kernel takes
_WORTH_LABELS = 32  # that it goes through in the time that one takes by itself


class LowRankField:
    """``W_c = a b^T``: what positions say to each other is ``q b``.

    ``W_s q (a b^T)^T = (W_s (q b)) a^T``, so that mixing costs as much as the rank has numbers, and
    no message as long as a row is ever made. Where scores of -inf rule most labels out, as those of
    a generator that truncates its distribution do, the others are found once and are all that is
    looked at, and positions that have a single one are known.
    """

    def __init__(
        self, unary: Tensor, edges: Edges | None, matrix: Tensor | None, a: Tensor, b: Tensor,
        known: Tensor | None, temperature: float,
    ) -> None:  # fmt: skip
        self.unary, self.shape, self.temperature = unary, unary.shape[:2], temperature
        v, self.threads = unary.shape[2], torch.get_num_threads()
        self.scores = unary.float().contiguous().view(-1, v)
        found = all_edges(matrix) if matrix is not None else edges
        assert found is not None  # there is one or the other
        self.edges: Edges = found
        self.a, self.b = a.float().contiguous(), b.float().contiguous()
        self.spoken = self.b
        rows = len(self.scores)
        self.words = [self.scores.new_empty(rows, a.shape[1]) for _ in range(2)]
        if known is None:
            self.row = torch.arange(rows, device=unary.device)
            self.labels = torch.empty_like(self.row)
        else:
            self.labels = known.flatten().clone()
            self.row, fixed = (
                where.nonzero()[:, 0] for where in (self.labels < 0, self.labels >= 0)
            )
            self._fix(fixed)
        self._find_candidates(v)

    @staticmethod
    def fits(unary: Tensor, a: Tensor, damping: float) -> bool:
        """Whether there is a kernel for it."""
        return a.shape[1] <= _MOST_RANK and damping == 0 and not unary.is_cuda

    def _fix(self, row: Tensor) -> None:
        """What positions say from now on, as their labels are."""
        said = self.spoken.index_select(0, self.labels.index_select(0, row))
        for words in self.words:
            words.index_copy_(0, row, said)

    def _find_candidates(self, v: int) -> None:
        candidate = self.row.new_empty(len(self.row), v // _WORTH_LABELS)
        candidates = torch.empty_like(self.row)
        self.candidate: Tensor | None = None
        self.candidates: Tensor | None = None
        if _C.mrf_find_candidates(self.scores, self.row, candidate, candidates, self.threads):
            if len(candidates):
                candidate = candidate[:, : int(candidates.max())].contiguous()
                self.labels.index_copy_(0, self.row, candidate[:, 0])  # of one there is no other
            self.candidate, self.candidates = candidate, candidates
            self._keep(candidates > 1)
        else:
            self.a, self.b = self.a.t().contiguous(), self.b.t().contiguous()

    def _keep(self, kept: Tensor) -> None:
        """Fixes all rows but these."""
        self._fix(self.row[~kept])
        still = kept.nonzero()[:, 0]
        self.row = self.row.index_select(0, still)
        if self.candidate is not None and self.candidates is not None:
            self.candidate = self.candidate.index_select(0, still)
            self.candidates = self.candidates.index_select(0, still)

    def _infer(self, iterations: int, q: Tensor | None, sure: Tensor | None = None) -> None:
        """Finds `labels`, probabilities `q`, and with `sure` that of the likeliest."""
        for step in range(iterations + 1):
            last = step == iterations
            bad = _C.mrf_low_rank_step(
                *self.edges, self.scores, self.row, self.words[0] if step else None, self.a, self.b,
                self.candidate, self.candidates, self.temperature, None if last else self.words[1],
                q if last else None, sure if last else None, self.labels if last else None,
                self.threads,
            )  # fmt: skip
            if bad >= 0 and step == 0:
                raise bad_unary(int(self.row[bad]) % self.shape[1])
            self.words.reverse()

    def mean_field(self, iterations: int) -> Tensor:
        """``[b, n, v]``, as `mrf_mean_field` returns it."""
        q = empty_like(self.scores)
        known = self.row.new_ones(len(q), dtype=torch.bool).index_fill_(0, self.row, False)
        fixed = known.nonzero()[:, 0]
        q.index_fill_(0, fixed, 0.0)
        q[fixed, self.labels[fixed]] = 1
        self._infer(iterations, q)
        return q.view(self.unary.shape).to(self.unary.dtype)

    def likeliest(self, iterations: int, rounds: int) -> Tensor:
        """``[b, n]``, as `mrf_likeliest` returns it."""
        if rounds > 1 and len(self.row):
            self._settle(iterations, rounds)
        if len(self.row):
            self._infer(iterations, None)
        return self.labels.view(self.shape)

    def _settle(self, iterations: int, rounds: int) -> None:
        """All inferences but the last."""
        left = self.row.new_zeros(self.shape, dtype=torch.bool)
        sure = self.scores.new_empty(self.shape)
        choice = None
        if self.candidate is None:
            choice = self.scores[self.row].isfinite().sum(1) > 1
        left.view(-1)[self.row] = True if choice is None else choice
        for count in counts(left, rounds):
            if not len(self.row):
                break
            self._infer(iterations, None, sure.view(-1))
            settled = surest(sure, left, count)
            left = left & ~settled
            self._keep(~settled.view(-1)[self.row])
