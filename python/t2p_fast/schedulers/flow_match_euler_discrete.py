# SPDX-License-Identifier: Apache-2.0
"""Euler's method along the straight paths of flow matching (Lipman et al. 2210.02747)."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from t2p_fast._checks import check_choice
from t2p_fast.ops.scheduler import NO_NOISE
from t2p_fast.ops.scheduler_coefficients import flow_coefficients
from t2p_fast.schedulers._base import (
    Generator,
    SchedulerOutput,
    draw_noise,
    randn,
)
from t2p_fast.schedulers._config import keeps_config, on_host
from t2p_fast.schedulers._sigma import Array, SigmaScheduler
from t2p_fast.schedulers._spacing import (
    beta_sigmas,
    check_positive,
    exponential_sigmas,
    karras_sigmas,
    one_at_most,
)

__all__ = ["FlowMatchEulerDiscreteScheduler"]

_NAME = "FlowMatchEulerDiscreteScheduler"


class FlowMatchEulerDiscreteScheduler(SigmaScheduler):
    """Flow matching: `x = (1 - sigma) x_0 + sigma e`, the network predicts `e - x_0`.

    Arguments, attributes and methods are those of diffusers' FlowMatchEulerDiscreteScheduler, which
    it replaces.

    Args:
        num_train_timesteps: The timestep of sigma 1.
        shift: Moves the steps towards noise (Esser et al. 2403.03206, equation 23).
        use_dynamic_shifting: Whether the shift comes with `set_timesteps`, as `mu`.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: Kept for pipelines, which work
            `mu` out from them.
        invert_sigmas: Whether sigma grows.
        shift_terminal: The last level, to which the others are stretched.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: Other laws for the levels, one
            at most; the last needs scipy.
        time_shift_type: What `mu` is: ``exponential``, a logarithm, or ``linear``.
        stochastic_sampling: Whether every step begins at `x_0` with new noise.
    """

    compatible_names: ClassVar[tuple[str, ...]] = ()

    @keeps_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,  # noqa: ARG002
        max_shift: float | None = 1.15,  # noqa: ARG002
        base_image_seq_len: int | None = 256,  # noqa: ARG002
        max_image_seq_len: int | None = 4096,  # noqa: ARG002
        invert_sigmas: bool = False,  # noqa: ARG002
        shift_terminal: float | None = None,  # noqa: ARG002
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,  # noqa: ARG002
    ) -> None:
        one_at_most(
            _NAME, use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas, use_beta_sigmas=use_beta_sigmas,
        )  # fmt: skip
        check_choice(_NAME, "time_shift_type", time_shift_type, ("exponential", "linear"))
        self._shift = shift
        levels = np.arange(num_train_timesteps, 0, -1) / num_train_timesteps
        if not use_dynamic_shifting:
            levels = self._shifted(levels)
        self._set_sigmas(levels, torch.from_numpy(levels * num_train_timesteps).float(), None)
        self.sigma_min, self.sigma_max = float(self.sigmas[-1]), float(self.sigmas[0])

    @property
    def shift(self) -> float:
        """The shift of the noise levels."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Sets the shift for the next `set_timesteps`."""
        self._shift = shift

    def _shifted(self, levels: Array) -> Array:
        shifted: Array = self._shift * levels / (1 + (self._shift - 1) * levels)
        return shifted

    def time_shift(self, mu: float, sigma: float, t: Any) -> Any:
        """Levels `t` shifted by `mu`, a logarithm or, with a linear shift, a factor."""
        factor = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        return factor / (factor + (1 / t - 1) ** sigma)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Levels stretched so that the last is `shift_terminal`."""
        rest = 1 - t
        return 1 - rest / (rest[-1] / (1 - self.config.shift_terminal))

    @on_host()
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Chooses the steps: their number, their noise levels, or their timesteps.

        Raises:
            ValueError: `mu` is missing where the shift is dynamic, nothing is given, or lengths
                differ.
        """
        config, train = self.config, self.config.num_train_timesteps
        if config.use_dynamic_shifting and mu is None:
            raise ValueError(
                f"{_NAME}.set_timesteps: `mu` must be passed when `use_dynamic_shifting` is set to "
                "be `True`"
            )
        lengths = {len(v) for v in (sigmas, timesteps) if v is not None}
        if num_inference_steps is not None:
            lengths.add(num_inference_steps)
        if len(lengths) != 1:
            raise ValueError(
                f"{_NAME}.set_timesteps: `num_inference_steps`, `sigmas` and `timesteps` should "
                f"have the same length and one of them be given, got {sorted(lengths)}"
            )
        steps = lengths.pop()
        check_positive(_NAME, steps)
        if sigmas is not None:
            levels = np.asarray(sigmas, dtype=np.float64)
        elif timesteps is not None:
            levels = np.asarray(timesteps, dtype=np.float64) / train
        else:
            levels = np.linspace(self.sigma_max * train, self.sigma_min * train, steps) / train
        if mu is not None and config.use_dynamic_shifting:
            levels = self.time_shift(mu, 1.0, levels)
        else:
            levels = self._shifted(levels)
        if config.shift_terminal:
            levels = self.stretch_shift_to_terminal(levels)
        low, high = float(levels[-1]), float(levels[0])
        if config.use_karras_sigmas:
            levels = karras_sigmas(low, high, steps)
        elif config.use_exponential_sigmas:
            levels = exponential_sigmas(low, high, steps)
        elif config.use_beta_sigmas:
            levels = beta_sigmas(_NAME, low, high, steps)
        last = 0.0
        if config.invert_sigmas:
            levels, last = 1 - levels, 1.0
        # From the rounded levels, so that they are the same bits as in diffusers.
        times = torch.from_numpy(levels).float() * train
        if timesteps is not None and not config.invert_sigmas:
            times = torch.tensor(timesteps, dtype=torch.float32)
        self.num_inference_steps = steps
        self._set_sigmas(np.append(levels, last), times, device)
        self.sigmas = self._given_sigmas = self.sigmas.to(device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,  # noqa: ARG002
        s_tmin: float = 0.0,  # noqa: ARG002
        s_tmax: float = float("inf"),  # noqa: ARG002
        s_noise: float = 1.0,  # noqa: ARG002
        generator: Generator = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        variance_noise: Tensor | None = None,
    ) -> Any:
        """The sample of the next noise level, in one kernel.

        Args:
            model_output: The velocity that the network predicts, `[b, ...]`.
            timestep: An element of `timesteps`; it matters in the first step.
            per_token_timesteps: `[b, n]`, a timestep for each token of a sample `[b, n, d]`; each
                goes to the next lower level of the schedule. Computed by torch, in float32.
            sample, generator, variance_noise, return_dict, uncond_output, guidance_scale,
                guidance_rescale: As in `DDIMScheduler.step`.
            s_churn, s_tmin, s_tmax, s_noise: Not used, as in diffusers.

        Raises:
            ValueError: `timestep` is a whole number, or arguments do not fit.
        """
        self._refuse_integer(timestep)
        self._float64_sigmas()
        step = self._this_step(timestep)
        stochastic = self.config.stochastic_sampling
        if per_token_timesteps is not None:
            if uncond_output is not None:
                model_output = torch.lerp(uncond_output, model_output, guidance_scale)
            prev = self._step_per_token(model_output, sample, per_token_timesteps, generator)
            self._step_index = step + 1
            return SchedulerOutput(prev) if return_dict else (prev,)
        noise = draw_noise(sample, generator, variance_noise) if stochastic else NO_NOISE
        prev, _ = self._run_step(
            (stochastic,), step, sample, model_output, uncond_output, guidance_scale,
            guidance_rescale, noise, returns_x0=False,
        )  # fmt: skip
        if prev.dtype is not model_output.dtype:
            prev = prev.to(model_output.dtype)
        return SchedulerOutput(prev) if return_dict else (prev,)

    def _coefficients(self, stochastic: bool) -> Tensor:
        return flow_coefficients(self._levels[:-1], self._levels[1:], stochastic=stochastic)

    def _step_per_token(
        self, model_output: Tensor, sample: Tensor, timesteps: Tensor, generator: Generator
    ) -> Tensor:
        sample = sample.float()
        sigma = timesteps / self.config.num_train_timesteps
        levels = self.sigmas.to(sigma.device)[:, None, None]
        lower = ((levels < sigma[None] - 1e-6) * levels).amax(0)[..., None]
        sigma = sigma[..., None]
        if self.config.stochastic_sampling:
            noise = randn(sample.shape, generator, sample.device, sample.dtype)
            fresh: Tensor = (1 - lower) * (sample - sigma * model_output) + lower * noise
            return fresh
        # As in diffusers, where the network of such models predicts x_0 - e.
        moved: Tensor = sample + (sigma - lower) * model_output
        return moved

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """`(1 - sigma) x_0 + sigma e` at timesteps of the schedule, `[b]`, or at the step set."""
        if noise is None:
            raise ValueError(f"{_NAME}.scale_noise: noise is missing")
        return self._mix_at(
            "scale_noise", sample, noise, timestep, lambda: (1 - self._levels, self._levels)
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`scale_noise`, with the arguments in the order that other schedulers have them in."""
        return self.scale_noise(original_samples, timesteps, noise)
