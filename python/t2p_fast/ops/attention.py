# SPDX-License-Identifier: Apache-2.0
"""Softmax attention on a CPU: the inner loop of U-Nets and transformers of images.

Sizes: `b` batch, `h` heads, `m` queries, `n` keys, `d` channels of queries and keys, `e` of values.
Inside, tensors are `[b, h, n, d]` views with any strides but that of the channels.
"""

import torch
from torch import Tensor
from torch.nn import functional

from t2p_fast._checks import check_choice, describe, is_plain
from t2p_fast._library import _C, define_op
from t2p_fast.memory import empty

__all__ = ["attention"]

_LAYOUTS = ("bhnd", "bnhd")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_CHANNELS = 512
# On processors with AMX, Intel's all, torch multiplies wide float32 heads at least as fast as our
# kernel: from these sizes on in 0.71 to 1.00 of the time, with 77 keys in 0.99 to 1.17.
_WIDE, _MANY_KEYS = 160, 256
_TORCH_IS_FASTER_WHEN_WIDE = _C.build_info()["isa"] == "amx"


# The kernel, beside its fake ----------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, layout: str
) -> Tensor:
    out = _attend_fake(q, k, v, bias, scale, layout)
    bias = None if bias is None else bias.contiguous()
    _C.attention(_rows(q), _rows(k), _rows(v), bias, scale, out, torch.get_num_threads())
    return out


def _attend_fake(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    layout: str,
) -> Tensor:
    b, h, m, _ = q.shape
    if layout == "bnhd":
        return empty([b, m, h, v.shape[3]], q).transpose(1, 2)
    return empty([b, h, m, v.shape[3]], q)


_attention = define_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, str layout) -> Tensor",
    cpu=_attend,
    fake=_attend_fake,
)


# The public function -----------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, layout: str) -> None:
    op = "attention"
    check_choice(op, "layout", layout, _LAYOUTS)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got {describe(tensor)}")
        if tensor.ndim != 4:
            raise ValueError(f"{op}: {name} must have 4 dimensions, got {list(tensor.shape)}")
        if tensor.dtype != q.dtype:
            dtypes = (str(t.dtype).removeprefix("torch.") for t in (tensor, q))
            raise TypeError(f"{op}: {name} is " + " but q is ".join(dtypes))
        if tensor.device != q.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but q is on {q.device}")
    rows, heads = (2, 1) if layout == "bhnd" else (1, 2)
    for name, tensor, other, dims in (
        ("k", k, "q", (0, heads, 3)), ("v", v, "k", (0, heads, rows)),
    ):  # fmt: skip
        with_whom = q if other == "q" else k
        if any(tensor.shape[dim] != with_whom.shape[dim] for dim in dims):
            raise ValueError(
                f"{op}: {name} is {list(tensor.shape)} but {other} is {list(with_whom.shape)} in "
                f"layout {layout!r}"
            )
    if bias is None:
        return
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        came = str(bias.dtype) if isinstance(bias, Tensor) else describe(bias)
        raise TypeError(f"{op}: bias must be a tensor of floats or None, got {came}")
    if bias.shape != (k.shape[0], k.shape[rows]):
        here = [k.shape[0], k.shape[rows]]
        raise ValueError(f"{op}: bias must be [b, n], here {here}, got {list(bias.shape)}")
    if bias.device != q.device:
        raise ValueError(f"{op}: bias is on {bias.device} but q is on {q.device}")


def _has_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    if q.device.type != "cpu" or q.dtype not in _DTYPES or torch.is_autocast_enabled("cpu"):
        return False
    if not (0 < q.shape[3] <= _MOST_CHANNELS and 0 < v.shape[3] <= _MOST_CHANNELS):
        return False
    if _by_torch_when_wide(q, bias) and q.shape[3] >= _WIDE and k.shape[2] >= _MANY_KEYS:
        return False
    if not torch.compiler.is_compiling():
        return is_plain(q, k, v, bias)
    wanted = q.requires_grad or k.requires_grad or v.requires_grad
    return not (torch.is_grad_enabled() and (wanted or (bias is not None and bias.requires_grad)))


def _by_torch_when_wide(q: Tensor, bias: Tensor | None) -> bool:
    return _TORCH_IS_FASTER_WHEN_WIDE and q.dtype == torch.float32 and bias is None


def _by_torch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype)[:, None, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    layout: str = "bhnd",
) -> Tensor:
    """``softmax(scale q k^T + bias) v``, in `O(m n (d + e))` time and `O(d + e)` memory a query.

    On a CPU without gradients, up to 512 channels, by our kernels: sums in float32, in an order
    that depends on the shapes alone. There, on a processor with AVX512-BF16, weights of bfloat16
    queries are rounded to bfloat16 for their products with values, as torch does, and numbers below
    2^-126 may count as 0; with AMX they are known to 2^-7, and their sum is that of rounded ones.
    Everything else is torch's `scaled_dot_product_attention`: on a GPU, in float64, under autocast,
    where a gradient is wanted, and with AMX and without a bias for 160 and more channels of float32
    and 256 and more keys, at which it is faster.

    Args:
        q: ``[b, h, m, d]``, or ``[b, m, h, d]`` with `layout` "bnhd".
        k: ``[b, h, n, d]``, of the dtype of `q`.
        v: ``[b, h, n, e]``, of the dtype of `q`.
        bias: ``[b, n]`` floats, added to the scores of all queries and heads; -inf leaves a key
            out. A query without any key has zeros as its result.
        scale: Of the scores; ``1 / sqrt(d)`` if None.
        layout: Of `q`, `k`, `v` and the result; views of either are taken without a copy.

    Returns:
        The result, like `q` with `e` channels.

    Raises:
        TypeError: Dtypes differ, or `bias` holds no floats.
        ValueError: Shapes do not fit together, or the layout is unknown.

    Source: A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 1; with the
    running maximum of M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax",
    2018, algorithm 3.
    """
    _check(q, k, v, bias, layout)
    scale = 1 / max(q.shape[3], 1) ** 0.5 if scale is None else float(scale)
    if layout == "bnhd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if _has_kernel(q, k, v, bias):
        bias = None if bias is None else bias.float()
        # The dispatcher costs more than a small call, and has nothing to do for a plain one.
        attend = _attention if torch.compiler.is_compiling() else _attend
        out: Tensor = attend(q, k, v, bias, scale, layout)
    else:
        out = _by_torch(q, k, v, bias, scale)
    return out.transpose(1, 2) if layout == "bnhd" else out
