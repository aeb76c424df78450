# SPDX-License-Identifier: Apache-2.0
"""Markov random fields in plain PyTorch, on dense matrices.

R. Vyas et al., "MarkovGen", CVPR 2024, arXiv 2308.10997: equations 1 to 4 and algorithm 1.
"""

import itertools
import math

import torch
from torch import Tensor

__all__ = ["mrf_bp", "mrf_energy", "mrf_icm", "mrf_marginals", "mrf_mean_field"]


def mrf_mean_field(
    unary: Tensor,
    w_s: Tensor,
    w_c: Tensor,
    *,
    iterations: int = 5,
    known: Tensor | None = None,
    damping: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """As `t2p_fast.ops.mrf_mean_field`: known positions keep a one-hot ``q`` all along."""

    def clamped(q: Tensor) -> Tensor:
        if known is None:
            return q
        one_hot = torch.nn.functional.one_hot(known.clamp_min(0), q.shape[-1]).to(q.dtype)
        return torch.where((known >= 0)[..., None], one_hot, q)

    q = clamped((unary / temperature).softmax(-1))
    for _ in range(iterations):
        message = (w_s @ q) @ w_c.mT
        updated = ((message + unary) / temperature).softmax(-1)
        q = clamped((1 - damping) * updated + damping * q)
    return q


def mrf_energy(unary: Tensor, w_s: Tensor, w_c: Tensor, labels: Tensor) -> Tensor:
    """As `t2p_fast.ops.mrf_energy` with unordered pairs, ``[b]``, by the sum as it is written."""
    energies = []
    for f, x in zip(unary, labels.tolist(), strict=True):
        total = torch.zeros((), dtype=f.dtype)
        for i, a in enumerate(x):
            total = total - f[i, a]
            for j in range(i):
                c = x[j]
                total = total - (w_s[i, j] * w_c[a, c] + w_s[j, i] * w_c[c, a]) / 2
        energies.append(total)
    return torch.stack(energies)


def mrf_marginals(unary: Tensor, w_s: Tensor, w_c: Tensor) -> tuple[Tensor, Tensor]:
    """The exact marginals ``[n, v]`` and the labels ``[n]`` of least energy, by trying all.

    Args:
        unary: ``[n, v]``, with ``v ** n`` small.
        w_s: ``[n, n]``.
        w_c: ``[v, v]``.
    """
    n, v = unary.shape
    labels = torch.tensor(list(itertools.product(range(v), repeat=n)))
    energy = mrf_energy(unary.expand(len(labels), n, v), w_s, w_c, labels)
    probability = (-energy).softmax(0)
    marginals = torch.zeros_like(unary)
    for i in range(n):
        marginals[i].index_add_(0, labels[:, i], probability)
    return marginals, labels[energy.argmin()]


def mrf_icm(unary: Tensor, w_s: Tensor, w_c: Tensor, init: Tensor, *, sweeps: int = 50) -> Tensor:
    """As `t2p_fast.ops.mrf_icm`, for symmetric weights."""
    labels = init.clone()
    off_diagonal = w_s - torch.diag(w_s.diagonal())
    for f, x in zip(unary, labels, strict=True):
        for _ in range(sweeps):
            before = x.clone()
            for i in range(len(x)):
                scores = f[i] + off_diagonal[i] @ w_c[x]
                best = scores.argmax()
                if scores[best] > scores[x[i]]:
                    x[i] = best
            if torch.equal(before, x):
                break
    return labels


def mrf_bp(
    unary: Tensor,
    w_s: Tensor,
    w_c: Tensor,
    *,
    iterations: int = 50,
    damping: float = 0.5,
    temperature: float = 0.0,
) -> Tensor:
    """As `t2p_fast.ops.mrf_bp` with all messages at once, between all pairs with a weight."""
    b, n, v = unary.shape
    there = (w_s != 0) & ~torch.eye(n, dtype=torch.bool)
    # messages[b, i, j] goes from i to j
    messages = unary.new_zeros(b, n, n, v)
    pairs = w_s[..., None, None] * w_c
    for _ in range(iterations):
        belief = unary + (messages * there[..., None]).sum(1)
        h = belief[:, :, None] - messages.transpose(1, 2)
        scores = h[..., :, None] + pairs
        if temperature > 0:
            fresh = temperature * (scores / temperature).logsumexp(-2)
        else:
            fresh = scores.amax(-2)
        fresh = fresh - fresh.amax(-1, keepdim=True)
        messages = (1 - damping) * fresh + damping * messages
    if math.isnan(float(messages.sum())):
        raise ValueError("reference.mrf_bp: a message is not a number")
    return unary + (messages * there[..., None]).sum(1)
