# SPDX-License-Identifier: Apache-2.0
"""vq against what people use: eager torch, taming-transformers, FAISS, vector-quantize-pytorch."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import kmeans, vq_nearest, vq_quantize

from .cuda_graph import in_graph
from .registry import Benchmark, Case, GateError, Inputs, Provider, Sizes, Workload

__all__ = ["BENCHMARK"]

Call = Callable[[], Any]

_GATE_ROWS = 64
_KMEANS_ITERATIONS = 10
_BETA = 0.25
_DECAY = 0.8
_SMOOTHING = 1e-5  # of the counts, as in vector-quantize-pytorch


def _case(n: int, k: int, d: int, *, quick: bool = False) -> Case:
    return Case({"n": n, "k": k, "d": d}, quick)


def _gpu_case(n: int, k: int, d: int) -> Case:
    return replace(_case(n, k, d), devices=("cuda",))


def _inputs(sizes: Sizes, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sizes["n"], sizes["d"], generator=generator)
    codebook = torch.randn(sizes["k"], sizes["d"], generator=generator)
    return {"x": x.to(device), "codebook": codebook.to(device)}


def _inputs_dead(sizes: Sizes, device: str) -> Inputs:
    """A tenth of the codes in use, the others as VQ-VAE and taming-transformers begin: +-1/k."""
    inputs = _inputs(sizes, device)
    generator = torch.Generator().manual_seed(2)
    k, d = sizes["k"], sizes["d"]
    start = ((2 * torch.rand(k, d, generator=generator) - 1) / k).to(device)
    used = (torch.rand(k, 1, generator=generator) < 0.1).to(device)
    return {**inputs, "codebook": torch.where(used, inputs["codebook"], start)}


def _inputs_half(sizes: Sizes, device: str) -> Inputs:
    return {name: tensor.half() for name, tensor in _inputs(sizes, device).items()}


# nearest -----------------------------------------------------------------------------------------


def _some_rows(x: Tensor) -> Tensor:
    n = x.shape[0]
    return torch.linspace(0, n - 1, min(n, _GATE_ROWS), device=x.device).long()


def _least(x: Tensor, codebook: Tensor) -> Tensor:
    """The least squared distance of the rows that the gate looks at, in float64."""
    some = x[_some_rows(x)].double()
    distance: Tensor = reference.vq_nearest(some, codebook.double(), return_distance=True)[1]
    return distance


def _check_nearest(x: Tensor, codebook: Tensor, indices: Any, ours: bool, least: Tensor) -> None:
    """Compares the distance of the codes chosen with the least distance, in float64.

    All indices are checked for range, the distances of `_GATE_ROWS` rows spread over `x`. Ours
    may differ by the fp32 rounding of two distances; peers, which expand the square, by the
    cancellation that this brings in their dtype, or in TF32 on a GPU.
    """
    n, d = x.shape
    indices = torch.as_tensor(indices, device=x.device).reshape(-1)
    if indices.shape[0] != n or indices.dtype.is_floating_point:
        raise GateError(f"expected {n} integers, got {indices.shape[0]} of {indices.dtype}")
    if not 0 <= int(indices.min()) <= int(indices.max()) < codebook.shape[0]:
        raise GateError(f"an index is outside [0, {codebook.shape[0]})")
    rows = _some_rows(x)
    some, codes = x[rows].double(), codebook.double()
    chosen = (some - codes[indices[rows].long()]).square().sum(1)
    # gamma_(d + 2) of Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1
    gamma = (d + 2) * torch.finfo(torch.float32).eps
    if ours:
        allowed = 2 * gamma * chosen
    else:
        rounding = max(torch.finfo(x.dtype).eps, 2.0**-10) if x.is_cuda else 0.0
        scale = (some.norm(dim=1) + codes.norm(dim=1).amax()).square()
        allowed = 4 * (gamma + rounding) * scale
    wrong = chosen - least > allowed
    if wrong.any():
        row = int(rows[wrong.nonzero()[0, 0]])
        raise GateError(f"{int(wrong.sum())} of {len(rows)} rows have a nearer code (row {row})")


def _gate_nearest(inputs: Inputs, result: Any, ours: bool) -> None:
    x, codebook = inputs["x"], inputs["codebook"]
    if "least" not in inputs:
        inputs["least"] = _least(x, codebook)
    _check_nearest(x, codebook, result, ours, inputs["least"])


def _ours_nearest(inputs: Inputs) -> Call:
    return partial(vq_nearest, inputs["x"], inputs["codebook"])


def _addmm_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    """The usual short form: ``argmin_j |c_j|^2 - 2 x.c_j``."""
    norms = codebook.square().sum(1)
    return torch.addmm(norms, x, codebook.T, alpha=-2).argmin(1)


def _torch_addmm(inputs: Inputs) -> Call:
    return partial(_addmm_argmin, inputs["x"], inputs["codebook"])


def _torch_cdist(inputs: Inputs) -> Call:
    x, codebook = inputs["x"], inputs["codebook"]
    return lambda: torch.cdist(x, codebook).argmin(1)


def _torch_compile(inputs: Inputs) -> Call:
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(_addmm_argmin, fullgraph=True)
    return lambda: compiled(inputs["x"], inputs["codebook"])


def _torch_autotuned(inputs: Inputs) -> Call:
    tuned: Callable[[Tensor, Tensor], Tensor] = torch.compile(
        _addmm_argmin, fullgraph=True, mode="max-autotune-no-cudagraphs"
    )
    return lambda: tuned(inputs["x"], inputs["codebook"])


def _triton(inputs: Inputs) -> Call:
    from .triton_vq import nearest

    return partial(nearest, inputs["x"], inputs["codebook"])


def _flash_kmeans(inputs: Inputs) -> Call:
    from flash_kmeans import euclid_assign_triton

    x, codebook = inputs["x"][None], inputs["codebook"][None]
    squares, norms = x.float().square().sum(-1), codebook.float().square().sum(-1)
    indices = torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    return lambda: euclid_assign_triton(x, codebook, squares, out=indices, c_sq=norms)


def _taming(inputs: Inputs) -> Call:
    """The distance of taming-transformers' VectorQuantizer2."""
    x, codebook = inputs["x"], inputs["codebook"]

    def call() -> Tensor:
        distance = (
            torch.sum(x**2, dim=1, keepdim=True)
            + torch.sum(codebook**2, dim=1)
            - 2 * torch.einsum("bd,dn->bn", x, codebook.T)
        )
        return torch.argmin(distance, dim=1)

    return call


def _faiss_nearest(inputs: Inputs) -> Call:
    import faiss

    x, codebook = inputs["x"].numpy(), inputs["codebook"].numpy()
    faiss.omp_set_num_threads(torch.get_num_threads())
    return lambda: faiss.knn(x, codebook, 1)[1]


def _lucidrains(inputs: Inputs) -> Any:
    from vector_quantize_pytorch import VectorQuantize

    codebook = inputs["codebook"]
    k, d = codebook.shape
    quantizer = VectorQuantize(
        dim=d, codebook_size=k, decay=_DECAY, eps=_SMOOTHING, commitment_weight=_BETA,
        rotation_trick=False,
    ).to(codebook.device)  # fmt: skip
    quantizer._codebook.embed.copy_(codebook[None])
    quantizer._codebook.embed_avg.copy_(codebook[None])
    return quantizer


def _lucidrains_nearest(inputs: Inputs) -> Call:
    quantizer, rows = _lucidrains(inputs).eval(), inputs["x"][None]

    def call() -> Tensor:
        with torch.no_grad():
            indices: Tensor = quantizer(rows)[1]
        return indices

    return call


_NEAREST_PROVIDERS = (
    Provider("t2p_fast", _ours_nearest, ours=True),
    Provider("torch addmm+argmin", _torch_addmm),
    Provider("torch cdist+argmin", _torch_cdist),
    Provider("torch.compile", _torch_compile, flag="compile"),
    Provider("torch.compile max-autotune", _torch_autotuned, devices=("cuda",), flag="compile"),
    Provider("triton online argmin", _triton, module="triton", devices=("cuda",)),
    Provider(
        "flash-kmeans",
        _flash_kmeans,
        module="flash_kmeans",
        package="flash-kmeans",
        devices=("cuda",),
    ),
    Provider("taming-transformers", _taming),
    Provider("faiss", _faiss_nearest, module="faiss", package="faiss-cpu", devices=("cpu",)),
    Provider(
        "vector-quantize-pytorch",
        _lucidrains_nearest,
        module="vector_quantize_pytorch",
        package="vector-quantize-pytorch",
    ),
)
# The peers worth following over many sizes.
_GROWTH_PROVIDERS = tuple(
    p for p in _NEAREST_PROVIDERS if p.name in ("t2p_fast", "torch addmm+argmin", "faiss")
)
_GRAPH_PROVIDERS = tuple(
    in_graph(p)
    for p in _NEAREST_PROVIDERS
    if p.name in ("t2p_fast", "torch addmm+argmin", "triton online argmin")
)


def _nearest_flops(sizes: Sizes) -> float:
    return 2.0 * sizes["n"] * sizes["k"] * sizes["d"]


def _nearest_bytes(sizes: Sizes) -> float:
    return 4.0 * (sizes["n"] + sizes["k"]) * sizes["d"] + 8.0 * sizes["n"]


def _nearest(
    name: str,
    title: str,
    cases: tuple[Case, ...],
    line: str = "",
    **changes: Any,
) -> Workload:
    workload = Workload(
        name=name,
        title=title,
        cases=cases,
        providers=_GROWTH_PROVIDERS if line else _NEAREST_PROVIDERS,
        inputs=_inputs,
        gate=_gate_nearest,
        flops=_nearest_flops,
        bytes_moved=_nearest_bytes,
        line=line,
    )
    return replace(workload, **changes)


# train: quantise, losses, gradient, moving-average codebook --------------------------------------


def _train_inputs(sizes: Sizes, device: str) -> Inputs:
    inputs = _inputs(sizes, device)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(sizes["n"], sizes["d"], generator=generator)
    return {**inputs, "grad": grad.to(device)}


def _gate_train(inputs: Inputs, result: Any, ours: bool) -> None:
    """The first step: indices, the gradient of the input, and the codebook after the update."""
    indices, grad, codebook = result
    x, before = inputs["x"], inputs["codebook"]
    _gate_nearest(inputs, indices, ours)
    indices = indices.reshape(-1)
    expected = inputs["grad"].double() + _BETA * 2 / x.numel() * (x - before[indices]).double()
    if not torch.allclose(grad.reshape(x.shape).double(), expected, rtol=1e-4, atol=1e-5):
        raise GateError("the gradient of the input is wrong")
    k = before.shape[0]
    counts = torch.bincount(indices, minlength=k).double()
    sums = torch.zeros_like(before, dtype=torch.float64).index_add_(0, indices, x.double())
    after = _ema_codebook(
        torch.ones_like(counts).lerp_(counts, 1 - _DECAY), before.double().lerp_(sums, 1 - _DECAY)
    )
    if not torch.allclose(codebook.reshape(before.shape).double(), after, rtol=1e-3, atol=1e-4):
        raise GateError("the codebook after one moving-average step is wrong")


def _ema_codebook(ema_counts: Tensor, ema_sums: Tensor) -> Tensor:
    """The mean of every code's rows, with vector-quantize-pytorch's smoothing of the counts."""
    k, total = ema_counts.shape[0], ema_counts.sum()
    smoothed = (ema_counts + _SMOOTHING) / (total + k * _SMOOTHING) * total
    codebook: Tensor = ema_sums / smoothed[:, None]
    return codebook


class _MovingAverages:
    """The state of a codebook learned by moving averages (van den Oord et al., appendix A.1)."""

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook.clone()
        self.counts = codebook.new_ones(codebook.shape[0])
        self.sums = codebook.clone()

    def update(self, counts: Tensor, sums: Tensor) -> None:
        self.counts.lerp_(counts, 1 - _DECAY)
        self.sums.lerp_(sums, 1 - _DECAY)
        self.codebook = _ema_codebook(self.counts, self.sums)


def _ours_train(inputs: Inputs) -> Call:
    state, x, grad = _MovingAverages(inputs["codebook"]), inputs["x"], inputs["grad"]
    one = torch.ones((), device=x.device)

    def call() -> tuple[Tensor, Tensor | None, Tensor]:
        leaf = x.detach().requires_grad_()
        quantized, indices, loss, counts, sums = vq_quantize(
            leaf, state.codebook, beta=_BETA, codebook_weight=0.0, return_statistics=True
        )
        state.update(counts, sums)
        torch.autograd.backward([quantized, loss], [grad, one])
        return indices, leaf.grad, state.codebook

    return call


def _torch_train(inputs: Inputs) -> Call:
    """The best that eager torch offers: addmm and argmin, index_add_ for the statistics."""
    state, x, grad = _MovingAverages(inputs["codebook"]), inputs["x"], inputs["grad"]
    one = torch.ones((), device=x.device)

    def call() -> tuple[Tensor, Tensor | None, Tensor]:
        leaf = x.detach().requires_grad_()
        codebook = state.codebook
        with torch.no_grad():
            indices = _addmm_argmin(leaf, codebook)
        codes = codebook[indices]
        loss = _BETA * torch.nn.functional.mse_loss(leaf, codes)
        quantized = leaf + (codes - leaf).detach()
        counts = torch.bincount(indices, minlength=codebook.shape[0]).to(x.dtype)
        state.update(counts, torch.zeros_like(codebook).index_add_(0, indices, x))
        torch.autograd.backward([quantized, loss], [grad, one])
        return indices, leaf.grad, state.codebook

    return call


def _lucidrains_train(inputs: Inputs) -> Call:
    quantizer, x, grad = _lucidrains(inputs).train(), inputs["x"][None], inputs["grad"][None]
    one = torch.ones((), device=x.device)

    def call() -> tuple[Tensor, Tensor | None, Tensor]:
        leaf = x.detach().requires_grad_()
        quantized, indices, loss = quantizer(leaf)
        torch.autograd.backward([quantized, loss], [grad, one])
        return indices, leaf.grad, quantizer._codebook.embed

    return call


# k-means -----------------------------------------------------------------------------------------


def _gate_kmeans(inputs: Inputs, result: Any, ours: bool) -> None:  # noqa: ARG001
    """The inertia of Lloyd's algorithm in float64 from the same start, to half a percent."""
    x, k = inputs["x"].double(), inputs["codebook"].shape[0]
    centroids = inputs["x"][:k].double()
    for _ in range(_KMEANS_ITERATIONS):
        centroids = _lloyd(x, centroids, _addmm_argmin(x, centroids))
    expected, inertia = _inertia(x, centroids), _inertia(x, result.double())
    if not inertia <= 1.005 * expected:
        raise GateError(f"inertia {inertia:.6g}, float64 reaches {expected:.6g}")


def _inertia(x: Tensor, centroids: Tensor) -> float:
    return float((x - centroids[_addmm_argmin(x, centroids)]).square().sum())


def _lloyd(x: Tensor, centroids: Tensor, indices: Tensor) -> Tensor:
    counts = torch.bincount(indices, minlength=centroids.shape[0]).to(x.dtype)[:, None]
    sums = torch.zeros_like(centroids).index_add_(0, indices, x)
    return torch.where(counts > 0, sums / counts.clamp(min=1), centroids)


def _ours_kmeans(inputs: Inputs) -> Call:
    x, k = inputs["x"], inputs["codebook"].shape[0]
    return lambda: kmeans(x, k, iterations=_KMEANS_ITERATIONS, init=x[:k]).centroids


def _torch_kmeans(inputs: Inputs) -> Call:
    k = inputs["codebook"].shape[0]
    x: Tensor = inputs["x"]

    def call() -> Tensor:
        centroids = x[:k]
        for _ in range(_KMEANS_ITERATIONS):
            centroids = _lloyd(x, centroids, _addmm_argmin(x, centroids))
        return centroids

    return call


def _faiss_kmeans(inputs: Inputs) -> Call:
    import faiss

    x, (k, d) = inputs["x"].numpy(), inputs["codebook"].shape
    faiss.omp_set_num_threads(torch.get_num_threads())
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(x)}

    def call() -> Any:
        clustering = faiss.Kmeans(d, k, niter=_KMEANS_ITERATIONS, **limits)
        clustering.train(x, init_centroids=x[:k])
        return torch.from_numpy(clustering.centroids)

    return call


# the op on awkward data --------------------------------------------------------------------------


def _gate(device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for n, k, d in ((1, 1, 1), (63, 1000, 17), (257, 33, 8), (100, 129, 100)):
        x = torch.randn(n, d, generator=generator).to(device)
        codebook = torch.randn(k, d, generator=generator).to(device)
        least = _least(x, codebook)
        _check_nearest(x, codebook, vq_nearest(x, codebook), True, least)
        image = x.T.reshape(1, d, n, 1).contiguous()
        _check_nearest(x, codebook, vq_nearest(image, codebook, channel_dim=1), True, least)
        far = 1000 + x, 1000 + codebook
        _check_nearest(*far, vq_nearest(*far), True, _least(*far))
        if int(vq_nearest(x, torch.cat([codebook, codebook])).max()) >= k:
            raise GateError("of two equal codes the one with the higher index was chosen")


BENCHMARK = Benchmark(
    op="vq",
    gate=_gate,
    workloads=(
        _nearest(
            "nearest",
            "vq_nearest: the index of the nearest of k codes for n rows of d channels",
            (
                _case(256, 1024, 64),
                _case(256, 16384, 256),
                _case(1024, 1024, 256, quick=True),
                _case(1024, 8192, 8, quick=True),
                _case(4096, 8192, 32),
                _case(4096, 8192, 64),
                _case(4096, 16384, 8),
                _case(4096, 16384, 256),
                _case(16384, 1024, 64),
                _case(65536, 512, 8),
                _gpu_case(65536, 8192, 8),
                _gpu_case(65536, 16384, 256),
                _gpu_case(262144, 16384, 32),
            ),
        ),
        _nearest(
            "nearest, dead codes",
            "vq_nearest in a codebook of which nine codes in ten were never chosen",
            (_case(256, 16384, 256), _case(1024, 1024, 64, quick=True), _case(4096, 8192, 32)),
            inputs=_inputs_dead,
        ),
        _nearest(
            "nearest, float16",
            "vq_nearest of half precision inputs",
            (_gpu_case(1048576, 1024, 128),),
            inputs=_inputs_half,
            bytes_moved=lambda s: _nearest_bytes(s) / 2,
        ),
        _nearest(
            "nearest, in a CUDA graph",
            "vq_nearest replayed: the tokens of one image",
            (_gpu_case(1024, 8192, 32),),
            providers=_GRAPH_PROVIDERS,
        ),
        _nearest(
            "nearest over n",
            "vq_nearest as the number of rows grows",
            tuple(_case(n, 1024, 64) for n in (64, 256, 1024, 4096, 16384)),
            line="n",
        ),
        _nearest(
            "nearest over k",
            "vq_nearest as the codebook grows",
            tuple(_case(1024, k, 64) for k in (64, 256, 1024, 4096, 16384)),
            line="k",
        ),
        _nearest(
            "nearest over d",
            "vq_nearest as the channels grow",
            tuple(_case(1024, 4096, d) for d in (4, 8, 16, 32, 64, 128, 256)),
            line="d",
        ),
        Workload(
            name="train",
            title="vq_quantize forward and backward, with the codebook's moving averages",
            cases=(
                _case(4096, 1024, 256),
                _case(4096, 8192, 32),
                _case(1024, 1024, 64, quick=True),
            ),
            providers=(
                Provider("t2p_fast", _ours_train, ours=True),
                Provider("torch addmm+argmin", _torch_train),
                Provider(
                    "vector-quantize-pytorch",
                    _lucidrains_train,
                    module="vector_quantize_pytorch",
                    package="vector-quantize-pytorch",
                ),
            ),
            inputs=_train_inputs,
            gate=_gate_train,
            flops=_nearest_flops,
            # x, its gradient and that of the result, the result; the codebook and its averages
            bytes_moved=lambda s: 4.0 * (4 * s["n"] + 5 * s["k"]) * s["d"] + 8.0 * s["n"],
        ),
        Workload(
            name="kmeans",
            title=f"kmeans: {_KMEANS_ITERATIONS} iterations of Lloyd's algorithm",
            cases=(_case(65536, 1024, 64), _case(8192, 512, 32, quick=True)),
            providers=(
                Provider("t2p_fast", _ours_kmeans, ours=True),
                Provider("torch addmm+argmin", _torch_kmeans),
                Provider(
                    "faiss", _faiss_kmeans, module="faiss", package="faiss-cpu", devices=("cpu",)
                ),
            ),
            inputs=_inputs,
            gate=_gate_kmeans,
            flops=lambda s: _KMEANS_ITERATIONS * _nearest_flops(s),
            bytes_moved=lambda s: _KMEANS_ITERATIONS * _nearest_bytes(s),
        ),
    ),
)
