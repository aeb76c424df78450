# SPDX-License-Identifier: Apache-2.0
"""Denoising diffusion probabilistic models (Ho et al. 2006.11239)."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from t2p_fast.ops.scheduler import NO_NOISE, run_step
from t2p_fast.ops.scheduler_autograd import NO_BOUND
from t2p_fast.ops.scheduler_coefficients import VARIANCE_TYPES, ddpm_coefficients
from t2p_fast.schedulers._base import (
    Generator,
    SchedulerOutput,
    draw_noise,
    find_table,
)
from t2p_fast.schedulers._config import keeps_config, on_host
from t2p_fast.schedulers._discrete import DiscreteScheduler, TrainedBetas

__all__ = ["DDPMScheduler"]

_LOG = logging.getLogger(__name__)


class DDPMScheduler(DiscreteScheduler):
    """DDPM: the sampler that the model was trained for.

    Arguments, attributes and methods are those of diffusers' DDPMScheduler, which it replaces.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: The forward
            process; schedules are in `BETA_SCHEDULES`.
        variance_type: ``fixed_small``, ``fixed_large``, ``learned`` (the log variance itself) or
            ``learned_range`` (2102.09672, equation 15). The ``_log`` forms are the same as those
            without.
        clip_sample, clip_sample_range, prediction_type, thresholding, dynamic_thresholding_ratio,
            sample_max_value, timestep_spacing, steps_offset, rescale_betas_zero_snr: As those of
            `DDIMScheduler`.
    """

    @keeps_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,  # noqa: ARG002
        beta_start: float = 0.0001,  # noqa: ARG002
        beta_end: float = 0.02,  # noqa: ARG002
        beta_schedule: str = "linear",  # noqa: ARG002
        trained_betas: TrainedBetas = None,  # noqa: ARG002
        variance_type: str = "fixed_small",
        clip_sample: bool = True,  # noqa: ARG002
        prediction_type: str = "epsilon",  # noqa: ARG002
        thresholding: bool = False,  # noqa: ARG002
        dynamic_thresholding_ratio: float = 0.995,  # noqa: ARG002
        clip_sample_range: float = 1.0,  # noqa: ARG002
        sample_max_value: float = 1.0,  # noqa: ARG002
        timestep_spacing: str = "leading",  # noqa: ARG002
        steps_offset: int = 0,  # noqa: ARG002
        rescale_betas_zero_snr: bool = False,  # noqa: ARG002
    ) -> None:
        if variance_type not in VARIANCE_TYPES:
            # As diffusers does, whose configurations may have anything here.
            _LOG.warning("DDPMScheduler: variance_type=%r is used as fixed_small", variance_type)
        self.variance_type = variance_type
        self.custom_timesteps = False
        self.one = torch.tensor(1.0)
        self._setup()

    @on_host()
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Chooses the timesteps: as many as `num_inference_steps`, or those of a falling list.

        Raises:
            ValueError: Both or none are given, the list does not fall, a timestep is out of range,
                or has no signal to predict from.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                "DDPMScheduler.set_timesteps: pass one of num_inference_steps and timesteps"
            )
        if timesteps is not None:
            chosen = torch.as_tensor(timesteps, dtype=torch.int64)
            train = self.config.num_train_timesteps
            if len(chosen) == 0 or not bool((chosen[1:] < chosen[:-1]).all()):
                raise ValueError(
                    "DDPMScheduler.set_timesteps: `timesteps` must be in descending order"
                )
            if int(chosen[0]) >= train or int(chosen[-1]) < 0:
                raise ValueError(
                    "DDPMScheduler.set_timesteps: `timesteps` must start before "
                    f"`self.config.train_timesteps`: {train}, and not go below 0"
                )
        else:
            assert num_inference_steps is not None
            chosen = self._spaced(num_inference_steps)
        self.num_inference_steps = len(chosen)
        self.custom_timesteps = timesteps is not None
        self._set_schedule(chosen, device)

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """The timestep that follows `timestep` in the schedule; -1 after the last.

        An int64 tensor on the host if `timestep` is a tensor.
        """
        previous = self._previous[int(timestep)]
        return torch.tensor(previous) if isinstance(timestep, Tensor) else previous

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
        uncond_output: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        mean_shift: Tensor | None = None,
    ) -> Any:
        """The sample of the next timestep, in one kernel.

        Args:
            model_output: What the network says of `sample`, `[b, ...]`; with a learned variance
                `[b, 2 c, ...]`.
            mean_shift: A gradient that is added to the mean, times the variance (2105.05233,
                algorithm 1): guidance by a classifier or by CLIP.
            timestep, sample, generator, variance_noise, return_dict, uncond_output, guidance_scale,
                guidance_rescale: As in `DDIMScheduler.step`. No noise is added at timestep 0.

        Raises:
            ValueError: Arguments do not fit.
        """
        if self.config.changed:
            self._look_at_config()
        if not self._schedule.holds(self.timesteps):
            # What somebody has put there is the schedule, as in diffusers.
            with on_host():
                self._set_schedule(self.timesteps.to("cpu", torch.int64), self.timesteps.device)
        schedule, index = self._schedule, None
        if generator is None and variance_noise is None and mean_shift is None:
            planned = schedule.planned(
                self.variance_type, timestep, sample, model_output, uncond_output, guidance_scale,
                guidance_rescale,
            )  # fmt: skip
            if planned is not None:
                return SchedulerOutput(*planned) if return_dict else planned
        row = schedule.value(timestep, self.timesteps)
        if row is None:
            row, index = self._rows_of(timestep, sample)
        variance_type = self.variance_type
        learned = variance_type in ("learned", "learned_range")
        key = (variance_type,)
        table = find_table(schedule.tables, key, sample, self._coefficients)
        noisy = range(1, len(self._previous))
        schedule.plan(variance_type, table, noisy, self._bounds, learned, by_timestep=True)
        noise = NO_NOISE
        if row > 0 or index is not None:
            noise = draw_noise(sample, generator, variance_noise)
        prev, x0 = run_step(
            sample, model_output, table, row, index, uncond_output, guidance_scale,
            guidance_rescale, self._bounds, learned, mean_shift, None, None, noise,
        )  # fmt: skip
        return SchedulerOutput(prev, x0) if return_dict else (prev, x0)

    def _coefficients(self, kind: str) -> Tensor:
        scales = self._scales()
        noisy = torch.arange(len(scales[0])) > 0
        return ddpm_coefficients(
            *scales,
            prediction_type=self.config.prediction_type,
            variance_type=kind if kind in VARIANCE_TYPES else "fixed_small",
            bounded=self._bounds[0] != NO_BOUND,
            noisy=noisy.double(),
        )

    def _get_variance(
        self,
        t: int,
        predicted_variance: Tensor | None = None,
        variance_type: str | None = None,
    ) -> Tensor:
        """The variance of a step; the root of fixed ``_log`` ones, the log of learned ones."""
        kind = variance_type or self.variance_type
        before = self._previous[t]
        product = self._products[t]
        product_before = self._products[before] if before >= 0 else torch.ones_like(product)
        beta = 1 - product / product_before
        small = ((1 - product_before) / (1 - product) * beta).clamp(min=1e-20)
        if kind == "learned":
            assert predicted_variance is not None
            return predicted_variance
        if kind == "learned_range":
            assert predicted_variance is not None
            fraction = (predicted_variance + 1) / 2
            return fraction * beta.log().float() + (1 - fraction) * small.log().float()
        if kind == "fixed_small_log":
            return small.sqrt().float()
        if kind == "fixed_large_log":
            return beta.sqrt().float()
        return (beta if kind == "fixed_large" else small).float()
