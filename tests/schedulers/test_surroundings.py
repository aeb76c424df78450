# SPDX-License-Identifier: Apache-2.0
"""Schedulers among modes of torch, threads, other defaults, and what users change about them."""

import copy
import pickle
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from t2p_fast import _C, ops
from t2p_fast.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

ALL: list[Any] = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
]
COUNTING = ALL[2:]


def _made(maker: Any, steps: int = 10, **config: Any) -> Any:
    scheduler = maker(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def _tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x, c = (torch.randn(2, 4, 8, 8, generator=random).to(dtype) for _ in range(2))
    return x, c


def _go_to(scheduler: Any, place: int) -> None:
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = place
    if hasattr(scheduler, "_reset"):
        scheduler._reset()  # results of the steps before


def _step(scheduler: Any, place: int = 2, c: Tensor | None = None, seed: int = 3) -> Tensor:
    x, output = _tensors()
    _go_to(scheduler, place)
    torch.manual_seed(seed)
    result = scheduler.step(output if c is None else c, scheduler.timesteps[place], x)
    previous: Tensor = result.prev_sample
    return previous


@pytest.mark.parametrize("maker", ALL)
def test_a_step_in_inference_mode_leaves_nothing_behind(maker: Any, run_python: Any) -> None:
    expected = _step(_made(maker))
    with torch.inference_mode():
        scheduler = _made(maker)
        inside = _step(scheduler)
    assert torch.equal(inside.clone(), expected)
    c = _tensors()[1].requires_grad_()
    outside = _step(scheduler, c=c)
    torch.testing.assert_close(outside.detach(), expected)
    outside.sum().backward()
    assert c.grad is not None
    if maker is DDPMScheduler:  # as the first step of a process
        run_python(
            "import torch; from t2p_fast.schedulers import DDPMScheduler\n"
            "s = DDPMScheduler(); s.set_timesteps(10); x = torch.zeros(1, 4, 8, 8)\n"
            "with torch.inference_mode(): s.step(x, s.timesteps[2], x)\n"
            "s.step(x, s.timesteps[2], x)"
        )


@pytest.mark.parametrize("maker", ALL)
def test_a_step_among_modes_leaves_nothing_behind(maker: Any) -> None:
    expected = _step(_made(maker))
    scheduler = _made(maker)
    torch.func.vmap(lambda c: _step(scheduler, c=c), randomness="different")(_tensors()[1][None])
    assert torch.equal(_step(scheduler), expected)
    scheduler = _made(maker)
    timestep = scheduler.timesteps[2]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(_tensors()[0])
        if maker in COUNTING:
            scheduler.set_begin_index(2)
        fake = scheduler.step(x, timestep, x).prev_sample
    assert fake.shape == x.shape
    assert torch.equal(_step(scheduler), expected)


def test_vmap_draws_other_noise_for_each() -> None:
    scheduler, (x, c) = _made(DDPMScheduler), _tensors()

    def step(output: Tensor) -> Tensor:
        result: Tensor = scheduler.step(output, scheduler.timesteps[2], x).prev_sample
        return result

    a, b = torch.func.vmap(step, randomness="different")(torch.stack([c, c]))
    assert not torch.equal(a, b)


def test_threads_draw_different_seeds() -> None:
    seeds: list[list[int]] = [[] for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda s=s: s.extend(_C.scheduler_seed() for _ in range(5000)))
            for s in seeds
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    drawn = [seed for each in seeds for seed in each]
    assert len(set(drawn)) == len(drawn) == 20_000


@pytest.mark.parametrize("maker", ALL)
def test_the_default_device_does_not_matter(maker: Any) -> None:
    expected = _step(_made(maker))
    x, c = _tensors()
    with torch.device("meta"):
        scheduler = _made(maker)
        assert scheduler.timesteps.device.type == "cpu"
        _go_to(scheduler, 2)
        torch.manual_seed(3)
        assert torch.equal(scheduler.step(c, scheduler.timesteps[2], x).prev_sample, expected)
    assert torch.equal(_step(scheduler), expected)


@pytest.mark.parametrize("maker", COUNTING)
def test_a_step_that_is_refused_is_not_counted(maker: Any) -> None:
    scheduler, (x, c) = _made(maker), _tensors()
    for wrong in (c[:, :3], c[:, :3].double()):
        with pytest.raises((ValueError, RuntimeError)):
            scheduler.step(wrong, scheduler.timesteps[0], x)
    assert scheduler.step_index in (None, 0)
    torch.manual_seed(3)
    again = scheduler.step(c, scheduler.timesteps[0], x).prev_sample
    assert torch.equal(again, _step(_made(maker), 0))
    assert scheduler.step_index == 1


@pytest.mark.parametrize("maker", COUNTING)
def test_sigmas_that_are_written_over_count(maker: Any) -> None:
    scheduler, other = _made(maker), _made(maker)
    unchanged = _step(scheduler)
    scheduler.sigmas[2] *= 1.1
    other.sigmas = torch.cat([other.sigmas[:2], other.sigmas[2:3] * 1.1, other.sigmas[3:]])
    written = _step(scheduler)
    assert not torch.equal(written, unchanged)
    torch.testing.assert_close(written, _step(other), rtol=0, atol=0)


@pytest.mark.parametrize("maker", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("by_attribute", [False, True])
def test_bounds_that_are_changed_count(maker: Any, by_attribute: bool) -> None:
    for change in (
        {"clip_sample": False},
        {"clip_sample_range": 0.3},
        {"thresholding": True, "sample_max_value": 3.0},
        {"prediction_type": "v_prediction"},
    ):
        scheduler = _made(maker)
        for _ in range(2):  # the second as planned
            _step(scheduler)
        if by_attribute:
            for name, value in change.items():
                setattr(scheduler.config, name, value)
        else:
            scheduler.register_to_config(**change)
        for copied in (copy.deepcopy(scheduler), scheduler):
            expected = _step(_made(maker, **change))
            for _ in range(2):
                assert torch.equal(_step(copied), expected)
        assert all(scheduler.config[name] == value for name, value in change.items())


@pytest.mark.parametrize("maker", [DDPMScheduler, EulerDiscreteScheduler])
def test_a_configuration_that_diffusers_puts_in_its_place_counts(maker: Any) -> None:
    theirs = pytest.importorskip("diffusers.configuration_utils").FrozenDict
    scheduler = _made(maker)
    _step(scheduler)
    # As the constructor of StableDiffusionPipeline does, for old configurations.
    scheduler._internal_dict = theirs({**scheduler.config, "prediction_type": "v_prediction"})
    assert torch.equal(_step(scheduler), _step(_made(maker, prediction_type="v_prediction")))
    assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("by", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("maker", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_copies_have_their_own_configuration(maker: Any, by: Any) -> None:
    scheduler = _made(maker)
    expected, wanted = _step(scheduler), _step(_made(maker, prediction_type="v_prediction"))
    scheduler.config.prediction_type = "v_prediction"
    copied = by(scheduler)  # before the original has seen it
    assert torch.equal(_step(copied), wanted)
    copied.register_to_config(prediction_type="epsilon")
    assert torch.equal(_step(copied), expected)
    assert torch.equal(_step(scheduler), wanted)


@pytest.mark.parametrize("maker", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_more_steps_may_be_put_in(maker: Any) -> None:
    scheduler, longer, (x, c) = _made(maker), _made(maker, 20), _tensors()
    scheduler.timesteps, scheduler.sigmas = longer.timesteps.clone(), longer.sigmas.clone()
    results = []
    for s in (scheduler, longer):
        torch.manual_seed(0)
        sample = x
        for timestep in s.timesteps:
            s.scale_model_input(sample, timestep)
            sample = s.step(c, timestep, sample).prev_sample
        results.append(sample)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_classes_of_users_are_saved_as_their_own(run_python: Any) -> None:
    pytest.importorskip("diffusers")
    run_python(
        "from t2p_fast.schedulers import DDIMScheduler, DDPMScheduler\n"
        "from diffusers import SchedulerMixin\n"
        "class Both(SchedulerMixin, DDIMScheduler): pass\n"
        "class Own(DDPMScheduler): pass\n"
        "assert Both().__module__ == Own().__module__ == '__main__'\n"
        "assert DDIMScheduler().__module__ == 'diffusers.schedulers'"
    )


def test_an_exported_step_leaves_nothing_behind() -> None:
    scheduler, (x, c) = _made(DDIMScheduler), _tensors()

    class Step(torch.nn.Module):
        def forward(self, output: Tensor, sample: Tensor) -> Tensor:
            result: Tensor = scheduler.step(output, 901, sample).prev_sample
            return result

    exported = torch.export.export(Step(), (c, x), strict=False)
    expected = scheduler.step(c, 901, x).prev_sample
    torch.testing.assert_close(exported.module()(c, x), expected)
    scheduler = _made(DDPMScheduler)
    add = torch.compile(lambda a, b, t: scheduler.add_noise(a, b, t), backend="eager")
    with torch.inference_mode():
        add(x, c, torch.tensor([5]))
    scheduler.add_noise(x.requires_grad_(), c, torch.tensor([5])).sum().backward()
    assert x.grad is not None


def test_ddpm_goes_by_timesteps_that_are_put_in() -> None:
    theirs = pytest.importorskip("diffusers").DDPMScheduler()
    theirs.set_timesteps(10)
    scheduler, (x, c) = _made(DDPMScheduler), _tensors()
    _step(scheduler)
    for s in (scheduler, theirs):
        s.timesteps = s.timesteps[::2]
    for place in (0, 2, 4):
        t, noise = theirs.timesteps[place], _tensors()[0].flip(0)
        ours = scheduler.step(c, scheduler.timesteps[place], x, variance_noise=noise)
        theirs_, alpha = theirs.previous_timestep(t), theirs.alphas_cumprod
        a_t = alpha[t]
        a_prev = alpha[theirs_] if theirs_ >= 0 else torch.tensor(1.0)
        b_t = 1 - a_t / a_prev
        x0 = ((x - (1 - a_t).sqrt() * c) / a_t.sqrt()).clamp(-1, 1)
        mean = (a_prev.sqrt() * b_t * x0 + (a_t / a_prev).sqrt() * (1 - a_prev) * x) / (1 - a_t)
        deviation = ((1 - a_prev) / (1 - a_t) * b_t).clamp(min=1e-20).sqrt()
        expected = mean + (deviation * noise if t > 0 else 0)
        torch.testing.assert_close(ours.prev_sample, expected, rtol=1e-4, atol=1e-5)
        assert int(scheduler.previous_timestep(scheduler.timesteps[place])) == int(theirs_)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_results_have_the_dtypes_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    for maker in COUNTING:
        for sample, output in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
            x, c = _tensors(sample)[0], _tensors(output)[1]
            schedulers = _made(maker), _made(getattr(diffusers, maker.__name__))
            results = [
                s.step(c, s.timesteps[0], x, generator=torch.Generator().manual_seed(1))
                for s in schedulers
            ]
            assert results[0].prev_sample.dtype == results[1].prev_sample.dtype


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_noise_for_doubles_is_that_of_diffusers() -> None:
    theirs = pytest.importorskip("diffusers").DPMSolverMultistepScheduler
    x, c = _tensors(torch.float64)
    results = []
    for maker in (DPMSolverMultistepScheduler, theirs):
        scheduler = maker(algorithm_type="sde-dpmsolver++")
        scheduler.set_timesteps(10)
        generator = torch.Generator().manual_seed(1)
        results.append(scheduler.step(c, scheduler.timesteps[0], x, generator=generator)[0])
    torch.testing.assert_close(*results, check_dtype=False, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("maker", ALL)
def test_no_steps_are_refused(maker: Any) -> None:
    with pytest.raises(ValueError, match="num_inference_steps"):
        maker().set_timesteps(0)


def test_flow_matching_takes_noise_in_either_order() -> None:
    scheduler, (x, noise) = _made(FlowMatchEulerDiscreteScheduler), _tensors()
    timesteps = scheduler.timesteps[2:4]
    assert torch.equal(
        scheduler.add_noise(x, noise, timesteps), scheduler.scale_noise(x, timesteps, noise)
    )


@pytest.mark.parametrize("maker", ALL)
def test_a_first_step_compiles_as_a_whole(maker: Any) -> None:
    scheduler, (x, c) = _made(maker), _tensors()
    timestep = scheduler.timesteps[2]
    if maker in COUNTING:
        scheduler.scale_model_input(x, timestep)
    else:
        timestep = int(timestep)
    _go_to(scheduler, 2)

    def step(output: Tensor) -> Tensor:
        result: Tensor = scheduler.step(output, timestep, x).prev_sample
        return result

    compiled = torch.compile(step, backend="eager", fullgraph=True)(c)
    if maker not in (DDPMScheduler, EulerAncestralDiscreteScheduler):  # drawn by torch there
        expected = _step(_made(maker))
        torch.testing.assert_close(compiled, expected)


def test_autograd_knows_what_is_written_over() -> None:
    x, c = _tensors()
    table = torch.rand(1, 16)
    for write in (
        lambda y: ops.group_norm_silu(y, 2, inplace=True),
        lambda y: ops.scheduler_step(y, c, table, 0, return_x0=False, out=y),
    ):
        source = x.clone().requires_grad_()
        y = source.sigmoid()
        with torch.no_grad():
            write(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
