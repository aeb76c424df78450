# SPDX-License-Identifier: Apache-2.0
"""Codebooks of which many codes lie close together, as those that nothing chooses do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2p_fast.ops import vq_nearest, vq_pack
from vq_cases import (
    METRICS,
    assert_nearest,
    assert_nearest_by,
    assert_same_for_any_number_of_threads,
    case_of,
)

SCALES = [0.3, 0.03, 1e-4, 1e-9, 1e-16, 1e-19, 1e-40, 0.0]


def crowded(n: int, k: int, d: int, scale: float, part: float, seed: int = 0) -> tuple[Tensor, ...]:
    """Rows of which some are in the crowd; a codebook with so large a part in it."""
    x, codebook = case_of(n, k, d, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    inside = torch.rand(k, generator=generator) < part
    center = 3 * torch.randn(d, generator=generator) * (seed % 2)
    codebook[inside] *= scale
    codebook += center
    x += center
    x[::5] = (x[::5] - center) * scale + center  # as the crowd
    x[1::7] = codebook[torch.arange(len(x[1::7])) * 11 % k]  # codes
    return x, codebook


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("part", [0.06, 0.6, 0.97, 1.0])
@pytest.mark.parametrize("scale", SCALES)
def test_nearest_is_exact_in_a_crowd(scale: float, part: float, metric: str) -> None:
    for n, k, d, seed in ((300, 1500, 20, 0), (40, 700, 8, 1), (130, 400, 65, 2), (90, 300, 3, 3)):
        x, codebook = crowded(n, k, d, scale, part, seed)
        indices, distance = vq_nearest(x, codebook, metric=metric, return_distance=True)
        packed = vq_pack(codebook, metric=metric)
        again = vq_nearest(x, codebook, metric=metric, return_distance=True, packed=packed)
        torch.testing.assert_close((indices, distance), again, rtol=0, atol=0)
        if metric == "l2":
            assert_nearest(x, codebook, indices, distance)
        else:
            assert_nearest_by(metric, x, codebook, indices, distance)


@settings(max_examples=60)
@given(
    n=st.integers(24, 200),
    k=st.integers(128, 700),
    d=st.integers(1, 40),
    scale=st.sampled_from(SCALES),
    part=st.floats(0.02, 1),
    magnitude=st.sampled_from([1e-30, 1.0, 1e10]),
    seed=st.integers(0, 2**20),
)
def test_nearest_is_exact_in_any_crowd(
    n: int, k: int, d: int, scale: float, part: float, magnitude: float, seed: int
) -> None:
    x, codebook = (magnitude * t for t in crowded(n, k, d, scale, part, seed))
    assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("part", [0.5, 1.0])
def test_the_first_of_equal_codes_wins(metric: str, part: float) -> None:
    x, codebook = case_of(100, 600, 12)
    equal = torch.rand(600, generator=torch.Generator().manual_seed(1)) < part
    equal[0] = False
    codebook[equal] = codebook[0] + 0.0
    codebook[0] *= -1  # not in the crowd
    first = int(equal.nonzero()[0])
    x[:50] = codebook[first] + 1e-3 * x[:50]
    for packed in (None, vq_pack(codebook, metric=metric)):
        found = vq_nearest(x, codebook, metric=metric, packed=packed)
        assert (found[:50] == first).all()
        assert not equal[found[50:]][found[50:] != first].any()


def test_zeros_of_both_signs_are_equal() -> None:
    x, codebook = case_of(64, 512, 16)
    codebook[100:] = 0.0
    codebook[101::2] = -0.0
    found = vq_nearest(0.01 * x, codebook)
    assert (found == 100).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_and_codes_not_finite(bad: float, metric: str) -> None:
    x, codebook = crowded(100, 600, 12, 1e-5, 0.6)
    x[3, 2] = x[50, 0] = bad
    codebook[5, 3] = codebook[77, 0] = bad
    indices, distance = vq_nearest(x, codebook, metric=metric, return_distance=True)
    rows = torch.tensor([3, 50])
    assert (indices[rows] == 0).all()
    assert distance[rows].isnan().all()
    finite = codebook.isfinite().all(1)
    assert finite[indices].sum() >= 98
    kept = x.isfinite().all(1)
    codes = finite.nonzero()[:, 0]
    best = vq_nearest(x[kept], codebook[codes], metric=metric)
    assert torch.equal(indices[kept], codes[best])


def test_codes_that_are_all_not_finite() -> None:
    x, codebook = case_of(50, 300, 6)
    indices, distance = vq_nearest(x, codebook * math.inf, return_distance=True)
    assert (indices == 0).all()
    assert distance.isinf().all()


def test_same_bits_for_any_number_of_threads() -> None:
    x, codebook = crowded(700, 900, 24, 1e-6, 0.7)
    assert_same_for_any_number_of_threads(lambda: vq_nearest(x, codebook, return_distance=True))
