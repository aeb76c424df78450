# SPDX-License-Identifier: Apache-2.0
"""Checks and conversions of arguments that several ops share."""

import torch
from torch import Tensor

from t2p_fast._library import _C

__all__ = [
    "check_choice",
    "describe",
    "has_modes",
    "is_plain",
    "normalize_dim",
    "under_autocast",
    "written",
]

_is_compiling = torch.compiler.is_compiling


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


has_modes = _C.has_modes


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether no gradient is wanted and no mode of torch would do more than run an op."""
    return not _is_compiling() and _C.is_plain(*tensors)


def written(*tensors: Tensor | None) -> None:
    """Tells autograd that these have been written over, so that it does not use what was there."""
    if _is_compiling():  # which sees it in the op's schema
        return
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


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
