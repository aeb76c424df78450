# SPDX-License-Identifier: Apache-2.0
"""Dead leaves."""

import numpy as np
import pytest

from t2p_fast.data.leaves import dead_leaves


def test_shape_and_reproducibility() -> None:
    for size in (16, 64, 70):
        picture = dead_leaves(3, size)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, dead_leaves(3, size))


def test_index_and_seed_make_another_picture() -> None:
    first = dead_leaves(0)
    assert not np.array_equal(first, dead_leaves(1))
    assert not np.array_equal(first, dead_leaves(0, seed=1))


def test_edges_are_as_rare_and_as_sharp_as_in_photographs() -> None:
    """Differences between neighbours have heavy tails: mostly small, now and then an edge."""
    pictures = np.stack([dead_leaves(i) for i in range(12)]).astype(np.float64).mean(-1)
    difference = np.diff(pictures, axis=2).ravel()
    kurtosis = np.mean((difference - difference.mean()) ** 4) / difference.var() ** 2
    assert kurtosis > 8  # 3 for noise
    assert np.mean(np.abs(difference) < 3) > 0.4
    assert np.mean(np.abs(difference) > 20) > 0.01


def test_leaves_cover_the_background() -> None:
    for index in range(4):
        assert len(np.unique(dead_leaves(index).reshape(-1, 3), axis=0)) > 20


def test_negative_index_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        dead_leaves(-1)
