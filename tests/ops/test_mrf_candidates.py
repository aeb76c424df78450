# SPDX-License-Identifier: Apache-2.0
"""Scores that rule most labels out, and labels found in several rounds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import LowRank, mrf_likeliest, mrf_mean_field

B, N, V = 3, 10, 200


def _field(rank: int) -> tuple[Tensor, LowRank]:
    random = torch.Generator().manual_seed(rank)
    w_s, a, b = (torch.randn(s, generator=random) for s in ((N, N), (V, rank), (V, rank)))
    return w_s / N**0.5, LowRank(a / rank**0.5, b / rank**0.5)


def _scores(most: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of one to `most` labels a row, or of all where known; and what is known."""
    random = torch.Generator().manual_seed(seed)
    f = 2 * torch.randn(B, N, V, generator=random)
    known = torch.randint(-V, V, (B, N), generator=random).clamp_min(-1)
    order = torch.rand(B, N, V, generator=random).argsort(-1)
    kept = order < torch.randint(1, most + 1, (B, N, 1), generator=random)
    return f.masked_fill(~kept & (known < 0)[..., None], -torch.inf), known


@pytest.mark.parametrize("rank", [1, 5, 16, 33])
@pytest.mark.parametrize("most", [1, 3, 6, 7, 200])  # up to 6 of 200 are worth a list
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_most_labels_ruled_out(rank: int, most: int, temperature: float) -> None:
    (f, known), (w_s, w_c) = _scores(most), _field(rank)
    options = {"known": known, "iterations": 3, "temperature": temperature}
    q = mrf_mean_field(f, w_s, w_c, **options)
    matrix = w_c.a.double() @ w_c.b.double().T
    truth = reference.mrf_mean_field(f.double(), w_s.double(), matrix, **options)
    torch.testing.assert_close(q.double(), truth, rtol=0, atol=2e-5)
    assert torch.equal(mrf_likeliest(f, w_s, w_c, **options), q.argmax(-1))
    everything = mrf_mean_field(f, w_s, w_c, iterations=3, temperature=temperature)
    whole = reference.mrf_mean_field(
        f.double(), w_s.double(), matrix, iterations=3, temperature=temperature
    )
    torch.testing.assert_close(everything.double(), whole, rtol=0, atol=2e-5)


def test_few_candidates_of_rows_alone() -> None:
    """One row with many is enough for none to be looked at as a list: the results are the same."""
    (f, _), (w_s, w_c) = _scores(4), _field(8)
    few = mrf_mean_field(f, w_s, w_c)
    wide = f.clone()
    wide[0, 0] = -1e30
    wide[0, 0, f[0, 0].isfinite()] = f[0, 0, f[0, 0].isfinite()]
    torch.testing.assert_close(mrf_mean_field(wide, w_s, w_c), few, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_what_is_no_score_is_refused_among_candidates(bad: float | None) -> None:
    w_s, w_c = _field(4)
    f = torch.full((1, N, V), -torch.inf)
    f[..., 7] = 0
    f[0, 6, 7] = -torch.inf if bad is None else bad
    for op in (mrf_mean_field, mrf_likeliest):
        with pytest.raises(ValueError, match="unary of position 6 has a NaN, an infinity"):
            op(f, w_s, w_c)


def _in_rounds(f: Tensor, w_s: Tensor, matrix: Tensor, known: Tensor, rounds: int) -> Tensor:
    """`mrf_likeliest` in rounds, a picture and a position at a time."""
    known = known.clone()
    for picture in range(len(f)):
        free = [i for i in range(N) if known[picture, i] < 0 and f[picture, i].isfinite().sum() > 1]
        settled = 0
        for done in range(1, rounds):
            q = reference.mrf_mean_field(
                f[picture : picture + 1], w_s, matrix, known=known[picture : picture + 1]
            )[0]
            target = -(-(settled + len(free)) * done // rounds)
            free.sort(key=lambda i: -float(q[i].max()))
            for i in free[: target - settled]:
                known[picture, i] = int(q[i].argmax())
            free, settled = free[target - settled :], target
    return reference.mrf_mean_field(f, w_s, matrix, known=known).argmax(-1)


@pytest.mark.parametrize("rounds", [2, 3, 8, 30])
@pytest.mark.parametrize("most", [1, 4, 200])
@pytest.mark.parametrize("low_rank", [True, False])
def test_rounds(rounds: int, most: int, low_rank: bool, device: torch.device) -> None:
    (f, known), (w_s, w_c) = _scores(most, seed=rounds), _field(4)
    known[2, :] = known[2].clamp_min(0)  # nothing to find there
    matrix = w_c.a @ w_c.b.T
    expected = _in_rounds(f.double(), w_s.double(), matrix.double(), known, rounds)
    labels = LowRank(*(part.to(device) for part in w_c)) if low_rank else matrix.to(device)
    found = mrf_likeliest(
        f.to(device), w_s.to(device), labels, known=known.to(device), rounds=rounds
    )
    assert torch.equal(found.cpu(), expected)


def test_rounds_refuse() -> None:
    w_s, w_c = _field(4)
    with pytest.raises(ValueError, match="mrf_likeliest: rounds is 0, expected at least 1"):
        mrf_likeliest(torch.zeros(1, N, V), w_s, w_c, rounds=0)


def test_same_candidates_on_every_instruction_set(run_python: Callable[..., str]) -> None:
    program = """
import torch
from t2p_fast import build_info, reference
from t2p_fast.ops import LowRank, mrf_mean_field
g = torch.Generator().manual_seed(0)
f, w_s = torch.randn(2, 30, 333, generator=g), 0.2 * torch.randn(30, 30, generator=g)
f = f.masked_fill(torch.rand(f.shape, generator=g).argsort(-1) > 5, -torch.inf)
a, b = torch.randn(2, 333, 19, generator=g)
truth = reference.mrf_mean_field(f.double(), w_s.double(), a.double() @ b.double().T / 5)
assert float((mrf_mean_field(f, w_s, LowRank(a / 5, b)) - truth).abs().max()) < 3e-5
print(build_info()["isa"])
"""
    from t2p_fast import build_info

    levels = build_info()["isa_built"]
    for isa in levels[: levels.index(build_info()["isa"]) + 1]:
        assert run_python(program, T2P_ISA=isa).strip() == isa
