# SPDX-License-Identifier: Apache-2.0
"""How fast noise grows over the timesteps of training: betas and their products, in float64."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["BETA_SCHEDULES", "make_betas", "products_of", "rescale_zero_terminal_snr"]

_MOST = 0.999
# Names mean different things in different libraries; here they are those of diffusers, and what it
# lacks has a name of its own:
#   linear            linspace(start, end)                       "linear" of guided-diffusion
#   scaled_linear     linspace(sqrt(start), sqrt(end))^2         "linear" of latent-diffusion
#   squaredcos_cap_v2 Nichol and Dhariwal 2102.09672, eq. 17     "cosine" of all, which works, too
#   sigmoid           betas along a sigmoid (GeoDiff)
#   sigmoid_alpha     products along a sigmoid, Jabri et al. 2212.11972    "sigmoid" of lucidrains
#   laplace, exp      products from a Laplace or exponential law of the SNR
BETA_SCHEDULES = (
    "linear", "scaled_linear", "squaredcos_cap_v2", "cosine", "sigmoid", "sigmoid_alpha", "laplace",
    "exp",
)  # fmt: skip


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _sigmoid_alpha(t: float) -> float:
    first, last = -3.0, 3.0  # tau = 1

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    here = sigmoid(last) - sigmoid(t * (last - first) + first)
    return here / (sigmoid(last) - sigmoid(first))


def _laplace(t: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def _exp(t: float) -> float:
    return math.exp(-12 * t)


_PRODUCTS: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": _cosine,
    "cosine": _cosine,
    "sigmoid_alpha": _sigmoid_alpha,
    "laplace": _laplace,
    "exp": _exp,
}


def make_betas(
    schedule: str,
    count: int,
    start: float,
    end: float,
    trained: Sequence[float] | np.ndarray | Tensor | None = None,
    *,
    owner: str,
) -> Tensor:
    """The variances of the forward process, `[count]` in float64.

    Args:
        schedule: One of `BETA_SCHEDULES`.
        count: Timesteps of training.
        start, end: The first and the last beta, where the schedule has them.
        trained: Betas that are used instead.
        owner: Who asks, for the messages.

    Raises:
        NotImplementedError: The schedule is not known.
        ValueError: `trained` has another length than `count`, or betas outside [0, 1].
    """
    if trained is not None:
        betas = torch.as_tensor(np.asarray(trained), dtype=torch.float64).clone()
        if betas.ndim != 1 or not bool(((betas >= 0) & (betas <= 1)).all()):
            raise ValueError(f"{owner}: trained_betas must be a list of numbers from 0 to 1")
        return betas
    if schedule not in BETA_SCHEDULES:
        raise NotImplementedError(
            f"{owner}: beta_schedule={schedule!r} is not supported; supported: "
            + ", ".join(map(repr, BETA_SCHEDULES))
        )
    if schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
    if schedule == "sigmoid":
        along = torch.linspace(-6, 6, count, dtype=torch.float64).sigmoid()
        return along * (end - start) + start
    product = _PRODUCTS[schedule]
    return torch.tensor(
        [min(1 - product((i + 1) / count) / product(i / count), _MOST) for i in range(count)],
        dtype=torch.float64,
    )


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas without signal at the last timestep (Lin et al. 2305.08891, algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    products = root.square()
    return 1 - torch.cat([products[:1], products[1:] / products[:-1]])


def products_of(betas: Tensor) -> Tensor:
    """The cumulative products of 1 - beta."""
    return (1 - betas).cumprod(0)
