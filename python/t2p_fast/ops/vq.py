# SPDX-License-Identifier: Apache-2.0
"""Vector quantisation: nearest codes, lookup, and the quantiser of a VQ-VAE.

Sizes: `n` rows, `k` codes, `d` channels, `g` groups. `x` has its channels in dimension
`channel_dim`; every other position is a row. Inside, tensors are viewed as `[outer, d, inner]`,
which costs no copy for `[n, d]`, `[b, n, d]` and images `[b, d, h, w]`. CPU kernels see float32,
CUDA kernels `x`, and what they write of codes, in its own dtype.
"""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from t2p_fast._checks import check_choice, describe, is_plain, normalize_dim, under_autocast
from t2p_fast._library import _C, define_op
from t2p_fast.memory import empty

__all__ = ["vq_lookup", "vq_nearest", "vq_pack", "vq_quantize"]

METRICS = ("l2", "dot", "cosine")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _as_rows(x: Tensor, channel_dim: int) -> Tensor:
    """`x` as `[outer, d, inner]`: a view where the strides allow it."""
    shape = x.shape
    outer, inner = math.prod(shape[:channel_dim]), math.prod(shape[channel_dim + 1 :])
    return x.reshape(outer, shape[channel_dim], inner)


def _empty_like_rows(x: Tensor, channel_dim: int) -> Tensor:
    """An empty tensor shaped like `x` that `_as_rows` can view without a copy."""
    shape = x.shape
    rows = [math.prod(shape[:channel_dim]), shape[channel_dim], math.prod(shape[channel_dim + 1 :])]
    return empty(rows, x).reshape(shape)


def _readable(x: Tensor) -> Tensor:
    """`x` in a dtype that the kernels of its device read."""
    return x if x.is_cuda else x.float()


def without_channels(x: Tensor, channel_dim: int) -> list[int]:
    return [*x.shape[:channel_dim], *x.shape[channel_dim + 1 :]]


def check_tensors(op: str, **tensors: Tensor) -> None:
    """All on one device, and those of floating point of a supported dtype."""
    (first, reference), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor.device != reference.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first} is on {reference.device}"
            )
        expected = (torch.int64,) if name == "indices" else _DTYPES
        if tensor.dtype not in expected:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in expected)
            came = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"{op}: {name} must be {wanted}, got {came}")


# The kernels, for CPU and CUDA tensors, each beside its fake --------------------------------------


def _nearest(
    x: Tensor, codebook: Tensor, metric: str, channel_dim: int, packed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    distance, indices = _nearest_fake(x, codebook, metric, channel_dim)
    (k, d), codes = codebook.shape, codebook.float().contiguous()
    workspace = distance  # not looked at on the CPU
    if x.is_cuda:
        workspace = distance.new_empty(_C.vq_workspace_size(indices.numel(), k, d, metric))
    rows, threads = _as_rows(_readable(x), channel_dim), torch.get_num_threads()
    packed = None if x.is_cuda else packed
    _C.vq_nearest(rows, codes, metric, packed, workspace, indices, distance, threads)
    return distance, indices


def _nearest_fake(
    x: Tensor,
    codebook: Tensor,
    metric: str,  # noqa: ARG001
    channel_dim: int,
    packed: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    if codebook.ndim != 2:
        raise ValueError(f"vq_nearest: codebook must be [k, d], got {list(codebook.shape)}")
    check_tensors("vq_nearest", x=x, codebook=codebook)
    shape = without_channels(x, channel_dim)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


def _lookup(indices: Tensor, codebook: Tensor, channel_dim: int) -> Tensor:
    codes = codebook.float().contiguous()
    out = _lookup_fake(indices, codebook if codebook.is_cuda else codes, channel_dim)
    rows, threads = _as_rows(out, channel_dim), torch.get_num_threads()
    _C.vq_lookup(indices.contiguous(), codes, rows, threads)
    return out.to(codebook.dtype)


def _lookup_fake(indices: Tensor, codebook: Tensor, channel_dim: int) -> Tensor:
    if codebook.ndim != 2:
        raise ValueError(f"vq_lookup: codebook must be [k, d], got {list(codebook.shape)}")
    check_tensors("vq_lookup", indices=indices, codebook=codebook)
    shape = indices.shape
    return codebook.new_empty([*shape[:channel_dim], codebook.shape[1], *shape[channel_dim:]])


def _accumulate(x: Tensor, indices: Tensor, k: int, channel_dim: int) -> tuple[Tensor, Tensor]:
    counts, sums = _accumulate_fake(x, indices, k, channel_dim)
    workspace = counts  # not looked at on the CPU
    if x.is_cuda:
        workspace = counts.new_empty(_C.vq_accumulate_workspace_size(indices.numel(), k))
    rows, threads = _as_rows(_readable(x), channel_dim), torch.get_num_threads()
    _C.vq_accumulate(rows, indices.contiguous(), workspace, counts, sums, threads)
    return counts, sums


def _accumulate_fake(x: Tensor, indices: Tensor, k: int, channel_dim: int) -> tuple[Tensor, Tensor]:
    check_tensors("vq_accumulate", x=x, indices=indices)
    counts = x.new_empty([k], dtype=torch.float32)
    return counts, counts.new_empty([k, x.shape[channel_dim]])


def _quantize(
    x: Tensor,
    codebook: Tensor,
    beta: float,
    codebook_weight: float,
    metric: str,
    channel_dim: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, codes, threads = x.float(), codebook.float().contiguous(), torch.get_num_threads()
    distance, indices = _nearest(rows, codes, metric, channel_dim)
    quantized = _empty_like_rows(rows, channel_dim)
    loss = distance.new_empty([])
    _C.vq_lookup(indices, codes, _as_rows(quantized, channel_dim), threads)
    if metric != "l2":
        distance = (rows - quantized).square().sum(channel_dim)
    _C.vq_total(distance.contiguous(), (beta + codebook_weight) / max(x.numel(), 1), loss)
    counts, sums = _no_statistics(codebook)
    if statistics:
        counts, sums = _accumulate(rows, indices, codebook.shape[0], channel_dim)
    return quantized.to(x.dtype), indices, loss, counts, sums


def _quantize_cuda(
    x: Tensor,
    codebook: Tensor,
    beta: float,
    codebook_weight: float,
    metric: str,
    channel_dim: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    distance, indices = _nearest_fake(x, codebook, metric, channel_dim)
    (k, d), codes = codebook.shape, codebook.float().contiguous()
    quantized, loss = _empty_like_rows(x, channel_dim), distance.new_empty([])
    scale = (beta + codebook_weight) / max(x.numel(), 1)
    workspace = distance.new_empty(_C.vq_workspace_size(indices.numel(), k, d, metric))
    rows, to = _as_rows(x, channel_dim), _as_rows(quantized, channel_dim)
    _C.vq_quantize(rows, codes, metric, scale, workspace, indices, distance, to, loss)
    counts, sums = _no_statistics(codebook)
    if statistics:
        counts, sums = _accumulate(x, indices, k, channel_dim)
    return quantized, indices, loss, counts, sums


def _no_statistics(codebook: Tensor) -> tuple[Tensor, Tensor]:
    counts = codebook.new_empty([0], dtype=torch.float32)
    return counts, counts.new_empty([0, codebook.shape[1]])


def _quantize_fake(
    x: Tensor,
    codebook: Tensor,
    beta: float,  # noqa: ARG001
    codebook_weight: float,  # noqa: ARG001
    metric: str,
    channel_dim: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    distance, indices = _nearest_fake(x, codebook, metric, channel_dim)
    k, d = codebook.shape
    counts = distance.new_empty([k if statistics else 0])
    sums = distance.new_empty([k if statistics else 0, d])
    quantized = _empty_like_rows(x, channel_dim)
    return quantized, indices, distance.new_empty([]), counts, sums


# Gradients ---------------------------------------------------------------------------------------


def _nearest_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, codebook, ctx.metric, ctx.channel_dim, _ = inputs
    _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, codebook, indices)


def _nearest_backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    """The gradient of the distance to c = c_(indices_i), which is as in `vq_nearest`."""
    x, codebook, indices = ctx.saved_tensors
    dim = ctx.channel_dim
    rows, codes = x.float(), _vq_lookup(indices, codebook.float(), dim)
    grad = grad.unsqueeze(dim)
    if ctx.metric == "l2":
        grad_x = 2 * grad * (rows - codes)
        grad_codes = -grad_x
    elif ctx.metric == "dot":
        grad_x, grad_codes = -grad * codes, -grad * rows
    else:
        a, b = (t.norm(dim=dim, keepdim=True).clamp_min(1e-30) for t in (rows, codes))
        rows, codes = rows / a, codes / b
        cosine = (rows * codes).sum(dim, keepdim=True)
        grad_x, grad_codes = grad / a * (cosine * rows - codes), grad / b * (cosine * codes - rows)
    _, sums = _vq_accumulate(grad_codes, indices, codebook.shape[0], dim)
    return grad_x.to(x.dtype), sums.to(codebook.dtype), None, None, None


def _lookup_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    indices, codebook, ctx.channel_dim = inputs
    ctx.k, ctx.dtype = codebook.shape[0], codebook.dtype
    ctx.save_for_backward(indices)


def _lookup_backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
    (indices,) = ctx.saved_tensors
    _, sums = _vq_accumulate(grad, indices, ctx.k, ctx.channel_dim)
    return None, sums.to(ctx.dtype), None


def _quantize_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, codebook, ctx.beta, ctx.codebook_weight, _, ctx.channel_dim, _ = inputs
    quantized, indices, _, counts, sums = output
    ctx.mark_non_differentiable(indices, counts, sums)
    ctx.save_for_backward(x, codebook, quantized, indices)


def _quantize_backward(
    ctx: Any, grad_quantized: Tensor, _indices: None, grad_loss: Tensor, *_statistics: None
) -> tuple[Tensor | None, ...]:
    # loss = beta / (n d) sum_i |x_i - c_j|^2 for x, and codebook_weight / (n d) of it for c
    x, codebook, quantized, indices = ctx.saved_tensors
    unit = grad_loss * (2 / max(x.numel(), 1))
    grad_x = grad_codebook = None
    if x.dtype == torch.float32:
        difference = x - quantized
    else:  # not from the codes as they were rounded to the dtype of x
        difference = x.float() - _vq_lookup(indices, codebook.float(), ctx.channel_dim)
    if ctx.needs_input_grad[0]:
        grad_x = torch.addcmul(grad_quantized, difference, unit * ctx.beta).to(x.dtype)
    if ctx.needs_input_grad[1]:
        # From the differences, not as counts c - sums: that cancels far from the origin.
        _, sums = _vq_accumulate(difference, indices, codebook.shape[0], ctx.channel_dim)
        grad_codebook = (sums * -(unit * ctx.codebook_weight)).to(codebook.dtype)
    return grad_x, grad_codebook, None, None, None, None, None


# Batching rules: a batch of `x` against one codebook is just more rows ---------------------------


def _nearest_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    codebook: Tensor,
    metric: str,
    channel_dim: int,
    packed: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    x_dim, codebook_dim, *_ = in_dims
    if codebook_dim is None and x_dim is not None:
        return _vq_nearest(x.movedim(x_dim, 0), codebook, metric, channel_dim + 1, packed), (0, 0)
    results = [
        _vq_nearest(
            x if x_dim is None else x.select(x_dim, b),
            codebook if codebook_dim is None else codebook.select(codebook_dim, b),
            metric,
            channel_dim,
        )
        for b in range(info.batch_size)
    ]
    distance, indices = zip(*results, strict=True)
    return (torch.stack(distance), torch.stack(indices)), (0, 0)


def _lookup_vmap(
    info: Any, in_dims: tuple[int | None, ...], indices: Tensor, codebook: Tensor, channel_dim: int
) -> tuple[Tensor, int]:
    indices_dim, codebook_dim, _ = in_dims
    if codebook_dim is None and indices_dim is not None:
        return _vq_lookup(indices.movedim(indices_dim, 0), codebook, channel_dim + 1), 0
    results = [
        _vq_lookup(
            indices if indices_dim is None else indices.select(indices_dim, b),
            codebook if codebook_dim is None else codebook.select(codebook_dim, b),
            channel_dim,
        )
        for b in range(info.batch_size)
    ]
    return torch.stack(results), 0


_vq_nearest = define_op(
    "vq_nearest(Tensor x, Tensor codebook, str metric, int channel_dim, Tensor? packed=None) -> "
    "(Tensor, Tensor)",
    cpu=_nearest,
    fake=_nearest_fake,
    setup_context=_nearest_setup_context,
    backward=_nearest_backward,
    vmap=_nearest_vmap,
)
_vq_lookup = define_op(
    "vq_lookup(Tensor indices, Tensor codebook, int channel_dim) -> Tensor",
    cpu=_lookup,
    fake=_lookup_fake,
    setup_context=_lookup_setup_context,
    backward=_lookup_backward,
    vmap=_lookup_vmap,
)
_vq_accumulate = define_op(
    "vq_accumulate(Tensor x, Tensor indices, SymInt k, int channel_dim) -> (Tensor, Tensor)",
    cpu=_accumulate,
    fake=_accumulate_fake,
)
_vq_quantize = define_op(
    "vq_quantize(Tensor x, Tensor codebook, float beta, float codebook_weight, str metric, "
    "int channel_dim, bool statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_quantize,
    cuda=_quantize_cuda,
    fake=_quantize_fake,
    setup_context=_quantize_setup_context,
    backward=_quantize_backward,
)


# Public functions --------------------------------------------------------------------------------


def check_x(op: str, x: Tensor, codebook: Tensor, channel_dim: int) -> int:
    for name, tensor in (("x", x), ("codebook", codebook)):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got {describe(tensor)}")
    if x.ndim < 2:
        raise ValueError(f"{op}: x must be [n, d] or have more dimensions, got {list(x.shape)}")
    dim = normalize_dim(op, "channel_dim", channel_dim, x.ndim)
    if codebook.ndim == 3 and x.shape[dim] != codebook.shape[0] * codebook.shape[2]:
        g, k, d = codebook.shape
        raise ValueError(
            f"{op}: x has {x.shape[dim]} channels, but the codebook [{g}, {k}, {d}] is for {g * d}"
        )
    return dim


def _groups(x: Tensor, codebook: Tensor, dim: int) -> list[tuple[Tensor, Tensor]]:
    """Each group of channels of `x`, a view, with its codes."""
    return list(zip(x.chunk(codebook.shape[0], dim), codebook.unbind(0), strict=True))


@overload
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    channel_dim: int = ...,
    return_distance: Literal[False] = ...,
    packed: Tensor | None = ...,
) -> Tensor: ...
@overload
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    channel_dim: int = ...,
    return_distance: Literal[True],
    packed: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    channel_dim: int = -1,
    return_distance: bool = False,
    packed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Index of the nearest code for every row: ``argmin_j distance(x_i, c_j)``.

    The index is exact: that of the smallest distance in float64 arithmetic, also far from the
    origin, where ``|x|^2 - 2 x.c + |c|^2`` in float32 is not; the lowest one among equals. Nothing
    of size `n k` is stored. A row with a NaN or an infinity gets index 0 and distance NaN; a code
    with one is never chosen while another is finite. The distance is differentiable.

    Args:
        x: `[n, d]`, `[b, n, d]`, or an image `[b, d, h, w]` with `channel_dim=1`; float32,
            bfloat16 or float16, any strides. Under autocast it is converted to float32.
        codebook: `[k, d]`, or `[g, k, d]` for `g` groups of channels, each with codes of its own
            (product quantization; then `x` has `g d` channels); float32, bfloat16 or float16.
        metric: The distance: `"l2"`, ``|x - c|^2``; `"dot"`, ``-x.c``; or `"cosine"`,
            ``1 - x.c / (|x| |c|)``, which is 1 where a vector has length 0.
        channel_dim: The dimension of `x` that holds the channels.
        return_distance: Whether to return the distances as well.
        packed: What `vq_pack` made of this very `codebook`, for the same metric: saves packing it
            at every call. On CUDA it is not looked at.

    Returns:
        The indices, int64, in the shape of `x` without `channel_dim`, or with `g` in its place for
        a grouped codebook; with `return_distance` also the distances, float32, in the same shape.
        O(n k d) time, O(n + k d) memory.

    Raises:
        ValueError: Shapes or devices do not fit, the codebook is empty, or `metric` is unknown.
        TypeError: A tensor is of another dtype.

    Example:
        >>> vq_nearest(torch.tensor([[0.9, 0.0]]), torch.eye(2))
        tensor([0])
    """
    check_choice("vq_nearest", "metric", metric, METRICS)
    dim = check_x("vq_nearest", x, codebook, channel_dim)
    x, codebook = under_autocast(x, codebook)
    if packed is not None and not (isinstance(packed, Tensor) and codebook.ndim == 2):
        raise ValueError(
            f"vq_nearest: packed must be what vq_pack returned for a codebook [k, d], got "
            f"{describe(packed)} and a codebook {list(codebook.shape)}"
        )
    if codebook.ndim == 3:
        results = [
            _vq_nearest(part, codes, metric, dim) for part, codes in _groups(x, codebook, dim)
        ]
        distance, indices = (torch.stack(r, dim) for r in zip(*results, strict=True))
    else:
        # A plain call goes past the dispatcher, which would cost more than a small search itself.
        plain = is_plain(x, codebook, packed) and not x.is_meta
        nearest = _nearest if plain else _vq_nearest
        distance, indices = nearest(x, codebook, metric, dim, packed)
    return (indices, distance) if return_distance else indices


@torch.no_grad()
def vq_pack(codebook: Tensor, *, metric: str = "l2") -> Tensor:
    """A codebook in the form that searches on the CPU want, for `vq_nearest(packed=...)`.

    Every search begins by packing the codebook, O(k d). Where there are few rows, as one image's
    tokens, that is up to half of its time; who searches one codebook often does it once.

    Args:
        codebook: `[k, d]` on the CPU; float32, bfloat16 or float16. If it changes, pack it again:
            results for a codebook that is not the one packed are not exact.
        metric: As in `vq_nearest`.

    Returns:
        uint8, about `k d` bytes. It depends on the instruction set and is not meant to be stored.

    Raises:
        ValueError: `codebook` is of another shape, empty, or on a GPU; or `metric` is unknown.
        TypeError: `codebook` is of another dtype.
    """
    check_choice("vq_pack", "metric", metric, METRICS)
    if not isinstance(codebook, Tensor) or codebook.layout != torch.strided:
        raise TypeError(f"vq_pack: codebook must be a dense tensor, got {describe(codebook)}")
    if codebook.ndim != 2:
        raise ValueError(f"vq_pack: codebook must be [k, d], got {list(codebook.shape)}")
    check_tensors("vq_pack", codebook=codebook)
    codes = codebook.detach().float().contiguous()
    threads = torch.get_num_threads()
    packed = torch.empty(_C.vq_packed_size(codes, metric, threads), dtype=torch.uint8)
    _C.vq_pack(codes, metric, packed, threads)
    return packed


def vq_lookup(indices: Tensor, codebook: Tensor, *, channel_dim: int = -1) -> Tensor:
    """The codes at `indices`: ``out_i = c_(indices_i)``.

    The gradient of the codebook is added up in a fixed order, in float64: it is the same for any
    number of threads.

    Args:
        indices: int64 of any shape, each in `[0, k)`; for a grouped codebook with `g` entries in
            dimension `channel_dim`, as `vq_nearest` returns them.
        codebook: `[k, d]` or `[g, k, d]`; float32, bfloat16 or float16.
        channel_dim: The dimension of the result that holds the channels.

    Returns:
        In the dtype of `codebook`, the shape of `indices` with `d` inserted at `channel_dim`: from
        `[b, h, w]`, an image `[b, d, h, w]` with `channel_dim=1`. For a grouped codebook `g d`
        channels take the place of `g`.

    Raises:
        IndexError: An index is outside `[0, k)` (on CUDA such a row is NaN instead).
        ValueError: Shapes do not fit.
        TypeError: `indices` is not int64 or `codebook` of another dtype.
    """
    (codebook,) = under_autocast(codebook)
    if codebook.ndim == 3:
        dim = normalize_dim("vq_lookup", "channel_dim", channel_dim, indices.ndim)
        if indices.shape[dim] != codebook.shape[0]:
            raise ValueError(
                f"vq_lookup: indices are {list(indices.shape)}, but the codebook "
                f"{list(codebook.shape)} wants {codebook.shape[0]} of them in dimension {dim}"
            )
        groups = zip(indices.unbind(dim), codebook.unbind(0), strict=True)
        return torch.cat([_vq_lookup(index, codes, dim) for index, codes in groups], dim)
    dim = normalize_dim("vq_lookup", "channel_dim", channel_dim, indices.ndim + 1)
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
    """The quantiser of a VQ-VAE (van den Oord et al. 2017, equations 2 and 3).

    ``e_i = c_j`` with ``j = argmin_j distance(x_i, c_j)`` as in `vq_nearest`, and ``loss =
    codebook_weight mean((sg(x) - e)^2) + beta mean((x - sg(e))^2)``, `sg` being the stop-gradient.
    The gradient of `quantized` goes straight to `x`; the value of `quantized` is that of the codes
    to the bit, as ``x + (e - x).detach()`` would not be.

    Args:
        x, codebook, metric: As in `vq_nearest`. The metric chooses codes; losses are always squared
            differences.
        beta: Weight of the commitment loss, whose gradient goes to `x`.
        channel_dim: The dimension of `x` that holds the channels.
        codebook_weight: Weight of the codebook loss, whose gradient goes to `codebook`; 0 for a
            codebook learned by moving averages.
        return_statistics: Whether to return what moving averages need.

    Returns:
        `(quantized, indices, loss)`: the codes in the shape and dtype of `x`, the int64 indices as
        `vq_nearest` returns them, and a float32 scalar, 0 for an empty `x`. With
        `return_statistics` also `counts` `[k]`, the number of rows of every code, and `sums`
        `[k, d]`, their sums, in float32, without gradient and the same for any number of threads.
        For a grouped codebook the last two begin with `g`.

    Raises:
        ValueError, TypeError: As in `vq_nearest`.
    """
    check_choice("vq_quantize", "metric", metric, METRICS)
    dim = check_x("vq_quantize", x, codebook, channel_dim)
    x, codebook = under_autocast(x, codebook)
    weights = float(beta), float(codebook_weight)
    results: tuple[Tensor, ...]
    if codebook.ndim == 3:
        parts = [
            _vq_quantize(part, codes, *weights, metric, dim, return_statistics)
            for part, codes in _groups(x, codebook, dim)
        ]
        quantized, indices, loss, counts, sums = zip(*parts, strict=True)
        results = (
            torch.cat(quantized, dim),
            torch.stack(indices, dim),
            torch.stack(loss).mean(),
            torch.stack(counts),
            torch.stack(sums),
        )
    else:
        results = _vq_quantize(x, codebook, *weights, metric, dim, return_statistics)
    return results if return_statistics else results[:3]
