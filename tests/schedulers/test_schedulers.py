# SPDX-License-Identifier: Apache-2.0
"""The schedulers by themselves: schedules, spacing, noise, configurations, errors."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import scheduler_noise
from t2p_fast.schedulers import (
    BETA_SCHEDULES,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    make_betas,
)
from t2p_fast.schedulers._base import randn
from t2p_fast.schedulers._noise_schedule import products_of, rescale_zero_terminal_snr

ALL: list[Any] = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
]
KARRAS = ALL[:5]


def _products(name: str) -> Tensor:
    return products_of(make_betas(name, 1000, 1e-4, 0.02, owner="test"))


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_schedules_are_valid(name: str) -> None:
    products = _products(name)
    assert products.dtype == torch.float64
    assert (products[1:] < products[:-1]).all()
    assert ((products > 0) & (products < 1)).all()


def test_schedules_by_their_formulas() -> None:
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    cosine = (
        ((t + 0.008) / 1.008 * math.pi / 2).cos() / math.cos(0.008 / 1.008 * math.pi / 2)
    ) ** 2
    torch.testing.assert_close(_products("cosine")[:-1], cosine, rtol=1e-9, atol=0)
    assert torch.equal(_products("cosine"), _products("squaredcos_cap_v2"))
    sigmoid = ((-(6 * t - 3)).sigmoid() - (-torch.tensor(3.0).double()).sigmoid()) / (
        torch.tensor(3.0).double().sigmoid() - torch.tensor(-3.0).double().sigmoid()
    )
    torch.testing.assert_close(_products("sigmoid_alpha")[:-1], sigmoid, rtol=1e-9, atol=0)
    # Terminal products as published for 1000 steps.
    for name, last in (("linear", 4.04e-5), ("sigmoid", 3.97e-5)):
        assert _products(name)[-1] == pytest.approx(last, rel=2e-3)
    stable = products_of(make_betas("scaled_linear", 1000, 0.00085, 0.012, owner="test"))
    assert stable[-1] == pytest.approx(0.00466, rel=2e-3)


def test_zero_terminal_snr() -> None:
    betas = make_betas("scaled_linear", 1000, 0.00085, 0.012, owner="test")
    before, after = products_of(betas), products_of(rescale_zero_terminal_snr(betas))
    assert after[-1] == 0
    torch.testing.assert_close(after[0], before[0])
    assert (after[1:] < after[:-1]).all()


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 30, 49, 333, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacing(steps: int, spacing: str) -> None:
    """Exactly as many timesteps as asked for, falling, within the training's."""
    for kind in (DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler):
        scheduler = kind(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps
        assert len(times) == steps
        assert (times[1:] < times[:-1]).all()
        assert times[-1] >= 0
        assert times[0] <= 999
    if spacing != "leading" and steps > 1:
        assert times[0] == 999


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 30])
def test_ddim_goes_to_the_next_timestep(spacing: str, steps: int) -> None:
    """With the right noise predicted, every step lands on the forward process (2010.02502)."""
    scheduler = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    products = scheduler._products
    x0, eps = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    x = scheduler.add_noise(x0, eps, scheduler.timesteps[0])
    for t, following in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        x = scheduler.step(eps, t, x).prev_sample
        product = 1.0 if following is None else products[following]
        torch.testing.assert_close(x, product**0.5 * x0 + (1 - product) ** 0.5 * eps)


def test_steps_are_the_reference() -> None:
    x, m, u = (torch.randn(2, 3, 4, 4).double() for _ in range(3))
    noise = torch.randn(2, 3, 4, 4).double()
    output = reference.scheduler_guide(m, u, 4.0, 0.3)
    guidance: Any = {"uncond_output": u, "guidance_scale": 4.0, "guidance_rescale": 0.3}
    ddim = DDIMScheduler(thresholding=True, sample_max_value=2.0)
    ddim.set_timesteps(10)
    now, following = ddim._products[700], ddim._products[600]
    scales = (now.sqrt(), (1 - now).sqrt(), following.sqrt(), (1 - following).sqrt())
    ours = ddim.step(m, 700, x, eta=0.7, variance_noise=noise, **guidance)
    truth = reference.scheduler_ddim_step(
        x, output, *scales, eta=0.7, threshold=(0.995, 2.0), noise=noise
    )
    torch.testing.assert_close(ours.to_tuple(), truth)
    ddpm = DDPMScheduler(variance_type="fixed_large")
    ddpm.set_timesteps(10)
    shift = torch.randn_like(x)
    ours = ddpm.step(m, 700, x, variance_noise=noise, mean_shift=shift, **guidance)
    truth = reference.scheduler_ddpm_step(
        x, output, *scales, variance_type="fixed_large", clip=1.0, noise=noise, mean_shift=shift
    )
    torch.testing.assert_close(ours.to_tuple(), truth)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_a_timestep_for_each_sample(kind: Any) -> None:
    scheduler = kind()
    scheduler.set_timesteps(10)
    x, m, noise = (torch.randn(3, 3, 4, 4) for _ in range(3))
    times = torch.tensor([700, 0, 123])  # the last one is off the schedule
    extra: Any = {"variance_noise": noise}
    if kind is DDIMScheduler:
        extra["eta"] = 0.5
    together = scheduler.step(m, times, x, **extra)
    for i, t in enumerate(times.tolist()):
        one = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in extra.items()}
        alone = scheduler.step(m[i : i + 1], t, x[i : i + 1], **one)
        assert torch.equal(together.prev_sample[i], alone.prev_sample[0])
        assert torch.equal(together.pred_original_sample[i], alone.pred_original_sample[0])


@pytest.mark.parametrize("kind", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_noise(kind: Any) -> None:
    """From a generator it is torch's; without one the kernel's, after torch.manual_seed."""
    x, m = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)

    def step(**kwargs: Any) -> Tensor:
        scheduler = kind()
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[3]
        scheduler.scale_model_input(x, t)
        result: Tensor = scheduler.step(m, t, x, **kwargs).prev_sample
        return result

    torch.manual_seed(4)
    first = step()
    assert not torch.equal(step(), first)
    torch.manual_seed(4)
    assert torch.equal(step(), first)
    seeded = torch.Generator().manual_seed(2)
    given = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(step(generator=seeded), step(variance_noise=given))
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    each = torch.cat(
        [torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 6)]
    )
    assert torch.equal(step(generator=generators), step(variance_noise=each))
    with pytest.raises(ValueError, match="pass either generator or variance_noise"):
        step(generator=seeded, variance_noise=given)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        randn((3, 2), generators, torch.device("cpu"), torch.float32)
    assert scheduler_noise((2, 3), 1).shape == (2, 3)


@pytest.mark.parametrize("layout", ["contiguous", "strided", "float64", "with a gradient"])
def test_noise_of_a_seed(layout: str) -> None:
    """A step takes one number of torch's default generator, whatever road it goes."""
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    x, m = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    if layout == "strided":
        x = x.mT
    elif layout == "float64":
        x = x.double()
    elif layout == "with a gradient":
        m.requires_grad_()
    torch.manual_seed(7)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    following = torch.rand(())
    torch.manual_seed(7)
    ours = scheduler.step(m, scheduler.timesteps[3], x)
    assert torch.equal(torch.rand(()), following)
    noise = scheduler_noise(x.shape, seed).to(x.dtype)
    expected = scheduler.step(m, scheduler.timesteps[3], x, variance_noise=noise)
    assert torch.equal(ours.prev_sample, expected.prev_sample)
    torch.manual_seed(7)
    scheduler.step(m, 0, x)  # the last step adds none
    assert torch.empty((), dtype=torch.int64).random_() == seed


@pytest.mark.parametrize("kind", ALL)
def test_a_copy_finds_steps_in_timesteps_of_its_own(kind: Any) -> None:
    scheduler = kind()
    scheduler.set_timesteps(5)
    for clone in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        own, other = clone.timesteps, scheduler.timesteps
        assert own.data_ptr() != other.data_ptr()
        assert [clone._schedule.value(t, own) for t in own] == own.tolist()
        assert all(clone._schedule.value(t, own) is None for t in other)
        assert clone._schedule.value(own[:2], own) is None


def test_gradients_through_a_step() -> None:
    """What guidance through the predicted x_0 needs."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    m = 0.5 * x.sin()
    scheduler.step(m, 500, x).pred_original_sample.square().sum().backward()
    grad, x64 = x.grad, x.detach().double().requires_grad_()
    alpha = scheduler._products[500].sqrt()
    x0, _ = reference.scheduler_predict(
        x64, 0.5 * x64.sin(), alpha, (1 - alpha**2).sqrt(), "epsilon"
    )
    x0.square().sum().backward()
    assert grad is not None
    torch.testing.assert_close(grad.double(), x64.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_configuration(kind: Any, tmp_path: Path) -> None:
    scheduler = kind(num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert loaded.config.num_train_timesteps == len(loaded) == 500
    assert {**loaded.config, "_use_default_values": None} == {
        **scheduler.config, "_use_default_values": None
    }  # fmt: skip
    other, unused = kind.from_config({**scheduler.config, "unheard_of": 3}, True)
    assert other.config["unheard_of"] == unused["unheard_of"] == 3
    assert (
        kind.from_config(scheduler.config, num_train_timesteps=100).config.num_train_timesteps
        == 100
    )
    for clone in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert dict(clone.config) == dict(scheduler.config)
    with pytest.raises(TypeError, match="a configuration does not change"):
        scheduler.config["num_train_timesteps"] = 3
    with pytest.raises(AttributeError, match="has no 'nonsense'"):
        _ = scheduler.config.nonsense
    with pytest.warns(FutureWarning, match=r"use \w+\.config\.unheard_of"):
        assert other.unheard_of == 3
    with pytest.raises(AttributeError, match=f"'{kind.__name__}' object has no attribute 'nonse"):
        _ = other.nonsense
    with pytest.raises(ValueError, match="expected a configuration, got a str"):
        kind.from_config("folder")
    with pytest.raises(OSError, match="has no file"):
        kind.from_pretrained(tmp_path, subfolder="nowhere")
    assert kind.__name__ in repr(scheduler)


@pytest.mark.parametrize("kind", KARRAS)
def test_compatible_schedulers_take_each_others_configuration(kind: Any) -> None:
    scheduler = kind(beta_schedule="scaled_linear", beta_end=0.013)
    for other in scheduler.compatibles:
        between = other.from_config(scheduler.config)
        back = kind.from_config(between.config)
        assert {k: v for k, v in back.config.items() if k in scheduler.config} == dict(
            scheduler.config
        )


@pytest.mark.parametrize("kind", KARRAS)
def test_trained_betas(kind: Any, tmp_path: Path) -> None:
    scheduler = kind(trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path).betas.tolist() == scheduler.betas.tolist()
    with pytest.raises(ValueError, match="trained_betas must be a list of numbers from 0 to 1"):
        kind(trained_betas=[0.1, 3.0])


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_betas_above_one_give_nan_where_they_leave_no_signal(kind: Any) -> None:
    scheduler = kind(beta_start=0.1, beta_end=2.0, clip_sample=False)
    scheduler.set_timesteps(50)
    x = torch.randn(1, 3, 4, 4)
    assert scheduler.step(x, 980, x).prev_sample.isnan().all()
    assert scheduler.step(x, 0, x).prev_sample.isfinite().all()


def test_previous_timestep_of_a_tensor_is_one() -> None:
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(timesteps=[100, 87, 0])
    previous = [scheduler.previous_timestep(t) for t in scheduler.timesteps]
    assert all(isinstance(t, torch.Tensor) for t in previous)
    assert [t.item() for t in previous] == [87, 0, -1]
    assert scheduler.previous_timestep(100) == 87


@pytest.mark.parametrize("kind", ALL)
def test_results_are_tuples_and_dicts(kind: Any) -> None:
    scheduler = kind()
    scheduler.set_timesteps(4)
    x, t = torch.randn(1, 3, 4, 4), scheduler.timesteps[0]
    scheduler.scale_model_input(x, t)
    torch.manual_seed(0)
    result = scheduler.step(x, t, x)
    scheduler.set_timesteps(4)
    torch.manual_seed(0)
    plain = scheduler.step(x, t.clone(), x, return_dict=False)
    assert isinstance(plain, tuple)
    assert all(torch.equal(a, b) for a, b in zip(result, plain, strict=True))
    assert torch.equal(result[0], result["prev_sample"])
    assert next(iter(result.keys())) == "prev_sample"
    assert len(result.values()) == len(result) == len(plain)
    assert "prev_sample=" in repr(result)


@pytest.mark.parametrize("kind", KARRAS)
def test_epsilon_with_zero_terminal_snr_is_refused(kind: Any) -> None:
    scheduler = kind(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match=r"prediction_type='epsilon' cannot be used"):
        scheduler.set_timesteps(10)
    scheduler = kind(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    scheduler.set_timesteps(10)
    training = DDPMScheduler(rescale_betas_zero_snr=True)
    x = torch.randn(1, 3, 4, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * scheduler.scale_model_input(x, t), t, x).prev_sample
        assert x.isfinite().all()
    for timestep in (999, training.timesteps[0]):  # of DDPM, which may go through all
        with pytest.raises(ValueError, match=r"cannot be used at timestep 999"):
            training.step(x, timestep, x)
    # Where the timestep without signal is left out, epsilon may stay.
    kind(rescale_betas_zero_snr=True, timestep_spacing="leading").set_timesteps(10)


def test_timesteps_are_found_without_reading_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element of `timesteps` is known by its place: on a GPU, reading it would wait."""
    x = torch.randn(1, 3, 4, 4)
    for kind in ALL:
        scheduler = kind()
        scheduler.set_timesteps(5)
        timesteps = list(scheduler.timesteps)
        memory = scheduler.timesteps.untyped_storage().data_ptr()
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__int__", "__float__", "__bool__"):
                patch.setattr(Tensor, name, _unless_in(memory, getattr(Tensor, name)))
            for t in timesteps:
                scheduler.scale_model_input(x, t)
                scheduler.step(x, t, x)
            with pytest.raises(AssertionError, match="timesteps were read"):
                timesteps[0].item()


def _unless_in(memory: int, method: Any) -> Any:
    def checked(self: Tensor, *args: Any) -> Any:
        assert self.untyped_storage().data_ptr() != memory, "timesteps were read"
        return method(self, *args)

    return checked


def test_counted_steps_end() -> None:
    for kind in ALL[2:]:
        scheduler = kind()
        scheduler.set_timesteps(2)
        x = torch.randn(1, 2, 2, 2)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        for t in scheduler.timesteps:
            scheduler.step(x, t, x)
        with pytest.raises(ValueError, match="all 2 steps are done"):
            scheduler.step(x, scheduler.timesteps[-1], x)


def test_changed_sigmas_are_used() -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    scheduler.sigmas = scheduler.sigmas * 2
    x, t = torch.randn(1, 3, 4, 4), scheduler.timesteps[0]
    scheduler.scale_model_input(x, t)
    ours = scheduler.step(0.1 * x, t, x).prev_sample
    sigma, following = scheduler.sigmas[:2].double()
    truth = reference.scheduler_euler_step(x.double(), 0.1 * x.double(), sigma, following)[0]
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_training_under_grad(kind: Any) -> None:
    scheduler, x = kind(), torch.randn(2, 3, 4, 4)
    noise = torch.randn_like(x).requires_grad_()
    times = torch.tensor([10, 900])
    noisy = scheduler.add_noise(x, noise, times)
    product = scheduler._products[times].view(2, 1, 1, 1)
    expected = product.sqrt() * x + (1 - product).sqrt() * noise
    torch.testing.assert_close(noisy.double(), expected)
    noisy.sum().backward()
    torch.testing.assert_close(noise.grad.double(), (1 - product).sqrt().expand_as(x).double())
    velocity = scheduler.get_velocity(x, noise, times)
    expected = product.sqrt() * noise - (1 - product).sqrt() * x
    torch.testing.assert_close(velocity.double(), expected)


def test_errors() -> None:
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"DDIMScheduler.step: call set_timesteps first"):
        DDIMScheduler().step(x, 5, x)
    with pytest.raises(ValueError, match="num_inference_steps=1001 must be from 1 to"):
        DDIMScheduler().set_timesteps(1001)
    with pytest.raises(NotImplementedError, match="beta_schedule='wavy' is not supported"):
        DDIMScheduler(beta_schedule="wavy")
    with pytest.raises(ValueError, match=r"prediction_type='noise' is not supported"):
        DDPMScheduler(prediction_type="noise")
    with pytest.raises(ValueError, match="timestep_spacing='even' is not supported"):
        DDIMScheduler(timestep_spacing="even").set_timesteps(3)
    with pytest.raises(ValueError, match="must be in descending order"):
        DDPMScheduler().set_timesteps(timesteps=[1, 2])
    with pytest.raises(ValueError, match=r"must start before `self.config.train_timesteps`"):
        DDPMScheduler().set_timesteps(timesteps=[1000, 2])
    with pytest.raises(ValueError, match="pass one of num_inference_steps and timesteps"):
        DDPMScheduler().set_timesteps(3, timesteps=[1])
    with pytest.raises(ValueError, match="timestep 1000 is outside"):
        DDPMScheduler().step(x, 1000, x)
    with pytest.raises(ValueError, match="needs twice the channels"):
        DDPMScheduler(variance_type="learned_range").step(x, 5, x)
    with pytest.raises(ValueError, match="steps_offset=1 moves the first of 1000 timesteps"):
        DDIMScheduler(steps_offset=1).set_timesteps(1000)
    for kind in (EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler):
        scheduler = kind()
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="Passing integer indices"):
            scheduler.step(x, 3, x)
        with pytest.raises(ValueError, match=r"timestep 3.5 is not one of its timesteps"):
            scheduler.index_for_timestep(3.5)
        with pytest.raises(ValueError, match="only one of"):
            kind(use_karras_sigmas=True, use_exponential_sigmas=True)
    with pytest.raises(NotImplementedError, match="solver_type='best' is not supported"):
        DPMSolverMultistepScheduler(solver_type="best")
    with pytest.raises(ValueError, match="solver_order is 4, expected 1, 2 or 3"):
        DPMSolverMultistepScheduler(solver_order=4)
    with pytest.raises(ValueError, match="Please choose `sigma_min` instead"):
        DPMSolverMultistepScheduler(algorithm_type="dpmsolver")
    with pytest.raises(ValueError, match="`mu` must be passed"):
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).set_timesteps(3)
