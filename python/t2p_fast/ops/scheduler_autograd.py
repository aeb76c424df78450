# SPDX-License-Identifier: Apache-2.0
"""The step in torch operations: what runs in float64, and its gradient."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from t2p_fast.ops.scheduler_coefficients import Column

__all__ = ["CLIP", "NO_BOUND", "THRESHOLD", "Arguments", "Values", "compute", "gradients"]

NO_BOUND, CLIP, THRESHOLD = 0, 1, 2


@dataclass(frozen=True)
class Arguments:
    """The tensors and numbers of one step, as the registered op takes them; noise is given."""

    sample: Tensor
    model_output: Tensor
    coefficients: Tensor
    index: Tensor | None
    row: int
    uncond_output: Tensor | None
    guidance_scale: float
    guidance_rescale: float
    bound: int
    limit: float
    ratio: float
    learned: bool
    shift: Tensor | None
    history1: Tensor | None
    history2: Tensor | None
    noise: Tensor | None


@dataclass(frozen=True)
class Values:
    """What a step computes on its way."""

    columns: list[Tensor]
    output: Tensor  # after guidance
    unscaled: Tensor  # before the rescaling of guidance
    factor: Tensor | None
    variance: Tensor | None
    raw_x0: Tensor
    s: Tensor | None
    x0: Tensor
    prev: Tensor


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _sum(x: Tensor) -> Tensor:
    """The sum over each sample, shaped to go with samples."""
    return _per_sample(_flat(x).sum(1), x)


def _centred(x: Tensor) -> Tensor:
    return x - _per_sample(_flat(x).mean(1), x)


def _spread(x: Tensor) -> Tensor:
    return _sum(_centred(x).square()).sqrt()


def _quantile(magnitude: Tensor, ratio: float) -> tuple[Tensor, Tensor, float]:
    """The two values about the quantile, `[b, 2]`, their places, and the weight of the second."""
    n = magnitude.shape[1]
    position = ratio * (n - 1)
    low = int(torch.sym_int(position))  # a SymFloat has no __int__ before torch 2.10
    values, places = magnitude.sort(dim=1)
    ranks = [low, min(low + 1, n - 1)]
    return values[:, ranks], places[:, ranks], position - low


def compute(a: Arguments) -> Values:
    """The step."""
    x, dtype = a.sample, a.sample.dtype
    rows = a.coefficients[a.index] if a.index is not None else a.coefficients[a.row][None]
    c = [_per_sample(column, x) for column in rows.to(dtype).unbind(1)]
    output, uncond, noise, variance = a.model_output, a.uncond_output, a.noise, None
    if a.learned:
        output, raw = output.chunk(2, 1)
        variance = (c[Column.LOG_VARIANCE] + c[Column.LOG_VARIANCE_OF] * raw).exp()
        if noise is not None:
            noise = noise * variance.sqrt()
        if uncond is not None and uncond.shape != output.shape:
            uncond = uncond.chunk(2, 1)[0]
    unscaled, factor = output, None
    if uncond is not None:
        unscaled = uncond + a.guidance_scale * (output - uncond)
        if a.guidance_rescale != 0:
            own = _spread(unscaled)
            ratio = torch.where(own == 0, 1.0, _spread(output) / own.where(own != 0, 1.0))
            factor = a.guidance_rescale * ratio + (1 - a.guidance_rescale)
    guided = unscaled if factor is None else factor * unscaled
    x0 = c[Column.X0_SAMPLE] * x + c[Column.X0_OUTPUT] * guided
    prev = c[Column.PREV_SAMPLE] * x + c[Column.PREV_OUTPUT] * guided
    if a.shift is not None:
        x0 = x0 + c[Column.X0_SHIFT] * a.shift
        weight = c[Column.PREV_SHIFT]
        if variance is not None:
            weight = weight + c[Column.PREV_SHIFT_VARIANCE] * variance
        prev = prev + weight * a.shift
    if noise is not None:
        x0, prev = x0 + c[Column.X0_NOISE] * noise, prev + c[Column.PREV_NOISE] * noise
    if a.history1 is not None:
        prev = prev + c[Column.PREV_HISTORY1] * a.history1
    if a.history2 is not None:
        prev = prev + c[Column.PREV_HISTORY2] * a.history2
    raw_x0, s = x0, None
    if a.bound == CLIP:
        x0 = x0.clamp(-a.limit, a.limit)
    elif a.bound == THRESHOLD:
        if a.limit <= 1 or x0.numel() == 0:
            s = x0.new_full((len(x0),), a.limit)
        else:
            pair, _, part = _quantile(_flat(x0).abs(), a.ratio)
            s = pair[:, 0].lerp(pair[:, 1], part).clamp(1, a.limit)
            s = s.where(_flat(x0).isnan().any(1).logical_not(), torch.nan)
        s = _per_sample(s, x)
        x0 = (x0 / s).clamp(-1, 1)
    if a.bound != NO_BOUND:
        prev = prev + c[Column.PREV_X0] * x0
    return Values(c, guided, unscaled, factor, variance, raw_x0, s, x0, prev)


def gradients(a: Arguments, grad_prev: Tensor, grad_x0: Tensor) -> dict[str, Tensor | None]:
    """The gradients of the tensors among the arguments, by their names."""
    v = compute(a)
    c = v.columns
    grad_raw = grad_x0
    if a.bound != NO_BOUND:
        grad_raw = _through_bound(a, v, grad_x0 + c[Column.PREV_X0] * grad_prev)
    found: dict[str, Tensor | None] = {
        "sample": c[Column.X0_SAMPLE] * grad_raw + c[Column.PREV_SAMPLE] * grad_prev
    }
    for name, column in (
        ("history1", Column.PREV_HISTORY1),
        ("history2", Column.PREV_HISTORY2),
    ):
        found[name] = c[column] * grad_prev
    of_shift = c[Column.X0_SHIFT] * grad_raw if a.shift is not None else grad_raw
    weight = c[Column.PREV_SHIFT]
    of_noise = c[Column.X0_NOISE] * grad_raw + c[Column.PREV_NOISE] * grad_prev
    grad_variance = None
    if v.variance is not None:
        weight = weight + c[Column.PREV_SHIFT_VARIANCE] * v.variance
        root = v.variance.sqrt()
        grad_log = torch.zeros_like(root)
        if a.noise is not None:
            grad_log = grad_log + 0.5 * of_noise * a.noise * root
        if a.shift is not None:
            of_variance = c[Column.PREV_SHIFT_VARIANCE] * grad_prev * a.shift
            grad_log = grad_log + of_variance * v.variance
        grad_variance = grad_log * c[Column.LOG_VARIANCE_OF]
        of_noise = of_noise * root
    found["shift"] = of_shift + weight * grad_prev
    found["noise"] = of_noise
    grad_guided = c[Column.X0_OUTPUT] * grad_raw + c[Column.PREV_OUTPUT] * grad_prev
    grad_output, found["uncond_output"] = _through_guidance(a, v, grad_guided)
    if grad_variance is not None:
        grad_output = torch.cat([grad_output, grad_variance], 1)
    found["model_output"] = grad_output
    return found


def _through_bound(a: Arguments, v: Values, grad: Tensor) -> Tensor:
    if a.bound == CLIP:
        return grad * (v.raw_x0.abs() <= a.limit)
    assert v.s is not None
    within = grad * (v.raw_x0.abs() <= v.s) / v.s
    if a.limit <= 1 or grad.numel() == 0:
        return within
    # The quantile depends on the two values that it lies between.
    flat = _flat(v.raw_x0)
    pair, places, part = _quantile(flat.abs(), a.ratio)
    quantile = pair[:, 0].lerp(pair[:, 1], part)
    of_s = -_flat(within * v.raw_x0 / v.s).sum(1)
    of_s = of_s * ((quantile >= 1) & (quantile <= a.limit))
    signs = flat.gather(1, places).sign()
    parts = torch.stack([of_s * (1 - part), of_s * part], 1) * signs
    return within + torch.zeros_like(flat).scatter_add(1, places, parts).view_as(within)


def _through_guidance(a: Arguments, v: Values, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    if a.uncond_output is None:
        return grad, None
    output = a.model_output.chunk(2, 1)[0] if a.learned else a.model_output
    of_output = torch.zeros_like(grad)
    if v.factor is not None:
        # factor = phi spread(output) / spread(unscaled) + 1 - phi
        of_factor = _sum(grad * v.unscaled) * a.guidance_rescale
        grad = grad * v.factor
        wanted, own = _spread(output), _spread(v.unscaled)
        usable = (own != 0) & (wanted != 0)
        wanted, own = wanted.where(usable, 1.0), own.where(usable, 1.0)
        of_factor = of_factor * usable
        grad = grad - of_factor * wanted * _centred(v.unscaled) / own**3
        of_output = of_factor * _centred(output) / (wanted * own)
    of_output = of_output + a.guidance_scale * grad
    of_uncond = (1 - a.guidance_scale) * grad
    if a.uncond_output.shape != output.shape:  # with a variance, which is not used
        of_uncond = torch.cat([of_uncond, torch.zeros_like(of_uncond)], 1)
    return of_output, of_uncond
