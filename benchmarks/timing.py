# SPDX-License-Identifier: Apache-2.0
"""Times calls, one or several that take turns. The only file that looks at a clock."""

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

__all__ = ["alternate_ms", "ceilings", "median_ms", "take_turns", "time_call", "time_first"]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_call(call: Callable[[], Any], calls: int, device: str) -> tuple[float, float]:
    """Seconds a call, of the wall clock and of the processor."""
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    _synchronize(device)
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def time_first(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What a call returns, and the seconds that it took."""
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, time.perf_counter() - start


def take_turns(
    calls: Sequence[Callable[[], Any]],
    first: Sequence[float],
    *,
    seconds: float,
    seconds_per_sample: float,
    device: str,
) -> list[tuple[list[tuple[float, float]], int]]:
    """Samples of all calls in alternation, and how many calls each sample holds.

    Args:
        calls: what is timed.
        first: the seconds that one call of each took before.
        seconds: how long all of it should last; there are 3 to 50 rounds.
        seconds_per_sample: short calls are repeated to fill so much.
        device: "cpu" or "cuda".
    """
    repeats = []
    for call, one in zip(calls, first, strict=True):
        if one < 10 * seconds_per_sample:
            one = min(time_call(call, 2, device)[0], one)
        repeats.append(max(1, min(1000, round(seconds_per_sample / max(one, 1e-7)))))
    samples: list[list[tuple[float, float]]] = [[] for _ in calls]
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < 3 or (time.perf_counter() < end and rounds < 50):
            order = range(len(calls)) if rounds % 2 == 0 else reversed(range(len(calls)))
            for i in order:
                samples[i].append(time_call(calls[i], repeats[i], device))
            rounds += 1
    finally:
        gc.enable()
    return list(zip(samples, repeats, strict=True))


def ceilings(device: str) -> tuple[float, float]:
    """Flops and bytes per second: the best matrix product, and a copy (bytes read and written)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    scale = 4 if device == "cuda" else 1
    flops = 0.0
    for n, k in ((512, 512), (1024, 1024), (2048, 256)):
        a = torch.randn(scale * n, scale * k, dtype=dtype, device=device)
        b = torch.randn(scale * k, scale * n, dtype=dtype, device=device)
        out = a @ b
        product = partial(torch.mm, a, b, out=out)
        best = min(time_call(product, 1, device)[0] for _ in range(16))
        flops = max(flops, 2 * scale**3 * n * n * k / best)
    source = torch.ones(scale**2 << 24, device=device)
    target = torch.empty_like(source)
    best = min(time_call(partial(target.copy_, source), 1, device)[0] for _ in range(16))
    return flops, 2 * source.nbytes / best


def median_ms(call: Callable[[], object]) -> float:
    """Milliseconds of one call, the median of at least five after one that does not count."""
    call()
    samples: list[float] = []
    while len(samples) < 5 or (sum(samples) < 0.5 and len(samples) < 100):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return 1000 * median(samples)


def alternate_ms(calls: Sequence[Callable[[], object]], rounds: int) -> list[tuple[float, float]]:
    """Of calls that take turns: the median by the wall clock, and the least processor time.

    A round before the first does not count.
    """
    samples: list[list[tuple[float, float]]] = [[] for _ in calls]
    for call in calls:
        call()
    for turn in range(rounds):
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            samples[i].append(time_call(calls[i], 1, "cpu"))
    return [(1e3 * median(w for w, _ in part), 1e3 * min(c for _, c in part)) for part in samples]
