# SPDX-License-Identifier: Apache-2.0
"""The one place where t2p_fast talks to torch.library, and where the compiled module is loaded.

Functions given to `define_op` as `cpu` or `cuda` are the only ones that may call `_C`: the
dispatcher hands them real tensors. Everything else sees fake ones while torch compiles or exports.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from t2p_fast import _C

_C.init(torch)

_LIBRARY = torch.library.Library("t2p_fast", "DEF")

__all__ = ["_C", "define_op"]


def define_op(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
) -> Any:
    """Registers one op as ``torch.ops.t2p_fast.<name>`` and returns a function that calls it.

    Args:
        schema: The op's signature in the language of torch schemas, without a namespace.
        cpu: The implementation for CPU tensors.
        cuda: The implementation for CUDA tensors; `cpu` where it serves both.
        fake: Shapes, strides and dtypes of the results, computed without data.
        setup_context: Saves what `backward` needs, as in `torch.library.register_autograd`.
        backward: The gradient formula; without one the results are not differentiable.
        vmap: The batching rule, as in `torch.library.register_vmap`.
    """
    name = schema.split("(", 1)[0]
    qualified = f"t2p_fast::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda or cpu, "CUDA")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=_LIBRARY
        )
    if vmap is not None:
        torch.library.register_vmap(qualified, vmap, lib=_LIBRARY)
    op = getattr(torch.ops.t2p_fast, name).default

    def call(*arguments: Any) -> Any:
        # torch would drop the tangents without a word: a registered op has no formula for them.
        if getattr(forward_ad, "_current_level", -1) >= 0 and any(map(_has_tangent, arguments)):
            raise NotImplementedError(
                f"{name}: forward-mode differentiation is not supported, use reverse mode"
            )
        return op(*arguments)

    return call


def _has_tangent(argument: object) -> bool:
    if not isinstance(argument, torch.Tensor):
        return False
    return forward_ad.unpack_dual(argument).tangent is not None
