# SPDX-License-Identifier: Apache-2.0
"""Vector quantisation: nearest code, lookup, the quantiser of a VQ-VAE, and k-means.

Sizes: `n` rows, `k` codes, `d` channels. `x` has its channels in dimension `channel_dim`; every
other position is a row. Inside, tensors are viewed as `[outer, d, inner]`, which costs no copy
for `[n, d]`, `[b, n, d]` and images `[b, d, h, w]`.
"""

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from t2p_fast._checks import check_choice, normalize_dim, under_autocast
from t2p_fast._library import _C, define_op

__all__ = ["KMeansResult", "kmeans", "vq_lookup", "vq_nearest", "vq_quantize"]

_METRICS = ("l2",)


def _as_rows(x: Tensor, channel_dim: int) -> Tensor:
    """`x` as `[outer, d, inner]`: a view where the strides allow it."""
    shape = x.shape
    outer, inner = math.prod(shape[:channel_dim]), math.prod(shape[channel_dim + 1 :])
    return x.reshape(outer, shape[channel_dim], inner)


def _without_channels(shape: torch.Size, channel_dim: int) -> list[int]:
    return [*shape[:channel_dim], *shape[channel_dim + 1 :]]


def _empty_like_rows(x: Tensor, channel_dim: int) -> Tensor:
    """An empty tensor shaped like `x` that `_as_rows` can view without a copy."""
    return torch.empty_like(_as_rows(x, channel_dim)).reshape(x.shape)


# vq_nearest --------------------------------------------------------------------------------------


def _nearest(x: Tensor, codebook: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    indices, distance = _nearest_fake(x, codebook, channel_dim)
    _C.vq_nearest(
        _as_rows(x, channel_dim),
        codebook.contiguous(),
        indices,
        distance,
        threads=torch.get_num_threads(),
    )
    return indices, distance


def _nearest_fake(x: Tensor, codebook: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    shape = _without_channels(x.shape, channel_dim)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape)


def _nearest_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, codebook, channel_dim = inputs
    indices, _ = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, codebook, indices)
    ctx.channel_dim = channel_dim


def _nearest_backward(ctx: Any, _: None, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, codebook, indices = ctx.saved_tensors
    codes = _vq_lookup(indices, codebook, ctx.channel_dim)
    grad_x = 2 * grad.unsqueeze(ctx.channel_dim) * (x - codes)
    _, sums = _vq_accumulate(grad_x, indices, codebook.shape[0], ctx.channel_dim)
    return grad_x, -sums, None


# vq_lookup ---------------------------------------------------------------------------------------


def _lookup(indices: Tensor, codebook: Tensor, channel_dim: int) -> Tensor:
    out = _lookup_fake(indices, codebook, channel_dim)
    _C.vq_lookup(
        indices.contiguous(),
        codebook.contiguous(),
        _as_rows(out, channel_dim),
        threads=torch.get_num_threads(),
    )
    return out


def _lookup_fake(indices: Tensor, codebook: Tensor, channel_dim: int) -> Tensor:
    shape = indices.shape
    return codebook.new_empty([*shape[:channel_dim], codebook.shape[1], *shape[channel_dim:]])


def _lookup_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    indices, codebook, channel_dim = inputs
    ctx.save_for_backward(indices)
    ctx.k, ctx.channel_dim = codebook.shape[0], channel_dim


def _lookup_backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
    (indices,) = ctx.saved_tensors
    _, sums = _vq_accumulate(grad, indices, ctx.k, ctx.channel_dim)
    return None, sums, None


# vq_accumulate -----------------------------------------------------------------------------------


def _accumulate(x: Tensor, indices: Tensor, k: int, channel_dim: int) -> tuple[Tensor, Tensor]:
    counts, sums = _accumulate_fake(x, indices, k, channel_dim)
    _C.vq_accumulate(
        _as_rows(x, channel_dim),
        indices.contiguous(),
        counts,
        sums,
        threads=torch.get_num_threads(),
    )
    return counts, sums


def _accumulate_fake(
    x: Tensor,
    indices: Tensor,  # noqa: ARG001
    k: int,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty([k]), x.new_empty([k, x.shape[channel_dim]])


# vq_quantize -------------------------------------------------------------------------------------


def _quantize(
    x: Tensor,
    codebook: Tensor,
    beta: float,
    codebook_weight: float,
    channel_dim: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    quantized, indices, loss, counts, sums = _quantize_fake(
        x, codebook, beta, codebook_weight, channel_dim, statistics
    )
    rows, codes, threads = _as_rows(x, channel_dim), codebook.contiguous(), torch.get_num_threads()
    distance = x.new_empty(indices.shape)
    _C.vq_nearest(rows, codes, indices, distance, threads=threads)
    _C.vq_lookup(indices, codes, _as_rows(quantized, channel_dim), threads=threads)
    scale = (beta + codebook_weight) / max(x.numel(), 1)
    loss.copy_(distance.sum(dtype=torch.float64) * scale)
    if statistics:
        _C.vq_accumulate(rows, indices, counts, sums, threads=threads)
    return quantized, indices, loss, counts, sums


def _quantize_fake(
    x: Tensor,
    codebook: Tensor,
    beta: float,  # noqa: ARG001
    codebook_weight: float,  # noqa: ARG001
    channel_dim: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, d = codebook.shape if statistics else (0, codebook.shape[1])
    return (
        _empty_like_rows(x, channel_dim),
        x.new_empty(_without_channels(x.shape, channel_dim), dtype=torch.int64),
        x.new_empty([]),
        x.new_empty([k]),
        x.new_empty([k, d]),
    )


def _quantize_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, codebook, ctx.beta, ctx.codebook_weight, ctx.channel_dim, _ = inputs
    quantized, indices, _, counts, sums = output
    ctx.mark_non_differentiable(indices, counts, sums)
    ctx.save_for_backward(x, codebook, quantized, indices)


def _quantize_backward(
    ctx: Any, grad_quantized: Tensor, _indices: None, grad_loss: Tensor, *_statistics: None
) -> tuple[Tensor, Tensor | None, None, None, None, None]:
    x, codebook, quantized, indices = ctx.saved_tensors
    unit = grad_loss * (2 / max(x.numel(), 1))
    grad_x = torch.addcmul(grad_quantized, x - quantized, unit * ctx.beta)
    grad_codebook = None
    if ctx.needs_input_grad[1]:
        counts, sums = _vq_accumulate(x, indices, codebook.shape[0], ctx.channel_dim)
        grad_codebook = (counts[:, None] * codebook - sums) * (unit * ctx.codebook_weight)
    return grad_x, grad_codebook, None, None, None, None


_vq_nearest = define_op(
    "vq_nearest(Tensor x, Tensor codebook, int channel_dim) -> (Tensor, Tensor)",
    cpu=_nearest,
    fake=_nearest_fake,
    setup_context=_nearest_setup_context,
    backward=_nearest_backward,
)
_vq_lookup = define_op(
    "vq_lookup(Tensor indices, Tensor codebook, int channel_dim) -> Tensor",
    cpu=_lookup,
    fake=_lookup_fake,
    setup_context=_lookup_setup_context,
    backward=_lookup_backward,
)
_vq_accumulate = define_op(
    "vq_accumulate(Tensor x, Tensor indices, SymInt k, int channel_dim) -> (Tensor, Tensor)",
    cpu=_accumulate,
    fake=_accumulate_fake,
)
_vq_quantize = define_op(
    "vq_quantize(Tensor x, Tensor codebook, float beta, float codebook_weight, int channel_dim, "
    "bool statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_quantize,
    fake=_quantize_fake,
    setup_context=_quantize_setup_context,
    backward=_quantize_backward,
)


def _check_x(op: str, x: Tensor, channel_dim: int) -> int:
    if x.ndim < 2:
        raise ValueError(f"{op}: x must be [n, d] or have more dimensions, got {list(x.shape)}")
    return normalize_dim(op, "channel_dim", channel_dim, x.ndim)


@overload
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    channel_dim: int = ...,
    return_distance: Literal[False] = ...,
) -> Tensor: ...
@overload
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    channel_dim: int = ...,
    return_distance: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    channel_dim: int = -1,
    return_distance: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Index of the nearest code for every row: ``argmin_j |x_i - c_j|^2``."""
    check_choice("vq_nearest", "metric", metric, _METRICS)
    dim = _check_x("vq_nearest", x, channel_dim)
    x, codebook = under_autocast(x, codebook)
    indices, distance = _vq_nearest(x, codebook, dim)
    return (indices, distance) if return_distance else indices


def vq_lookup(indices: Tensor, codebook: Tensor, *, channel_dim: int = -1) -> Tensor:
    """The codes at `indices`, channels in dimension `channel_dim` of the result."""
    dim = normalize_dim("vq_lookup", "channel_dim", channel_dim, indices.ndim + 1)
    (codebook,) = under_autocast(codebook)
    result: Tensor = _vq_lookup(indices, codebook, dim)
    return result


def vq_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    beta: float = 0.25,
    metric: str = "l2",
    channel_dim: int = -1,
    codebook_weight: float = 1.0,
    return_statistics: bool = False,
) -> tuple[Tensor, ...]:
    """The quantiser of a VQ-VAE, fused."""
    check_choice("vq_quantize", "metric", metric, _METRICS)
    dim = _check_x("vq_quantize", x, channel_dim)
    x, codebook = under_autocast(x, codebook)
    results: tuple[Tensor, ...] = _vq_quantize(
        x, codebook, beta, codebook_weight, dim, return_statistics
    )
    return results if return_statistics else results[:3]


class KMeansResult(NamedTuple):
    """What `kmeans` found."""

    centroids: Tensor
    indices: Tensor
    inertia: Tensor


def kmeans(
    x: Tensor,
    k: int,
    *,
    iterations: int = 10,
    init: Literal["random", "kmeans++"] | Tensor = "random",
    generator: torch.Generator | None = None,
) -> KMeansResult:
    """Lloyd's algorithm on `x` `[n, d]`."""
    if x.ndim != 2:
        raise ValueError(f"kmeans: x must be [n, d], got {list(x.shape)}")
    n = x.shape[0]
    if isinstance(init, Tensor):
        centroids = init.clone()
    else:
        centroids = x[torch.randperm(n, generator=generator)[:k].to(x.device)].clone()
    for _ in range(iterations):
        indices, distance = _vq_nearest(x, centroids, 1)
        counts, sums = _vq_accumulate(x, indices, k, 1)
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centroids)
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            farthest = distance.argsort(descending=True, stable=True)[: len(empty)]
            centroids[empty[: len(farthest)]] = x[farthest]
    indices, distance = _vq_nearest(x, centroids, 1)
    return KMeansResult(centroids, indices, distance.sum())
