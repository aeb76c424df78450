# SPDX-License-Identifier: Apache-2.0
"""Alpha-expansion: energies fall, two labels are solved exactly, other costs are refused."""

import pytest
import torch
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import (
    codebook_labels,
    grid_neighbours,
    mrf_alpha_expansion,
    mrf_bp,
    mrf_energy,
    mrf_icm,
)
from t2p_fast.ops.mrf_graph import dense_grid

pytest.importorskip("scipy")
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_two_labels_are_solved_exactly(seed: int) -> None:
    """One cut over two labels is the global minimum (Greig, Porteous and Seheult, 1989)."""
    unary, grid = _random(2, 9, 2, seed=seed), grid_neighbours(3, 3, weight=0.6)
    found = mrf_alpha_expansion(unary, grid, 1.0)
    matrix = dense_grid(*grid).double()
    for picture in range(2):
        eye = torch.eye(2, dtype=torch.float64)
        _, best = reference.mrf_marginals(unary[picture].double(), matrix, eye)
        assert torch.equal(found[picture], best)


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("metric", ["potts", "codes"])
def test_energy_never_rises(connectivity: int, metric: str) -> None:
    unary = _random(2, 30, 8)
    grid = grid_neighbours(5, 6, connectivity=connectivity, weight=0.5)
    w_c = (
        codebook_labels(_random(8, 3, seed=1), scale=1.0, truncation=2.0)
        if metric == "codes"
        else 1.0
    )
    x = torch.randint(0, 8, (2, 30), generator=torch.Generator().manual_seed(0))
    before = mrf_energy(unary, grid, w_c, x)
    for _ in range(3):
        x = mrf_alpha_expansion(unary, grid, w_c, init=x, cycles=1)
        after = mrf_energy(unary, grid, w_c, x)
        assert (after <= before + 1e-5).all()
        before = after
    # No single position can do better alone either: expansion moves hold those moves.
    assert torch.equal(mrf_icm(unary, grid, w_c, init=x), x)


def test_reaches_the_energies_of_the_libraries() -> None:
    """16 x 16 Potts, 64 labels: PyMaxflow 44.85 and gco 45.04 on one such problem, BP below."""
    cost = torch.rand(2, 256, 64, generator=torch.Generator().manual_seed(0))
    grid, edges = grid_neighbours(16, 16, weight=0.1), 2 * 15 * 16 * 0.1
    energy = {
        name: float((mrf_energy(-cost, grid, 1.0, labels) + edges).mean())
        for name, labels in (
            ("cuts", mrf_alpha_expansion(-cost, grid, 1.0)),
            ("icm", mrf_icm(-cost, grid, 1.0)),
            ("bp", mrf_bp(-cost, grid, 1.0).argmax(-1)),
        )
    }
    assert energy["bp"] < energy["cuts"] < energy["icm"]
    assert energy["cuts"] < 46


def test_known_and_ruled_out_labels() -> None:
    unary, grid = _random(1, 30, 5), grid_neighbours(5, 6, weight=2.0)
    unary[0, 7, 1:] = -torch.inf
    known = torch.full((1, 30), -1)
    known[0, :4] = 3
    labels = mrf_alpha_expansion(unary, grid, 1.0, known=known)
    assert (labels[0, :4] == 3).all()
    assert int(labels[0, 7]) == 0
    assert mrf_alpha_expansion(unary[:0], grid, 1.0).shape == (0, 30)
    # What rules a known label out adds to every energy alike.
    ruled_out = unary.index_fill(1, torch.arange(4), -torch.inf)
    assert torch.equal(mrf_alpha_expansion(ruled_out.where(known[..., None] < 0, unary), grid, 1.0,
                                           known=known), labels)  # fmt: skip
    ruled_out[0, :4, 4] = 0.0
    assert torch.equal(mrf_alpha_expansion(ruled_out, grid, 1.0, known=known), labels)


def test_init_that_is_ruled_out_is_left() -> None:
    unary, grid = _random(1, 30, 5), grid_neighbours(5, 6, weight=0.5)
    unary[0, ::3, 1:3] = -torch.inf
    init = torch.ones(1, 30, dtype=torch.int64)
    labels = mrf_alpha_expansion(unary, grid, 1.0, init=init)
    assert unary.gather(2, labels[..., None]).isfinite().all()
    energies = [
        mrf_energy(unary, grid, 1.0, x) for x in (labels, mrf_alpha_expansion(unary, grid, 1.0))
    ]
    torch.testing.assert_close(*energies, rtol=0.02, atol=0.5)


def test_errors() -> None:
    unary, grid = _random(1, 30, 5), grid_neighbours(5, 6)
    learned = _random(5, 5)
    with pytest.raises(ValueError, match="-w_c is no metric: w_c"):
        mrf_alpha_expansion(unary, grid, learned + learned.T)
    with pytest.raises(ValueError, match="-w_c is no metric"):
        mrf_alpha_expansion(unary, grid, -1.0)
    with pytest.raises(ValueError, match="w_s holds -1, expected none below 0"):
        mrf_alpha_expansion(unary, grid_neighbours(5, 6, weight=-1.0), 1.0)
    with pytest.raises(ValueError, match="w_s must be symmetric"):
        mrf_alpha_expansion(unary, _random(30, 30), 1.0)
    with pytest.raises(ValueError, match="cycles is 0, expected at least 1"):
        mrf_alpha_expansion(unary, grid, 1.0, cycles=0)
    with pytest.raises(ValueError, match=r"init holds a label outside \[0, 5\)"):
        mrf_alpha_expansion(unary, grid, 1.0, init=torch.full((1, 30), -1))
