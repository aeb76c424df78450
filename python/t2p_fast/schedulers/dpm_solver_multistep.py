# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver++ and DPM-Solver with several steps (Lu et al. 2211.01095, 2206.00927)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2p_fast._checks import check_choice
from t2p_fast.ops.scheduler import NO_NOISE, run_step
from t2p_fast.ops.scheduler_autograd import NO_BOUND, THRESHOLD
from t2p_fast.ops.scheduler_coefficients import (
    ALGORITHM_TYPES,
    PREDICTION_TYPES,
    SOLVER_TYPES,
    dpm_solver_coefficients,
)
from t2p_fast.schedulers._base import (
    UNBOUNDED,
    Generator,
    SchedulerOutput,
    draw_noise,
    find_table,
)
from t2p_fast.schedulers._config import keeps_config, on_host
from t2p_fast.schedulers._discrete import TrainedBetas, set_betas
from t2p_fast.schedulers._karras import LEAST_PRODUCT
from t2p_fast.schedulers._sigma import Array, SigmaScheduler
from t2p_fast.schedulers._spacing import (
    SPACINGS,
    beta_sigmas,
    check_positive,
    exponential_sigmas,
    karras_sigmas,
    one_at_most,
    timesteps_of_sigmas,
)

__all__ = ["DPMSolverMultistepScheduler"]

_NAME = "DPMSolverMultistepScheduler"


class DPMSolverMultistepScheduler(SigmaScheduler):
    """DPM-Solver++ of order 1, 2 or 3, for noise, data, velocity and flow predictions.

    Arguments, attributes and methods are those of diffusers' DPMSolverMultistepScheduler, which it
    replaces.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type,
            thresholding, dynamic_thresholding_ratio, sample_max_value, timestep_spacing,
                steps_offset,
            rescale_betas_zero_snr: As those of `DDIMScheduler`; `prediction_type` may be
            ``flow_prediction``.
        solver_order: 1, 2 (for guided sampling) or 3.
        algorithm_type: ``dpmsolver++``, ``dpmsolver``, or one of them with noise,
            ``sde-dpmsolver++`` and ``sde-dpmsolver``.
        solver_type: ``midpoint`` or ``heun``, of second order.
        lower_order_final: Whether the last steps of fewer than 15 are of lower order.
        euler_at_final: Whether the last step is of first order.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas, use_flow_sigmas:
            Other laws for the noise levels, one at most.
        flow_shift: The shift of flow levels.
        final_sigmas_type: Whether the last step ends at ``zero`` or ``sigma_min``.
        lambda_min_clipped: Timesteps with less log SNR / 2 are left out.
        variance_type: ``learned`` or ``learned_range`` where the network has a variance, which is
            not used.
        use_dynamic_shifting, time_shift_type: Whether `flow_shift` comes with `set_timesteps`.
    """

    lenient = True

    @keeps_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,  # noqa: ARG002
        beta_end: float = 0.02,  # noqa: ARG002
        beta_schedule: str = "linear",  # noqa: ARG002
        trained_betas: TrainedBetas = None,  # noqa: ARG002
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,  # noqa: ARG002
        dynamic_thresholding_ratio: float = 0.995,  # noqa: ARG002
        sample_max_value: float = 1.0,  # noqa: ARG002
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,  # noqa: ARG002
        euler_at_final: bool = False,  # noqa: ARG002
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,  # noqa: ARG002
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"),  # noqa: ARG002
        variance_type: str | None = None,  # noqa: ARG002
        timestep_spacing: str = "linspace",  # noqa: ARG002
        steps_offset: int = 0,  # noqa: ARG002
        rescale_betas_zero_snr: bool = False,  # noqa: ARG002
        use_dynamic_shifting: bool = False,  # noqa: ARG002
        time_shift_type: str = "exponential",  # noqa: ARG002
    ) -> None:
        # Configurations of diffusers' other multistep solvers.
        if algorithm_type == "deis":
            algorithm_type = "dpmsolver++"
            self.register_to_config(algorithm_type=algorithm_type)
        if solver_type in ("logrho", "bh1", "bh2"):
            solver_type = "midpoint"
            self.register_to_config(solver_type=solver_type)
        for name, value, choices in (
            ("algorithm_type", algorithm_type, ALGORITHM_TYPES),
            ("solver_type", solver_type, SOLVER_TYPES),
        ):
            if value not in choices:
                raise NotImplementedError(
                    f"{_NAME}: {name}={value!r} is not supported; supported: "
                    + ", ".join(map(repr, choices))
                )
        check_choice(_NAME, "prediction_type", prediction_type, PREDICTION_TYPES)
        if solver_order not in (1, 2, 3):
            raise ValueError(f"{_NAME}: solver_order is {solver_order}, expected 1, 2 or 3")
        one_at_most(
            _NAME, use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas, use_beta_sigmas=use_beta_sigmas,
            use_lu_lambdas=use_lu_lambdas, use_flow_sigmas=use_flow_sigmas,
        )  # fmt: skip
        if not algorithm_type.endswith("++") and final_sigmas_type == "zero":
            raise ValueError(
                f"{_NAME}: `final_sigmas_type` zero is not supported for `algorithm_type` "
                f"{algorithm_type}. Please choose `sigma_min` instead."
            )
        products = set_betas(self, least_product=LEAST_PRODUCT)
        self._products = products
        self.alpha_t, self.sigma_t = products.sqrt().float(), (1 - products).sqrt().float()
        self._lambdas: Array = (products.log() - (1 - products).log()).numpy() / 2
        self.lambda_t = torch.from_numpy(self._lambdas).float()
        self._train_sigmas: Array = ((1 - products) / products).sqrt().numpy()
        self.init_noise_sigma = 1.0
        self._reset()
        timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._set_sigmas(self._train_sigmas, timesteps, None)
        self._look_at_config()

    def _reset(self) -> None:
        # The results of the steps before, the latest last, as diffusers keeps them.
        self.model_outputs: list[Tensor | None] = [None] * self.config.solver_order
        self.lower_order_nums = 0

    @on_host()
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Chooses the steps: their number, or their timesteps.

        Args:
            mu: The logarithm of the flow shift, with `use_dynamic_shifting`.

        Raises:
            ValueError: Not one of the two is given, they do not go with the configuration, or the
                last timestep has no signal to predict from.
        """
        config = self.config
        if mu is not None:
            if not config.use_dynamic_shifting or config.time_shift_type != "exponential":
                raise ValueError(f"{_NAME}.set_timesteps: mu wants use_dynamic_shifting")
            self.register_to_config(flow_shift=math.exp(mu))
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"{_NAME}.set_timesteps: Must pass exactly one of `num_inference_steps` or "
                "`timesteps`."
            )
        if timesteps is not None:
            for law in ("karras_sigmas", "lu_lambdas", "exponential_sigmas", "beta_sigmas"):
                if config[f"use_{law}"]:
                    raise ValueError(
                        f"{_NAME}.set_timesteps: Cannot use `timesteps` with "
                        f"`config.use_{law} = True`"
                    )
            times = np.asarray(timesteps).astype(np.float64)
        else:
            assert num_inference_steps is not None
            times = self._spaced(num_inference_steps)
        levels, times = self._choose_levels(times)
        if config.final_sigmas_type not in ("zero", "sigma_min"):
            check_choice(
                _NAME, "final_sigmas_type", config.final_sigmas_type, ("zero", "sigma_min")
            )
        last = self._train_sigmas[0] if config.final_sigmas_type == "sigma_min" else 0.0
        terminal = config.rescale_betas_zero_snr and config.prediction_type == "epsilon"
        if terminal and levels.max() >= self._train_sigmas[-1] * (1 - 1e-9):
            raise ValueError(
                f"{_NAME}.set_timesteps: prediction_type='epsilon' cannot be used with "
                "rescale_betas_zero_snr at the last timestep, which has no signal: the noise says "
                "nothing about the sample there; use 'v_prediction', or timestep_spacing='leading'"
            )
        self.num_inference_steps = len(times)
        self._reset()
        whole = torch.from_numpy(times.astype(np.int64))
        self._set_sigmas(np.append(levels, last), whole, device)

    def _spaced(self, steps: int) -> Array:
        config = self.config
        check_choice(_NAME, "timestep_spacing", config.timestep_spacing, SPACINGS)
        check_positive(_NAME, steps)
        train = config.num_train_timesteps
        # Timesteps with too little signal are left out at the noisy end.
        clipped = int(np.searchsorted(self._lambdas[::-1], config.lambda_min_clipped))
        last = train - clipped
        if config.timestep_spacing == "linspace":
            linear: Array = np.linspace(0, last - 1, steps + 1).round()[:0:-1].copy()
            return linear
        if config.timestep_spacing == "leading":
            step = last // (steps + 1)
            leading: Array = (np.arange(steps + 1.0) * step)[:0:-1] + config.steps_offset
            return leading
        times = np.round(last - np.arange(steps) * train / steps)
        spaced: Array = times[times > 0] - 1
        return spaced

    def _choose_levels(self, times: Array) -> tuple[Array, Array]:
        config, train, steps = self.config, self._train_sigmas, len(times)
        if config.use_flow_sigmas:
            share = 1 - np.linspace(1, 1 / config.num_train_timesteps, steps + 1)
            shift = config.flow_shift
            levels = (shift * share / (1 + (shift - 1) * share))[:0:-1].copy()
            return levels, levels * config.num_train_timesteps
        low, high = train[0], train[-1]
        if config.use_karras_sigmas:
            levels = karras_sigmas(low, high, steps)
        elif config.use_lu_lambdas:
            # Even steps of the log SNR (2206.00927, section 3.3).
            levels = np.exp(np.linspace(math.log(high), math.log(low), steps))
        elif config.use_exponential_sigmas:
            levels = exponential_sigmas(low, high, steps)
        elif config.use_beta_sigmas:
            levels = beta_sigmas(_NAME, low, high, steps)
        else:
            return np.interp(times, np.arange(len(train)), train), times
        times = timesteps_of_sigmas(levels, train)
        rounded = config.use_karras_sigmas or config.use_lu_lambdas
        if rounded and config.beta_schedule not in ("squaredcos_cap_v2", "cosine"):
            times = times.round()
        return levels, times

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
    ) -> Any:
        """The sample of the next timestep, in one kernel.

        Args:
            model_output: What the network says of `sample`, `[b, ...]`.
            timestep: An element of `timesteps`; it matters in the first step.
            sample, generator, variance_noise, return_dict, uncond_output, guidance_scale,
                guidance_rescale: As in `DDIMScheduler.step`. Noise is for the ``sde`` algorithms.

        Raises:
            ValueError: `set_timesteps` has not been called, or arguments do not fit.
        """
        if self.num_inference_steps is None:
            raise ValueError(f"{_NAME}.step: call set_timesteps first")
        self._float64_sigmas()
        step = self._this_step(timestep)
        if self._has_variance:
            # Networks with a learned variance have it behind the channels of the sample.
            model_output = model_output[:, : sample.shape[1]]
            if uncond_output is not None:
                uncond_output = uncond_output[:, : sample.shape[1]]
        order = self._order_at(step)
        kind, bounds = self._kind, self._bounds
        if bounds[0] == THRESHOLD and not self._predicts_data:
            model_output = self._thresholded_noise(
                model_output, uncond_output, sample, step, guidance_scale, guidance_rescale
            )
            uncond_output, kind, bounds = None, "epsilon", UNBOUNDED
        noise = NO_NOISE
        if self._adds_noise:
            noise = draw_noise(sample, generator, variance_noise, torch.float32)
        before = self.model_outputs
        prev, result = self._run_step(
            (order, kind, bounds[0]), step, sample, model_output, uncond_output, guidance_scale,
            guidance_rescale, noise, bounds, before[-1] if order > 1 else None,
            before[-2] if order > 2 else None,
        )  # fmt: skip
        self.model_outputs = [*before[1:], result]
        if self.lower_order_nums < len(before):
            self.lower_order_nums += 1
        return SchedulerOutput(prev) if return_dict else (prev,)

    def _look_at_config(self) -> None:
        """Takes from the configuration what every step needs."""
        super()._look_at_config()
        config = self.config
        order: int = config.solver_order
        self.model_outputs = ([None] * order + self.model_outputs)[-order:]
        self._has_variance = config.variance_type in ("learned", "learned_range")
        self._predicts_data = config.algorithm_type.endswith("++")
        self._adds_noise = config.algorithm_type.startswith("sde")
        self._kind, self._bounds = config.prediction_type, self._bound()

    def _order_at(self, step: int) -> int:
        """The order of a step: lower where results are missing, and for stability at the end."""
        schedule, timesteps = self._schedule, self.timesteps
        steps = len(schedule.values if timesteps is schedule.timesteps else timesteps)
        left, order = steps - 1 - step, min(len(self.model_outputs), self.lower_order_nums + 1)
        if left > 1 or order == 1:
            return order
        config = self.config
        few = config.lower_order_final and steps < 15
        if left == 0 and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
            return 1
        return min(order, 2) if left == 1 and few else order

    def _scales(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.use_flow_sigmas:
            return 1 - levels, levels
        alpha = 1 / (1 + levels.square()).sqrt()
        return alpha, levels * alpha

    def _coefficients(self, order: int, kind: str, bound: int) -> Tensor:
        config = self.config
        return dpm_solver_coefficients(
            *self._scales(self._levels),
            order=order,
            algorithm_type=config.algorithm_type,
            solver_type=config.solver_type,
            prediction_type=kind,
            bounded=bound != NO_BOUND,
        )

    def _thresholded_noise(
        self, model_output: Tensor, uncond_output: Tensor | None, sample: Tensor, step: int,
        guidance_scale: float, guidance_rescale: float,
    ) -> Tensor:  # fmt: skip
        """The noise that belongs to the thresholded `x_0`, for the solvers that go by noise."""
        table = find_table(
            self._schedule.tables, ("x0",), sample,
            lambda _: dpm_solver_coefficients(
                *self._scales(self._levels), order=1, prediction_type=self.config.prediction_type,
                bounded=True,
            ),
        )  # fmt: skip
        _, x0 = run_step(
            sample, model_output, table, step, uncond_output=uncond_output,
            guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, bound=self._bound(),
        )  # fmt: skip
        alpha, sigma = (float(v[step]) for v in self._scales(self._levels))
        assert x0 is not None
        return (sample - alpha * x0) / sigma

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha x_0 + sigma e` at timesteps of the schedule, `[b]`, or at the step set."""
        return self._mix_at(
            "add_noise", original_samples, noise, timesteps, lambda: self._scales(self._levels)
        )
