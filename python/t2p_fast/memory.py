# SPDX-License-Identifier: Apache-2.0
"""Memory of large results on the CPU, kept when they die and given to the next ones.

glibc maps an array of megabytes anew for every result and unmaps it afterwards. Each call then
enters all of its pages again, at a cost above that of most kernels here: torch's group norm and
SiLU of 32 MiB take 24 ms so, and 3.6 ms where pages are kept (Zen 4, 2 threads). So results of
`LARGE` bytes and more have memory of their own, which goes back into a cache with the last tensor
that uses it, as on a GPU in torch.

In all but one way these are tensors like any other: their storage can't be resized in place, as
one that numpy made can't. That goes for small results of a scheduler's step too, which are made
without torch's dispatcher.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from t2p_fast._library import _C

__all__ = ["LARGE", "cached_bytes", "empty", "empty_cache", "empty_like", "limit", "set_limit"]

LARGE: int = _C.LARGE

_CODES = {
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int64: (0, 64),
}
_from_dlpack = torch.utils.dlpack.from_dlpack


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)`, from the cache if it is large and on the CPU."""
    dtype = dtype or like.dtype
    if not _is_ours(like, dtype) or math.prod(shape) * dtype.itemsize < LARGE:
        return like.new_empty(tuple(shape), dtype=dtype)
    count, stride = 1, []
    for size in reversed(shape):
        stride.append(count)
        count *= size
    return _from_dlpack(_C.empty(shape, stride[::-1], *_CODES[dtype]))


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like(x)`, from the cache if it is large and on the CPU."""
    if x.nbytes < LARGE or not _is_ours(x, x.dtype) or not _without_gaps(x):
        return torch.empty_like(x)
    return _from_dlpack(_C.empty(x.shape, x.stride(), *_CODES[x.dtype]))


def _is_ours(like: Tensor, dtype: torch.dtype) -> bool:
    """Not of a fake tensor either, whose sizes may be symbols."""
    if type(like) is not Tensor or like.is_cuda:
        return False
    return like.device.type == "cpu" and dtype in _CODES


def _without_gaps(x: Tensor) -> bool:
    """Every element in its own place, and none between them."""
    count = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != count:
            return False
        count *= size
    return True


def empty_cache() -> None:
    """Gives what is cached back to the system."""
    _C.drop_blocks()


def cached_bytes() -> int:
    """What is cached now, in bytes."""
    return _C.kept_bytes()


def limit() -> int:
    """How much may be cached, in bytes: a sixteenth of the machine's memory, at most 1 GiB."""
    return _C.kept_limit()


def set_limit(size: int) -> None:
    """Caches at most `size` bytes from now on; 0 turns the cache off.

    Raises:
        ValueError: `size` is negative.
    """
    if size < 0:
        raise ValueError(f"set_limit: size is {size}, expected at least 0")
    _C.set_kept_limit(size)
