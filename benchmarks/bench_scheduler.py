# SPDX-License-Identifier: Apache-2.0
"""One step with guidance, against diffusers' schedulers and the bare algebra in eager torch."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t2p_fast import reference, schedulers
from t2p_fast.ops import scheduler_noise, scheduler_step
from t2p_fast.ops.scheduler_coefficients import ddim_coefficients, ddpm_coefficients

from .cuda_graph import in_graph
from .registry import Benchmark, Case, GateError, Inputs, Provider, Sizes, Workload

__all__ = ["BENCHMARK"]

Call = Callable[[], Any]

_SCALE = 7.5
_STEPS, _PLACE = 50, 20  # the step that is timed
_THRESHOLD = {"thresholding": True, "sample_max_value": 1.5}
# The sampler of each workload: its class, configuration, and whether it adds noise.
_SAMPLERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, False),
    "ddpm": ("DDPMScheduler", {}, True),
    "ddpm with threshold": ("DDPMScheduler", _THRESHOLD, True),
    "euler": ("EulerDiscreteScheduler", {}, False),
    "dpm-solver++": ("DPMSolverMultistepScheduler", {}, False),
    "flow matching": ("FlowMatchEulerDiscreteScheduler", {}, False),
}


def _shape(sizes: Sizes) -> tuple[int, ...]:
    return sizes["b"], sizes["c"], sizes["h"], sizes["w"]


def _inputs(sizes: Sizes, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    names = ("sample", "output", "uncond", "history")
    tensors = {name: torch.randn(_shape(sizes), generator=generator) for name in names}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _at_step(library: Any, workload: str, device: torch.device) -> Any:
    """A scheduler before the step that is timed, and the timestep."""
    name, config, _ = _SAMPLERS[workload]
    scheduler = getattr(library, name)(**config)
    scheduler.set_timesteps(_STEPS, device=device)
    return scheduler, scheduler.timesteps[_PLACE]


def _rewind(scheduler: Any, history: Tensor) -> Callable[[], None]:
    """Puts a scheduler that counts its steps back to the one that is timed."""
    scheduler.is_scale_input_called = True
    counts = hasattr(scheduler, "set_begin_index")
    multistep = hasattr(scheduler, "model_outputs")

    def rewind() -> None:
        if counts:
            scheduler._step_index = _PLACE
        if multistep:
            scheduler.model_outputs = [None, history]
            scheduler.lower_order_nums = 2

    return rewind


def _ours(workload: str) -> Callable[[Inputs], Call]:
    def build(inputs: Inputs) -> Call:
        sample, output, uncond = inputs["sample"], inputs["output"], inputs["uncond"]
        scheduler, timestep = _at_step(schedulers, workload, sample.device)
        rewind = _rewind(scheduler, inputs["history"])

        def call() -> Any:
            rewind()
            return scheduler.step(
                output, timestep, sample, uncond_output=uncond, guidance_scale=_SCALE
            )

        return call

    return build


def _diffusers(workload: str) -> Callable[[Inputs], Call]:
    def build(inputs: Inputs) -> Call:
        sample, output, uncond = inputs["sample"], inputs["output"], inputs["uncond"]
        library = importlib.import_module("diffusers")
        scheduler, timestep = _at_step(library, workload, sample.device)
        rewind = _rewind(scheduler, inputs["history"])

        def call() -> Any:
            rewind()
            guided = uncond + _SCALE * (output - uncond)
            return scheduler.step(guided, timestep, sample)

        return call

    return build


def _algebra(inputs: Inputs) -> Call:
    """DDIM without clipping is two sums of products; what eager torch does with just that."""
    sample, output, uncond = inputs["sample"], inputs["output"], inputs["uncond"]
    scheduler, timestep = _at_step(schedulers, "ddim", sample.device)
    a, s, a_prev, s_prev = (float(v[int(timestep)]) for v in scheduler._scales())

    def call() -> Any:
        guided = torch.lerp(uncond, output, _SCALE)
        x0 = torch.add(sample, guided, alpha=-s).div_(a)
        prev = torch.mul(x0, a_prev).add_(guided, alpha=s_prev)
        return schedulers.SchedulerOutput(prev, x0)

    return call


def _copy(workload: str) -> Callable[[Inputs], Call]:
    """Not a peer but a measure: one copy that moves as many bytes as the step has to."""

    def build(inputs: Inputs) -> Call:
        tensors = _tensors(workload)
        source = torch.zeros(
            tensors * inputs["sample"].numel() // 2, device=inputs["sample"].device
        )
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return build


def _tensors(workload: str) -> int:
    """How many tensors of the sample's size a step reads and writes, at least."""
    return {"flow matching": 4, "dpm-solver++": 6}.get(workload, 5)


def _gate(workload: str) -> Callable[[Inputs, Any, bool], None]:
    def gate(inputs: Inputs, result: Any, ours: bool) -> None:
        if isinstance(result, Tensor):  # the copy
            return
        scheduler, timestep = _at_step(schedulers, workload, torch.device("cpu"))
        _rewind(scheduler, inputs["history"].double().cpu())()
        wide = {name: tensor.double().cpu() for name, tensor in inputs.items()}
        noise = torch.zeros_like(wide["sample"])
        options = {"variance_noise": noise} if _SAMPLERS[workload][2] else {}
        truth = scheduler.step(
            wide["output"], timestep, wide["sample"], uncond_output=wide["uncond"],
            guidance_scale=_SCALE, **options,
        )  # fmt: skip
        prev, expected = result.prev_sample.double().cpu(), truth.prev_sample
        if _SAMPLERS[workload][2]:
            _check_noise(scheduler, timestep, prev - expected)
        elif not torch.allclose(prev, expected, rtol=1e-5, atol=1e-4):
            raise GateError(f"prev is off by {float((prev - expected).abs().max()):.3g}")
        x0 = getattr(result, "pred_original_sample", None)
        if x0 is not None:
            limit = 1e-5 if ours else 1e-3  # torch's quantile ranks in float32
            if not torch.allclose(x0.double().cpu(), truth.pred_original_sample, limit, 10 * limit):
                raise GateError("the predicted clean sample is wrong")

    return gate


def _check_noise(scheduler: Any, timestep: Tensor, noise: Tensor) -> None:
    """The noise of a step is normal and as strong as it should be."""
    std = float(scheduler._get_variance(int(timestep))) ** 0.5
    n = noise.numel()
    if abs(float(noise.mean())) > 6 * std / n**0.5 + 1e-4:
        raise GateError(f"the noise has mean {float(noise.mean()):.3g}")
    if abs(float(noise.square().mean()) / std**2 - 1) > 6 * (2 / n) ** 0.5 + 0.02:
        raise GateError(
            f"the noise has variance {float(noise.square().mean()):.3g}, not {std**2:.3g}"
        )


def _case(
    b: int, c: int, h: int, *, quick: bool = False, devices: tuple[str, ...] = ("cpu", "cuda")
) -> Case:
    return Case({"b": b, "c": c, "h": h, "w": h}, quick, devices)


_CASES = (
    _case(1, 4, 8),
    _case(1, 4, 64, quick=True),
    _case(8, 4, 64),
    _case(1, 3, 256),
    _case(4, 3, 256, quick=True),
    _case(16, 4, 512, devices=("cuda",)),  # 64 MiB a tensor
)
_GRAPH_CASES = (_case(2, 4, 64, devices=("cuda",)),)


def _workload(name: str, title: str, *, graph: bool = False) -> Workload:
    providers = [
        Provider("t2p_fast", _ours(name), ours=True),
        Provider("diffusers", _diffusers(name), module="diffusers"),
    ]
    if name == "ddim":
        providers.append(Provider("torch algebra", _algebra))
    providers.append(Provider("copy of the bytes", _copy(name), yardstick=True))
    if graph:  # diffusers' steps wait for the device
        providers = [in_graph(p) for p in providers if not p.module]
    return Workload(
        name=f"{name}, in a CUDA graph" if graph else name,
        title=title,
        cases=_GRAPH_CASES if graph else _CASES,
        providers=tuple(providers),
        inputs=_inputs,
        gate=_gate(name),
        flops=lambda sizes: 10.0 * sizes["b"] * sizes["c"] * sizes["h"] * sizes["w"],
        bytes_moved=lambda sizes: 4.0 * _tensors(name) * torch.Size(_shape(sizes)).numel(),
    )


def _awkward(device: str) -> None:
    """The op on ragged shapes, with a bound, a row for each sample, and noise."""
    products = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    alpha, sigma = products.sqrt(), (1 - products).sqrt()
    scales = (alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
    generator = torch.Generator().manual_seed(1)
    for shape in ((1, 1), (3, 7), (2, 3, 5, 7), (2, 16385)):
        x, c, u = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
        index = torch.arange(shape[0], device=device) + 2
        noise = scheduler_noise(shape, 3, device=device)
        for threshold in (None, (0.9, 1.7)):
            bounds: dict[str, Any] = {
                "threshold": threshold,
                "clip": 0.9 if threshold is None else None,
            }
            for make in (ddpm_coefficients, ddim_coefficients):
                table = make(*scales, bounded=True).float().to(device)
                ours = scheduler_step(
                    x, c, table, index, uncond_output=u, guidance_scale=_SCALE, seed=3, **bounds
                )
                truth = reference.scheduler_step(
                    x.double(), c.double(), table.double()[index], uncond_output=u.double(),
                    guidance_scale=_SCALE, noise=noise.double(), **bounds,
                )  # fmt: skip
                for a, b in zip(ours, truth, strict=True):
                    if not torch.allclose(a.double(), b, rtol=1e-5, atol=1e-4):
                        raise GateError(f"a step at {list(shape)} is wrong")


BENCHMARK = Benchmark(
    op="scheduler",
    gate=_awkward,
    workloads=(
        *(
            _workload(name, f"{_SAMPLERS[name][0]}: a step with guidance{tail}")
            for name, tail in (
                ("ddim", ", without noise"),
                ("ddpm", " and noise"),
                ("ddpm with threshold", ", noise and dynamic thresholding"),
                ("euler", ""),
                ("dpm-solver++", " of second order"),
                ("flow matching", ""),
            )
        ),
        _workload("ddim", "DDIMScheduler: a step with guidance, replayed", graph=True),
    ),
)
