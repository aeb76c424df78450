# SPDX-License-Identifier: Apache-2.0
"""Euler's method for the probability flow (Karras et al. 2206.00364, algorithm 2)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2p_fast._checks import check_choice
from t2p_fast.ops.scheduler import NO_NOISE
from t2p_fast.ops.scheduler_coefficients import euler_coefficients
from t2p_fast.schedulers._base import (
    Generator,
    SchedulerOutput,
    draw_noise,
)
from t2p_fast.schedulers._config import keeps_config, on_host
from t2p_fast.schedulers._discrete import TrainedBetas
from t2p_fast.schedulers._karras import KarrasScheduler
from t2p_fast.schedulers._spacing import (
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    one_at_most,
    spaced_timesteps,
    timesteps_of_sigmas,
)

__all__ = ["EulerDiscreteScheduler"]


class EulerDiscreteScheduler(KarrasScheduler):
    """Euler's method, with the churn of Karras et al. if wanted.

    Arguments, attributes and methods are those of diffusers' EulerDiscreteScheduler, which it
    replaces.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type,
            timestep_spacing, steps_offset, rescale_betas_zero_snr: As those of `DDIMScheduler`.
        interpolation_type: How noise levels between timesteps are found, ``linear`` or
            ``log_linear``.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: Other laws for the levels, one
            at most; the last needs scipy.
        sigma_min, sigma_max: The ends of such a law.
        timestep_type: ``discrete``, or ``continuous``: with v_prediction the network is given
            `log(sigma) / 4`.
        final_sigmas_type: Whether the last step ends at ``zero`` or ``sigma_min``.
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
        interpolation_type: str = "linear",  # noqa: ARG002
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,  # noqa: ARG002
        sigma_max: float | None = None,  # noqa: ARG002
        timestep_spacing: str = "linspace",  # noqa: ARG002
        timestep_type: str = "discrete",  # noqa: ARG002
        steps_offset: int = 0,  # noqa: ARG002
        rescale_betas_zero_snr: bool = False,  # noqa: ARG002
        final_sigmas_type: str = "zero",  # noqa: ARG002
    ) -> None:
        name = "EulerDiscreteScheduler"
        check_choice(
            name, "prediction_type", prediction_type,
            ("epsilon", "sample", "original_sample", "v_prediction"),
        )  # fmt: skip
        one_at_most(
            name, use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas, use_beta_sigmas=use_beta_sigmas,
        )  # fmt: skip
        self.use_karras_sigmas = use_karras_sigmas
        self.use_exponential_sigmas = use_exponential_sigmas
        self.use_beta_sigmas = use_beta_sigmas
        self._setup_levels()
        if self._continuous():
            self._set_sigmas(self._levels.numpy(), self._log_sigmas(self._levels.numpy()), None)

    def _continuous(self) -> bool:
        config = self.config
        kinds: tuple[str, str] = (config.timestep_type, config.prediction_type)
        return kinds == ("continuous", "v_prediction")

    @staticmethod
    def _log_sigmas(levels: Any) -> Tensor:
        return torch.from_numpy(0.25 * np.log(levels[:-1])).float()

    @on_host()
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Chooses the steps: their number, their timesteps, or their noise levels with the last.

        Raises:
            ValueError: Not one of the three is given, they do not go with the configuration, or the
                last timestep has no signal to predict from.
        """
        config, name = self.config, "EulerDiscreteScheduler"
        if (num_inference_steps, timesteps, sigmas).count(None) != 2:
            raise ValueError(
                f"{name}.set_timesteps: pass exactly one of `num_inference_steps`, `timesteps` and "
                "`sigmas`"
            )
        law = self.use_karras_sigmas or self.use_exponential_sigmas or self.use_beta_sigmas
        if timesteps is not None and (law or self._continuous()):
            raise ValueError(
                f"{name}.set_timesteps: `timesteps` cannot be set with karras, exponential, beta "
                "or continuous noise levels"
            )
        train = self._train_sigmas
        if sigmas is not None:
            levels = np.asarray(sigmas, dtype=np.float64)
            times = timesteps_of_sigmas(levels[:-1], train)
        else:
            if timesteps is not None:
                times = np.asarray(timesteps, dtype=np.float64)
            else:
                assert num_inference_steps is not None
                times = spaced_timesteps(
                    name, config.timestep_spacing, num_inference_steps, len(train),
                    config.steps_offset,
                )  # fmt: skip
            levels, times = self._choose_levels(times)
            last = train[0] if config.final_sigmas_type == "sigma_min" else 0.0
            levels = np.append(levels, last)
        self._check_signal(levels)
        self.num_inference_steps = len(times)
        tensor = torch.from_numpy(times).float()
        if self._continuous():
            tensor = self._log_sigmas(levels)
        self._set_sigmas(levels, tensor, device)

    def _choose_levels(self, times: Any) -> tuple[Any, Any]:
        config, train, name = self.config, self._train_sigmas, "EulerDiscreteScheduler"
        check_choice(name, "final_sigmas_type", config.final_sigmas_type, ("zero", "sigma_min"))
        check_choice(
            name, "interpolation_type", config.interpolation_type, ("linear", "log_linear")
        )
        steps = len(times)
        if config.interpolation_type == "linear":
            levels = np.interp(times, np.arange(len(train)), train)
        else:
            # One more than there are steps, as diffusers has it: the last is the least level.
            levels = np.exp(np.linspace(math.log(train[-1]), math.log(train[0]), steps + 1))
        low = levels[-1] if config.get("sigma_min") is None else config.sigma_min
        high = levels[0] if config.get("sigma_max") is None else config.sigma_max
        if self.use_karras_sigmas:
            levels = karras_sigmas(low, high, steps)
        elif self.use_exponential_sigmas:
            levels = exponential_sigmas(low, high, steps)
        elif self.use_beta_sigmas:
            levels = beta_sigmas(name, low, high, steps)
        else:
            return levels, times
        return levels, timesteps_of_sigmas(levels, train)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generator = None,
        return_dict: bool = True,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        variance_noise: Tensor | None = None,
    ) -> Any:
        """The sample of the next noise level, in one kernel.

        Args:
            model_output: What the network says of the scaled sample, `[b, ...]`.
            timestep: An element of `timesteps`; it matters in the first step.
            sample: x, before it was scaled.
            s_churn, s_tmin, s_tmax, s_noise: The churn of Karras et al., table 5.
            generator, variance_noise, return_dict, uncond_output, guidance_scale, guidance_rescale:
                As in `DDIMScheduler.step`.

        Raises:
            ValueError: `timestep` is a whole number, or arguments do not fit.
        """
        step = self._begin_step(timestep)
        churn, noise = 0.0, NO_NOISE
        if s_churn > 0 and s_tmin <= self._values_of_sigmas()[step] <= s_tmax:
            churn = min(s_churn / (len(self._levels) - 1), 2**0.5 - 1)
            noise = draw_noise(sample, generator, variance_noise)
        prev, x0 = self._run_step(
            (churn, s_noise), step, sample, model_output, uncond_output, guidance_scale,
            guidance_rescale, noise,
        )  # fmt: skip
        if prev.dtype is not model_output.dtype:
            prev = prev.to(model_output.dtype)
        return SchedulerOutput(prev, x0) if return_dict else (prev, x0)

    def _values_of_sigmas(self) -> list[float]:
        values: list[float] = self._levels.tolist()
        return values

    def _coefficients(self, churn: float, noise_scale: float) -> Tensor:
        kind = self.config.prediction_type.removeprefix("original_")
        return euler_coefficients(
            self._levels[:-1],
            self._levels[1:],
            prediction_type=kind,
            churn=churn,
            noise_scale=noise_scale,
        )

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha e - sigma x_0` at timesteps of the schedule, `[b]`."""
        if isinstance(timesteps, int) or timesteps.dtype in (torch.int32, torch.int64):
            self._refuse_integer(timesteps)
        alpha = 1 / (1 + self._float64_sigmas().square()).sqrt()
        return self._mix_at(
            "velocity", sample, noise, timesteps, lambda: (-alpha * self._levels, alpha)
        )
