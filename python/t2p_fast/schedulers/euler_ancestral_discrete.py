# SPDX-License-Identifier: Apache-2.0
"""Euler's method with fresh noise in every step (k-diffusion's ancestral sampler)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2p_fast._checks import check_choice
from t2p_fast.ops.scheduler import NO_NOISE
from t2p_fast.ops.scheduler_coefficients import ancestral_coefficients
from t2p_fast.schedulers._base import (
    Generator,
    SchedulerOutput,
    draw_noise,
)
from t2p_fast.schedulers._config import keeps_config, on_host
from t2p_fast.schedulers._discrete import TrainedBetas
from t2p_fast.schedulers._karras import KarrasScheduler
from t2p_fast.schedulers._spacing import spaced_timesteps

__all__ = ["EulerAncestralDiscreteScheduler"]


class EulerAncestralDiscreteScheduler(KarrasScheduler):
    """Ancestral sampling with Euler's method.

    Arguments, attributes and methods are those of diffusers' EulerAncestralDiscreteScheduler, which
    it replaces.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type,
            timestep_spacing, steps_offset, rescale_betas_zero_snr: As those of `DDIMScheduler`.
    """

    @keeps_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,  # noqa: ARG002
        beta_start: float = 0.0001,  # noqa: ARG002
        beta_end: float = 0.02,  # noqa: ARG002
        beta_schedule: str = "linear",  # noqa: ARG002
        trained_betas: TrainedBetas = None,  # noqa: ARG002
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",  # noqa: ARG002
        steps_offset: int = 0,  # noqa: ARG002
        rescale_betas_zero_snr: bool = False,  # noqa: ARG002
    ) -> None:
        check_choice(
            "EulerAncestralDiscreteScheduler", "prediction_type", prediction_type,
            ("epsilon", "sample", "v_prediction"),
        )  # fmt: skip
        self._setup_levels()

    @on_host()
    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Chooses the timesteps and noise levels of `num_inference_steps` steps.

        Raises:
            ValueError: The last timestep has no signal to predict from.
        """
        config, train = self.config, self._train_sigmas
        times = spaced_timesteps(
            "EulerAncestralDiscreteScheduler", config.timestep_spacing, num_inference_steps,
            len(train), config.steps_offset,
        )  # fmt: skip
        levels = np.append(np.interp(times, np.arange(len(train)), train), 0.0)
        self._check_signal(levels)
        self.num_inference_steps = num_inference_steps
        self._set_sigmas(levels, torch.from_numpy(times).float(), device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        variance_noise: Tensor | None = None,
    ) -> Any:
        """The sample of the next noise level, in one kernel; args as in `DDIMScheduler.step`."""
        step = self._begin_step(timestep)
        noise = NO_NOISE
        last = len(self._levels) - 2
        if step < last or generator is not None:  # the last step adds none
            noise = draw_noise(sample, generator, variance_noise)
        prev, x0 = self._run_step(
            (), step, sample, model_output, uncond_output, guidance_scale, guidance_rescale, noise
        )
        if prev.dtype is not model_output.dtype:
            prev = prev.to(model_output.dtype)
        return SchedulerOutput(prev, x0) if return_dict else (prev, x0)

    def _coefficients(self) -> Tensor:
        return ancestral_coefficients(
            self._levels[:-1], self._levels[1:], prediction_type=self.config.prediction_type
        )
