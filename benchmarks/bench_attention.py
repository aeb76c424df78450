# SPDX-License-Identifier: Apache-2.0
"""Attention at the sizes of U-Nets and token transformers, against torch's."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import attention

from .registry import Benchmark, Case, GateError, Inputs, Provider, Sizes, Workload

__all__ = ["BENCHMARK"]

Call = Callable[[], Any]


def _case(b: int, h: int, m: int, n: int, d: int, *, quick: bool = False) -> Case:
    return Case({"b": b, "h": h, "m": m, "n": n, "d": d}, quick)


# A U-Net at half the width of Stable Diffusion's, its own tokens and 77 of text; tokens of 16 x 16
# and 32 x 32 pictures; the one head of an autoencoder's middle.
_CASES = (
    _case(1, 8, 4096, 4096, 20),
    _case(1, 8, 4096, 77, 20, quick=True),
    _case(1, 8, 1024, 1024, 40, quick=True),
    _case(1, 8, 1024, 77, 40),
    _case(1, 8, 256, 256, 80),
    _case(2, 12, 256, 256, 64),
    _case(1, 12, 1024, 1024, 64),
    _case(1, 1, 1024, 1024, 512),
)


def _inputs(dtype: torch.dtype) -> Callable[[Sizes, str], Inputs]:
    def inputs(sizes: Sizes, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        b, h, m, n, d = (sizes[letter] for letter in "bhmnd")
        # Projections lie as [b, rows, h, d]; models pass views of them.
        q, k, v = (
            torch.randn(b, rows, h, d, generator=generator).to(device, dtype).transpose(1, 2)
            for rows in (m, n, n)
        )
        return {"q": q, "k": k, "v": v}

    return inputs


def _ours(inputs: Inputs) -> Call:
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    return lambda: attention(q, k, v, layout="bnhd").transpose(1, 2)


def _torch(inputs: Inputs) -> Call:
    q, k, v = (inputs[name] for name in "qkv")
    return lambda: F.scaled_dot_product_attention(q, k, v)


def _matrix(inputs: Inputs) -> Call:
    q, k, v = (inputs[name] for name in "qkv")
    return lambda: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def _check(name: str, found: Tensor, truth: Tensor, limit: float) -> None:
    error = float((found.double().cpu() - truth).abs().max())
    if not error <= limit:
        raise GateError(f"{name} is off by {error:.3g}, more than {limit:.3g}")


def _gate(inputs: Inputs, result: Any, ours: bool) -> None:
    q, k, v = (inputs[name].double().cpu() for name in "qkv")
    truth = reference.attention(q, k, v)
    limit = 2.0**-17 if inputs["q"].dtype == torch.float32 else 2.0**-7
    _check("the result", result, truth, limit * float(v.abs().max()) * (1 if ours else 4))


def _workload(name: str, title: str, dtype: torch.dtype) -> Workload:
    def flops(sizes: Sizes) -> float:
        return 4.0 * sizes["b"] * sizes["h"] * sizes["m"] * sizes["n"] * sizes["d"]

    def moved(sizes: Sizes) -> float:
        rows = 2 * sizes["m"] + 2 * sizes["n"]
        return float(dtype.itemsize * sizes["b"] * sizes["h"] * rows * sizes["d"])

    return Workload(
        name=name,
        title=title,
        cases=_CASES,
        providers=(
            Provider("t2p_fast", _ours, ours=True, devices=("cpu",)),
            Provider("torch sdpa", _torch),
            Provider("torch matmul", _matrix),
        ),
        inputs=_inputs(dtype),
        gate=_gate,
        flops=flops,
        bytes_moved=moved,
    )


def _awkward(device: str) -> None:
    """Ragged shapes, keys left out, and scores far apart."""
    generator = torch.Generator().manual_seed(1)
    for m, n, d, e in ((1, 1, 1, 1), (33, 65, 7, 21), (17, 130, 40, 16)):
        q, k, v = (torch.randn(2, 3, *s, generator=generator) for s in ((m, d), (n, d), (n, e)))
        bias = torch.randn(2, n, generator=generator).mul(20)
        bias[:, 1::2] = -torch.inf
        truth = reference.attention(q.double(), k.double(), v.double(), bias=bias.double())
        found = attention(*(x.to(device) for x in (q, k, v)), bias=bias.to(device))
        _check(f"the result at {m} x {n}", found, truth, 2.0**-15)


BENCHMARK = Benchmark(
    op="attention",
    gate=_awkward,
    workloads=(
        _workload("float32", "Attention in float32", torch.float32),
        _workload("bfloat16", "Attention in bfloat16", torch.bfloat16),
    ),
)
