# SPDX-License-Identifier: Apache-2.0
"""Mean field with a window of the grid against the float64 reference."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import GridWeights, grid_neighbours, mrf_likeliest, mrf_mean_field
from t2p_fast.ops.mrf_graph import dense_grid
from t2p_fast.ops.mrf_window import window_of

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _gaussian(kh: int, kw: int, middle: float = 0.0) -> Tensor:
    y, x = torch.meshgrid(torch.arange(kh) - kh // 2, torch.arange(kw) - kw // 2, indexing="ij")
    table = 0.3 * torch.exp(-(y.square() + x.square()) / (2 * 1.5**2))
    table[kh // 2, kw // 2] = middle
    return table


def _table(kind: str, kh: int, kw: int, seed: int) -> Tensor:
    if kind == "gaussian":
        return _gaussian(kh, kw)
    if kind == "mirrored":  # symmetric, of full rank
        table = _random(kh, kw, seed=seed).abs()
        table = table + table.flip(0) + table.flip(1) + table.flip(0, 1)
        return table / table.sum()
    table = _random(kh, kw, seed=seed) / math.sqrt(kh * kw)
    if kind == "sparse":
        table[_random(kh, kw, seed=seed + 1) > 0] = 0
    return table


def _truth(unary: Tensor, w_s: GridWeights, w_c: float, **options: object) -> Tensor:
    table, height, width = w_s
    matrix = dense_grid(table.double(), height, width)
    labels = w_c * torch.eye(unary.shape[2], dtype=torch.float64)
    return reference.mrf_mean_field(unary.double(), matrix, labels, **options)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["gaussian", "mirrored", "free", "sparse"]),
    kh=st.sampled_from([1, 3, 5, 7, 9]),
    kw=st.sampled_from([1, 3, 5, 7, 9, 11]),
    b=st.integers(1, 3),
    h=st.integers(1, 7),
    w=st.integers(1, 19),
    v=st.sampled_from([1, 2, 7, 8, 16, 31, 32, 33, 64, 65, 130]),
    w_c=st.sampled_from([1.0, -0.6, 2.5]),
    share=st.sampled_from([None, 0.0, 0.5, 1.0]),
    damping=st.sampled_from([0.0, 0.0, 0.4]),
    temperature=st.sampled_from([0.7, 1.0, 3.0]),
    iterations=st.integers(1, 6),
    seed=st.integers(0, 2**20),
)
def test_is_that_of_the_reference(
    kind: str, kh: int, kw: int, b: int, h: int, w: int, v: int, w_c: float, share: float | None,
    damping: float, temperature: float, iterations: int, seed: int,
) -> None:  # fmt: skip
    """Windows larger than the grid, and labels that fill no strip, among them."""
    unary = 2 * _random(b, h * w, v, seed=seed)
    if v > 1:
        unary[_random(b, h * w, v, seed=seed + 1) > 1.5] = -math.inf
        unary[..., 0] = 0.5
    w_s = GridWeights(_table(kind, kh, kw, seed), h, w)
    known = None
    if share is not None:
        generator = torch.Generator().manual_seed(seed)
        known = torch.randint(0, v, (b, h * w), generator=generator)
        known[torch.rand(b, h * w, generator=generator) >= share] = -1
    options = {
        "iterations": iterations, "damping": damping, "temperature": temperature, "known": known,
    }  # fmt: skip
    ours = mrf_mean_field(unary, w_s, w_c, **options)
    truth = _truth(unary, w_s, w_c, **options)
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.sum(-1), torch.ones(b, h * w), rtol=0, atol=1e-5)
    ruled_out = torch.isneginf(unary)
    if known is not None:
        fixed = known >= 0
        one_hot = torch.nn.functional.one_hot(known.clamp_min(0), v).float()
        assert torch.equal(ours[fixed], one_hot[fixed])
        ruled_out = ruled_out & ~fixed[..., None]
    assert (ours[ruled_out] == 0).all()


@pytest.mark.parametrize(("kh", "kw"), [(3, 3), (3, 5), (5, 5), (7, 3), (9, 9)])
@pytest.mark.parametrize("middle", [0.0, 0.3, -1.0, 0.123])
def test_gaussians_are_taken_apart(kh: int, kw: int, middle: float) -> None:
    table = _gaussian(kh, kw, middle)
    window = window_of(table, 8, 8, 1.3, 1.0)
    assert window is not None
    assert window.down is not None
    assert window.across[0, kw // 2] == 1
    again = window.down[:, None].double() @ window.across.double()
    again[kh // 2, kw // 2] += window.middle
    # Three roundings: of the weights as they came, and of both factors.
    torch.testing.assert_close(again, 1.3 * table.double(), rtol=0, atol=4e-7 * 1.3 * 0.3)


@pytest.mark.parametrize(
    "table",
    [
        grid_neighbours(2, 2).table,  # four weights are fewer than three and three
        _gaussian(1, 9),
        torch.tensor([[1.0, 2, 1], [2, 0, 2], [1, 2, 1.001]]) / 8,
        torch.tensor([[1.0, 2, 1], [2, 0, 2], [2, 4, 2]]) / 8,
        torch.zeros(3, 3),
        torch.tensor([1.0, 2, 1])[:, None] @ torch.tensor([[1.0, 2, 0, 2, 1]]) / 20,
    ],
    ids=["neighbours", "line", "nearly", "unlike in the mirror", "zero", "nothing in the middle"],
)
def test_other_windows_are_not(table: Tensor) -> None:
    window = window_of(table, 8, 8, 1.0, 1.0)
    assert window is not None
    assert window.down is None
    assert torch.equal(window.across, table)
    unary = 3 * _random(1, 64, 20)
    w_s = GridWeights(table, 8, 8)
    ours = mrf_mean_field(unary, w_s, 1.0)
    torch.testing.assert_close(ours.double(), _truth(unary, w_s, 1.0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("w_c", [1.0, 20.0, -20.0, 60.0, 1e4, -1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_weights_of_any_size(w_c: float, temperature: float) -> None:
    """Far beyond what a softmax without its maximum can bear, or close to it."""
    w_s = GridWeights(_gaussian(5, 5), 6, 7)  # of some 3.6 together
    has_kernel = window_of(w_s.table, 6, 7, w_c, temperature) is not None
    assert has_kernel == (abs(w_c) * float(w_s.table.sum()) < 41 * temperature)
    # Scores so clear that the iteration doesn't amplify rounding without end.
    unary = 30 * _random(2, 42, 40, seed=3) * max(1.0, abs(w_c))
    ours = mrf_mean_field(unary, w_s, w_c, iterations=3, temperature=temperature)
    truth = _truth(unary, w_s, w_c, iterations=3, temperature=temperature)
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-4)


def test_messages_close_to_the_bound() -> None:
    """All neighbours agree on one label, or on every but one, as much as the kernel takes."""
    table = torch.full((3, 3), 40.0 / 9)
    for sign in (1.0, -1.0):
        w_s = GridWeights(sign * table, 9, 9)
        assert window_of(w_s.table, 9, 9, 1.0, 1.0) is not None
        unary = torch.zeros(1, 81, 33)
        unary[..., 5] = 35.0
        unary[:, 40] = 0
        ours = mrf_mean_field(unary, w_s, 1.0, iterations=2)
        truth = _truth(unary, w_s, 1.0, iterations=2)
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["gaussian", "free"])
@pytest.mark.parametrize(("b", "v"), [(1, 300), (2, 33), (5, 64), (1, 1100)])
def test_threads_change_nothing(kind: str, b: int, v: int) -> None:
    unary, w_s = 3 * _random(b, 60, v), GridWeights(_table(kind, 5, 3, 1), 6, 10)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results += [mrf_mean_field(unary, w_s, 1.0) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0].double(), _truth(unary, w_s, 1.0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    unary, w_s = 3 * _random(2, 20, 33), GridWeights(_gaussian(3, 3).to(dtype), 4, 5)
    half = mrf_mean_field(unary.to(dtype), w_s, 1.0)
    assert half.dtype == dtype
    wide = mrf_mean_field(unary.to(dtype).float(), w_s._replace(table=w_s.table.float()), 1.0)
    assert torch.equal(half, wide.to(dtype))


def test_strided_scores_and_labels() -> None:
    unary, known = 3 * _random(33, 20, 2), torch.full((20, 2), -1)
    known[3] = 4
    w_s = GridWeights(_gaussian(3, 3), 4, 5)
    strided = mrf_mean_field(unary.permute(2, 1, 0), w_s, 1.0, known=known.T)
    dense = mrf_mean_field(
        unary.permute(2, 1, 0).contiguous(), w_s, 1.0, known=known.T.contiguous()
    )
    assert torch.equal(strided, dense)
    assert torch.equal(
        mrf_likeliest(unary.permute(2, 1, 0), w_s, 1.0, known=known.T), dense.argmax(-1)
    )


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("v", [3, 70])
@pytest.mark.parametrize("b", [1, 3])
def test_bad_scores(number: float, v: int, b: int) -> None:
    """The position is named, and known ones' scores do not matter."""
    unary, w_s = torch.zeros(b, 20, v), GridWeights(_gaussian(3, 3), 4, 5)
    unary[-1, 7] = number
    unary[-1, 13] = number
    with pytest.raises(ValueError, match="mrf_mean_field: unary of position 7 has a NaN"):
        mrf_mean_field(unary, w_s, 1.0)
    known = torch.full((b, 20), -1)
    known[-1, 7] = 1
    with pytest.raises(ValueError, match="mrf_mean_field: unary of position 13 has a NaN"):
        mrf_mean_field(unary, w_s, 1.0, known=known)
    known[-1, 13] = 0
    q = mrf_mean_field(unary, w_s, 1.0, known=known)
    assert torch.isfinite(q).all()
    known[0, 0] = v
    with pytest.raises(ValueError, match=f"mrf_mean_field: known holds label {v}, expected less"):
        mrf_mean_field(unary, w_s, 1.0, known=known)


def test_weights_that_are_no_numbers() -> None:
    unary, table = _random(1, 9, 5), torch.zeros(3, 3)
    table[0, 0] = math.nan
    assert window_of(table, 3, 3, 1.0, 1.0) is None
    assert mrf_mean_field(unary, GridWeights(table, 3, 3), 1.0).isnan().any()


def test_no_positions() -> None:
    w_s = GridWeights(_gaussian(3, 3), 1, 0)
    assert mrf_mean_field(torch.zeros(2, 0, 5), w_s, 1.0).shape == (2, 0, 5)
    w_s = GridWeights(_gaussian(3, 3), 2, 2)
    assert mrf_mean_field(torch.zeros(0, 4, 5), w_s, 1.0).shape == (0, 4, 5)


def test_the_table_may_change() -> None:
    """What is kept of a window is found by its weights, not by the tensor."""
    unary, table = 3 * _random(1, 20, 33), _gaussian(3, 3)
    w_s = GridWeights(table, 4, 5)
    before = mrf_mean_field(unary, w_s, 1.0)
    table.mul_(-1)
    after = mrf_mean_field(unary, w_s, 1.0)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after.double(), _truth(unary, w_s, 1.0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("plain", [True, False])
def test_with_and_without_the_dispatcher(plain: bool) -> None:
    unary, w_s = 3 * _random(1, 20, 33), GridWeights(_gaussian(3, 3), 4, 5)
    q = mrf_mean_field(unary.requires_grad_(not plain), w_s, 1.0)
    assert q.requires_grad != plain
    torch.testing.assert_close(
        q.detach().double(), _truth(unary.detach(), w_s, 1.0), rtol=0, atol=2e-6
    )
