# SPDX-License-Identifier: Apache-2.0
"""group_norm_silu against torch's group_norm followed by silu, eager and compiled."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import group_norm_silu

from .registry import Benchmark, Case, GateError, Inputs, Provider, Sizes, Workload

__all__ = ["BENCHMARK"]

Call = Callable[[], Any]
_GROUPS = 32


def _case(
    b: int, c: int, h: int, *, quick: bool = False, devices: tuple[str, ...] = ("cpu", "cuda")
) -> Case:
    return Case({"b": b, "c": c, "h": h, "w": h}, quick, devices)


# The levels of Stable Diffusion's U-Net with guidance, and its decoder near the pixels.
_CASES = (
    _case(2, 320, 64, quick=True),
    _case(2, 640, 32),
    _case(2, 1280, 16),
    _case(1, 128, 256, quick=True),
    _case(1, 128, 1024, devices=("cuda",)),
)


def _inputs(layout: torch.memory_format, dtype: torch.dtype) -> Callable[[Sizes, str], Inputs]:
    def make(sizes: Sizes, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        shape = sizes["b"], sizes["c"], sizes["h"], sizes["w"]
        x, grad = (
            torch.randn(shape, generator=generator).to(device, dtype, memory_format=layout)
            for _ in range(2)
        )
        weight, bias = torch.randn(2, sizes["c"], generator=generator).to(device, dtype)
        return {"x": x, "grad": grad, "weight": weight, "bias": bias, "target": torch.empty_like(x)}

    return make


def _ours(inputs: Inputs) -> Call:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return lambda: group_norm_silu(x, _GROUPS, weight, bias)


def _in_place(inputs: Inputs) -> Call:
    """Ever again over the same tensor: timing only, the gate sees the first call."""
    x, weight, bias = inputs["x"].clone(), inputs["weight"], inputs["bias"]
    first = [True]

    def call() -> Tensor:
        result = group_norm_silu(x, _GROUPS, weight, bias, inplace=True)
        if first:
            first.clear()
            return result.clone()
        return result

    return call


def _torch(inputs: Inputs) -> Call:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return lambda: F.silu(F.group_norm(x, _GROUPS, weight, bias))


def _compiled(inputs: Inputs) -> Call:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    function = torch.compile(lambda a, w, b: F.silu(F.group_norm(a, _GROUPS, w, b)))
    return lambda: function(x, weight, bias)


def _inference(build: Callable[[Inputs], Call]) -> Callable[[Inputs], Call]:
    return build


def _training(build: Callable[[Inputs], Call]) -> Callable[[Inputs], Call]:
    """Forward and backward."""

    def make(inputs: Inputs) -> Call:
        leaves = {name: inputs[name].detach().requires_grad_() for name in ("x", "weight", "bias")}
        forward = build({**inputs, **leaves})
        return lambda: torch.autograd.grad(forward(), list(leaves.values()), inputs["grad"])

    return make


def _copy(tensors: int) -> Callable[[Inputs], Call]:
    """Not a peer but a measure: copies of x into memory that is there."""

    def build(inputs: Inputs) -> Call:
        def call() -> None:
            for _ in range(tensors):
                inputs["target"].copy_(inputs["x"])

        return call

    return build


def _check(name: str, found: Tensor, truth: Tensor, limit: float) -> None:
    error = float(((found.double().cpu() - truth).abs() / (1 + truth.abs())).max())
    if not error <= limit:
        raise GateError(f"{name} is off by {error:.3g}, more than {limit:.3g}")


def _gate_forward(inputs: Inputs, result: Any, ours: bool) -> None:
    if result is None:  # the copy
        return
    x, weight, bias = (inputs[name].double().cpu() for name in ("x", "weight", "bias"))
    truth = reference.group_norm_silu(x, _GROUPS, weight, bias)
    float32 = 4e-6 if ours else 2e-5
    _check("y", result, truth, float32 if inputs["x"].dtype == torch.float32 else 0.02)


def _gate_training(inputs: Inputs, result: Any, ours: bool) -> None:
    if result is None:
        return
    leaves = [inputs[name].double().cpu().requires_grad_() for name in ("x", "weight", "bias")]
    y = reference.group_norm_silu(leaves[0], _GROUPS, leaves[1], leaves[2])
    truth = torch.autograd.grad(y, leaves, inputs["grad"].double().cpu())
    for name, found, expected in zip(("x", "weight", "bias"), result, truth, strict=True):
        scale = float(expected.abs().mean()) if name != "x" else 1.0
        limit = 2e-5 if ours else 1e-4
        _check(f"the gradient of {name}", found / scale, expected / scale, limit)


def _workload(
    name: str, title: str, *, layout: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32, training: bool = False,
) -> Workload:  # fmt: skip
    wrap: Callable[[Callable[[Inputs], Call]], Callable[[Inputs], Call]]
    wrap = _training if training else _inference
    providers = [Provider("t2p_fast", wrap(_ours), ours=True)]
    if not training:
        providers.append(Provider("t2p_fast in place", _in_place, ours=True))
    moved = 5 if training else 2
    providers += [
        Provider("torch eager", wrap(_torch)),
        Provider("torch.compile", wrap(_compiled), flag="compile"),
        Provider("copy of x", _copy(2 if training else 1), yardstick=True),
    ]
    size = dtype.itemsize
    return Workload(
        name=name,
        title=title,
        cases=_CASES,
        providers=tuple(providers),
        inputs=_inputs(layout, dtype),
        gate=_gate_training if training else _gate_forward,
        flops=lambda sizes: 20.0 * sizes["b"] * sizes["c"] * sizes["h"] * sizes["w"],
        bytes_moved=lambda sizes: moved * size * sizes["b"] * sizes["c"] * sizes["h"] * sizes["w"],
    )


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _awkward(device: str) -> None:
    """Ragged shapes, a mean far from zero, and everything that can be added."""
    generator = torch.Generator().manual_seed(1)
    for shape, groups in (((1, 3, 7), 1), ((2, 33, 5, 7), 11), ((1, 40, 33, 65), 4)):
        for mean in (0.0, 1e4):
            x, residual = mean + torch.randn(2, *shape, generator=generator)
            scale, shift = torch.randn(2, *shape[:2], generator=generator)
            weight, bias = torch.randn(2, shape[1], generator=generator)
            extras = {"residual": residual - mean, "scale": scale, "shift": shift}
            truth = reference.group_norm_silu(
                x.double(), groups, weight.double(), bias.double(),
                **{name: tensor.double() for name, tensor in extras.items()},
            )  # fmt: skip
            for last in (False, True):
                found = group_norm_silu(
                    (_channels_last(x) if last else x).to(device), groups, weight.to(device),
                    bias.to(device),
                    **{name: tensor.to(device) for name, tensor in extras.items()},
                )  # fmt: skip
                _check(f"y at {list(shape)}", found, truth, 2e-5)


BENCHMARK = Benchmark(
    op="group_norm",
    gate=_awkward,
    workloads=(
        _workload("forward", "GroupNorm and SiLU"),
        _workload("channels last", "GroupNorm and SiLU, channels last", layout=torch.channels_last),
        _workload("bfloat16", "GroupNorm and SiLU in bfloat16", dtype=torch.bfloat16),
        _workload("training", "GroupNorm and SiLU, forward and backward", training=True),
    ),
)
