# SPDX-License-Identifier: Apache-2.0
"""Fields are the same whatever torch makes tensors of and where, if it isn't told."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from t2p_fast import ops
from t2p_fast.ops import LowRank, grid_neighbours
from t2p_fast.ops.mrf_graph import _all_pairs, _edges_of, grid_structure
from t2p_fast.ops.mrf_window import _window_of


def _numbers(*shape: int) -> Tensor:
    random = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")


UNARY, W_S, LOW = _numbers(2, 9, 40), _numbers(9, 9), LowRank(_numbers(40, 3), _numbers(40, 3))
SYMMETRIC, GRID = W_S + W_S.T, grid_neighbours(3, 3, weight=0.123)
KNOWN = torch.tensor([[1, -1, 3, -1, -1, -1, -1, -1, 2]] * 2)
RULED_OUT = UNARY.where(UNARY.topk(1, -1).values <= UNARY, -torch.inf)

FIELDS: dict[str, Callable[[], Any]] = {
    "low rank": lambda: ops.mrf_mean_field(UNARY, W_S, LOW),
    "low rank, known": lambda: ops.mrf_mean_field(UNARY, W_S, LOW, known=KNOWN),
    "low rank, one candidate": lambda: ops.mrf_mean_field(RULED_OUT, W_S, LOW),
    "rounds": lambda: ops.mrf_likeliest(UNARY, W_S, LOW, known=KNOWN, rounds=3),
    "rounds, matrix": lambda: ops.mrf_likeliest(UNARY, W_S, _numbers(40, 40), rounds=3),
    "window": lambda: ops.mrf_mean_field(UNARY, GRID, 1.0),
    "grid": lambda: ops.mrf_mean_field(UNARY, GRID, _numbers(40, 40)),
    "icm": lambda: ops.mrf_icm(UNARY, SYMMETRIC, 1.0),
    "belief propagation": lambda: ops.mrf_bp(UNARY, GRID, 1.0),
    "alpha-expansion": lambda: ops.mrf_alpha_expansion(UNARY, GRID, 1.0),
    "energy": lambda: ops.mrf_energy(UNARY, GRID, 1.0, UNARY.argmax(-1)),
}


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    for function in (_window_of, _edges_of, _all_pairs, grid_structure):
        function.cache_clear()
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("field", FIELDS)
def test_default_dtype_and_device(field: str) -> None:
    if field == "alpha-expansion":
        pytest.importorskip("scipy")
    expected = FIELDS[field]()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        torch.testing.assert_close(FIELDS[field](), expected, rtol=0, atol=0)
        assert grid_neighbours(2, 2).table.dtype == torch.float32
    torch.set_default_dtype(torch.float32)
    for function in (_window_of, _edges_of, _all_pairs, grid_structure):
        function.cache_clear()
    with torch.device("meta"):
        torch.testing.assert_close(FIELDS[field](), expected, rtol=0, atol=0)
    torch.testing.assert_close(FIELDS[field](), expected, rtol=0, atol=0)
