# SPDX-License-Identifier: Apache-2.0
"""What the two Euler schedulers share: `x = x_0 + sigma e`, scaled before the network sees it."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2p_fast.schedulers._discrete import set_betas
from t2p_fast.schedulers._sigma import Array, SigmaScheduler

__all__ = ["KarrasScheduler"]

_LOG = logging.getLogger(__name__)
# The least product of an otherwise zero terminal SNR: noise levels are finite, at most 4096.
LEAST_PRODUCT = 2.0**-24


class KarrasScheduler(SigmaScheduler):
    """A scheduler of the form of Karras et al. 2206.00364."""

    def _setup_levels(self) -> None:
        products = set_betas(self, least_product=LEAST_PRODUCT)
        self._train_sigmas: Array = ((1 - products) / products).sqrt().numpy()
        train = len(products)
        levels = np.append(self._train_sigmas[::-1], 0.0)
        timesteps = torch.arange(train - 1, -1, -1, dtype=torch.float32)
        self.is_scale_input_called = False
        self._set_sigmas(levels, timesteps, None)

    def _check_signal(self, sigmas: Array) -> None:
        config = self.config
        terminal = config.rescale_betas_zero_snr and config.prediction_type == "epsilon"
        if terminal and len(sigmas) and sigmas.max() >= self._train_sigmas[-1] * (1 - 1e-9):
            raise ValueError(
                f"{type(self).__name__}.set_timesteps: prediction_type='epsilon' cannot be used "
                "with rescale_betas_zero_snr at the last timestep, which has no signal: the noise "
                "says nothing about the sample there; use 'v_prediction', or "
                "timestep_spacing='leading'"
            )

    @property
    def init_noise_sigma(self) -> Tensor:
        """What standard normal noise is multiplied by to make the first sample."""
        largest = self.sigmas.max()
        if self.config.timestep_spacing in ("linspace", "trailing"):
            return largest
        scaled: Tensor = (largest**2 + 1) ** 0.5
        return scaled

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """`x / sqrt(sigma^2 + 1)`: what the network wants to see."""
        if self._step_index is None:
            self._init_step_index(timestep)
        assert self._step_index is not None
        self.is_scale_input_called = True
        sigma = float(self._float64_sigmas()[self._step_index])
        scaled: Tensor = sample * (1 / (sigma * sigma + 1) ** 0.5)
        return scaled

    def _begin_step(self, timestep: Any) -> int:
        self._refuse_integer(timestep)
        if not self.is_scale_input_called:
            _LOG.warning(
                "The `scale_model_input` function should be called before `step` to ensure correct "
                "denoising. See `StableDiffusionPipeline` for a usage example."
            )
        self._float64_sigmas()
        return self._this_step(timestep)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_0 + sigma e` at timesteps of the schedule, `[b]`, or at the step that was set."""
        return self._mix_at(
            "add_noise",
            original_samples,
            noise,
            timesteps,
            lambda: (torch.ones_like(self._levels), self._levels),
        )
