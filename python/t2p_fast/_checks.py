# SPDX-License-Identifier: Apache-2.0
"""Checks and conversions of arguments that several ops share."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["check_choice", "describe", "is_plain", "normalize_dim", "under_autocast"]

_is_compiling = torch.compiler.is_compiling
_count_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_is_grad_enabled = torch.is_grad_enabled
_PLAIN = (Tensor, torch.nn.Parameter)


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        supported = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{op}: {name}={value!r} is not supported; supported: {supported}")


def describe(value: object) -> str:
    """What a value is, for an error message."""
    if isinstance(value, Tensor):
        return f"a {str(value.layout).removeprefix('torch.')} tensor"
    return f"a {type(value).__name__}"


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether no gradient is wanted and no mode of torch would do more than run an op."""
    if _is_compiling() or _count_modes() or _transform() is not None:
        return False
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return False
    grad = _is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN
            or tensor.is_neg()  # a view that the dispatcher would negate first
            or (grad and tensor.requires_grad)
        ):
            return False
    return True


def normalize_dim(op: str, name: str, dim: int, ndim: int) -> int:
    """`dim` counted from the front, for a tensor of `ndim` dimensions."""
    if not isinstance(dim, int):
        raise TypeError(f"{op}: {name} must be an int, got {describe(dim)}")
    if not -ndim <= dim < ndim:
        raise ValueError(f"{op}: {name}={dim} is out of range for {ndim} dimensions")
    return dim % ndim


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32 where autocast is on; unchanged where it is off."""
    device = tensors[0].device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return tuple(t.float() if t.is_floating_point() else t for t in tensors)
    return tensors
