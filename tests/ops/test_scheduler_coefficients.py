# SPDX-License-Identifier: Apache-2.0
"""The coefficients of the samplers against the formulas of their papers, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import scheduler_coefficients as tables
from t2p_fast.ops import scheduler_step
from t2p_fast.ops.scheduler_coefficients import Column


def _inputs(**names: int) -> dict[str, Tensor]:
    """Random tensors by name; a number is how often the channels are repeated."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(2, 3 * times, 4, 5, dtype=torch.float64, generator=generator)
        for name, times in names.items()
    }


def _run(tensors: dict[str, Tensor], table: Tensor, row: int, **options: Any) -> Any:
    tensors = dict(tensors)
    history = [tensors.pop(name) for name in ("history1", "history2") if name in tensors]
    sample, output = tensors.pop("sample"), tensors.pop("model_output")
    return scheduler_step(sample, output, table, row, history=history, **tensors, **options)


def _scales(steps: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    products = torch.linspace(0.02, 0.98, steps + 1, dtype=torch.float64)
    alpha, sigma = products.sqrt(), (1 - products).sqrt()
    return alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]


BOUNDS: list[dict[str, Any]] = [{}, {"clip": 0.7}, {"threshold": (0.9, 1.6)}]


def _assert_sampler(table: Tensor, step: Callable[..., Any], names: dict[str, int], bound: Any,
                    kinds: dict[str, str] | None = None, **options: Any) -> None:  # fmt: skip
    """The table's rows compute what the formula says, to float64 rounding."""
    kinds = kinds or {}
    tensors = _inputs(sample=1, model_output=1, **names)
    for row in range(len(table)):
        ours = _run(tensors, table, row, **bound)
        named = {kinds.get(k, k): v for k, v in tensors.items()}
        truth = step(row, named.pop("sample"), named.pop("model_output"), **named, **bound,
                     **options)  # fmt: skip
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("shift", ["mean", "epsilon"])
def test_ddpm_coefficients(bound: Any, kind: str, variance: str, shift: str) -> None:
    scales = _scales()
    table = tables.ddpm_coefficients(
        *scales, prediction_type=kind, variance_type=variance, bounded=bool(bound), shift=shift
    )
    _assert_sampler(
        table,
        lambda row, *a, **k: reference.scheduler_ddpm_step(*a, *(s[row] for s in scales), **k),
        {"noise": 1, "shift": 1},
        bound,
        {"shift": {"mean": "mean_shift", "epsilon": "eps_shift"}[shift]},
        prediction_type=kind,
        variance_type=variance,
    )


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_ddpm_learned_variance(bound: Any, variance: str) -> None:
    scales = _scales()
    table = tables.ddpm_coefficients(*scales, variance_type=variance, bounded=bool(bound))
    t = _inputs(sample=1, model_output=2, noise=1, shift=1)
    output, raw = t["model_output"].chunk(2, 1)
    for row in range(len(table)):
        ours = scheduler_step(
            t["sample"], t["model_output"], table, row, learned_variance=True, noise=t["noise"],
            shift=t["shift"], **bound,
        )  # fmt: skip
        truth = reference.scheduler_ddpm_step(
            t["sample"], output, *(s[row] for s in scales), variance_type=variance,
            variance_output=raw, noise=t["noise"], mean_shift=t["shift"], **bound,
        )  # fmt: skip
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("rederive", [False, True])
def test_ddim_coefficients(bound: Any, kind: str, eta: float, rederive: bool) -> None:
    scales = _scales()
    table = tables.ddim_coefficients(
        *scales, eta=eta, prediction_type=kind, rederive=rederive, bounded=bool(bound)
    )
    _assert_sampler(
        table,
        lambda row, *a, **k: reference.scheduler_ddim_step(*a, *(s[row] for s in scales), **k),
        {"noise": 1, "shift": 1},
        bound,
        {"shift": "eps_shift"},
        eta=eta,
        prediction_type=kind,
        rederive=rederive,
    )


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_coefficients(bound: Any, kind: str, order: int) -> None:
    a, s, a_prev, s_prev = _scales()
    alpha, sigma = torch.cat([a, a_prev[-1:]]), torch.cat([s, s_prev[-1:]])
    if kind == "flow_prediction":
        sigma = torch.linspace(0.95, 0.0, 7, dtype=torch.float64)
        alpha = 1 - sigma
    table = tables.dpm_solver_coefficients(
        alpha, sigma, order=order, prediction_type=kind, bounded=bool(bound)
    )

    def step(row: int, *args: Any, history1: Tensor | None = None, **kwargs: Any) -> Any:
        before = max(row - 1, 0)
        if row == 0 and order == 2:  # has no step before it: takes its own size twice
            factor = alpha[0] * sigma[1] / (sigma[0] * alpha[1])
            last = (alpha[0] * factor, sigma[0])
        else:
            last = (alpha[before], sigma[before])
        if order == 2:
            kwargs |= {"history": history1, "alpha_before": last[0], "sigma_before": last[1]}
        return reference.scheduler_dpm_solver_step(
            *args, alpha[row], sigma[row], alpha[row + 1], sigma[row + 1], prediction_type=kind,
            **kwargs,
        )  # fmt: skip

    if kind == "flow_prediction" and order == 2:
        table = table[:-1]  # the last step, to no noise, has no second order
    _assert_sampler(table, step, {"history1": 1} if order == 2 else {}, bound)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("churn", [0.0, 0.3])
def test_euler_coefficients(kind: str, churn: float) -> None:
    sigma = torch.linspace(14.0, 0.0, 7, dtype=torch.float64)
    table = tables.euler_coefficients(sigma[:-1], sigma[1:], prediction_type=kind, churn=churn)
    _assert_sampler(
        table,
        lambda row, *a, **k: reference.scheduler_euler_step(*a, sigma[row], sigma[row + 1], **k),
        {"noise": 1} if churn else {},
        {},
        prediction_type=kind,
        churn=churn,
    )


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_ancestral_coefficients(kind: str) -> None:
    sigma = torch.linspace(14.0, 0.0, 7, dtype=torch.float64)
    table = tables.ancestral_coefficients(sigma[:-1], sigma[1:], prediction_type=kind)
    _assert_sampler(
        table,
        lambda row, *a, **k: reference.scheduler_ancestral_step(
            *a, sigma[row], sigma[row + 1], **k
        ),
        {"noise": 1},
        {},
        prediction_type=kind,
    )


@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_coefficients(stochastic: bool) -> None:
    sigma = torch.linspace(1.0, 0.0, 7, dtype=torch.float64)
    table = tables.flow_coefficients(sigma[:-1], sigma[1:], stochastic=stochastic)
    _assert_sampler(
        table,
        lambda row, *a, **k: reference.scheduler_flow_step(*a, sigma[row], sigma[row + 1], **k),
        {"noise": 1} if stochastic else {},
        {},
    )


@pytest.mark.parametrize("algorithm", tables.ALGORITHM_TYPES)
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_orders(algorithm: str, order: int) -> None:
    """Without noise, a result that does not change gives what the first order gives."""
    a, s, _, _ = _scales(8)
    args = {"algorithm_type": algorithm, "bounded": True}
    first = tables.dpm_solver_coefficients(a, s, order=1, **args)
    for solver in ("midpoint", "heun"):
        higher = tables.dpm_solver_coefficients(a, s, order=order, solver_type=solver, **args)
        total = higher[:, [Column.PREV_X0, Column.PREV_HISTORY1, Column.PREV_HISTORY2]].sum(1)
        torch.testing.assert_close(total, first[:, Column.PREV_X0])
        assert (higher[:, Column.PREV_HISTORY2] != 0).all() == (order == 3)


def test_dpm_solver_third_order_follows_curves() -> None:
    """Where x_0 is a parabola in the log SNR, the third order is much nearer than the second."""
    lambdas = torch.tensor([-1.0, -0.4, 0.3, 0.8], dtype=torch.float64)
    alpha = (2 * lambdas).sigmoid().sqrt()
    sigma = (-2 * lambdas).sigmoid().sqrt()
    table = tables.dpm_solver_coefficients(alpha, sigma, order=3, bounded=True)
    result = lambda x: 0.3 * x.square() - x + 0.5  # noqa: E731
    fine = torch.linspace(0.3, 0.8, 200001, dtype=torch.float64)
    # x_t / sigma_t = x_s / sigma_s + integral of e^lambda x_0, equation 8
    integral = torch.trapezoid(fine.exp() * result(fine), fine)
    row, m = table[2], result(lambdas)
    ours = row[4] * 0.7 + row[6] * m[2] + row[8] * m[1] + row[9] * m[0]
    truth = sigma[3] * (0.7 / sigma[2] + integral)
    second = tables.dpm_solver_coefficients(alpha, sigma, order=2, bounded=True)[2]
    lower = second[4] * 0.7 + second[6] * m[2] + second[8] * m[1]
    assert abs(ours - truth) < 0.3 * abs(lower - truth)


def test_epsilon_without_signal_is_refused() -> None:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for make in (tables.ddpm_coefficients, tables.ddim_coefficients):
        with pytest.raises(ValueError, match="timestep without signal"):
            make(zero, one, one * 0.6, one * 0.8)
        make(zero, one, one * 0.6, one * 0.8, prediction_type="v_prediction")
