# SPDX-License-Identifier: Apache-2.0
"""Other distances than the squared one, and rows of low precision."""

import math

import pytest
import torch

from t2p_fast import reference
from t2p_fast.ops import vq_nearest
from vq_cases import CASES, HARD, METRIC_CASES, METRICS, assert_nearest_by, case_of

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), CASES, ids=lambda v: str(v))
def test_metrics(metric: str, n: int, k: int, d: int, device: torch.device, emulated: bool) -> None:
    n, k, d = (min(n, 100), min(k, 1000), min(d, 300)) if emulated else (n, k, d)
    x, codebook = (t.to(device) for t in case_of(n, k, d))
    x[0], codebook[-1] = 0, 0  # at a right angle to all, by definition
    found = vq_nearest(x, codebook, metric=metric, return_distance=True)
    assert_nearest_by(metric, x, codebook, *found)


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_metrics_on_hard_data(metric: str, hard: str, device: torch.device, emulated: bool) -> None:
    for n, k, d in METRIC_CASES[1:3] if emulated else METRIC_CASES:
        k = min(k, 140) if emulated else k
        x, codebook = (t.to(device) for t in HARD[hard](*case_of(n, k, d)))
        found = vq_nearest(x, codebook, metric=metric, return_distance=True)
        assert_nearest_by(metric, x, codebook, *found)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("n", "k", "d"), METRIC_CASES[1:], ids=lambda v: str(v))
def test_metrics_of_what_is_not_finite(
    bad: float, metric: str, n: int, k: int, d: int, device: torch.device, emulated: bool
) -> None:
    if emulated and bad < 0:
        pytest.skip("as the other infinity")
    x, codebook = (t.to(device) for t in case_of(n, k, d))
    spoiled = codebook.clone()
    spoiled[::3, 1] = bad
    keep = torch.arange(k, device=device)[torch.arange(k, device=device) % 3 != 0]
    clean = keep[vq_nearest(x, codebook[keep], metric=metric)]
    x[n // 2, 1] = bad
    indices, distance = vq_nearest(x, spoiled, metric=metric, return_distance=True)
    assert indices[n // 2] == 0
    assert distance[n // 2].isnan()
    others = torch.arange(n, device=device) != n // 2
    assert torch.equal(indices[others], clean[others])
    nothing = vq_nearest(x, torch.full_like(codebook, bad), metric=metric, return_distance=True)
    assert (nothing[0] == 0).all()
    assert nothing[1][others].isinf().all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), METRIC_CASES, ids=lambda v: str(v))
def test_metrics_ties_go_to_the_lowest_index(
    metric: str, n: int, k: int, d: int, device: torch.device, emulated: bool
) -> None:
    x, codebook = (t.to(device) for t in case_of(n, k // 4 if emulated else k, d))
    x = x[:20] if emulated else x
    plain = vq_nearest(x, codebook, metric=metric)
    assert torch.equal(vq_nearest(x, codebook.repeat(3, 1), metric=metric), plain)
    assert torch.equal(vq_nearest(x, codebook.repeat_interleave(20, 0), metric=metric), 20 * plain)


@pytest.mark.parametrize("metric", METRICS)
def test_metric_gradients(metric: str, device: torch.device) -> None:
    x, codebook = (t.to(device).requires_grad_() for t in case_of(50, 9, 5))
    weight = torch.linspace(-1, 1, 50, device=device)
    distance = vq_nearest(x, codebook, metric=metric, return_distance=True)[1]
    (distance * weight).sum().backward()
    x64, codes64 = (t.detach().double().requires_grad_() for t in (x, codebook))
    truth = reference.vq_nearest(x64, codes64, metric=metric, return_distance=True)[1]
    (truth * weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codebook.grad.double(), codes64.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), METRIC_CASES, ids=lambda v: str(v))
def test_low_precision_rows(
    n: int, k: int, d: int, metric: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Rows of low precision mean the numbers that they hold, whatever way they are read."""
    x, codebook = (t.to(device) for t in case_of(n, k, d))
    image = x.to(dtype).T.reshape(1, d, n, 1).contiguous()
    found = vq_nearest(image, codebook, metric=metric, channel_dim=1, return_distance=True)
    assert_nearest_by(metric, x.to(dtype).float(), codebook, *(t.view(n) for t in found))
    plain = vq_nearest(x.to(dtype), codebook, metric=metric)
    assert torch.equal(found[0].view(n), plain)
