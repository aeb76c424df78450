# SPDX-License-Identifier: Apache-2.0
"""Which timesteps and noise levels a sampler visits, in float64."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from t2p_fast._checks import check_choice

__all__ = [
    "SPACINGS",
    "beta_sigmas",
    "check_positive",
    "check_step_count",
    "exponential_sigmas",
    "karras_sigmas",
    "one_at_most",
    "spaced_timesteps",
    "timesteps_of_sigmas",
]

Array = NDArray[np.float64]
SPACINGS = ("linspace", "leading", "trailing")


def check_positive(owner: str, steps: int) -> None:
    if steps < 1:
        raise ValueError(
            f"{owner}.set_timesteps: num_inference_steps is {steps}, expected at least 1"
        )


def check_step_count(owner: str, steps: int, train: int) -> None:
    if not 1 <= steps <= train:
        raise ValueError(
            f"{owner}.set_timesteps: num_inference_steps={steps} must be from 1 to "
            f"num_train_timesteps={train}, the timesteps that the model was trained with"
        )


def spaced_timesteps(owner: str, spacing: str, steps: int, train: int, offset: int) -> Array:
    """The timesteps of `steps` steps, falling (Lin et al. 2305.08891, table 2); not rounded.

    `trailing` has exactly `steps` of them for any `steps`: they are counted, not stepped to.
    """
    check_choice(owner, "timestep_spacing", spacing, SPACINGS)
    check_positive(owner, steps)
    along = np.arange(steps, dtype=np.float64)
    if spacing == "linspace":
        linear: Array = np.linspace(0, train - 1, steps)[::-1].copy()
        return linear
    if spacing == "leading":
        timesteps: Array = (along * (train // steps))[::-1] + offset
        if timesteps[0] >= train:
            raise ValueError(
                f"{owner}.set_timesteps: steps_offset={offset} moves the first of {steps} "
                f"timesteps to {int(timesteps[0])}, beyond num_train_timesteps={train}"
            )
        return timesteps
    return np.round(train - along * train / steps) - 1


def timesteps_of_sigmas(sigmas: Array, train_sigmas: Array) -> Array:
    """The timesteps, not whole ones, that have these noise levels, by their logarithms."""
    levels = np.log(np.maximum(sigmas, 1e-10))
    return np.interp(levels, np.log(np.maximum(train_sigmas, 1e-10)), np.arange(len(train_sigmas)))


def karras_sigmas(low: float, high: float, steps: int, rho: float = 7.0) -> Array:
    """Karras et al. 2206.00364, equation 5."""
    along = np.linspace(0, 1, steps)
    first, last = high ** (1 / rho), low ** (1 / rho)
    sigmas: Array = (first + along * (last - first)) ** rho
    return sigmas


def exponential_sigmas(low: float, high: float, steps: int) -> Array:
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta_sigmas(owner: str, low: float, high: float, steps: int) -> Array:
    """Levels by the quantiles of a Beta(0.6, 0.6) law (2407.12173)."""
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise ImportError(f"{owner}: use_beta_sigmas needs scipy (pip install scipy)") from error
    quantiles: Array = beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6)
    return low + quantiles * (high - low)


def one_at_most(owner: str, **choices: object) -> None:
    chosen: Sequence[str] = [name for name, value in choices.items() if value]
    if len(chosen) > 1:
        raise ValueError(f"{owner}: only one of {', '.join(choices)} can be used, got {chosen}")
