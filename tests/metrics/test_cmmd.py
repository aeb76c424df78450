# SPDX-License-Identifier: Apache-2.0
"""CMMD against its definition and its known properties."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from t2p_fast.metrics.cmmd import cmmd


def points(n: int, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, 16, generator=generator) + shift, dim=1)


@pytest.mark.parametrize("unbiased", [True, False])
def test_definition(unbiased: bool) -> None:
    x, y = points(9), points(7, 0.3, seed=1)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(-float((a.double() - b.double()).square().sum()) / 200)

    def mean(a: torch.Tensor, b: torch.Tensor, same: bool) -> float:
        pairs = [
            kernel(p, q)
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (same and unbiased and i == j)
        ]
        return sum(pairs) / len(pairs)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert cmmd(x, y, unbiased=unbiased) == pytest.approx(1000 * expected, abs=1e-8)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = points(50), points(31, 0.2, seed=1)
    whole = cmmd(x, y)
    monkeypatch.setattr("t2p_fast.metrics.cmmd._BLOCK", 7)
    assert cmmd(x, y) == pytest.approx(whole, rel=1e-12)


def test_properties() -> None:
    x, y = points(400), points(400, seed=1)
    assert abs(cmmd(x, y)) < 0.02  # one distribution
    assert cmmd(x, x, unbiased=False) == pytest.approx(0, abs=1e-9)
    far = points(400, 0.5, seed=2)
    assert cmmd(x, far) == pytest.approx(cmmd(far, x), rel=1e-12)
    assert cmmd(x, far) > cmmd(x, points(400, 0.25, seed=2)) > 0.1
    # To first order in 1 / sigma^2, ten times the squared distance of the means.
    means = 10 * float((x.mean(0) - far.mean(0)).square().sum())
    assert cmmd(x, far, unbiased=False) == pytest.approx(means, rel=1.5e-2)


def test_bad_input() -> None:
    x = points(4)
    with pytest.raises(ValueError, match=r"cmmd: x is \[16\], expected \[rows, d\]"):
        cmmd(x[0], x)
    with pytest.raises(ValueError, match=r"cmmd: y is \[1, 16\], expected .* at least 2 rows"):
        cmmd(x, x[:1])
    with pytest.raises(ValueError, match="expected the same d"):
        cmmd(x, x[:, :3])
    with pytest.raises(ValueError, match="cmmd: sigma is 0, expected more than 0"):
        cmmd(x, x, sigma=0)
