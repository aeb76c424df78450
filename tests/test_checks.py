# SPDX-License-Identifier: Apache-2.0
"""Which calls may go past torch's dispatcher."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from t2p_fast._checks import is_plain


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


class _Subclass(Tensor):
    pass


def test_plain_tensors() -> None:
    x = torch.randn(3)
    assert is_plain()
    assert is_plain(x, None, torch.nn.Parameter(x, requires_grad=False))
    for other in (x.as_subclass(_Subclass), torch._neg_view(x), [1.0], 3):
        assert not is_plain(x, other)  # type: ignore[arg-type]


def test_a_gradient_is_wanted() -> None:
    x = torch.randn(3, requires_grad=True)
    assert not is_plain(None, x)
    assert is_plain(x.detach())
    with torch.no_grad():
        assert is_plain(x)
        assert is_plain(copy.deepcopy(torch.nn.Parameter(x)))
    with torch.inference_mode():
        assert is_plain(x)


def test_modes_and_transforms() -> None:
    x, seen = torch.randn(3), []

    def look(y: Tensor) -> Tensor:
        seen.append(is_plain(x))
        return y.sin()

    with _Mode():
        look(x)
    torch.vmap(look)(x)
    torch.func.grad(lambda y: look(y).sum())(x)
    with forward_ad.dual_level():
        look(x)
    assert seen == [False] * 4
    assert is_plain(x)


def test_while_torch_compiles() -> None:
    def function(y: Tensor) -> Tensor:
        return y + 1 if is_plain(y) else y - 1

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), -torch.ones(2))
