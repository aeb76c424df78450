# SPDX-License-Identifier: Apache-2.0
"""masked_sampling against what people use: diffusers' AmusedScheduler, and eager torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import masked_sample

from .registry import Benchmark, Case, GateError, Inputs, Provider, Sizes, Workload

__all__ = ["BENCHMARK"]

Call = Callable[[], Any]

_SCALE = 3.0  # of guidance, as diffusers counts it
_CHOICE_TEMPERATURE = 1.0
_STEPS, _STEP = 12, 4  # of the schedule of diffusers' pipeline


def _case(n: int, v: int, *, quick: bool = False) -> Case:
    return Case({"b": 1, "n": n, "v": v}, quick)


def _inputs(sizes: Sizes, device: str) -> Inputs:
    """Everything is masked: the first step, where most has to be drawn."""
    generator = torch.Generator().manual_seed(0)
    b, n, v = sizes["b"], sizes["n"], sizes["v"]
    logits, uncond = (2 * torch.randn(b, n, v, generator=generator) for _ in range(2))
    tokens = torch.full((b, n), v)
    share = torch.cos(torch.tensor((_STEP + 1) / _STEPS * torch.pi / 2))
    inputs = {
        "logits": logits,
        "uncond": uncond,
        "tokens": tokens,
        "count": (n * share).floor().long().expand(b).contiguous(),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _gate_round(inputs: Inputs, result: Any, ours: bool) -> None:
    """As many positions as wanted are masked; ours is what the reference makes of the seed."""
    tokens, v = inputs["tokens"], inputs["logits"].shape[2]
    if not torch.equal((result == v).sum(1), inputs["count"]):
        raise GateError(f"{(result == v).sum(1).tolist()} positions are masked")
    if int(result.min()) < 0 or int(result.max()) > v or result.shape != tokens.shape:
        raise GateError("there are tokens outside the vocabulary")
    if not ours:
        return
    truth = reference.masked_sample(
        inputs["logits"],
        tokens,
        uncond_logits=inputs["uncond"],
        guidance=_SCALE - 1,
        mask_count=inputs["count"],
        choice_temperature=_CHOICE_TEMPERATURE,
        seeds=torch.ones(tokens.shape[0], dtype=torch.int64, device=tokens.device),
    )
    # Of float32 log-probabilities a near tie may fall either way.
    if int((truth.tokens != result).sum()) > 2:
        raise GateError("the tokens are not those of the reference")


def _ours(inputs: Inputs) -> Call:
    seed = torch.ones(inputs["tokens"].shape[0], dtype=torch.int64, device=inputs["tokens"].device)

    def call() -> Tensor:
        return masked_sample(
            inputs["logits"],
            inputs["tokens"],
            uncond_logits=inputs["uncond"],
            guidance_scale=_SCALE,
            mask_count=inputs["count"],
            choice_temperature=_CHOICE_TEMPERATURE,
            seed=seed,
        ).tokens

    return call


def _diffusers(inputs: Inputs) -> Call:
    from diffusers.schedulers.scheduling_amused import AmusedScheduler

    logits, uncond, tokens = inputs["logits"], inputs["uncond"], inputs["tokens"]
    scheduler = AmusedScheduler(mask_token_id=logits.shape[2])
    scheduler.set_timesteps(_STEPS, device=tokens.device)
    timestep = scheduler.timesteps[_STEP]

    def call() -> Tensor:
        guided = uncond + _SCALE * (logits - uncond)
        masked: Tensor = scheduler.step(guided, timestep, tokens).prev_sample
        return masked

    return call


def _torch_round(logits: Tensor, uncond: Tensor, tokens: Tensor, count: Tensor) -> Tensor:
    """The shortest form: exponential noise for the tokens, one sort for the positions."""
    v = logits.shape[2]
    unknown = tokens == v
    p = torch.lerp(uncond, logits, _SCALE).softmax(-1)
    drawn = (p / torch.empty_like(p).exponential_()).argmax(-1)
    confidence = p.gather(-1, drawn[..., None])[..., 0].log()
    noise = torch.empty_like(confidence).exponential_().log()
    confidence = (confidence - _CHOICE_TEMPERATURE * noise).masked_fill(~unknown, torch.inf)
    order = confidence.argsort(1).argsort(1)
    filled = torch.where(unknown, drawn, tokens)
    return filled.masked_fill((order < count[:, None]) & unknown, v)


def _torch(inputs: Inputs) -> Call:
    names = "logits", "uncond", "tokens", "count"
    return lambda: _torch_round(*(inputs[name] for name in names))


def _torch_compile(inputs: Inputs) -> Call:
    compiled: Callable[..., Tensor] = torch.compile(_torch_round, fullgraph=True)
    names = "logits", "uncond", "tokens", "count"
    return lambda: compiled(*(inputs[name] for name in names))


def _gate(device: str) -> None:
    """The distribution of the tokens, by chi-square, and the reference on awkward sizes."""
    row = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5], device=device)
    masked = torch.full((1, 20_000), 5, device=device)
    drawn = masked_sample(row.expand(1, 20_000, 5), masked, seed=0).sampled[0]
    expected = row.softmax(0) * len(drawn)
    if float(((drawn.bincount(minlength=5) - expected) ** 2 / expected).sum()) > 18.47:
        raise GateError("the tokens do not follow the softmax")
    generator = torch.Generator().manual_seed(1)
    for n, v in ((1, 1), (5, 63), (9, 65), (3, 1025)):
        logits = torch.randn(2, n, v, generator=generator).to(device)
        tokens = torch.full((2, n), v, device=device)
        seeds = torch.tensor([3, 4], device=device)
        ours = masked_sample(logits, tokens, seed=seeds, mask_count=n // 2)
        truth = reference.masked_sample(logits, tokens, seeds=seeds)
        if not torch.equal(ours.sampled, truth.sampled):
            raise GateError(f"n={n} v={v}: the tokens are not those of the reference")


BENCHMARK = Benchmark(
    op="masked_sampling",
    gate=_gate,
    workloads=(
        Workload(
            name="round",
            title="masked_sample: guidance, a draw at n positions, and masking again",
            cases=(
                _case(64, 1024),
                _case(256, 1024),
                _case(256, 8192, quick=True),
                _case(1024, 8192),
            ),
            providers=(
                Provider("t2p_fast", _ours, ours=True),
                Provider("torch", _torch),
                Provider("torch.compile", _torch_compile, flag="compile"),
                Provider("diffusers", _diffusers, module="diffusers"),
            ),
            inputs=_inputs,
            gate=_gate_round,
            # guidance 3, exponential and its sum about 12, noise about 12 a word
            flops=lambda s: 27.0 * s["b"] * s["n"] * s["v"],
            bytes_moved=lambda s: 8.0 * s["b"] * s["n"] * s["v"] + 28.0 * s["b"] * s["n"],
        ),
    ),
)
