# SPDX-License-Identifier: Apache-2.0
"""MarkovGen's layer: a Markov random field over picture tokens, with learned weights.

S. Jayasumana et al., "MarkovGen: Structured Prediction for Efficient Text-to-Image Generation",
CVPR 2024, arXiv 2308.10997, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2p_fast._checks import has_modes
from t2p_fast.checkpoints import PretrainedModel, check_numbers
from t2p_fast.nn._packed import WeightState, can_be_kept
from t2p_fast.ops import LowRank, mrf_likeliest, mrf_mean_field, mrf_pack


@dataclass(frozen=True)
class TokenMRFConfig:
    """Size of a :class:`TokenMRF`.

    Attributes:
        vocab_size: number of picture tokens ``V``.
        token_grid: tokens along a side, so ``n = token_grid ** 2``.
        rank: of the label weights ``W_c = a b^T``; 0 learns the whole matrix, as the paper.
        iterations: of mean field.
        rounds: inferences in which :meth:`TokenMRF.finish` settles the tokens that are missing. One
            finds all at once, as in the paper, each as it is likeliest by itself: of two places
            for an object it then takes both or neither. With more, what is settled has a say in
            what follows.
    """

    vocab_size: int = 1024
    token_grid: int = 8
    rank: int = 0
    iterations: int = 5
    rounds: int = 1

    def __post_init__(self) -> None:
        check_numbers(
            self, "TokenMRFConfig: ", vocab_size="[1, 1048576]", token_grid="[1, 256]",
            rank="[0, 65536]", iterations="[1, 1000]", rounds="[1, 65536]",
        )  # fmt: skip


class TokenMRF(PretrainedModel):
    """Makes the tokens of a picture fit each other: mean field with learned weights.

    Weights of pairs of positions ``W_s [n, n]`` begin at the neighbours on the grid, weights of
    pairs of labels ``W_c [V, V]`` at zero: a new field changes nothing.
    """

    config_class = TokenMRFConfig
    config: TokenMRFConfig

    def __init__(self, config: TokenMRFConfig) -> None:
        super().__init__(config)
        n, v, r = config.token_grid**2, config.vocab_size, config.rank
        self.w_s = nn.Parameter(torch.empty(n, n))
        self.w_c = nn.Parameter(torch.empty(v, r if r > 0 else v))
        self.w_b: nn.Parameter | None = nn.Parameter(torch.empty(v, r)) if r > 0 else None
        self._packed: tuple[WeightState, Tensor] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the weights to those before training."""
        if self.w_s.is_meta:
            return
        grid = self.config.token_grid
        position = torch.cartesian_prod(*[torch.arange(grid, dtype=torch.float32)] * 2)
        near = torch.exp(-0.5 * torch.cdist(position, position).square())
        near.fill_diagonal_(0)
        self.w_s.copy_(near / near.sum(1, keepdim=True).clamp_min(1e-6))
        self.w_c.zero_()
        if self.w_b is not None:
            nn.init.normal_(self.w_b)

    def forward(
        self,
        unary: Tensor,
        known: Tensor | None = None,
        unknown: int | None = None,
        candidates: Tensor | None = None,
    ) -> Tensor:
        """Probabilities of the tokens.

        Args:
            unary: ``[b, n, V]``, scores of a generator.
            known: ``[b, n]`` int64, tokens that stay, negative where they are to be found.
            unknown: how many those are in a picture, at most: nothing on CUDA waits to find out.
            candidates: ``[b, n, k]`` int64, different ones at a position: `unary`, ``[b, n, k]``
                then, has the scores of these tokens alone, and all others are impossible. Exact,
                and costs `k` tokens a position instead of ``V``, in memory too, forward and
                backward: for training on what a generator may draw. It needs `known`.

        Weights and scores in float64 are computed with in float32.

        Returns:
            ``[b, n, V]``, one-hot where known; see :func:`t2p_fast.ops.mrf_mean_field`. With
            `candidates` ``[b, n, k]`` float32, without meaning where known.
        """
        if candidates is not None:
            return self._among(unary, candidates, known)
        q = mrf_mean_field(
            _single(unary), _single(self.w_s), self._labels(), known=known, unknown=unknown,
            **self._options(),
        )  # fmt: skip
        return q.to(unary.dtype)

    def _among(self, scores: Tensor, candidates: Tensor, known: Tensor | None) -> Tensor:
        b, n, k = scores.shape
        if candidates.shape != (b, n, k) or known is None or known.shape != (b, n):
            got = None if known is None else list(known.shape)
            raise ValueError(
                f"TokenMRF: candidates is {list(candidates.shape)} and known {got}, expected "
                f"{[b, n, k]} as unary, and {[b, n]}"
            )
        compiling = torch.compiler.is_compiling() or has_modes()
        if scores.device.type == "cpu" and not compiling:  # a GPU would have to wait to know
            _check_candidates(scores, candidates, known, self.config.vocab_size)
        with torch.autocast(scores.device.type, enabled=False):
            w_s, heard = self.w_s.float(), self.w_c.float()
            spoken = heard.t() if self.w_b is None else self.w_b.float()
            unknown = (known < 0)[..., None]
            scores = torch.where(unknown, scores.float(), 0.0)
            said_by_known, chosen = spoken[known.clamp_min(0)], candidates.view(b * n, k)
            q = scores.softmax(-1)
            for _ in range(self.config.iterations):
                said = F.embedding_bag(
                    chosen, spoken, mode="sum", per_sample_weights=q.view(b * n, k)
                )
                mixed = w_s @ torch.where(unknown, said.view(b, n, -1), said_by_known)
                if self.w_b is None:
                    message = mixed.gather(2, candidates)
                else:
                    message = (heard[candidates] @ mixed[..., None])[..., 0]
                q = (scores + message).softmax(-1)
        return q

    def _labels(self) -> Tensor | LowRank:
        w_c = _single(self.w_c)
        return w_c if self.w_b is None else LowRank(w_c, _single(self.w_b))

    def _options(self) -> dict[str, Any]:
        return {"iterations": self.config.iterations, "packed": self._packed_labels()}

    def _packed_labels(self) -> Tensor | None:
        """Label weights in bfloat16, outside of training: packed once for all calls."""
        weight = self.w_c
        if self.w_b is not None or weight.dtype != torch.bfloat16 or not can_be_kept(self, weight):
            return None
        if self._packed is None or not self._packed[0].is_still(weight):
            self._packed = WeightState.of(weight), mrf_pack(weight)
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def finish(self, scores: Tensor, tokens: Tensor, unknown: int | None = None) -> Tensor:
        """Fills in what is masked with the likeliest tokens, in ``config.rounds`` inferences.

        See :func:`t2p_fast.ops.mrf_likeliest`.

        Args:
            scores: ``[b, n, V]``, of the generator's last round; -inf is never chosen.
            tokens: ``[b, n]`` int64, with ``V`` where masked.
            unknown: how many are masked in a picture, at most: as of `forward`.

        Returns:
            Tokens ``[b, n]``.
        """
        known = tokens.masked_fill(tokens == self.config.vocab_size, -1)
        return mrf_likeliest(
            _single(scores), _single(self.w_s), self._labels(), known=known, unknown=unknown,
            rounds=self.config.rounds, **self._options(),
        )  # fmt: skip


def _single(x: Tensor) -> Tensor:
    """As the ops take it: float64 in float32."""
    return x.float() if x.dtype == torch.float64 else x


def _check_candidates(scores: Tensor, candidates: Tensor, known: Tensor, v: int) -> None:
    if known.numel() == 0:
        return
    if int(known.max()) >= v:
        raise ValueError(f"TokenMRF: known holds token {int(known.max())}, expected less than {v}")
    low, high = (int(x) for x in candidates.aminmax()) if candidates.numel() else (0, 0)
    if low < 0 or high >= v:
        raise ValueError(
            f"TokenMRF: candidates holds tokens {low} to {high}, expected 0 to {v - 1}"
        )
    best = scores.amax(-1) if scores.shape[-1] else scores.new_full(known.shape, -torch.inf)
    bad = (known < 0) & ~best.isfinite()  # amax hands a NaN on
    if bool(bad.any()):
        raise ValueError(
            f"TokenMRF: scores of position {int(bad.nonzero()[0, 1])} have a NaN, an infinity, or "
            "nothing but -inf"
        )
