# SPDX-License-Identifier: Apache-2.0
"""Steps that go as planned: numbers like those of any other step, and only where all is plain."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2p_fast.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

MAKERS: list[tuple[Any, dict[str, Any]]] = [
    (DDPMScheduler, {}),
    (DDIMScheduler, {"eta": 0.0}),
    (DDIMScheduler, {"eta": 0.7}),
    (DDIMScheduler, {"eta": 0.0, "use_clipped_model_output": True}),
]


def _tensors(dtype: torch.dtype = torch.float32, channels: int = 4) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    shapes = (2, 4, 8, 8), (2, channels, 8, 8), (2, channels, 8, 8)
    return tuple(torch.randn(s, generator=random).to(dtype) for s in shapes)


def _steps(scheduler: Any, options: dict[str, Any], planned: bool, dtype: torch.dtype) -> list[Any]:
    sample, c, u = _tensors(dtype)
    torch.manual_seed(7)
    results = []
    for timestep in [*scheduler.timesteps[:3], scheduler.timesteps[-1]]:
        if not planned:
            scheduler._schedule.plans.clear()
        result = scheduler.step(
            c,
            timestep,
            sample,
            uncond_output=u,
            guidance_scale=3.0,
            guidance_rescale=0.5,
            **options,
        )
        results.append((result.prev_sample, result.pred_original_sample))
    return results


@pytest.mark.parametrize(("maker", "options"), MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("thresholding", [False, True])
def test_planned_steps_are_the_same(
    maker: Any, options: dict[str, Any], dtype: torch.dtype, thresholding: bool
) -> None:
    scheduler = maker(thresholding=thresholding)
    scheduler.set_timesteps(10)
    expected = _steps(scheduler, options, planned=False, dtype=dtype)
    assert bool(scheduler._schedule.plans) == (dtype != torch.float64)
    torch.testing.assert_close(
        _steps(scheduler, options, planned=True, dtype=dtype), expected, rtol=0, atol=0
    )


COUNTING: list[Any] = [
    lambda: DPMSolverMultistepScheduler(),
    lambda: DPMSolverMultistepScheduler(solver_order=3, thresholding=True),
    lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    lambda: DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver", final_sigmas_type="sigma_min", thresholding=True
    ),
    lambda: EulerDiscreteScheduler(),
    lambda: EulerAncestralDiscreteScheduler(),
    lambda: FlowMatchEulerDiscreteScheduler(),
    lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
]


@pytest.mark.parametrize("make", COUNTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_planned_steps_of_schedulers_that_count_are_the_same(
    make: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(planned: bool) -> list[Tensor]:
        scheduler = make()
        scheduler.set_timesteps(5)
        asked = _plan_calls(scheduler, monkeypatch)
        x, c, u = _tensors(dtype)
        torch.manual_seed(7)
        results = []
        for timestep in scheduler.timesteps:
            if not planned:
                scheduler._schedule.plans.clear()
            scheduler.scale_model_input(x, timestep)
            x = scheduler.step(
                c, timestep, x, uncond_output=u, guidance_scale=3.0, guidance_rescale=0.5
            ).prev_sample
            results.append(x)
        assert any(asked) == (planned and dtype != torch.float64)
        return results

    expected = run(planned=False)
    torch.testing.assert_close(run(planned=True), expected, rtol=0, atol=0)


def test_what_is_written_into_timesteps_counts() -> None:
    scheduler, other = DDIMScheduler(), DDIMScheduler()
    scheduler.set_timesteps(10)
    other.set_timesteps(10)
    sample, c, _ = _tensors()
    scheduler.step(c, scheduler.timesteps[3], sample)
    scheduler.timesteps[3] = 77
    for result in (scheduler.step(c, scheduler.timesteps[3], sample) for _ in range(2)):
        assert torch.equal(result.prev_sample, other.step(c, 77, sample).prev_sample)


def test_a_changed_configuration_counts() -> None:
    sample, c, _ = _tensors()
    for maker in (DPMSolverMultistepScheduler, EulerDiscreteScheduler):
        results = []
        for late in (False, True):
            scheduler = maker(prediction_type="epsilon" if late else "v_prediction")
            scheduler.set_timesteps(10)
            if late:
                scheduler.step(c, scheduler.timesteps[0], sample)
                scheduler.register_to_config(prediction_type="v_prediction")
                scheduler.set_begin_index(0)
                scheduler._step_index = None
                if maker is DPMSolverMultistepScheduler:
                    scheduler._reset()
            results.append(scheduler.step(c, scheduler.timesteps[0], sample).prev_sample)
        assert torch.equal(*results)


def _plan_calls(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether steps from now on go as planned, one entry for each that asks."""
    schedule, asked = scheduler._schedule, []
    planned = type(schedule).planned

    def ask(self: Any, *arguments: Any) -> Any:
        result = planned(self, *arguments)
        asked.append(result is not None)
        return result

    monkeypatch.setattr(type(schedule), "planned", ask)
    return asked


def test_what_is_not_plain_goes_the_other_road(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    sample, c, _ = _tensors()
    t = scheduler.timesteps[3]
    first = scheduler.step(c, t, sample).prev_sample
    asked = _plan_calls(scheduler, monkeypatch)
    assert torch.equal(scheduler.step(c, t, sample).prev_sample, first)
    assert asked == [True]
    asked.clear()
    for other in (int(t), t.clone(), torch.tensor([int(t)] * 2)):
        assert torch.equal(scheduler.step(c, other, sample).prev_sample, first)
    wanted = c.clone().requires_grad_()
    assert scheduler.step(wanted, t, sample).prev_sample.requires_grad
    assert torch.equal(scheduler.step(c.mT, t, sample.mT).prev_sample.mT, first)
    assert scheduler.step(c.double(), t, sample).prev_sample.dtype == torch.float64
    assert asked == [False] * 6
    asked.clear()
    with pytest.raises(ValueError, match="model_output is"):
        scheduler.step(c[:, :2], t, sample)
    scheduler.timesteps = scheduler.timesteps.clone()  # somebody's own
    assert torch.equal(scheduler.step(c, scheduler.timesteps[3], sample).prev_sample, first)
    assert asked == [False] * 2


def test_results_own_their_memory_and_give_it_back() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    sample, c, _ = _tensors()
    first, second = (tuple(scheduler.step(c, scheduler.timesteps[3], sample)) for _ in range(2))
    for x, like in zip(second, first, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (like.shape, like.stride(), like.dtype)
        assert x.data_ptr() % 64 == 0
        part, kept = x[1, 2:], x[1, 2:].clone()
        del x
        assert torch.equal(part.add_(1), kept + 1)
    used = len({x.data_ptr() for x in (*first, *second)})
    assert used == 4
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        pytest.skip("there is no /proc to read how much memory is in use from")
    before = int(statistics.read_text().split()[1])
    for _ in range(10_000):  # of 2 KiB twice
        scheduler.step(c, scheduler.timesteps[3], sample)
    pages = int(statistics.read_text().split()[1]) - before
    assert pages * os.sysconf("SC_PAGESIZE") < 10_000 * 2 * 2048 / 4


def test_plans_end_with_their_schedule() -> None:
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    sample, c, _ = _tensors()
    scheduler.step(c, scheduler.timesteps[0], sample)
    other = copy.deepcopy(scheduler)
    assert not other._schedule.plans
    scheduler.set_timesteps(20)
    assert not scheduler._schedule.plans
    torch.manual_seed(3)
    expected = DDPMScheduler()
    expected.set_timesteps(10)
    wanted = expected.step(c, expected.timesteps[4], sample).prev_sample
    for _ in range(2):
        torch.manual_seed(3)
        assert torch.equal(other.step(c, other.timesteps[4], sample).prev_sample, wanted)


def test_a_learned_variance_is_planned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(10)
    sample, c, _ = _tensors(channels=8)
    results = []
    asked = _plan_calls(scheduler, monkeypatch)
    for _ in range(2):
        torch.manual_seed(1)
        results.append(scheduler.step(c, scheduler.timesteps[2], sample).prev_sample)
    assert torch.equal(*results)
    assert asked == [False, True]
