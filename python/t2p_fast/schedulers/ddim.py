# SPDX-License-Identifier: Apache-2.0
"""Denoising diffusion implicit models (Song et al. 2010.02502)."""

from typing import Any

import torch
from torch import Tensor

from t2p_fast.ops.scheduler import NO_NOISE, run_step
from t2p_fast.ops.scheduler_autograd import NO_BOUND
from t2p_fast.ops.scheduler_coefficients import ddim_coefficients
from t2p_fast.schedulers._base import (
    Generator,
    SchedulerOutput,
    draw_noise,
    find_table,
)
from t2p_fast.schedulers._config import keeps_config, on_host
from t2p_fast.schedulers._discrete import DiscreteScheduler, TrainedBetas

__all__ = ["DDIMScheduler"]


class DDIMScheduler(DiscreteScheduler):
    """DDIM: few steps, with as much noise as `eta` says.

    Arguments, attributes and methods are those of diffusers' DDIMScheduler, which it replaces:
    ``pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)``. The step that follows is
    the next of `timesteps` for every spacing.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: The forward
            process; schedules are in `BETA_SCHEDULES`.
        clip_sample, clip_sample_range: Whether the predicted `x_0` is clipped, and to what.
        set_alpha_to_one: Whether the last step ends without noise, or at that of timestep 0.
        steps_offset: Added to timesteps with leading spacing.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.
        thresholding, dynamic_thresholding_ratio, sample_max_value: Dynamic thresholding
            (2205.11487); a `sample_max_value` of 1 is clipping.
        timestep_spacing: ``leading``, ``trailing`` or ``linspace``.
        rescale_betas_zero_snr: Whether the last timestep is pure noise (2305.08891); that wants a
            prediction other than epsilon.
    """

    @keeps_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,  # noqa: ARG002
        beta_start: float = 0.0001,  # noqa: ARG002
        beta_end: float = 0.02,  # noqa: ARG002
        beta_schedule: str = "linear",  # noqa: ARG002
        trained_betas: TrainedBetas = None,  # noqa: ARG002
        clip_sample: bool = True,  # noqa: ARG002
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,  # noqa: ARG002
        prediction_type: str = "epsilon",  # noqa: ARG002
        thresholding: bool = False,  # noqa: ARG002
        dynamic_thresholding_ratio: float = 0.995,  # noqa: ARG002
        clip_sample_range: float = 1.0,  # noqa: ARG002
        sample_max_value: float = 1.0,  # noqa: ARG002
        timestep_spacing: str = "leading",  # noqa: ARG002
        rescale_betas_zero_snr: bool = False,  # noqa: ARG002
    ) -> None:
        self._setup()
        self._final_product = 1.0 if set_alpha_to_one else float(self._products[0])
        self.final_alpha_cumprod = torch.tensor(self._final_product)

    @on_host()
    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Chooses the timesteps of `num_inference_steps` steps; nothing is read back from `device`.

        Raises:
            ValueError: There are fewer timesteps of training, or one has no signal to predict from.
        """
        spaced = self._spaced(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self._set_schedule(spaced, device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        eps_shift: Tensor | None = None,
    ) -> Any:
        """The sample of the next timestep, in one kernel.

        Args:
            model_output: What the network says of `sample`, `[b, ...]`.
            timestep: An element of `timesteps`, any other timestep, or int64 `[b]`, one for each
                sample.
            sample: x_t.
            eta: From 0, no noise, to 1, that of DDPM.
            use_clipped_model_output: Whether the noise predicted is taken anew from the bounded
                `x_0`.
            generator: Makes the noise as torch does. Without it the kernel draws its own, from a
                seed out of torch's default generator.
            variance_noise: Noise to use instead.
            return_dict: Whether to return a `SchedulerOutput` rather than a tuple.
            uncond_output: The output without the condition: guidance in the same kernel.
            guidance_scale: `u + s (c - u)`.
            guidance_rescale: phi of 2305.08891.
            eps_shift: Added to the noise predicted, such as a classifier's gradient (2105.05233,
                algorithm 2).

        Raises:
            ValueError: `set_timesteps` has not been called, or arguments do not fit.
        """
        if self.num_inference_steps is None:
            raise ValueError("DDIMScheduler.step: call set_timesteps first")
        if self.config.changed:
            self._look_at_config()
        schedule, index = self._schedule, None
        if (generator is None or eta == 0) and variance_noise is None and eps_shift is None:
            planned = schedule.planned(
                (eta, use_clipped_model_output), timestep, sample, model_output, uncond_output,
                guidance_scale, guidance_rescale,
            )  # fmt: skip
            if planned is not None:
                return SchedulerOutput(*planned) if return_dict else planned
        row = schedule.value(timestep, self.timesteps)
        if row is None:
            row, index = self._rows_of(timestep, sample)
        key = (eta, use_clipped_model_output)
        table = find_table(schedule.tables, key, sample, self._coefficients)
        noisy = range(len(self._previous) if eta else 0)
        schedule.plan(key, table, noisy, self._bounds, by_timestep=True)
        noise = NO_NOISE if eta == 0 else draw_noise(sample, generator, variance_noise)
        prev, x0 = run_step(
            sample, model_output, table, row, index, uncond_output, guidance_scale,
            guidance_rescale, self._bounds, False, eps_shift, None, None, noise,
        )  # fmt: skip
        return SchedulerOutput(prev, x0) if return_dict else (prev, x0)

    def _coefficients(self, eta: float, rederive: bool) -> Tensor:
        return ddim_coefficients(
            *self._scales(),
            eta=eta,
            prediction_type=self.config.prediction_type,
            rederive=rederive,
            bounded=self._bounds[0] != NO_BOUND,
        )

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """The variance of a step with `eta` 1."""
        product = float(self._products[timestep])
        before = float(self._products[prev_timestep]) if prev_timestep >= 0 else self._final_product
        return torch.tensor((1 - before) / (1 - product) * (1 - product / before))
