# SPDX-License-Identifier: Apache-2.0
"""Mean field where the host says how many positions are to be found, so that it need not wait."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import GridWeights, LowRank, mrf_gathered, mrf_likeliest, mrf_mean_field

pytestmark = pytest.mark.usefixtures("poisoned_empty")

Unwaiting = Callable[[], AbstractContextManager[None]]
HEIGHT, WIDTH, V = 3, 5, 12
N = HEIGHT * WIDTH


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _known(counts: list[int], seed: int = 1) -> Tensor:
    """Labels, and as many unknown positions in each picture."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(len(counts), N, generator=generator).argsort(1).argsort(1)
    known = torch.randint(0, V, (len(counts), N), generator=generator)
    return known.masked_fill(order < torch.tensor(counts)[:, None], -1)


def _matrix(table: Tensor) -> Tensor:
    """The matrix of a table of offsets."""
    kh, kw = table.shape
    matrix = torch.zeros(N, N)
    for i in range(N):
        for j in range(N):
            y, x = j // WIDTH - i // WIDTH + kh // 2, j % WIDTH - i % WIDTH + kw // 2
            if 0 <= y < kh and 0 <= x < kw:
                matrix[i, j] = table[y, x]
    return matrix


WHOLE, WINDOW = _normal(5, 9, seed=2) / 4, _normal(3, 1, seed=3)
DENSE, LABELS = _normal(N, N, seed=4) / 4, _normal(V, V, seed=5) / 2
FACTORS = _normal(V, 3, seed=6) / 2, _normal(V, 3, seed=7) / 2
SPARSE = torch.where(DENSE > 0.2, DENSE, 0)

# What is given, by functions of a device, and as matrices.
PAIRS: dict[str, tuple[Callable[[torch.device], Tensor | GridWeights], Tensor]] = {
    "dense": (lambda device: DENSE.to(device), DENSE),
    "whole grid": (lambda device: GridWeights(WHOLE.to(device), HEIGHT, WIDTH), _matrix(WHOLE)),
    "window": (lambda device: GridWeights(WINDOW.to(device), HEIGHT, WIDTH), _matrix(WINDOW)),
    "csr": (lambda device: SPARSE.to_sparse_csr().to(device), SPARSE),
}
OF_LABELS: dict[str, tuple[Callable[[torch.device], Tensor | LowRank | float], Tensor]] = {
    "dense": (lambda device: LABELS.to(device), LABELS),
    "low rank": (
        lambda device: LowRank(*(x.to(device) for x in FACTORS)), FACTORS[0] @ FACTORS[1].T
    ),
    "number": (lambda _: 0.7, 0.7 * torch.eye(V)),
    "tensor": (lambda device: torch.tensor(-1.3, device=device), -1.3 * torch.eye(V)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("labels", OF_LABELS)
@pytest.mark.parametrize("pairs", PAIRS)
def test_it_is_that_of_the_reference(
    pairs: str, labels: str, device: torch.device, unwaiting: Unwaiting
) -> None:
    """Also where pictures have fewer, all, or none of their positions to find."""
    unary = 2 * _normal(4, N, V)
    w_s, w_c = PAIRS[pairs][0](device), OF_LABELS[labels][0](device)
    for counts, unknown in (([6, 6, 6, 6], 6), ([3, 0, 7, 1], 9), ([15, 2, 4, 15], 40)):
        known = _known(counts)
        for damping in (0.0, 0.3):
            options = {"iterations": 3, "damping": damping, "temperature": 1.2}
            given = unary.to(device), w_s, w_c
            told = {"known": known.to(device), "unknown": unknown}
            with unwaiting():
                ours = mrf_mean_field(*given, **told, **options)
                likeliest = mrf_likeliest(*given, **told, **options)
            truth = reference.mrf_mean_field(
                unary.double(), PAIRS[pairs][1].double(), OF_LABELS[labels][1].double(),
                known=known, **options,
            )  # fmt: skip
            torch.testing.assert_close(ours.cpu().double(), truth, rtol=0, atol=3e-5)
            assert torch.equal(likeliest, ours.argmax(-1))


def test_bfloat16_label_weights(device: torch.device, unwaiting: Unwaiting) -> None:
    unary, known, w_c = _normal(2, N, 16), _known([9, 4]), (_normal(16, 16, seed=8) / 4).bfloat16()
    given = unary.to(device), DENSE.to(device), w_c.to(device)
    place = known.to(device)
    with unwaiting():
        ours = mrf_mean_field(*given, known=place, unknown=9)
    truth = reference.mrf_mean_field(unary.double(), DENSE.double(), w_c.double(), known=known)
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=0, atol=0.02)


def test_it_changes_nothing(device: torch.device) -> None:
    """A GPU that is not told asks; in a graph it takes every position."""
    unary, known = _normal(3, N, V).to(device), _known([5, 8, 0]).to(device)
    field = functools.partial(mrf_mean_field, unary, DENSE.to(device), LABELS.to(device))
    told = field(known=known, unknown=8)
    torch.testing.assert_close(told, field(known=known))
    torch.testing.assert_close(told, field(known=known, unknown=N))
    nothing = field(known=known.clamp_min(0), unknown=0)
    assert torch.equal(nothing.argmax(-1), known.clamp_min(0))
    assert (nothing.amax(-1) == 1).all()


def test_empty(device: torch.device) -> None:
    unary, known = torch.empty(0, N, V, device=device), torch.empty(0, N, device=device).long()
    for unknown in (None, 3):
        q = mrf_mean_field(unary, DENSE.to(device), LABELS.to(device), known=known, unknown=unknown)
        assert q.shape == (0, N, V)


def test_while_a_graph_is_captured(
    device: torch.device, kernels: str, unwaiting: Unwaiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "cpu":
        pytest.skip("there are no graphs")
    monkeypatch.setattr(mrf_gathered, "_is_capturing", lambda: True)
    unary, known = _normal(2, N, V), _known([5, 8])
    given = unary.to(device), DENSE.to(device), LABELS.to(device)
    place = known.to(device)
    with unwaiting():
        q = mrf_mean_field(*given, known=place)
    truth = reference.mrf_mean_field(unary.double(), DENSE.double(), LABELS.double(), known=known)
    torch.testing.assert_close(q.cpu().double(), truth, rtol=0, atol=3e-5)


def test_scores_of_known_positions_are_not_looked_at(device: torch.device) -> None:
    unary, known = _normal(2, N, V), _known([5, 8])
    spoilt = unary.masked_fill((known >= 0)[..., None], torch.nan)
    clean, other = (
        mrf_mean_field(x.to(device), DENSE.to(device), LABELS.to(device), known=known.to(device),
                       unknown=9)
        for x in (unary, spoilt)
    )  # fmt: skip
    assert torch.equal(clean, other)


def test_more_than_was_said(device: torch.device, kernels: str) -> None:
    given = _normal(2, N, V).to(device), DENSE.to(device), LABELS.to(device)
    known = _known([5, 8]).to(device)
    if kernels == "cpu":
        with pytest.raises(ValueError, match="unknown is 7, but 8 positions of a picture are"):
            mrf_mean_field(*given, known=known, unknown=7)
        return
    q, truth = (mrf_mean_field(*given, known=known, unknown=unknown) for unknown in (7, 8))
    torch.testing.assert_close(q[0], truth[0])
    assert torch.equal(q[1].isnan().any(-1), known[1] < 0)


@pytest.mark.parametrize(("unknown", "with_known"), [(-1, True), (3, False)])
def test_errors(unknown: int, with_known: bool, device: torch.device) -> None:
    given = _normal(1, N, V).to(device), DENSE.to(device), 1.0
    known = _known([3]).to(device) if with_known else None
    for op in (mrf_mean_field, mrf_likeliest):
        with pytest.raises(ValueError, match=f"unknown is {unknown}, expected at least 0 and"):
            op(*given, known=known, unknown=unknown)


def test_gradient(device: torch.device) -> None:
    unary, w_s = _normal(2, N, V).to(device), DENSE.to(device)
    known = _known([5, 8]).to(device)
    grads = []
    for unknown in (None, 9):
        leaf = unary.clone().requires_grad_()
        q = mrf_mean_field(leaf, w_s, LABELS.to(device), known=known, unknown=unknown)
        q.square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
