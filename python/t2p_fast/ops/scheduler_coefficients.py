# SPDX-License-Identifier: Apache-2.0
"""The samplers as coefficients of `scheduler_step`: float64 on the host, a row for every step.

`alpha` and `sigma` are the scales of signal and noise of every step's own timestep, `[t]`, in
float64; `_prev` marks those of the timestep that follows. A step computes, with sample x, output m
of the network, added gradient g, earlier results h1 and h2, noise z,

    x0   = bound(a0 x + a1 m + a2 g + a3 z)
    prev = b0 x + b1 m + b2 x0 + b3 g + b4 h1 + b5 h2 + b6 z

Where `x0` is not bounded, `b2 x0` is folded into the other terms here, where it costs no rounding.
"""

from enum import IntEnum

import torch
from torch import Tensor

from t2p_fast._checks import check_choice

__all__ = [
    "PREDICTION_TYPES",
    "VARIANCE_TYPES",
    "Column",
    "ancestral_coefficients",
    "ddim_coefficients",
    "ddpm_coefficients",
    "dpm_solver_coefficients",
    "euler_coefficients",
    "flow_coefficients",
    "mix_coefficients",
]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
VARIANCE_TYPES = (
    "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range",
)  # fmt: skip
ALGORITHM_TYPES = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
SOLVER_TYPES = ("midpoint", "heun")


class Column(IntEnum):
    """The columns of a row; those of csrc/scheduler/scheduler.h."""

    X0_SAMPLE = 0
    X0_OUTPUT = 1
    X0_SHIFT = 2
    X0_NOISE = 3
    PREV_SAMPLE = 4
    PREV_OUTPUT = 5
    PREV_X0 = 6
    PREV_SHIFT = 7
    PREV_HISTORY1 = 8
    PREV_HISTORY2 = 9
    LOG_VARIANCE = 10
    LOG_VARIANCE_OF = 11
    PREV_SHIFT_VARIANCE = 12
    PREV_NOISE = 13
    COUNT = 16


_FOLDED = (
    (Column.PREV_SAMPLE, Column.X0_SAMPLE),
    (Column.PREV_OUTPUT, Column.X0_OUTPUT),
    (Column.PREV_SHIFT, Column.X0_SHIFT),
    (Column.PREV_NOISE, Column.X0_NOISE),
)


def _rows(bounded: bool, **columns: Tensor | float) -> Tensor:
    """The table with the named columns; the rest is zero."""
    length = max(len(value) for value in columns.values() if isinstance(value, Tensor))
    table = torch.zeros(length, Column.COUNT, dtype=torch.float64)
    for name, value in columns.items():
        table[:, Column[name.upper()]] = value
    if not bounded:
        weight = table[:, Column.PREV_X0].clone()
        for to, of in _FOLDED:
            # An infinite coefficient of an absent input must not turn the rest into NaN.
            part = torch.where(weight != 0, weight * table[:, of], 0.0)
            table[:, to] += part
        table[:, Column.PREV_X0] = 0
    return table


def _prediction(
    op: str, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The coefficients of sample and output in `x_0` and in the noise."""
    check_choice(op, "prediction_type", prediction_type, PREDICTION_TYPES)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "epsilon":
        # A traced function can't look at numbers; a scheduler's timesteps have been checked before.
        if not torch.compiler.is_compiling() and bool((alpha == 0).any()):
            raise ValueError(
                f"{op}: prediction_type='epsilon' cannot be used at a timestep without signal "
                "(zero terminal SNR): its noise says nothing about the sample there; use "
                "'v_prediction' or 'sample', or leave that timestep out"
            )
        return 1 / alpha, -sigma / alpha, zero, one
    if prediction_type == "sample":
        return zero, one, 1 / sigma, -alpha / sigma
    if prediction_type == "v_prediction":
        return alpha, -sigma, sigma, alpha
    return one, -sigma, one, 1 - sigma


def ddpm_coefficients(
    alpha: Tensor,
    sigma: Tensor,
    alpha_prev: Tensor,
    sigma_prev: Tensor,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    bounded: bool = False,
    shift: str = "mean",
    noisy: Tensor | None = None,
) -> Tensor:
    """DDPM (2006.11239, equation 7); learned variances as in 2102.09672, equation 15.

    Args:
        alpha, sigma, alpha_prev, sigma_prev: `[t]`.
        prediction_type: What the network predicts, one of `PREDICTION_TYPES`.
        variance_type: One of `VARIANCE_TYPES`. ``learned`` is the log variance itself,
            ``learned_range`` a number from -1 to 1 between those of fixed_small and fixed_large.
            The ``_log`` forms are what they are without it.
        bounded: Whether `x0` will be clipped or thresholded.
        shift: What a `shift` is added to: ``mean``, times the variance (2105.05233, algorithm 1),
            or ``epsilon``.
        noisy: `[t]`, which steps add noise; all where not given.

    Returns:
        `[t, 16]` in float64.
    """
    op = "ddpm_coefficients"
    check_choice(op, "variance_type", variance_type, VARIANCE_TYPES)
    check_choice(op, "shift", shift, ("mean", "epsilon"))
    x0_sample, x0_output, _, _ = _prediction(op, alpha, sigma, prediction_type)
    step = (alpha / alpha_prev).square()
    beta = 1 - step
    small = (sigma_prev.square() / sigma.square() * beta).clamp(min=1e-20)
    learned = variance_type in ("learned", "learned_range")
    variance = beta if variance_type.startswith("fixed_large") else small
    log_small, log_beta = small.log(), beta.log()
    columns: dict[str, Tensor | float] = {}
    if variance_type == "learned_range":
        columns["log_variance"] = (log_beta + log_small) / 2
        columns["log_variance_of"] = (log_beta - log_small) / 2
    elif variance_type == "learned":
        columns["log_variance_of"] = 1.0
    if shift == "epsilon":
        columns["x0_shift"] = -sigma / alpha
    elif learned:
        columns["prev_shift_variance"] = 1.0
    else:
        columns["prev_shift"] = variance
    std = torch.ones_like(alpha) if learned else variance.sqrt()
    return _rows(
        bounded,
        x0_sample=x0_sample,
        x0_output=x0_output,
        prev_sample=step.sqrt() * sigma_prev.square() / sigma.square(),
        prev_x0=alpha_prev * beta / sigma.square(),
        prev_noise=std if noisy is None else std * noisy,
        **columns,
    )


def ddim_coefficients(
    alpha: Tensor,
    sigma: Tensor,
    alpha_prev: Tensor,
    sigma_prev: Tensor,
    *,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    rederive: bool = False,
    bounded: bool = False,
) -> Tensor:
    """DDIM (2010.02502, equations 12 and 16).

    Args:
        alpha, sigma, alpha_prev, sigma_prev, prediction_type, bounded: As in `ddpm_coefficients`.
        eta: From 0, no noise, to 1, that of DDPM.
        rederive: Whether the noise is taken anew from the bounded `x0`
            (``use_clipped_model_output``). A `shift` is added to the noise.

    Returns:
        `[t, 16]` in float64.
    """
    op = "ddim_coefficients"
    x0_sample, x0_output, eps_sample, eps_output = _prediction(op, alpha, sigma, prediction_type)
    ratio = (alpha / alpha_prev).square()
    std = eta * sigma_prev / sigma * (1 - ratio).clamp(min=0).sqrt()
    direction = (sigma_prev.square() - std.square()).clamp(min=0).sqrt()
    if rederive:
        columns = {
            "prev_sample": direction / sigma,
            "prev_x0": alpha_prev - direction * alpha / sigma,
        }
    else:
        columns = {
            "prev_sample": direction * eps_sample,
            "prev_output": direction * eps_output,
            "prev_x0": alpha_prev,
            "prev_shift": direction,
        }
    return _rows(
        bounded,
        x0_sample=x0_sample,
        x0_output=x0_output,
        x0_shift=-sigma / alpha,
        prev_noise=std,
        **columns,
    )


def dpm_solver_coefficients(
    alpha: Tensor,
    sigma: Tensor,
    *,
    order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    prediction_type: str = "epsilon",
    bounded: bool = False,
) -> Tensor:
    """DPM-Solver++ and DPM-Solver of several steps (2211.01095, algorithm 2; 2206.00927).

    The history holds the `x0` of the steps before, the latest first; for the algorithms without
    ``++`` the noise, which then takes the place of `x0` throughout.

    Args:
        alpha, sigma: `[t + 1]`, the last ones those of the result.
        order: 1, 2 or 3; that many results are used. Rows that lack predecessors are of less use
            than of a lower order.
        algorithm_type: One of ``dpmsolver++``, ``sde-dpmsolver++``, ``dpmsolver``,
            ``sde-dpmsolver``.
        solver_type: ``midpoint`` or ``heun``.
        prediction_type, bounded: As in `ddpm_coefficients`.

    Returns:
        `[t, 16]` in float64.
    """
    op = "dpm_solver_coefficients"
    check_choice(op, "algorithm_type", algorithm_type, ALGORITHM_TYPES)
    check_choice(op, "solver_type", solver_type, SOLVER_TYPES)
    if order not in (1, 2, 3):
        raise ValueError(f"{op}: order is {order}, expected 1, 2 or 3")
    a, s, a_prev, s_prev = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    x0_sample, x0_output, eps_sample, eps_output = _prediction(op, a, s, prediction_type)
    data, stochastic = algorithm_type.endswith("++"), algorithm_type.startswith("sde")
    log_snr = alpha.log() - sigma.log()  # half of it; infinite at the end
    h = log_snr[1:] - log_snr[:-1]
    # Both solvers integrate e^y against a polynomial in the result: y is -h for x_0, h for noise.
    # The stochastic ones are the same with twice the step for x_0, twice the size for noise.
    noise = torch.zeros_like(h)
    if data:
        y, size, drift = -h, a_prev, s_prev / s
        if stochastic:
            y, drift = 2 * y, drift * (-h).exp()
            noise = s_prev * (-torch.expm1(y)).clamp(min=0).sqrt()
    else:
        y, size, drift = h, s_prev, a_prev / a
        if stochastic:
            size = 2 * size
            noise = s_prev * torch.expm1(2 * y).clamp(min=0).sqrt()
    weights = _multistep_weights(order, solver_type, y, size, h)
    return _rows(
        bounded,
        x0_sample=x0_sample if data else eps_sample,
        x0_output=x0_output if data else eps_output,
        prev_sample=drift,
        prev_x0=weights[0],
        prev_history1=weights[1],
        prev_history2=weights[2],
        prev_noise=noise,
    )


def _multistep_weights(
    order: int, solver_type: str, y: Tensor, size: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What multiplies the latest result, the one before and the one before that."""
    zero = torch.zeros_like(h)
    value = -size * torch.expm1(y)
    if order == 1:
        return value, zero, zero
    # The first and second differences of the results, per step, along the log SNR.
    r0 = _shifted(h, 1) / h
    if order == 2 and solver_type == "midpoint":
        first = value / 2
    else:
        first = -size * (torch.expm1(y) / y - 1)
    if order == 2:
        return value + first / r0, -first / r0, zero
    r1 = _shifted(h, 2) / h
    second = -size * ((torch.expm1(y) - y) / y.square() - 0.5)
    # D1 = d0 + r0 / (r0 + r1) (d0 - d1), D2 = (d0 - d1) / (r0 + r1), where d0 = (m0 - m1) / r0 and
    # d1 = (m1 - m2) / r1.
    of_d0 = first * (1 + r0 / (r0 + r1)) + second / (r0 + r1)
    of_d1 = -(first * r0 + second) / (r0 + r1)
    return value + of_d0 / r0, of_d1 / r1 - of_d0 / r0, -of_d1 / r1


def _shifted(h: Tensor, count: int) -> Tensor:
    """The steps that lie `count` before; the first ones repeat."""
    return torch.cat([h[:1].expand(min(count, len(h))), h[: max(len(h) - count, 0)]])


def euler_coefficients(
    sigma: Tensor,
    sigma_prev: Tensor,
    *,
    prediction_type: str = "epsilon",
    churn: Tensor | float = 0.0,
    noise_scale: float = 1.0,
) -> Tensor:
    """Euler's step of Karras et al. (2206.00364, algorithm 2), where `x = x_0 + sigma e`.

    Args:
        sigma, sigma_prev: `[t]`.
        prediction_type: One of `PREDICTION_TYPES` but flow_prediction; the network saw
            `x / sqrt(1 + sigma^2)`.
        churn: gamma; the noise level is first raised to `(1 + gamma) sigma`.
        noise_scale: S_noise, what the noise for that is multiplied by.

    Returns:
        `[t, 16]` in float64.
    """
    raised = sigma * (1 + churn)
    x0_sample, x0_output = _exploding("euler_coefficients", raised, prediction_type)
    added = noise_scale * (raised.square() - sigma.square()).clamp(min=0).sqrt()
    # prev = x + (x - x_0) / raised * (sigma_prev - raised), x with the noise added
    ratio = sigma_prev / raised
    return _rows(
        False,
        x0_sample=x0_sample,
        x0_output=x0_output,
        x0_noise=added * x0_sample,
        prev_sample=ratio,
        prev_x0=1 - ratio,
        prev_noise=added * ratio,
    )


def ancestral_coefficients(
    sigma: Tensor, sigma_prev: Tensor, *, prediction_type: str = "epsilon"
) -> Tensor:
    """Euler's step down to less noise than asked for, and fresh noise up again (k-diffusion).

    Args and result as in `euler_coefficients`.
    """
    x0_sample, x0_output = _exploding("ancestral_coefficients", sigma, prediction_type)
    up = sigma_prev * (1 - (sigma_prev / sigma).square()).clamp(min=0).sqrt()
    ratio = sigma_prev.square() / sigma.square()  # the lower level is sigma_prev^2 / sigma
    return _rows(
        False,
        x0_sample=x0_sample,
        x0_output=x0_output,
        prev_sample=ratio,
        prev_x0=1 - ratio,
        prev_noise=up,
    )


def _exploding(op: str, sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    check_choice(op, "prediction_type", prediction_type, PREDICTION_TYPES[:3])
    alpha = 1 / (1 + sigma.square()).sqrt()
    x0_sample, x0_output, _, _ = _prediction(op, alpha, alpha * sigma, prediction_type)
    return x0_sample * alpha, x0_output


def flow_coefficients(sigma: Tensor, sigma_prev: Tensor, *, stochastic: bool = False) -> Tensor:
    """Euler's step on the straight path `x = (1 - sigma) x_0 + sigma e` (2210.02747).

    Args:
        sigma, sigma_prev: `[t]`.
        stochastic: Whether every step begins at `x0` with new noise.

    Returns:
        `[t, 16]` in float64.
    """
    one = torch.ones_like(sigma)
    if stochastic:
        columns = {"prev_x0": 1 - sigma_prev, "prev_noise": sigma_prev}
    else:
        columns = {"prev_sample": one, "prev_output": sigma_prev - sigma}
    return _rows(False, x0_sample=one, x0_output=-sigma, **columns)


def mix_coefficients(of_sample: Tensor, of_output: Tensor) -> Tensor:
    """Rows for `prev = a x + b m`: noise added, a velocity, an input scaled.

    Args:
        of_sample, of_output: `[t]`.

    Returns:
        `[t, 16]` in float64.
    """
    return _rows(False, prev_sample=of_sample, prev_output=of_output)
