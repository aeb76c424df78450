# SPDX-License-Identifier: Apache-2.0
"""mrf against eager torch in float32 and bfloat16, and against depthwise convolution."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import (
    GridWeights,
    grid_neighbours,
    mrf_bp,
    mrf_energy,
    mrf_icm,
    mrf_mean_field,
    mrf_pack,
)

from .cuda_graph import in_graph
from .registry import Benchmark, Case, GateError, Inputs, Provider, Sizes, Workload

__all__ = ["BENCHMARK"]

Call = Callable[[], Any]

_UNKNOWN = 66 / 256  # what Muse has left to find after 20 of its 24 rounds
_WINDOW = 5
_ITERATIONS = 5  # of the local workload
_BP_ITERATIONS = 10


def _case(
    n: int, v: int, t: int, *, quick: bool = False, devices: tuple[str, ...] = ("cpu", "cuda")
) -> Case:
    return Case({"n": n, "v": v, "t": t}, quick, devices)


# MarkovGen's base grid and number of iterations.
_BASE = _case(256, 8192, 5, devices=("cuda",))


# dense weights -----------------------------------------------------------------------------------


def _dense_inputs(sizes: Sizes, device: str) -> Inputs:
    """Learned weights of no structure; the message is about as large as the unary scores."""
    generator = torch.Generator().manual_seed(0)
    n, v = sizes["n"], sizes["v"]
    unary = 3 * torch.randn(1, n, v, generator=generator)
    w_s = 0.05 * torch.randn(n, n, generator=generator)
    w_c = torch.randn(v, v, generator=generator)
    inputs = {"unary": unary, "w_s": w_s, "w_c": w_c}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    inputs["w_s16"], inputs["w_c16"] = inputs["w_s"].bfloat16(), inputs["w_c"].bfloat16()
    return {**inputs, "t": sizes["t"], "known": None}


def _known_inputs(sizes: Sizes, device: str) -> Inputs:
    inputs = _dense_inputs(sizes, device)
    generator = torch.Generator().manual_seed(1)
    n, v = sizes["n"], sizes["v"]
    known = torch.randint(0, v, (1, n), generator=generator)
    unknown = int(n * _UNKNOWN)
    known[0, torch.randperm(n, generator=generator)[:unknown]] = -1
    # On a CPU nobody waits to find out.
    told = None if device == "cpu" else unknown
    return {**inputs, "known": known.to(device), "unknown": told}


def _ours(w_c: str) -> Callable[[Inputs], Call]:
    def build(inputs: Inputs) -> Call:
        # Weights are packed once, as a model does.
        weights = inputs[w_c]
        low = isinstance(weights, Tensor) and weights.dtype == torch.bfloat16
        packed = mrf_pack(weights) if low and not weights.is_cuda else None
        return lambda: mrf_mean_field(
            inputs["unary"],
            inputs["w_s"],
            inputs[w_c],
            iterations=inputs["t"],
            known=inputs["known"],
            packed=packed,
            unknown=inputs.get("unknown"),
        )

    return build


def _torch_dense(
    unary: Tensor, w_s: Tensor, w_c: Tensor, iterations: int, known: Tensor | None
) -> Tensor:
    """Algorithm 1 as it is written, in the dtype of the weights; known positions are put back."""
    one_hot = None
    if known is not None:
        one_hot = F.one_hot(known.clamp_min(0), unary.shape[-1]).to(w_c.dtype)
        free = (known < 0)[..., None]
    q = unary.softmax(-1).to(w_c.dtype)
    for _ in range(iterations):
        if one_hot is not None:
            q = torch.where(free, q, one_hot)
        q = ((w_s @ q) @ w_c.T + unary).softmax(-1).to(w_c.dtype)
    result: Tensor = q if one_hot is None else torch.where(free, q, one_hot)
    return result


def _eager(low: bool) -> Callable[[Inputs], Call]:
    def build(inputs: Inputs) -> Call:
        end = "16" if low else ""
        return lambda: _torch_dense(
            inputs["unary"],
            inputs["w_s" + end],
            inputs["w_c" + end],
            inputs["t"],
            inputs["known"],
        )

    return build


def _torch_compile(inputs: Inputs) -> Call:
    compiled: Callable[..., Tensor] = torch.compile(_torch_dense, fullgraph=True)
    arguments = [inputs[name] for name in ("unary", "w_s16", "w_c16", "t", "known")]
    return lambda: compiled(*arguments)


def _gate_dense(inputs: Inputs, result: Any, ours: bool) -> None:  # noqa: ARG001
    """Within 2e-2 of float64 everywhere and the same likeliest label at all but one of 200.

    The truth is computed once a case, for the largest in float32, whose error is far below that.
    """
    if "truth" not in inputs:
        dtype = torch.float64 if inputs["w_c"].numel() <= 2**20 else torch.float32
        inputs["truth"] = reference.mrf_mean_field(
            inputs["unary"].to(dtype),
            inputs["w_s"].to(dtype),
            inputs["w_c"].to(dtype),
            iterations=inputs["t"],
            known=inputs["known"],
        )
    truth = inputs["truth"]
    error = float((result.to(truth.dtype) - truth).abs().max())
    agreement = float((result.argmax(-1) == truth.argmax(-1)).float().mean())
    if not error <= 2e-2 or agreement < 0.995:
        raise GateError(f"q is off by {error:.2g}, {agreement:.2%} of the labels agree")


def _dense_flops(sizes: Sizes, unknown: float = 1.0) -> float:
    u, n, v = sizes["n"] * unknown, sizes["n"], sizes["v"]
    return sizes["t"] * 2.0 * u * v * (n * unknown + v)


def _dense_bytes(sizes: Sizes) -> float:
    n, v = sizes["n"], sizes["v"]
    return 4.0 * (sizes["t"] * v * v + n * n + 2 * n * v)


_DENSE_PROVIDERS = (
    Provider("t2p_fast bf16", _ours("w_c16"), ours=True),
    Provider("t2p_fast fp32", _ours("w_c"), ours=True),
    Provider("torch fp32", _eager(False)),
    Provider("torch bf16", _eager(True)),
    Provider("torch.compile bf16", _torch_compile, flag="compile"),
)


# a window on the grid, equal labels attract -------------------------------------------------------


def _local_inputs(sizes: Sizes, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    h, w, v = sizes["h"], sizes["w"], sizes["v"]
    unary = 3 * torch.randn(1, h * w, v, generator=generator)
    # A Gaussian of 1.5 positions, as a dense CRF's smoothness kernel, without its middle.
    y, x = torch.meshgrid(*2 * [torch.arange(_WINDOW) - _WINDOW // 2.0], indexing="ij")
    table = 0.3 * torch.exp(-(y.square() + x.square()) / (2 * 1.5**2))
    table[_WINDOW // 2, _WINDOW // 2] = 0
    return {"unary": unary.to(device), "w_s": GridWeights(table.to(device), h, w), "w_c": 1.0,
            "t": _ITERATIONS, "known": None}  # fmt: skip


def _torch_convolution(inputs: Inputs) -> Call:
    """The window as a depthwise convolution of an image of labels."""
    (table, h, w), v = inputs["w_s"], inputs["unary"].shape[2]
    image = inputs["unary"].view(1, h, w, v).permute(0, 3, 1, 2).contiguous()
    weight = table.expand(v, 1, *table.shape).contiguous()

    def call() -> Tensor:
        q = image.softmax(1)
        for _ in range(_ITERATIONS):
            q = (F.conv2d(q, weight, padding=_WINDOW // 2, groups=v) + image).softmax(1)
        result: Tensor = q.permute(0, 2, 3, 1).reshape(1, h * w, v)
        return result

    return call


def _gate_local(inputs: Inputs, result: Any, ours: bool) -> None:  # noqa: ARG001
    """The convolution in float64."""
    table, h, w = inputs["w_s"]
    double = {"unary": inputs["unary"].double(), "w_s": GridWeights(table.double(), h, w)}
    error = float((result - _torch_convolution(double)()).abs().max())
    if not error <= 2e-5:
        raise GateError(f"q is off by {error:.2g}")


# belief propagation and iterated conditional modes ------------------------------------------------


def _potts_inputs(sizes: Sizes, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    h, w, v = sizes["h"], sizes["w"], sizes["v"]
    unary = -torch.rand(1, h * w, v, generator=generator).to(device)
    return {"unary": unary, "w_s": grid_neighbours(h, w, weight=0.1), "w_c": torch.eye(v), "h": h}


def _ours_bp(temperature: float) -> Callable[[Inputs], Call]:
    def build(inputs: Inputs) -> Call:
        return lambda: mrf_bp(
            inputs["unary"],
            inputs["w_s"],
            inputs["w_c"],
            iterations=_BP_ITERATIONS,
            temperature=temperature,
        )

    return build


def _torch_bp(temperature: float) -> Callable[[Inputs], Call]:
    """Messages of the four directions as images, each direction one broadcast sum and a maximum."""

    def build(inputs: Inputs) -> Call:
        h, v = inputs["h"], inputs["unary"].shape[2]
        unary, pairs = inputs["unary"].view(h, -1, v), 0.1 * inputs["w_c"]
        shifts = ((0, 1), (0, -1), (1, 0), (-1, 0))

        def moved(message: Tensor, shift: tuple[int, int]) -> Tensor:
            """What arrives: of the neighbour on the other side, nothing at the border."""
            dy, dx = shift
            return F.pad(message, (0, 0, 1, 1, 1, 1))[
                1 - dy : message.shape[0] + 1 - dy, 1 - dx : message.shape[1] + 1 - dx
            ]

        def call() -> Tensor:
            messages = [torch.zeros_like(unary) for _ in shifts]
            for _ in range(_BP_ITERATIONS):
                arrived = [moved(m, s) for m, s in zip(messages, shifts, strict=True)]
                belief = unary + sum(arrived)
                fresh = []
                for i, message in enumerate(messages):
                    # arrived[i ^ 1] came from where message i goes.
                    scores = (belief - arrived[i ^ 1])[..., None] + pairs
                    new = scores.logsumexp(-2) if temperature else scores.amax(-2)
                    fresh.append(0.5 * (new - new.amax(-1, keepdim=True)) + 0.5 * message)
                messages = fresh
            arrived = [moved(m, s) for m, s in zip(messages, shifts, strict=True)]
            result: Tensor = (unary + sum(arrived)).view(1, -1, v)
            return result

        return call

    return build


def _gate_bp(temperature: float) -> Callable[[Inputs, Any, bool], None]:
    """The beliefs in float64, less a constant; max-product also beats greedy descent's energy."""

    def gate(inputs: Inputs, result: Any, ours: bool) -> None:  # noqa: ARG001
        w_s, w_c, unary = inputs["w_s"], inputs["w_c"], inputs["unary"]
        double = {**inputs, "unary": unary.double(), "w_c": w_c.double()}
        truth, beliefs = _torch_bp(temperature)(double)(), result.double()
        beliefs = beliefs + (truth - beliefs).mean(-1, keepdim=True)
        error = float((beliefs - truth).abs().max())
        if not error < 1e-4:
            raise GateError(f"the beliefs are off by {error:.2g}")
        reached = float(mrf_energy(unary, w_s, w_c, result.argmax(-1)))
        greedy = float(mrf_energy(unary, w_s, w_c, mrf_icm(unary, w_s, w_c)))
        if temperature == 0 and not reached <= greedy:
            raise GateError(f"an energy of {reached:.4g}, greedy descent has {greedy:.4g}")

    return gate


def _bp(name: str, title: str, temperature: float) -> Workload:
    return Workload(
        name=name,
        title=title,
        cases=(
            Case({"h": 16, "w": 16, "v": 64}, quick=True),
            Case({"h": 32, "w": 32, "v": 64}),
        ),
        providers=(
            Provider("t2p_fast", _ours_bp(temperature), ours=True),
            Provider("torch", _torch_bp(temperature)),
        ),
        inputs=_potts_inputs,
        gate=_gate_bp(temperature),
        flops=lambda s: _BP_ITERATIONS * 8.0 * s["h"] * s["w"] * s["v"] ** 2,
        bytes_moved=lambda s: _BP_ITERATIONS * 40.0 * s["h"] * s["w"] * s["v"],
    )


# the op on awkward data --------------------------------------------------------------------------


def _gate(device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for n, v in ((1, 1), (7, 33), (12, 130)):
        unary = torch.randn(2, n, v, generator=generator)
        w_s = 0.2 * torch.randn(n, n, generator=generator)
        w_c = 0.2 * torch.randn(v, v, generator=generator)
        known = torch.where(torch.rand(2, n, generator=generator) < 0.5, 0, -1)
        for fixed in (None, known):
            truth = reference.mrf_mean_field(
                unary.double(), w_s.double(), w_c.double(), known=fixed
            )
            place = fixed if fixed is None else fixed.to(device)
            q = mrf_mean_field(unary.to(device), w_s.to(device), w_c.to(device), known=place)
            if not float((q.cpu() - truth).abs().max()) < 1e-5:
                raise GateError(f"n={n} v={v}: q is not that of the reference")


BENCHMARK = Benchmark(
    op="mrf",
    gate=_gate,
    workloads=(
        Workload(
            name="mean field",
            title="mrf_mean_field: t iterations of MarkovGen's algorithm 1, dense weights",
            cases=(_case(256, 1024, 5, quick=True), _case(256, 8192, 1), _BASE),
            providers=_DENSE_PROVIDERS,
            inputs=_dense_inputs,
            gate=_gate_dense,
            flops=_dense_flops,
            bytes_moved=_dense_bytes,
        ),
        Workload(
            name="mean field, in a CUDA graph",
            title="mrf_mean_field replayed",
            cases=(_BASE,),
            providers=tuple(in_graph(p) for p in _DENSE_PROVIDERS if not p.flag),
            inputs=_dense_inputs,
            gate=_gate_dense,
            flops=_dense_flops,
            bytes_moved=_dense_bytes,
        ),
        Workload(
            name="known",
            title="mrf_mean_field with 66 of 256 positions to be found",
            cases=(_case(256, 1024, 5, quick=True), _case(256, 8192, 1), _BASE),
            providers=_DENSE_PROVIDERS,
            inputs=_known_inputs,
            gate=_gate_dense,
            flops=lambda s: _dense_flops(s, _UNKNOWN),
            bytes_moved=_dense_bytes,
        ),
        Workload(
            name="local",
            title=f"mrf_mean_field: {_ITERATIONS} iterations, {_WINDOW} x {_WINDOW} window, Potts",
            cases=(
                Case({"h": 16, "w": 16, "v": 1024}, quick=True),
                Case({"h": 32, "w": 32, "v": 64}),
            ),
            providers=(
                Provider("t2p_fast", _ours("w_c"), ours=True),
                Provider("torch conv2d", _torch_convolution),
            ),
            inputs=_local_inputs,
            gate=_gate_local,
            flops=lambda s: _ITERATIONS * s["h"] * s["w"] * s["v"] * (2.0 * _WINDOW**2 + 20),
            bytes_moved=lambda s: 4.0 * (2 * _ITERATIONS + 2) * s["h"] * s["w"] * s["v"],
        ),
        _bp("max-product", f"mrf_bp: {_BP_ITERATIONS} iterations, 4 neighbours", 0.0),
        _bp("sum-product", f"mrf_bp: {_BP_ITERATIONS} iterations at temperature 1", 1.0),
    ),
)
