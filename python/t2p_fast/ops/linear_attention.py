# SPDX-License-Identifier: Apache-2.0
"""Linear attention: attention whose cost grows with the length of a sequence, not its square.

Sizes: `b` batch, `h` heads, `m` queries, `n` keys, `d` channels of queries and keys, `e` of values,
`s` sequences. Inside, tensors are `[b, h, n, d]` views with any strides but that of the channels.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from t2p_fast._checks import check_choice, describe, is_plain, under_autocast
from t2p_fast._library import _C, define_op
from t2p_fast.memory import empty

__all__ = ["linear_attention"]

_FEATURES = ("relu", "elu+1", "identity")
_LAYOUTS = ("bhnd", "bnhd")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# The kernels, each beside its fake ---------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _options(
    key_mask: Tensor | None, cu_seqlens: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        None if key_mask is None else key_mask.contiguous().view(torch.uint8),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
    )


def _workspace(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, backward: bool
) -> Tensor | None:
    """Scratch memory that the kernels want on a GPU."""
    if not q.is_cuda:
        return None
    size = _C.linear_attention_workspace_size(q, k, v, cu_seqlens, causal, backward)
    return q.new_empty(size, dtype=torch.float32)


def _attend(
    q: Tensor, k: Tensor, v: Tensor,
    key_mask: Tensor | None, cu_seqlens: Tensor | None, initial_state: Tensor | None,
    feature: str, causal: bool, normalize: bool, eps: float, scale: float,
    layout: str, return_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, state = _attend_fake(
        q, k, v, key_mask, cu_seqlens, initial_state, feature, causal, normalize, eps, scale,
        layout, return_state,
    )  # fmt: skip
    q, k, v = _rows(q), _rows(k), _rows(v)
    options = _options(key_mask, cu_seqlens, initial_state)
    _C.linear_attention(
        q, k, v, *options, feature, causal, normalize, eps, scale,
        _workspace(q, k, v, options[1], causal, False), out, state if return_state else None,
        torch.get_num_threads(),
    )  # fmt: skip
    return out, state


def _attend_fake(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    key_mask: Tensor | None,  # noqa: ARG001
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,  # noqa: ARG001
    feature: str,  # noqa: ARG001
    causal: bool,  # noqa: ARG001
    normalize: bool,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    layout: str,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    b, h, m, d = q.shape
    e = v.shape[3]
    rows = layout == "bnhd"
    out = empty([b, m, h, e], q).transpose(1, 2) if rows else empty([b, h, m, e], q)
    s = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty([s, h, d, e + 1] if return_state else [0], dtype=torch.float32)
    return out, state


def _backward(
    q: Tensor, k: Tensor, v: Tensor,
    key_mask: Tensor | None, cu_seqlens: Tensor | None, initial_state: Tensor | None,
    feature: str, causal: bool, normalize: bool, eps: float, scale: float,
    grad_out: Tensor, grad_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    results = _backward_fake(
        q, k, v, key_mask, cu_seqlens, initial_state, feature, causal, normalize, eps, scale,
        grad_out, grad_state,
    )  # fmt: skip
    grad_q, grad_k, grad_v, grad_initial = results
    q, k, v = _rows(q), _rows(k), _rows(v)
    options = _options(key_mask, cu_seqlens, initial_state)
    _C.linear_attention_backward(
        q, k, v, *options, feature, causal, normalize, eps, scale,
        _workspace(q, k, v, options[1], causal, True), _rows(grad_out),
        None if grad_state is None else grad_state.contiguous(), grad_q, grad_k, grad_v,
        None if initial_state is None else grad_initial, torch.get_num_threads(),
    )  # fmt: skip
    return results


def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,  # noqa: ARG001
    cu_seqlens: Tensor | None,  # noqa: ARG001
    initial_state: Tensor | None,
    feature: str,  # noqa: ARG001
    causal: bool,  # noqa: ARG001
    normalize: bool,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    grad_out: Tensor,  # noqa: ARG001
    grad_state: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (empty(x.shape, x) for x in (q, k, v))
    shape = [0] if initial_state is None else initial_state.shape
    return grad_q, grad_k, grad_v, q.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, ctx.layout, ctx.return_state = inputs
    ctx.save_for_backward(*tensors[:6])
    ctx.options = tensors[6:]
    if not ctx.return_state:
        ctx.mark_non_differentiable(output[1])


@once_differentiable  # without it torch takes second derivatives for zero
def _gradients(ctx: Any, grad_out: Tensor, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_state = grad_state if ctx.return_state else None
    q, k, v, key_mask, cu_seqlens, initial_state = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_initial = _linear_attention_backward(
        q, k, v, key_mask, cu_seqlens, initial_state, *ctx.options, grad_out, grad_state
    )
    initial = None if initial_state is None else grad_initial
    return (grad_q, grad_k, grad_v, None, None, initial, *[None] * 7)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, Tensor? initial_state, "
    "str feature, bool causal, bool normalize, float eps, float scale"
)
_linear_attention = define_op(
    f"linear_attention({_ARGUMENTS}, str layout, bool return_state) -> (Tensor, Tensor)",
    cpu=_attend,
    fake=_attend_fake,
    setup_context=_setup_context,
    backward=_gradients,
)
_linear_attention_backward = define_op(
    f"linear_attention_backward({_ARGUMENTS}, Tensor grad_out, Tensor? grad_state) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    cpu=_backward,
    fake=_backward_fake,
)


# The public function -----------------------------------------------------------------------------


def _check(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> None:  # fmt: skip
    op = "linear_attention"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got {describe(tensor)}")
        if tensor.ndim != 4:
            raise ValueError(f"{op}: {name} must have 4 dimensions, got {list(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            came = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16, got {came}")
    others = {"key_mask": key_mask, "cu_seqlens": cu_seqlens, "initial_state": initial_state}
    for name, other in {"k": k, "v": v, **others}.items():
        if other is None:
            continue
        if not isinstance(other, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor or None, got {describe(other)}")
        # torch would give a call with one meta tensor to the meta kernel, which computes nothing.
        if other.device != q.device:
            raise ValueError(f"{op}: {name} is on {other.device} but q is on {q.device}")
    if key_mask is not None and key_mask.dtype != torch.bool:
        came = str(key_mask.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: key_mask must be bool, got {came}")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0):
        raise ValueError(f"{op}: cu_seqlens must be [s + 1], got {list(cu_seqlens.shape)}")


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    feature: str = ..., causal: bool = ..., normalize: bool = ..., eps: float = ...,
    scale: float = ..., key_mask: Tensor | None = ..., cu_seqlens: Tensor | None = ...,
    initial_state: Tensor | None = ..., return_state: Literal[False] = ..., layout: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    feature: str = ..., causal: bool = ..., normalize: bool = ..., eps: float = ...,
    scale: float = ..., key_mask: Tensor | None = ..., cu_seqlens: Tensor | None = ...,
    initial_state: Tensor | None = ..., return_state: Literal[True], layout: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: str = "relu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-15,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    layout: str = "bhnd",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with the kernel ``phi(q) phi(k)``, in `O(n d e)` time and `O(d e)` memory.

    ``S = S_0 + sum_j phi(k_j) v_j^T``, ``z = z_0 + sum_j phi(k_j)``,
    ``o_i = scale phi(q_i)^T S / (scale phi(q_i)^T z + eps)``, with the sums over all keys or, if
    causal, over those up to ``i``. Differentiable once in `q`, `k`, `v` and `initial_state`. Sums
    are in float32, in an order that depends on the shapes alone, and the state stays in float32.
    On a GPU the states of parts of the keys are kept meanwhile, if causal of every 64. On a CPU,
    bfloat16 numbers below 2^-126 may count as 0.

    Args:
        q: ``[b, h, m, d]``, or ``[b, m, h, d]`` with `layout` "bnhd"; float32, bfloat16 or float16.
        k: ``[b, h, n, d]``, of the dtype of `q`.
        v: ``[b, h, n, e]``, of the dtype of `q`; `d` and `e` are at most 256.
        feature: phi: "relu" (SANA, EfficientViT), "elu+1" (Katharopoulos et al.) or "identity".
        causal: Whether a query sees only the keys up to its own place; then `m` must be `n`. A NaN
            or infinity may reach up to 31 places before its own, on a GPU 63.
        normalize: Whether to divide; else `o_i` is the numerator.
        eps: Added to the denominator.
        scale: Of the queries, after phi.
        key_mask: ``[b, n]`` bool, false where a key is left out.
        cu_seqlens: ``[s + 1]`` int64, where sequences begin that lie one after another in a batch
            of 1, first 0 and last `n`; then `m` must be `n`. On a GPU, where it would have to wait
            for them, values are not checked: others leave results undefined.
        initial_state: ``[s, h, d, e + 1]`` float32 (`s` is `b` without `cu_seqlens`): S and, in the
            last column, z, of the keys that came before.
        return_state: Whether to return the state after all keys too.
        layout: Of `q`, `k`, `v` and the result; views of either are taken without a copy.

    Returns:
        The result, like `q` with `e` channels; with `return_state` also the state.

    Raises:
        TypeError: A dtype is not supported, or those of `q`, `k` and `v` differ.
        ValueError: Shapes do not fit together, or an option is unknown.

    Source: A. Katharopoulos et al., "Transformers are RNNs", ICML 2020, equations 5 to 12.
    """
    check_choice("linear_attention", "feature", feature, _FEATURES)
    check_choice("linear_attention", "layout", layout, _LAYOUTS)
    _check(q, k, v, key_mask, cu_seqlens, initial_state)
    q, k, v = under_autocast(q, k, v)
    if layout == "bnhd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tensors = q, k, v, key_mask, cu_seqlens, initial_state
    # The dispatcher and autograd cost more than a small call.
    plain = is_plain(*tensors) and not q.is_meta
    out, state = (_attend if plain else _linear_attention)(
        *tensors, feature, causal, normalize, eps, scale, layout, return_state
    )
    if layout == "bnhd":
        out = out.transpose(1, 2)
    return (out, state) if return_state else out
