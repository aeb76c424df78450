# SPDX-License-Identifier: Apache-2.0
"""Labels found in several inferences, the surest first."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["counts", "settle", "surest"]


def settle(
    infer: Callable[[Tensor, Tensor | None], Tensor],
    unary: Tensor,
    known: Tensor | None,
    rounds: int,
) -> Tensor:
    """What is known before the last of `rounds` inferences: see `mrf_likeliest`.

    Args:
        infer: ``q [b, n, v]`` of unary scores and what is known.
        unary: ``[b, n, v]``.
        known: ``[b, n]``, negative where unknown, or ``None``.
        rounds: inferences, the last among them.
    """
    if known is None:
        known = torch.full(unary.shape[:2], -1, device=unary.device)
    left = (known < 0) & (unary.isfinite().sum(-1) > 1)
    undecided = left.any(1)
    if not unary.is_cuda and not undecided.all():  # a GPU would have to wait to know
        known = known.clone()
        if undecided.any():
            known[undecided] = settle(infer, unary[undecided], known[undecided], rounds)
        return known
    for count in counts(left, rounds):
        sure, likeliest = infer(unary, known).max(-1)
        settled = surest(sure, left, count)
        known = torch.where(settled, likeliest, known)
        left = left & ~settled
    return known


def counts(left: Tensor, rounds: int) -> Sequence[Tensor]:
    """How many positions of a picture settle after each inference but the last, ``[b, 1]``.

    Of those `left` ``[b, n]`` equal shares, the first ones rounded up.
    """
    done = torch.arange(rounds, device=left.device)
    together = (left.sum(1, keepdim=True) * done + rounds - 1) // rounds
    each: Sequence[Tensor] = together.diff(dim=1).split(1, dim=1)
    return each


def surest(sure: Tensor, left: Tensor, count: Tensor) -> Tensor:
    """The `count` positions ``[b, n]`` of those `left` of which one is `sure`, as a mask.

    Of equally sure ones the first.

    Args:
        sure: ``[b, n]`` probabilities of the likeliest labels.
        left: ``[b, n]`` bool.
        count: ``[b, 1]``.
    """
    order = sure.masked_fill(~left, -1.0).argsort(dim=1, descending=True, stable=True)
    return left & (order.argsort(1) < count)
