# SPDX-License-Identifier: Apache-2.0
"""Group normalisation with SiLU, a residual, and the scale and shift of a time embedding.

Sizes: `b` samples of `c` channels in `g` groups, at `n` positions.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from t2p_fast._checks import check_choice, describe, is_plain, written
from t2p_fast._library import _C, define_op
from t2p_fast.memory import empty_like

__all__ = ["group_norm_silu"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ACTIVATIONS = ("silu", "none")
# Places among the registered op's arguments.
_X, _GROUPS, _WEIGHT, _BIAS, _RESIDUAL, _SCALE, _SHIFT, _EPS, _SILU = range(9)

_kernel: Any = _C.group_norm
_backward_kernel: Any = _C.group_norm_backward


# The kernels, beside the same in PyTorch for float64 ----------------------------------------------


def _workspace(x: Tensor, groups: int, backward: bool) -> Tensor | None:
    size = _C.group_norm_workspace_size(x, groups, backward) if x.is_cuda else 0
    return x.new_empty(size, dtype=torch.float64) if size else None


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, groups = arguments[:2]
    if x.dtype == torch.float64:
        return _forward_in_torch(*arguments)
    y = empty_like(x)
    statistics = x.new_empty((len(x), groups, 2), dtype=torch.float64)
    workspace = _workspace(x, groups, False)
    _kernel(*arguments, workspace, y, statistics, torch.get_num_threads())
    return y, statistics


def _forward_fake(x: Tensor, groups: int, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((len(x), groups, 2), dtype=torch.float64)


def _forward_inplace(*arguments: Any) -> None:
    x, groups = arguments[:2]
    if x.dtype == torch.float64:
        x.copy_(_forward_in_torch(*arguments)[0])
        return
    statistics = x.new_empty((len(x), groups, 2), dtype=torch.float64)
    workspace = _workspace(x, groups, False)
    _kernel(*arguments, workspace, x, statistics, torch.get_num_threads())


def _forward_inplace_fake(*_: Any) -> None:
    return None


def _backward(grad: Tensor, x: Tensor, statistics: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return _backward_in_torch(grad, x, statistics, *rest)
    grad_x = empty_like(x)
    sums = x.new_empty((2, x.shape[0], x.shape[1]), dtype=torch.float32)
    workspace = _workspace(x, rest[0], True)
    _backward_kernel(grad, x, statistics, *rest, workspace, grad_x, sums, torch.get_num_threads())
    return grad_x, sums


def _backward_fake(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty((2, x.shape[0], x.shape[1]), dtype=dtype)


def _normalized(x: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised x as `[b, g, -1]`, and 1 / sqrt(var + eps)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(wide).reshape(*statistics.shape[:2], -1)
    mean, inverse = statistics[..., :1], statistics[..., 1:].to(wide)
    near = mean.to(wide)
    return ((grouped - near) - (mean - near).to(wide)) * inverse, inverse


def _gain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a channel is multiplied by and what is added, both `[b, c, 1, ...]`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = torch.ones(x.shape[:2], dtype=wide, device=x.device)
    offset = torch.zeros_like(factor)
    if weight is not None:
        factor = factor * weight
    if bias is not None:
        offset = offset + bias
    if scale is not None:
        factor, offset = factor * (1 + scale), offset * (1 + scale)
    if shift is not None:
        offset = offset + shift
    shape = [*x.shape[:2], *[1] * (x.ndim - 2)]
    return factor.reshape(shape), offset.reshape(shape)


def _forward_in_torch(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, groups, weight, bias, residual, scale, shift, eps, silu = arguments
    y, statistics = _forward_fake(*arguments)
    grouped = x.reshape(len(x), groups, -1).double()
    mean = grouped.mean(-1)
    variance = (grouped - mean[..., None]).square().mean(-1)
    statistics.copy_(torch.stack([mean, torch.rsqrt(variance + eps)], -1))
    factor, offset = _gain(x, weight, bias, scale, shift)
    z = _normalized(x, statistics)[0].reshape(x.shape) * factor + offset
    if silu:
        z = torch.nn.functional.silu(z)
    return y.copy_(z if residual is None else z + residual), statistics


def _backward_in_torch(
    grad: Tensor, x: Tensor, statistics: Tensor, _: int, weight: Tensor | None,
    bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_x, sums = _backward_fake(grad, x)
    xhat, inverse = _normalized(x, statistics)
    factor, offset = _gain(x, weight, bias, scale, shift)
    dz = grad.to(sums.dtype)
    if silu:
        z = xhat.reshape(x.shape) * factor + offset
        p = torch.sigmoid(z)
        dz = dz * p * (1 + z * (1 - p))
    by_channel = dz.reshape(*x.shape[:2], -1)
    sums[0] = by_channel.sum(-1)
    sums[1] = (by_channel * xhat.reshape(by_channel.shape)).sum(-1)
    own = (dz * factor).reshape(xhat.shape)
    away = own.mean(-1, keepdim=True) + xhat * (own * xhat).mean(-1, keepdim=True)
    return grad_x.copy_(((own - away) * inverse).reshape(x.shape)), sums


# Gradients ----------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.groups, weight, bias, _, scale, shift, _, ctx.silu = inputs
    ctx.save_for_backward(x, output[1], weight, bias, scale, shift)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, statistics, weight, bias, scale, shift = ctx.saved_tensors
    laid_out = _laid_out_as(grad, x)
    grad_x, sums = _group_norm_silu_backward(
        laid_out, x, statistics, ctx.groups, weight, bias, scale, shift, ctx.silu
    )
    plain, weighted = sums
    needs = ctx.needs_input_grad
    result: list[Tensor | None] = [None] * 9
    result[_X] = grad_x if needs[_X] else None
    result[_RESIDUAL] = grad if needs[_RESIDUAL] else None
    factor = 1 if scale is None else 1 + scale
    if needs[_WEIGHT]:
        result[_WEIGHT] = (weighted * factor).sum(0)
    if needs[_BIAS]:
        result[_BIAS] = (plain * factor).sum(0)
    if needs[_SCALE]:
        own = weighted if weight is None else weighted * weight
        result[_SCALE] = own if bias is None else own + plain * bias
    if needs[_SHIFT]:
        result[_SHIFT] = plain
    return tuple(result)


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    results = []
    for i in range(info.batch_size):
        own = [
            value if dim is None else value.select(dim, i)
            for value, dim in zip(arguments, in_dims, strict=True)
        ]
        for place in (_WEIGHT, _BIAS, _SCALE, _SHIFT):
            own[place] = None if own[place] is None else own[place].contiguous()
        own[_X] = _dense(own[_X])
        own[_RESIDUAL] = None if own[_RESIDUAL] is None else _laid_out_as(own[_RESIDUAL], own[_X])
        results.append(_group_norm_silu(*own))
    y, statistics = zip(*results, strict=True)
    return (torch.stack(y), torch.stack(statistics)), (0, 0)


_ARGUMENTS = (
    "int groups, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? scale, Tensor? shift,"
    " float eps, bool silu"
)
_group_norm_silu = define_op(
    f"group_norm_silu(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor)",
    cpu=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
    vmap=_vmap,
)
_group_norm_silu_ = define_op(
    f"group_norm_silu_(Tensor(a!) x, {_ARGUMENTS}) -> ()",
    cpu=_forward_inplace,
    fake=_forward_inplace_fake,
)
_group_norm_silu_backward = define_op(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor statistics, int groups, Tensor? weight,"
    " Tensor? bias, Tensor? scale, Tensor? shift, bool silu) -> (Tensor, Tensor)",
    cpu=_backward,
    fake=_backward_fake,
)


# What users call ----------------------------------------------------------------------------------


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: Literal["silu", "none"] = "silu",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Group normalisation and what follows it, in one pass over memory where the cache allows.

    `silu(((x - mean) / sqrt(var + eps) weight + bias) (1 + scale) + shift) + residual`, with the
    mean and the variance of a group of channels of a sample (Wu and He, "Group Normalization",
    2018); scale and shift are those of a time embedding (Dhariwal and Nichol, 2021, section 3).

    Arithmetic is in float32, rounded once to the dtype of x; statistics are combined in float64
    from blocks of at most 8192 elements, in an order that does not depend on the threads. They are
    taken about each block's own mean: the result errs by a few units of float32 in the normalised
    values also where the mean is 10^4 times the spread. Values whose squared deviations leave the
    range of float32 (spread above 10^17) give NaN. On a GPU a group that fits into the registers
    of a block is read once, else twice. Float64 tensors are computed in float64 by PyTorch.
    Differentiable once in all tensors; deterministic.

    Args:
        x: `[b, c, ...]` in float32, bfloat16, float16 or float64; contiguous or with channels last,
            as the result. Anything else is copied first.
        num_groups: g, a divisor of c.
        weight: `[c]`, like bias, scale and shift in any floating dtype; used in float32.
        bias: `[c]`.
        eps: Added to the variance.
        activation: `"silu"`, or `"none"`.
        residual: As x; added last.
        scale: `[b, c]`, or `[b, c, 1, ...]`.
        shift: Likewise.
        inplace: Writes over x, which must be contiguous or have its channels last, and returns it.
            Saves a result's memory. Not where a gradient is wanted.

    Returns:
        `[b, c, ...]` in the dtype of x. O(b c n) time, and O(b c) memory beside the result, with
        channels last O(b c n / 64).

    Raises:
        ValueError: Shapes, layouts or devices do not fit, or `inplace` where a gradient is wanted.
        TypeError: A dtype is not supported.
    """
    op = "group_norm_silu"
    check_choice(op, "activation", activation, _ACTIVATIONS)
    tensors = {"weight": weight, "bias": bias, "residual": residual, "scale": scale, "shift": shift}
    _check(op, x, num_groups, tensors)
    dense = _dense(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    if residual is not None:
        residual = _laid_out_as(residual.to(x.dtype), dense)
    arguments = (
        dense, num_groups, _coefficients(weight, wide), _coefficients(bias, wide), residual,
        _coefficients(scale, wide, x), _coefficients(shift, wide, x), float(eps),
        activation == "silu",
    )  # fmt: skip
    if not inplace:
        # A plain call goes past the dispatcher, which would cost more than a small norm itself.
        if is_plain(x, *tensors.values()) and not x.is_meta:
            return _forward(*arguments)[0]
        result: Tensor = _group_norm_silu(*arguments)[0]
        return result
    if dense is not x:
        raise ValueError(f"{op}: inplace wants x contiguous or with its channels last")
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *tensors.values())
    ):
        raise ValueError(f"{op}: inplace cannot be used where a gradient is wanted")
    _group_norm_silu_(*arguments)
    written(x)
    return x


def _coefficients(
    values: Tensor | None, dtype: torch.dtype, x: Tensor | None = None
) -> Tensor | None:
    if values is None:
        return None
    if x is not None:
        values = values.reshape(x.shape[:2])
    return values.to(dtype).contiguous()


def _has_channels_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or _has_channels_last(x) else x.contiguous()


def _laid_out_as(values: Tensor, x: Tensor) -> Tensor:
    if x.is_contiguous():
        return values.contiguous()
    return values.movedim(1, -1).contiguous().movedim(-1, 1)


def _check(op: str, x: Tensor, groups: int, tensors: dict[str, Tensor | None]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {describe(x)}")
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: x must be float32, bfloat16, float16 or float64, got "
            f"{str(x.dtype).removeprefix('torch.')}"
        )
    if x.ndim < 2:
        raise ValueError(f"{op}: x must be [b, c, ...], got {list(x.shape)}")
    b, c = x.shape[:2]
    if not isinstance(groups, int) or groups < 1 or c == 0 or c % groups:
        raise ValueError(f"{op}: num_groups={groups} does not divide the {c} channels of x")
    wanted: dict[str, list[int]] = {"weight": [c], "bias": [c], "residual": list(x.shape)}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            came = describe(tensor) if not isinstance(tensor, Tensor) else str(tensor.dtype)
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {came}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but x is on {x.device}")
        shape = list(tensor.shape)
        if name in wanted:
            fits, expected = shape == wanted[name], str(wanted[name])
        else:
            fits = shape[:2] == [b, c] and all(size == 1 for size in shape[2:])
            expected = f"[{b}, {c}]"
        if not fits:
            raise ValueError(f"{op}: {name} is {shape} but x is {list(x.shape)}, want {expected}")
