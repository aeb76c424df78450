# SPDX-License-Identifier: Apache-2.0
"""linear_attention against torch's matrix products, in the forms that people write."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from t2p_fast import reference
from t2p_fast.ops import linear_attention

from .registry import Benchmark, Case, GateError, Inputs, Provider, Sizes, Workload

__all__ = ["BENCHMARK"]

Call = Callable[[], Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_EPS = 1e-15
_CHUNK = 64  # of the causal form in torch, the fastest of 32, 64 and 128


def _case(
    b: int,
    h: int,
    n: int,
    d: int,
    *,
    quick: bool = False,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    return Case({"b": b, "h": h, "n": n, "d": d}, quick, devices)


def _inputs(sizes: Sizes, device: str, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shape = [sizes[letter] for letter in "bhnd"]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    return {"q": q, "k": k, "v": v, "grad": grad}


def _side_by_side(sizes: Sizes, device: str) -> Inputs:
    """The same with the heads of a position side by side in memory, as projections leave them."""
    inputs = _inputs(sizes, device)
    return {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}


def _close(result: Tensor, truth: Tensor, tolerance: float) -> None:
    error = float((result.double() - truth).abs().max() / truth.abs().max())
    if not error < tolerance:
        raise GateError(f"the largest error is {error:.1e} of the largest number")


def _gate_forward(inputs: Inputs, result: Tensor, ours: bool, *, causal: bool = False) -> None:
    q, k, v = (inputs[name][:1, :1].double() for name in "qkv")
    truth, _ = reference.linear_attention(q, k, v, causal=causal)
    exact = result.dtype == torch.float32
    _close(result[:1, :1], truth, (2e-6 if ours else 1e-4) if exact else 1e-2)


def _gate_training(inputs: Inputs, result: Any, ours: bool, *, causal: bool) -> None:
    leaves = [inputs[name][:1, :1].double().requires_grad_() for name in "qkv"]
    truth, _ = reference.linear_attention(*leaves, causal=causal)
    wanted = torch.autograd.grad(truth, leaves, inputs["grad"][:1, :1].double())
    for gradient, right in zip(result, wanted, strict=True):
        _close(gradient[:1, :1], right, 1e-5 if ours else 1e-3)


def _ones_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As diffusers and EfficientViT write it: in float32, a row of ones under v^T."""
    dtype = q.dtype
    q, k, v = q.relu().float(), k.relu().float(), v.float()
    v = functional.pad(v.mT, (0, 0, 0, 1), value=1.0)
    out = (v @ k) @ q.mT
    out = out[..., :-1, :] / (out[..., -1:, :] + _EPS)
    return out.mT.to(dtype)


def _two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The shortest form, in the inputs' dtype."""
    q, k = q.relu(), k.relu()
    return q @ (k.mT @ v) / (q @ k.sum(-2)[..., None] + _EPS)


def _chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, in chunks: states before each by a running sum, all pairs within each."""
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b, h, n // _CHUNK, _CHUNK, d) for x in (q.relu(), k.relu(), v))
    sums = k.mT @ v
    z = k.reshape(b, h, n, d).cumsum(2).reshape(k.shape)
    out = (q @ k.mT).tril() @ v + q @ (sums.cumsum(2) - sums)
    return (out / ((q * z).sum(-1, keepdim=True) + _EPS)).reshape(b, h, n, d)


def _forward(attend: Attend, inputs: Inputs) -> Call:
    return lambda: attend(inputs["q"], inputs["k"], inputs["v"])


def _training(attend: Attend, inputs: Inputs) -> Call:
    leaves = [inputs[name].clone().requires_grad_() for name in "qkv"]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, inputs["grad"])


def _compiled(build: Callable[[Attend, Inputs], Call], attend: Attend, inputs: Inputs) -> Call:
    return build(torch.compile(attend, fullgraph=True), inputs)


_causal = partial(linear_attention, causal=True)


def _providers(
    build: Callable[[Attend, Inputs], Call], ours: Attend, forms: dict[str, Attend]
) -> tuple[Provider, ...]:
    compiled = next(iter(forms.values()))
    return (
        Provider("t2p_fast", partial(build, ours), ours=True),
        *(Provider(name, partial(build, form)) for name, form in forms.items()),
        Provider("torch.compile", partial(_compiled, build, compiled), flag="compile"),
    )


_PLAIN: dict[str, Attend] = {"torch ones row": _ones_row, "torch": _two_products}
_CAUSAL: dict[str, Attend] = {"torch chunks": _chunks}
_CASES = (
    _case(2, 70, 1024, 32, quick=True),
    _case(1, 36, 4096, 32),
    _case(16, 36, 4096, 32, devices=("cuda",)),
)
_CAUSAL_CASES = (_case(1, 16, 1024, 64),)


def _flops(products: float) -> Callable[[Sizes], float]:
    return lambda s: 2.0 * products * s["b"] * s["h"] * s["n"] * s["d"] ** 2


def _bytes(tensors: int, width: int) -> Callable[[Sizes], float]:
    return lambda s: float(tensors * width * s["b"] * s["h"] * s["n"] * s["d"])


def _gate(device: str) -> None:
    """Awkward sizes, all features, a state and a mask."""
    generator = torch.Generator().manual_seed(0)
    for n, d, e in ((1, 1, 1), (37, 15, 33), (130, 64, 8)):
        q, k, v = (torch.randn(2, 2, n, c, generator=generator).to(device) for c in (d, d, e))
        state = torch.rand(2, 2, d, e + 1, generator=generator).to(device)
        mask = (torch.rand(2, n, generator=generator) < 0.7).to(device)
        for feature in ("relu", "elu+1"):
            for causal in (False, True):
                ours = linear_attention(
                    q, k, v, feature=feature, causal=causal, initial_state=state, key_mask=mask
                )
                truth, _ = reference.linear_attention(
                    q.double(), k.double(), v.double(), feature=feature, causal=causal,
                    initial_state=state.double(), key_mask=mask,
                )  # fmt: skip
                _close(ours, truth, 1e-5)


BENCHMARK = Benchmark(
    op="linear_attention",
    gate=_gate,
    workloads=(
        Workload(
            name="forward",
            title="linear_attention: relu, float32",
            cases=_CASES,
            providers=_providers(_forward, linear_attention, _PLAIN),
            inputs=_inputs,
            gate=_gate_forward,
            flops=_flops(2),
            bytes_moved=_bytes(4, 4),
        ),
        Workload(
            name="forward-bf16",
            title="linear_attention: relu, bfloat16",
            cases=_CASES,
            providers=_providers(_forward, linear_attention, _PLAIN),
            inputs=partial(_inputs, dtype=torch.bfloat16),
            gate=_gate_forward,
            flops=_flops(2),
            bytes_moved=_bytes(4, 2),
        ),
        Workload(
            name="forward-side-by-side",
            title="linear_attention: relu, float32, heads side by side",
            cases=_CASES,
            providers=_providers(_forward, linear_attention, _PLAIN),
            inputs=_side_by_side,
            gate=_gate_forward,
            flops=_flops(2),
            bytes_moved=_bytes(4, 4),
        ),
        Workload(
            name="causal",
            title="linear_attention: relu, causal, float32",
            cases=_CAUSAL_CASES,
            providers=_providers(_forward, _causal, _CAUSAL),
            inputs=_inputs,
            gate=partial(_gate_forward, causal=True),
            flops=_flops(2),
            bytes_moved=_bytes(4, 4),
        ),
        Workload(
            name="training",
            title="linear_attention and its gradients: relu, float32",
            cases=_CASES,
            providers=_providers(_training, linear_attention, _PLAIN),
            inputs=_inputs,
            gate=partial(_gate_training, causal=False),
            flops=_flops(7),
            bytes_moved=_bytes(11, 4),
        ),
        Workload(
            name="training-causal",
            title="linear_attention and its gradients: relu, causal, float32",
            cases=_CAUSAL_CASES,
            providers=_providers(_training, _causal, _CAUSAL),
            inputs=_inputs,
            gate=partial(_gate_training, causal=True),
            flops=_flops(7),
            bytes_moved=_bytes(11, 4),
        ),
    ),
)
