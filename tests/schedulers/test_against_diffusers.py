# SPDX-License-Identifier: Apache-2.0
"""Whole loops beside those of diffusers 0.42.1, where that is right."""

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from t2p_fast import schedulers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")

# diffusers keeps its tables in float32: their products have errors of 1e-6 to 1e-5, which steps
# that divide by alpha pass on.
RTOL = 5e-5

DISCRETE = ("DDIMScheduler", "DDPMScheduler")
EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
DPM = "DPMSolverMultistepScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"


def _model(x: Tensor, variance: bool) -> Tensor:
    output = 0.3 * x + 0.1 * torch.sin(3 * x)
    return torch.cat([output, torch.cos(x)], 1) if variance else output


def _loop(library: Any, name: str, config: Any, steps: Any, step: Any, dtype: torch.dtype) -> Any:
    scheduler = getattr(library, name)(**config)
    scheduler.set_timesteps(**steps)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    x = (x * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step = {**step, "generator": generator}
    results = []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        learned = name == "DDPMScheduler" and config.get("variance_type", "").startswith("learned")
        x = scheduler.step(_model(seen, learned), t, x, **step).prev_sample
        results.append(x)
    return scheduler, results


def _compare(
    name: str, config: Any, *, steps: Any = None, step: Any = None,
    dtype: torch.dtype = torch.float32, rtol: float = RTOL,
) -> None:  # fmt: skip
    arguments = (name, config, steps or {"num_inference_steps": 10}, step or {}, dtype)
    theirs, expected = _loop(diffusers, *arguments)
    ours, results = _loop(schedulers, *arguments)
    assert ours.timesteps.dtype == theirs.timesteps.dtype
    # Whole timesteps are the same; those between, found from noise levels in float32, nearly.
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-2)
    if hasattr(theirs, "sigmas"):
        # sqrt(1 - A) in float32: near the end 1 - A is 1e-4, to half a unit of 1.
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=4e-4, atol=0)
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).abs().max()) <= rtol * float(b.abs().max())


@pytest.mark.parametrize("name", [*DISCRETE, *EULER, DPM])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_predictions_and_spacings(name: str, kind: str, spacing: str) -> None:
    if (name, spacing) == ("DDIMScheduler", "linspace"):
        pytest.skip("diffusers steps to t - T // N, which is not the next timestep (#11347)")
    if (name, kind) == ("EulerAncestralDiscreteScheduler", "sample"):
        pytest.skip("diffusers has not implemented it")
    _compare(name, {"prediction_type": kind, "timestep_spacing": spacing})


@pytest.mark.parametrize(
    "schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
)
def test_beta_schedules(schedule: str) -> None:
    _compare("DDPMScheduler", {"beta_schedule": schedule})


@pytest.mark.parametrize(
    "config",
    [
        {"variance_type": "fixed_small_log"},
        {"variance_type": "fixed_large"},
        {"variance_type": "learned_range"},
        {"thresholding": True, "sample_max_value": 1.5},
        {"thresholding": True},
        {"clip_sample": False, "prediction_type": "v_prediction"},
        {"trained_betas": np.linspace(1e-4, 0.03, 1000)},
    ],
    ids=str,
)
def test_ddpm(config: Any) -> None:
    _compare("DDPMScheduler", config)


def test_ddpm_custom_timesteps() -> None:
    _compare("DDPMScheduler", {}, steps={"timesteps": [999, 700, 650, 40, 3]})


@pytest.mark.parametrize(
    ("config", "step"),
    [
        ({}, {"eta": 1.0}),
        ({}, {"eta": 0.5, "use_clipped_model_output": True}),
        ({"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
          "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, {}),
        ({"thresholding": True, "sample_max_value": 2.0}, {}),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
          "timestep_spacing": "trailing"}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_ddim(config: Any, step: Any) -> None:
    _compare("DDIMScheduler", config, step=step)


@pytest.mark.parametrize(
    "algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"]
)
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [10, 20])
def test_dpm_solver(algorithm: str, solver: str, order: int, steps: int) -> None:
    if order == 3 and algorithm.startswith("sde"):
        pytest.skip("missing in diffusers, or with the wrong sign in its last term")
    last = "zero" if algorithm.endswith("++") else "sigma_min"
    config = {"algorithm_type": algorithm, "solver_type": solver, "solver_order": order,
              "final_sigmas_type": last}  # fmt: skip
    _compare(DPM, config, steps={"num_inference_steps": steps})


@pytest.mark.parametrize(
    "config",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_lu_lambdas": True},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {"euler_at_final": True},
        {"thresholding": True, "sample_max_value": 1.5},
        {"thresholding": True, "sample_max_value": 1.5, "algorithm_type": "dpmsolver",
         "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min"},
        {"lambda_min_clipped": -5.1},
    ],
    ids=str,
)  # fmt: skip
def test_dpm_solver_options(config: Any) -> None:
    _compare(DPM, config)


@pytest.mark.parametrize(
    ("config", "step"),
    [
        ({"use_karras_sigmas": True}, {}),
        ({"use_exponential_sigmas": True}, {}),
        ({"final_sigmas_type": "sigma_min"}, {}),
        ({"interpolation_type": "log_linear"}, {}),
        ({"timestep_type": "continuous", "prediction_type": "v_prediction"}, {}),
        ({}, {"s_churn": 4.0, "s_noise": 1.01}),
    ],
    ids=str,
)
def test_euler(config: Any, step: Any) -> None:
    _compare("EulerDiscreteScheduler", config, step=step)


def test_euler_by_sigmas() -> None:
    levels = [14.6, 6.5, 2.7, 0.9, 0.2, 0.0]
    _compare("EulerDiscreteScheduler", {}, steps={"sigmas": levels})


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({}, {}),
        ({"shift": 3.0}, {}),
        ({"use_dynamic_shifting": True}, {"mu": 1.1}),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 2.0}),
        ({"stochastic_sampling": True}, {}),
        ({"shift_terminal": 0.02}, {}),
        ({"invert_sigmas": True}, {}),
        ({"use_karras_sigmas": True}, {}),
        ({"use_exponential_sigmas": True}, {}),
    ],
    ids=str,
)
def test_flow_match(config: Any, steps: Any) -> None:
    _compare(FLOW, config, steps={"num_inference_steps": 10, **steps})


@pytest.mark.parametrize("name", [*DISCRETE, *EULER, DPM, FLOW])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """diffusers rounds after every operation: units of the last place, some of them."""
    config = {} if name == FLOW else {"prediction_type": "v_prediction"}
    _compare(name, config, dtype=dtype, rtol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", [*DISCRETE, *EULER, DPM])
def test_add_noise(name: str) -> None:
    ours, theirs = getattr(schedulers, name)(), getattr(diffusers, name)()
    x, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    times = theirs.timesteps[[2, 7, 9]]
    torch.testing.assert_close(ours.add_noise(x, noise, times), theirs.add_noise(x, noise, times),
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    if name in DISCRETE:
        torch.testing.assert_close(
            ours.get_velocity(x, noise, times), theirs.get_velocity(x, noise, times),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
    elif name != "DDIMScheduler":
        for scheduler in (ours, theirs):
            scheduler.set_begin_index(4)
        expected = theirs.add_noise(x, noise, times)
        torch.testing.assert_close(ours.add_noise(x, noise, times), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*DISCRETE, *EULER, DPM, FLOW])
def test_signatures_and_defaults(name: str) -> None:
    """Every argument of diffusers is there, in its place and with its default."""
    ours, theirs = getattr(schedulers, name), getattr(diffusers, name)
    for method in ("__init__", "set_timesteps", "step"):
        a, b = (inspect.signature(getattr(c, method)).parameters for c in (ours, theirs))
        common = list(b)
        assert list(a)[: len(common)] == common, method
        for argument in common:
            assert a[argument].default == b[argument].default, (method, argument)


@pytest.mark.parametrize("name", [*DISCRETE, *EULER, DPM])
def test_configurations_go_both_ways(name: str) -> None:
    ours, theirs = getattr(schedulers, name), getattr(diffusers, name)
    pndm = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                   beta_schedule="scaled_linear", skip_prk_steps=True)  # fmt: skip
    scheduler, expected = ours.from_config(pndm.config), theirs.from_config(pndm.config)
    for key, value in expected.config.items():
        if not key.startswith("_"):
            assert scheduler.config[key] == value, key
    back = diffusers.PNDMScheduler.from_config(scheduler.config)
    assert {k: v for k, v in back.config.items() if not k.startswith("_")} == {
        k: v for k, v in pndm.config.items() if not k.startswith("_")
    }


def _tiny_unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("name", DISCRETE)
def test_in_a_pipeline(name: str, tmp_path: Any) -> None:
    """`pipe.scheduler = ...` just works, and draws the same picture."""
    pipeline_type = getattr(diffusers, name.replace("Scheduler", "Pipeline"))
    pipe = pipeline_type(_tiny_unet(), getattr(diffusers, name)())
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(1)
        pictures.append(
            pipe(batch_size=2, num_inference_steps=5, generator=generator, output_type="np").images
        )
        pipe.scheduler = getattr(schedulers, name).from_config(pipe.scheduler.config)
    np.testing.assert_allclose(pictures[1], pictures[0], atol=2e-5)
    pipe.scheduler.save_pretrained(tmp_path)
    loaded = getattr(diffusers, name).from_pretrained(tmp_path)
    assert loaded.config.beta_end == pipe.scheduler.config.beta_end
