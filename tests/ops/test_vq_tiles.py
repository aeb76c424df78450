# SPDX-License-Identifier: Apache-2.0
"""Sizes about the edges of AMX's tiles: groups of 16 rows, 64 channels, groups of 192 codes.

Tiles serve from 49 channels and 24 rows on; elsewhere these are sizes like any others.
"""

import math

import pytest
import torch

from t2p_fast.ops import vq_nearest, vq_pack
from vq_cases import METRICS, assert_nearest, assert_nearest_by, case_of

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("d", [48, 49, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("n", [24, 31, 33, 128, 145])
def test_nearest_by_tiles(n: int, d: int) -> None:
    for k in (64, 97, 192, 193, 500):
        x, codebook = case_of(n, k, d, seed=n + k)
        indices, distance = vq_nearest(x, codebook, return_distance=True)
        assert_nearest(x, codebook, indices, distance)
        again = vq_nearest(x, codebook, packed=vq_pack(codebook))
        assert torch.equal(again, indices)


@pytest.mark.parametrize("metric", METRICS)
def test_nearest_by_tiles_in_every_metric(metric: str) -> None:
    for n, k, d in ((40, 200, 50), (129, 700, 96)):
        x, codebook = case_of(n, k, d, seed=k)
        indices, distance = vq_nearest(x, codebook, metric=metric, return_distance=True)
        assert_nearest_by(metric, x, codebook, indices, distance)


def test_nearest_by_tiles_on_hard_data() -> None:
    """Far from the origin; rows of sizes of their own in one group; ties; codes that are NaN."""
    x, codebook = case_of(90, 400, 72)
    for far in (x + 1000, codebook[:90] + 1e-3 * x + 1000):
        indices, distance = vq_nearest(far, codebook + 1000, return_distance=True)
        assert_nearest(far, codebook + 1000, indices, distance)
    wide = x * 10 ** torch.linspace(-6, 6, 90)[:, None]
    assert_nearest(wide, codebook, *vq_nearest(wide, codebook, return_distance=True))
    twice = codebook.repeat(2, 1)
    assert torch.equal(vq_nearest(x, twice), vq_nearest(x, codebook))
    holes = codebook.clone()
    holes[vq_nearest(x, codebook).unique(), 5] = math.nan
    indices = vq_nearest(x, holes)
    left = (~holes.isnan().any(1)).nonzero()[:, 0]
    assert torch.equal(indices, left[vq_nearest(x, holes[left])])
