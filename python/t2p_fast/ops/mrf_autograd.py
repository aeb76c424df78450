# SPDX-License-Identifier: Apache-2.0
"""The gradient of `mrf_mean_field`."""

from typing import Any

import torch
from torch import Tensor

from t2p_fast.ops.mrf_graph import dense_grid, offset_index

__all__ = ["mean_field_backward", "mean_field_setup_context"]


def mean_field_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    unary, w_s, begin, node, ctx.height, ctx.width, w_c, w_b, known, *options = inputs
    ctx.iterations, ctx.damping, ctx.temperature, ctx.candidates, *_ = options
    ctx.save_for_backward(unary, w_s, begin, node, w_c, w_b, known)


def mean_field_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Through the unrolled loop, whose ``q`` are computed again instead of kept.

    With S = W_s Q, M = S W_c^T + f and P = softmax(M / t):
    dM = P (dP - sum(dP P)) / t, dW_c = dM^T S, dS = dM W_c, dW_s = dS Q^T, dQ = W_s^T dS.
    """
    unary, values, begin, node, w_c, w_b, known = ctx.saved_tensors
    if ctx.candidates:
        raise NotImplementedError("mrf_mean_field: with candidates there is no gradient")
    f, matrix = unary.float(), _matrix(values.float(), begin, node, ctx.height, ctx.width, unary)
    labels, labels_b = w_c.float(), None if w_b is None else w_b.float()
    keep, t = ctx.damping, ctx.temperature
    free = None if known is None else (known < 0)[..., None]
    one_hot = None
    if known is not None and free is not None:
        f = torch.where(free, f, 0)  # scores of known positions may be anything
        one_hot = torch.nn.functional.one_hot(known.clamp_min(0), f.shape[-1]).to(f.dtype)

    def clamped(q: Tensor) -> Tensor:
        return q if free is None or one_hot is None else torch.where(free, q, one_hot)

    def mix(s: Tensor) -> Tensor:
        if labels_b is not None:
            low: Tensor = s @ labels_b @ labels.mT
            return low
        said: Tensor = s * labels if labels.ndim == 0 else s @ labels.mT
        return said

    first = (f / t).softmax(-1)
    q, steps = clamped(first), []
    for _ in range(ctx.iterations):
        mixed = matrix @ q
        p = ((mix(mixed) + f) / t).softmax(-1)
        steps.append((q, mixed, p))
        q = clamped((1 - keep) * p + keep * q)

    d_f, d_matrix, d_labels = (
        torch.zeros_like(f),
        torch.zeros_like(matrix),
        torch.zeros_like(labels),
    )
    d_labels_b = None if labels_b is None else torch.zeros_like(labels_b)
    d_q = grad.float()
    for q, mixed, p in reversed(steps):
        if free is not None:
            d_q = d_q * free
        d_m = _softmax_grad(p, (1 - keep) * d_q) / t
        d_f = d_f + d_m
        rows, said = d_m.flatten(0, 1), mixed.flatten(0, 1)
        if labels_b is not None and d_labels_b is not None:
            d_labels = d_labels + rows.mT @ (said @ labels_b)
            d_labels_b = d_labels_b + said.mT @ (rows @ labels)
            d_mixed = d_m @ labels @ labels_b.mT
        elif labels.ndim == 0:
            d_labels = d_labels + (d_m * mixed).sum()
            d_mixed = d_m * labels
        else:
            d_labels = d_labels + rows.mT @ said
            d_mixed = d_m @ labels
        d_matrix = d_matrix + (d_mixed @ q.mT).sum(0)
        d_q = matrix.mT @ d_mixed + keep * d_q
    if free is not None:
        d_q = d_q * free
    d_f = d_f + _softmax_grad(first, d_q) / t
    d_values = _values_grad(d_matrix, values, begin, node, ctx.height, ctx.width)
    return (
        d_f.to(unary.dtype), d_values.to(values.dtype), None, None, None, None,
        d_labels.to(w_c.dtype), None if d_labels_b is None else d_labels_b.to(w_b.dtype),
        None, None, None, None, None, None, None,
    )  # fmt: skip


def _softmax_grad(p: Tensor, grad: Tensor) -> Tensor:
    return p * (grad - (grad * p).sum(-1, keepdim=True))


def _matrix(
    values: Tensor, begin: Tensor | None, node: Tensor | None, height: int, width: int, like: Tensor
) -> Tensor:
    """The matrix ``[n, n]`` of weights given in any form."""
    n = like.shape[1]
    if begin is not None and node is not None:
        at = torch.repeat_interleave(begin.diff(), output_size=node.shape[0]) * n + node
        return values.new_zeros(n * n).index_add(0, at, values).view(n, n)
    return values if height == 0 else dense_grid(values, height, width)


def _values_grad(
    d_matrix: Tensor,
    values: Tensor,
    begin: Tensor | None,
    node: Tensor | None,
    height: int,
    width: int,
) -> Tensor:
    """The gradient of the weights in the form in which they were given."""
    if begin is not None and node is not None:
        start = torch.repeat_interleave(begin.diff(), output_size=node.shape[0])
        return d_matrix[start, node]
    if height == 0:
        return d_matrix
    size = values.shape[0], values.shape[1]
    index, inside = offset_index(size, height, width, values.device)
    table = d_matrix.new_zeros(values.numel())
    return table.index_add(0, index.flatten(), (d_matrix * inside).flatten()).view(values.shape)
