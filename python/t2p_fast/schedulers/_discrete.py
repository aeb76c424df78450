# SPDX-License-Identifier: Apache-2.0
"""What DDPM and DDIM share: whole timesteps, and scales from the products of 1 - beta."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2p_fast._checks import check_choice
from t2p_fast.schedulers._base import Scheduler, Tables
from t2p_fast.schedulers._noise_schedule import make_betas, products_of, rescale_zero_terminal_snr
from t2p_fast.schedulers._spacing import check_step_count, spaced_timesteps

__all__ = ["DiscreteScheduler", "TrainedBetas", "set_betas"]

TrainedBetas = Sequence[float] | np.ndarray | Tensor | None


def set_betas(scheduler: Any, *, least_product: float = 0.0) -> Tensor:
    """Sets `betas`, `alphas` and `alphas_cumprod` from the configuration.

    Returns:
        The products in float64, the last one not less than `least_product` where the
        signal-to-noise ratio is rescaled to end at zero.
    """
    config = scheduler.config
    owner = type(scheduler).__name__
    betas = make_betas(
        config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end,
        config.trained_betas, owner=owner,
    )  # fmt: skip
    if config.rescale_betas_zero_snr:
        betas = rescale_zero_terminal_snr(betas)
    products = products_of(betas)
    if config.rescale_betas_zero_snr and least_product:
        products[-1] = least_product
    scheduler.betas, scheduler.alphas = betas.float(), (1 - betas).float()
    scheduler.alphas_cumprod = products.float()
    return products


class DiscreteScheduler(Scheduler):
    """A scheduler whose timesteps are whole numbers below `num_train_timesteps`."""

    prediction_types = ("epsilon", "sample", "v_prediction")

    def _setup(self) -> None:
        check_choice(
            type(self).__name__, "prediction_type", self.config.prediction_type,
            self.prediction_types,
        )  # fmt: skip
        self._products = set_betas(self)
        self._final_product = 1.0
        self.init_noise_sigma = 1.0
        self._constants: Tables = {}  # for any schedule
        self._set_schedule(torch.arange(len(self._products) - 1, -1, -1), None)

    def _set_schedule(self, timesteps: Tensor, device: torch.device | str | None) -> None:
        super()._set_schedule(timesteps, device)
        train = len(self._products)
        # Off the schedule the next timestep lies a usual step back.
        back = train // self.num_inference_steps if self.num_inference_steps else 1
        following = torch.arange(train) - back
        following[timesteps] = torch.cat([timesteps[1:], torch.tensor([-1])])
        self._following: Tensor = following
        self._previous: list[int] = following.tolist()
        self._look_at_config()
        values = self._schedule.values
        if self._epsilon_without_signal and self.num_inference_steps:
            for value in values:
                self._check_signal(value)
        elif self._epsilon_without_signal:
            # The schedule of training has it: a step there goes through `_rows_of`, which refuses.
            values[:] = [value if self._products[value] > 0 else None for value in values]

    def _look_at_config(self) -> None:
        super()._look_at_config()
        config = self.config
        self._bounds = self._bound()
        # Betas above 1 leave no signal either, by mistake: they give NaN there, as in diffusers.
        self._epsilon_without_signal = (
            config.prediction_type == "epsilon"
            and config.rescale_betas_zero_snr
            and float(self._products[-1]) <= 0
        )

    def _check_signal(self, timestep: int) -> None:
        if self._epsilon_without_signal and float(self._products[timestep]) <= 0:
            raise ValueError(
                f"{type(self).__name__}: prediction_type='epsilon' cannot be used at timestep "
                f"{timestep}, where rescale_betas_zero_snr leaves no signal: the noise says "
                "nothing about the sample there; use 'v_prediction' or 'sample'"
            )

    def _spaced(self, num_inference_steps: int) -> Tensor:
        config, owner = self.config, type(self).__name__
        check_step_count(owner, num_inference_steps, config.num_train_timesteps)
        spaced = spaced_timesteps(
            owner, config.timestep_spacing, num_inference_steps, config.num_train_timesteps,
            config.steps_offset,
        )  # fmt: skip
        return torch.from_numpy(spaced.round().astype(np.int64))

    def _scales(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma of every timestep of training, and those of the one that follows."""
        products, following = self._products, self._following
        next_products = torch.where(following >= 0, products[following.clamp(min=0)],
                                    self._final_product)  # fmt: skip
        usable = products
        if self.config.prediction_type == "epsilon":  # rows of timesteps without signal
            usable = products.where(products > 0, torch.nan)
        return (
            usable.sqrt(), (1 - usable).sqrt(), next_products.sqrt(), (1 - next_products).sqrt(),
        )  # fmt: skip

    def _rows_of(self, timestep: Any, sample: Tensor) -> tuple[int, Tensor | None]:
        """The row of a timestep, or those of a timestep for each sample; rows are timesteps."""
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            return 0, timestep.to(device=sample.device, dtype=torch.int64)
        row, count = int(timestep), len(self._previous)
        if row >= count or row < 0:
            owner = type(self).__name__
            raise ValueError(f"{owner}.step: timestep {row} is outside [0, {count})")
        self._check_signal(row)
        return row, None

    def _mix_train(
        self, name: str, sample: Tensor, noise: Tensor, timesteps: Any,
        make: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:  # fmt: skip
        products = self._products
        index = timesteps if isinstance(timesteps, Tensor) else torch.tensor(timesteps)
        return self._mix(
            self._constants, name, sample, noise,
            lambda: make(products.sqrt(), (1 - products).sqrt()), index,
        )  # fmt: skip

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """`sqrt(A_t) x_0 + sqrt(1 - A_t) e`: samples of the forward process, in one kernel.

        Args:
            original_samples: x_0, `[b, ...]`.
            noise: e, of that shape.
            timesteps: int64 `[b]`, a timestep for each sample, or one for all.
        """
        return self._mix_train("add_noise", original_samples, noise, timesteps, lambda a, s: (a, s))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """`sqrt(A_t) e - sqrt(1 - A_t) x_0`: what a network that predicts v learns.

        Args as in `add_noise`.
        """
        return self._mix_train("velocity", sample, noise, timesteps, lambda a, s: (-s, a))
