# SPDX-License-Identifier: Apache-2.0
"""On a GPU: ops in a stream of their own and in a CUDA graph, which is replayed on other inputs.

Emulated or not, the host waits for the GPU in none of them: in a graph it cannot.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from t2p_fast.ops import (
    GridWeights,
    LowRank,
    group_norm_silu,
    masked_sample,
    mrf_mean_field,
    scheduler_step,
    vq_nearest,
    vq_quantize,
)

Unwaiting = Callable[[], AbstractContextManager[None]]
Case = tuple[tuple[Tensor, ...], Callable[..., tuple[Tensor, ...]]]


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _nearest(seed: int, d: int) -> Case:
    inputs = _normal(300, d, seed=seed), _normal(500, d, seed=seed + 1)
    return inputs, lambda x, codes: vq_nearest(x, codes, return_distance=True)


def _quantize(seed: int, d: int) -> Case:
    inputs = _normal(2, d, 15, 10, seed=seed), _normal(500, d, seed=seed + 1)
    return inputs, lambda x, codes: vq_quantize(x, codes, channel_dim=1)


def _group_norm(seed: int) -> Case:
    inputs = _normal(2, 32, 17, 19, seed=seed), _normal(32, seed=seed + 1)
    return inputs, lambda x, weight: (group_norm_silu(x, 4, weight),)


def _step(seed: int) -> Case:
    inputs = *(_normal(2, 4, 16, 16, seed=seed + i) for i in range(3)), _normal(5, 16, seed=9)

    def call(x: Tensor, output: Tensor, other: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
        return scheduler_step(
            x, output, coefficients, 2, uncond_output=other, guidance_scale=3.0, seed=7
        )

    return inputs, call


def _sample(seed: int) -> Case:
    hidden = torch.where(_normal(2, 40, seed=seed + 1) < 0, 99, 3)
    inputs = _normal(2, 40, 100, seed=seed), hidden, torch.tensor([5, 9])

    def call(logits: Tensor, tokens: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        return tuple(masked_sample(logits, tokens, mask_token=99, mask_count=count, seed=7))

    return inputs, call


def _mean_field(seed: int) -> Case:
    inputs = _normal(2, 24, 30, seed=seed), _normal(24, 24, seed=3), _normal(30, 30, seed=4)
    return inputs, lambda *tensors: (mrf_mean_field(*tensors, iterations=3),)


def _partly_known(seed: int, name: str) -> Case:
    """66 of 256 positions are to be found, others in every picture and with every seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(2, 256, generator=generator).argsort(1)
    known = torch.randint(0, 24, (2, 256), generator=generator).scatter(1, chosen[:, :66], -1)
    inputs = [_normal(2, 256, 24, seed=seed), known, *_WEIGHTS[name]]

    def call(unary: Tensor, known: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        table, label, *more = weights
        w_s = table if len(table) == 256 else GridWeights(table, 16, 16)
        w_c = LowRank(label, *more) if more else label
        return (mrf_mean_field(unary, w_s, w_c, iterations=2, known=known, unknown=66),)

    return tuple(inputs), call


_WEIGHTS = {
    "dense": (_normal(256, 256, seed=3) / 16, _normal(24, 24, seed=4)),
    "bfloat16": (_normal(256, 256, seed=3) / 16, _normal(24, 24, seed=4).bfloat16()),
    "grid": (_normal(31, 31, seed=3) / 16, _normal(24, 24, seed=4)),
    "window": (_normal(3, 3, seed=3), torch.tensor(0.7)),
    "window, labels": (_normal(5, 3, seed=3), _normal(24, 24, seed=4)),
    "low rank": (_normal(31, 31, seed=3) / 16, _normal(24, 2, seed=4), _normal(24, 2, seed=5)),
}

CASES: dict[str, Callable[[int], Case]] = {
    "vq_nearest, few channels": lambda seed: _nearest(seed, 8),
    "vq_nearest, tensor cores": lambda seed: _nearest(seed, 48),
    "vq_quantize, few channels": lambda seed: _quantize(seed, 8),
    "vq_quantize, tensor cores": lambda seed: _quantize(seed, 48),
    "group_norm_silu": _group_norm,
    "scheduler_step": _step,
    "masked_sample": _sample,
    "mrf_mean_field": _mean_field,
    **{f"mrf_mean_field, {name}": functools.partial(_partly_known, name=name) for name in _WEIGHTS},
}


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("streams and graphs are a GPU's: --device cuda")
    return device


@pytest.mark.parametrize("name", CASES)
def test_host_does_not_wait(
    name: str, device: torch.device, kernels: str, unwaiting: Unwaiting
) -> None:
    if kernels == "cpu":
        pytest.skip("there is nobody to wait for")
    inputs, call = CASES[name](0)
    places = [x.to(device) for x in inputs]
    with unwaiting():
        call(*places)


@pytest.mark.parametrize("name", CASES)
def test_in_a_stream_of_its_own(name: str, cuda: torch.device) -> None:
    inputs, call = CASES[name](0)
    truth = call(*(x.to(cuda) for x in inputs))
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # whatever is not in this stream comes too early
        found = call(*(x.to(cuda, non_blocking=True) for x in inputs))
    torch.cuda.current_stream(cuda).wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_graph_replayed_on_other_inputs(name: str, cuda: torch.device) -> None:
    inputs, call = CASES[name](0)
    places = [x.to(cuda) for x in inputs]
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(stream):
        call(*places)  # what is set up once is not of the graph
    torch.cuda.current_stream(cuda).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(*places)
    for seed in (100, 200):
        others = [x.to(cuda) for x in CASES[name](seed)[0]]
        for place, other in zip(places, others, strict=True):
            place.copy_(other)
        graph.replay()
        truth = call(*others)
        assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
