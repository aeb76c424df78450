# SPDX-License-Identifier: Apache-2.0
"""Mean field and the energy against the float64 reference, brute force and autograd."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import (
    GridWeights,
    LowRank,
    codebook_labels,
    grid_neighbours,
    mrf_energy,
    mrf_likeliest,
    mrf_mean_field,
    mrf_pack,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
]

Pair = Tensor | GridWeights
Label = Tensor | LowRank | float


def _matrix_of(w_s: Pair, n: int) -> Tensor:
    """The matrix of position weights, by looking every pair up."""
    if isinstance(w_s, Tensor):
        return w_s.to_dense().double()
    table, _, width = w_s
    kh, kw = table.shape
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            row, column = j // width - i // width + kh // 2, j % width - i % width + kw // 2
            if 0 <= row < kh and 0 <= column < kw:
                matrix[i, j] = table[row, column]
    return matrix


def _labels_of(w_c: Label, v: int) -> Tensor:
    if isinstance(w_c, LowRank):
        return w_c.a.double() @ w_c.b.double().T
    if isinstance(w_c, Tensor) and w_c.ndim == 2:
        return w_c.double()
    return float(w_c) * torch.eye(v, dtype=torch.float64)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _pairs(kind: str, h: int, w: int, seed: int) -> Pair:
    n = h * w
    scale = 1 / math.sqrt(n)
    if kind == "dense":
        return scale * _random(n, n, seed=seed)
    if kind == "csr":
        there = torch.rand(n, n, generator=torch.Generator().manual_seed(seed)) < 0.3
        return (scale * _random(n, n, seed=seed) * there).to_sparse_csr()
    if kind == "4":
        return grid_neighbours(h, w, weight=0.3)
    if kind == "8":
        return grid_neighbours(h, w, connectivity=8, weight=0.3, diagonal_weight=-0.1)
    size = (3, 5) if kind == "window" else (2 * h - 1, 2 * w - 1)
    return GridWeights(scale * _random(*size, seed=seed), h, w)


def _labels(kind: str, v: int, seed: int) -> Label:
    if kind == "dense":
        return 0.5 * _random(v, v, seed=seed + 1)
    if kind == "low rank":
        rank = 1 + seed % 9
        a, b = _random(v, rank, seed=seed + 2), _random(v, rank, seed=seed + 3)
        return LowRank(0.8 * a / rank**0.5, 0.5 * b)
    return 1.3


PAIRS = ["dense", "csr", "4", "8", "window", "offsets"]
LABELS = ["dense", "low rank", "potts"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.sampled_from(PAIRS),
    labels=st.sampled_from(LABELS),
    b=st.integers(1, 3),
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    v=st.sampled_from([1, 2, 15, 16, 17, 64, 65, 130]),
    share=st.sampled_from([None, 0.0, 0.5, 1.0]),
    damping=st.sampled_from([0.0, 0.4]),
    temperature=st.sampled_from([0.7, 1.0, 3.0]),
    iterations=st.integers(1, 6),
    seed=st.integers(0, 2**20),
)
def test_mean_field_is_that_of_the_reference(
    pairs: str, labels: str, b: int, h: int, w: int, v: int, share: float | None, damping: float,
    temperature: float, iterations: int, seed: int, device: torch.device,
) -> None:  # fmt: skip
    n = h * w
    unary = 2 * _random(b, n, v, seed=seed)
    w_s, w_c = _pairs(pairs, h, w, seed), _labels(labels, v, seed)
    known = None
    if share is not None:
        generator = torch.Generator().manual_seed(seed)
        known = torch.randint(0, v, (b, n), generator=generator)
        known[torch.rand(b, n, generator=generator) >= share] = -1
    options = {"iterations": iterations, "damping": damping, "temperature": temperature}
    ours = mrf_mean_field(
        unary.to(device), _to(w_s, device), _to(w_c, device),
        known=None if known is None else known.to(device), **options,
    ).cpu()  # fmt: skip
    truth = reference.mrf_mean_field(
        unary.double(), _matrix_of(w_s, n), _labels_of(w_c, v), known=known, **options
    )
    # Rounding of a message, passed on from iteration to iteration.
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=3e-5)
    torch.testing.assert_close(ours.sum(-1), torch.ones(b, n), rtol=0, atol=1e-5)
    if known is not None:
        fixed = known >= 0
        assert torch.equal(ours[fixed].argmax(-1), known[fixed])
        assert (ours[fixed].amax(-1) == 1).all()
    likeliest = mrf_likeliest(
        unary.to(device), _to(w_s, device), _to(w_c, device),
        known=None if known is None else known.to(device), **options,
    ).cpu()  # fmt: skip
    assert torch.equal(likeliest[known >= 0], known[known >= 0]) if known is not None else True
    reached = truth.gather(-1, likeliest[..., None])[..., 0]
    assert float((truth.amax(-1) - reached).amax()) <= 6e-5


@pytest.mark.parametrize("rank", [1, 256, 257])
def test_any_rank(rank: int) -> None:
    """Above 256 the message is made in full."""
    f, w_s = _random(2, 6, 40, seed=1), _random(6, 6, seed=2)
    w_c = LowRank(_random(40, rank, seed=3) / rank**0.5, 0.3 * _random(40, rank, seed=4))
    truth = reference.mrf_mean_field(f.double(), w_s.double(), _labels_of(w_c, 40))
    torch.testing.assert_close(mrf_mean_field(f, w_s, w_c).double(), truth, rtol=0, atol=3e-5)


def test_of_equals_the_likeliest_is_the_first() -> None:
    w_c = LowRank(torch.zeros(70, 2), torch.zeros(70, 2))
    f = torch.full((1, 3, 70), -1.0)
    f[0, 0, [5, 40, 69]] = f[0, 1, [69, 33]] = 2
    assert mrf_likeliest(f, torch.zeros(3, 3), w_c).tolist() == [[5, 33, 0]]


def test_likeliest_refuses_and_has_no_gradient() -> None:
    f, w_s = torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(2, 2)
    assert not mrf_likeliest(f, w_s, LowRank(torch.zeros(4, 1), torch.zeros(4, 1))).requires_grad
    with pytest.raises(ValueError, match="mrf_likeliest: iterations is 0, expected at least 1"):
        mrf_likeliest(f, w_s, 1.0, iterations=0)
    with pytest.raises(ValueError, match="unary of position 1 has a NaN"):
        mrf_likeliest(
            torch.tensor([[[0.0, 1.0], [float("nan"), 0.0]]]), w_s,
            LowRank(torch.zeros(2, 1), torch.zeros(2, 1)),
        )  # fmt: skip


def test_packing_label_weights_refuses() -> None:
    with pytest.raises(TypeError, match="mrf_pack: w_c must be bfloat16, got float32"):
        mrf_pack(torch.zeros(4, 4))
    with pytest.raises(
        ValueError, match=r"mrf_pack: w_c must be \[v, v\] with v >= 1, got \[4, 5\]"
    ):
        mrf_pack(torch.zeros(4, 5).bfloat16())
    f, w_s, w_c = torch.zeros(1, 2, 512), torch.zeros(2, 2), torch.zeros(512, 512).bfloat16()
    with pytest.raises(ValueError, match="mrf_mean_field: packed must be what mrf_pack returned"):
        mrf_mean_field(f, w_s, w_c, packed=torch.zeros(4))
    if mrf_pack(w_c).numel():
        with pytest.raises(ValueError, match="mrf_mean_field: packed must have"):
            mrf_mean_field(f, w_s, w_c, packed=torch.zeros(8, dtype=torch.uint8))


def _to(weights: Pair | Label, device: torch.device) -> Pair | Label:
    if isinstance(weights, float):
        return weights
    if isinstance(weights, Tensor):
        return weights.to(device)
    return type(weights)(*(t.to(device) if isinstance(t, Tensor) else t for t in weights))


def test_mean_field_in_bfloat16(device: torch.device, emulated: bool) -> None:
    """Low precision is asked for by the dtype of ``w_c``; probabilities within 2e-2."""
    n, v = (20, 64) if emulated else (64, 256)
    unary = 3 * _random(2, n, v).to(device)
    w_s, w_c = (0.1 * _random(k, k, seed=k).to(device) for k in (n, v))
    known = torch.where(_random(2, n, seed=3) > 0, 5, -1).to(device)
    for fixed in (None, known):
        low = mrf_mean_field(unary, w_s, w_c.bfloat16(), known=fixed)
        assert low.dtype == torch.float32
        truth = reference.mrf_mean_field(unary.double(), w_s.double(), w_c.double(), known=fixed)
        assert float((low - truth).abs().max()) < 2e-2
        assert float((low.argmax(-1) == truth.argmax(-1)).float().mean()) > 0.99
    half = mrf_mean_field(unary.bfloat16(), w_s, w_c)
    assert half.dtype == torch.bfloat16


def test_candidates_approach_the_whole(device: torch.device) -> None:
    unary = 6 * _random(1, 20, 300).to(device)
    w_s, w_c = (0.1 * _random(k, k, seed=k).to(device) for k in (20, 300))
    whole = mrf_mean_field(unary, w_s, w_c)
    errors = [
        float((mrf_mean_field(unary, w_s, w_c, candidates=k) - whole).abs().max())
        for k in (2, 30, 300)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_mean_field_finds_marginals_of_the_energy() -> None:
    """For weak pairs the fixed point is close to the marginals that brute force gives."""
    unary = _random(1, 4, 3).double()
    w_s, w_c = 0.2 * _random(4, 4, seed=1).double(), _random(3, 3, seed=2).double()
    w_s, w_c = (w_s + w_s.T) / 2, (w_c + w_c.T) / 2
    w_s.fill_diagonal_(0)
    marginals, _ = reference.mrf_marginals(unary[0], w_s, w_c)
    q = mrf_mean_field(unary.float(), w_s.float(), w_c.float(), iterations=50)
    error = float((q[0] - marginals).abs().max())
    alone = unary.softmax(-1)[0]
    assert error < 0.15 * float((alone - marginals).abs().max())


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("damped", [False, True])
def test_gradients_are_those_of_the_reference(
    pairs: str, labels: str, damped: bool, device: torch.device
) -> None:
    h, w, v = 3, 4, 6
    n = h * w
    options = {"damping": 0.3, "temperature": 1.5} if damped else {}
    known = torch.where(_random(2, n, seed=7) > 0.7, 2, -1) if damped else None
    grad = _random(2, n, v, seed=8)
    unary, w_s, w_c = _random(2, n, v), _pairs(pairs, h, w, 1), _labels(labels, v, 1)
    found = {}
    for name, dtype in (("ours", torch.float32), ("truth", torch.float64)):
        f = unary.to(dtype, copy=True).requires_grad_()
        values = w_s.table if isinstance(w_s, GridWeights) else w_s.to_dense()
        values = values.to(dtype, copy=True).requires_grad_()
        parts = list(w_c) if isinstance(w_c, LowRank) else [torch.as_tensor(w_c)]
        parts = [p.to(dtype, copy=True).requires_grad_() for p in parts]
        if name == "ours":
            place = known if known is None else known.to(device)
            pair: Pair = values.to(device)
            if isinstance(w_s, GridWeights):
                pair = GridWeights(pair, h, w)
            elif w_s.layout == torch.sparse_csr:
                entries = values[w_s.to_dense() != 0]
                pair = torch.sparse_csr_tensor(
                    w_s.crow_indices(), w_s.col_indices(), entries, (n, n), check_invariants=True
                ).to(device)
            label = LowRank(*(p.to(device) for p in parts)) if len(parts) > 1 else parts[0]
            if len(parts) == 1:
                label = label.to(device)
            q = mrf_mean_field(f.to(device), pair, label, known=place, **options)
        else:
            if isinstance(w_s, GridWeights):
                pair = torch.zeros(n, n, dtype=dtype)
                marks = GridWeights(torch.arange(1.0, values.numel() + 1).view(values.shape), h, w)
                index = _matrix_of(marks, n).long()
                pair = torch.where(index > 0, values.flatten()[index - 1], pair)
            else:
                pair = values
            label = parts[0] @ parts[1].T if len(parts) > 1 else parts[0]
            label = label * torch.eye(v, dtype=dtype) if label.ndim == 0 else label
            q = reference.mrf_mean_field(f, pair, label, known=known, **options)
        (q * grad.to(q)).sum().backward()
        gradient = values.grad
        if isinstance(w_s, Tensor) and w_s.layout == torch.sparse_csr:
            gradient = gradient * (w_s.to_dense() != 0)
        found[name] = [f.grad, gradient, *(p.grad for p in parts)]
    for ours, truth in zip(found["ours"], found["truth"], strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)


def test_reference_passes_gradcheck() -> None:
    known = torch.tensor([[-1, 2, -1]])
    inputs = tuple(
        t.double().requires_grad_() for t in (_random(1, 3, 4), _random(3, 3), _random(4, 4))
    )
    assert torch.autograd.gradcheck(
        lambda f, s, c: reference.mrf_mean_field(
            f, s, c, known=known, damping=0.2, temperature=1.3, iterations=3
        ),
        inputs,
    )


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("labels", LABELS)
def test_energy_is_the_sum_as_it_is_written(pairs: str, labels: str) -> None:
    h, w, v = 3, 4, 7
    n = h * w
    unary, w_s, w_c = _random(2, n, v), _pairs(pairs, h, w, 1), _labels(labels, v, 1)
    x = torch.randint(0, v, (2, n), generator=torch.Generator().manual_seed(0))
    matrix, weights = _matrix_of(w_s, n), _labels_of(w_c, v)
    energy = mrf_energy(unary, w_s, w_c, x).double()
    truth = reference.mrf_energy(unary.double(), matrix, weights, x)
    torch.testing.assert_close(energy, truth, rtol=1e-5, atol=1e-5)
    ordered = torch.stack([
        -sum(unary[p, i, a].double() for i, a in enumerate(x[p].tolist()))
        - sum(matrix[i, j] * weights[x[p, i], x[p, j]] for i in range(n) for j in range(n))
        for p in range(2)
    ])  # fmt: skip
    energy = mrf_energy(unary, w_s, w_c, x, pair_sum="ordered").double()
    torch.testing.assert_close(energy, ordered, rtol=1e-5, atol=1e-5)


def test_energy_is_differentiable() -> None:
    unary, w_s, w_c = (t.requires_grad_() for t in (_random(1, 4, 3), _random(4, 4), _random(3, 3)))
    x = torch.tensor([[0, 1, 2, 1]])
    mrf_energy(unary, w_s, w_c, x).sum().backward()
    assert unary.grad[0].argmin(-1).tolist() == x[0].tolist()
    torch.testing.assert_close(w_s.grad[1, 3], -w_c[1, 1].detach() / 2)
    assert float(w_c.grad.abs().sum()) > 0


def test_codebook_labels() -> None:
    codebook = _random(10, 4)
    for p in (1.0, 2.0):
        weights = codebook_labels(codebook, scale=2.0, truncation=1.5, p=p)
        distance = (codebook[:, None] - codebook[None]).norm(p=p, dim=-1)
        torch.testing.assert_close(weights, -2 * distance.clamp_max(1.5))
        assert (weights.diagonal() == 0).all()


def test_same_results_on_every_instruction_set(run_python: Callable[..., str]) -> None:
    program = """
import torch
from t2p_fast import build_info, reference
from t2p_fast.ops import grid_neighbours, mrf_mean_field
g = torch.Generator().manual_seed(0)
for v in (5, 100):
    f, w_s = torch.randn(2, 30, v, generator=g), 0.2 * torch.randn(30, 30, generator=g)
    w_c = 0.3 * torch.randn(v, v, generator=g)
    truth = reference.mrf_mean_field(f.double(), w_s.double(), w_c.double())
    assert float((mrf_mean_field(f, w_s, w_c) - truth).abs().max()) < 1e-5
    assert float((mrf_mean_field(f, w_s, w_c.bfloat16()) - truth).abs().max()) < 2e-2
    grid = grid_neighbours(5, 6, weight=0.2)
    one = mrf_mean_field(f, grid, 1.0)
    torch.set_num_threads(3)
    assert torch.equal(mrf_mean_field(f, grid, 1.0), one)
print(build_info()["isa"])
"""
    from t2p_fast import build_info

    levels = build_info()["isa_built"]
    for isa in levels[: levels.index(build_info()["isa"]) + 1]:
        assert run_python(program, T2P_ISA=isa).strip() == isa


def test_rows_that_rule_labels_out(device: torch.device) -> None:
    unary = _random(1, 6, 9).to(device)
    unary[..., 3] = -math.inf
    q = mrf_mean_field(unary, 0.2 * _random(6, 6).to(device), _random(9, 9).to(device))
    assert (q[..., 3] == 0).all()
    assert q.isfinite().all()
    huge = mrf_mean_field(1e30 * unary, 0.2 * _random(6, 6).to(device), 1.0)
    assert torch.equal(huge.argmax(-1), unary.argmax(-1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all"])
def test_unary_not_finite_is_refused(bad: float | str) -> None:
    unary = _random(2, 5, 20)
    unary[1, 3, :] = -math.inf if bad == "all" else unary[1, 3, :]
    if bad != "all":
        unary[1, 3, 18] = bad
    with pytest.raises(ValueError, match="unary of position 3 has a NaN, an infinity, or nothing"):
        mrf_mean_field(unary, _random(5, 5), 1.0)


def test_no_positions_and_nothing_to_find(device: torch.device) -> None:
    empty = torch.empty(2, 0, 5, device=device)
    assert mrf_mean_field(empty, torch.empty(0, 0, device=device), 1.0).shape == (2, 0, 5)
    known = torch.ones(1, 4, dtype=torch.int64, device=device)
    q = mrf_mean_field(_random(1, 4, 5).to(device), _random(4, 4).to(device), 1.0, known=known)
    assert torch.equal(q.argmax(-1), known)


def test_opcheck(device: torch.device, opcheck: Callable[..., object]) -> None:
    op = torch.ops.t2p_fast.mrf_mean_field.default
    f, w_s, w_c = (
        t.to(device).requires_grad_() for t in (_random(2, 6, 5), _random(6, 6), _random(5, 5))
    )
    known = torch.where(_random(2, 6) > 0, 1, -1).to(device)
    a, b = (_random(5, 2, seed=s).to(device).requires_grad_() for s in (1, 2))
    table = _random(3, 3).to(device).requires_grad_()
    for arguments in (
        (f, w_s, None, None, 0, 0, w_c, None, None, 2, 0.0, 1.0, 0),
        (f, table, None, None, 2, 3, a, b, known, 2, 0.3, 0.5, 0, None, 6),
        (
            f,
            w_s,
            None,
            None,
            0,
            0,
            w_c.detach().bfloat16().requires_grad_(),
            None,
            known,
            1,
            0.0,
            1.0,
            0,
        ),
    ):
        opcheck(op, arguments)


@pytest.mark.not_emulated(reason="torch traces it as on a CPU")
def test_compile(device: torch.device) -> None:
    f, w_s, w_c = (
        t.to(device).requires_grad_() for t in (_random(2, 6, 5), _random(6, 6), _random(5, 5))
    )
    table = _random(3, 5).to(device).requires_grad_()
    known = torch.where(_random(2, 6) > 0, 1, -1).to(device)

    def layer(f: Tensor, w_s: Tensor, table: Tensor, w_c: Tensor) -> Tensor:
        q = mrf_mean_field(f, w_s, w_c, known=known, unknown=6) + mrf_mean_field(
            f, GridWeights(table, 2, 3), w_c, damping=0.1
        )
        return q.square().sum() + mrf_energy(f, w_s, w_c, known.clamp_min(0)).sum()

    inputs = f, w_s, table, w_c
    expected = torch.autograd.grad(layer(*inputs), inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)


def test_errors(device: torch.device) -> None:
    f, w_s, w_c = (t.to(device) for t in (_random(2, 6, 5), _random(6, 6), _random(5, 5)))
    with pytest.raises(ValueError, match=r"unary must be \[b, n, v >= 1\], got \[6, 5\]"):
        mrf_mean_field(f[0], w_s, w_c)
    with pytest.raises(TypeError, match="unary must be float32, bfloat16 or float16, got float64"):
        mrf_mean_field(f.double(), w_s, w_c)
    with pytest.raises(ValueError, match=r"w_s is \[5, 5\], but unary has n = 6"):
        mrf_mean_field(f, w_s[:5, :5], w_c)
    with pytest.raises(ValueError, match=r"w_c is \[4, 4\], but unary has v = 5"):
        mrf_mean_field(f, w_s, w_c[:4, :4])
    with pytest.raises(ValueError, match=r"w_c.b is \[4, 2\], expected \[5, r\]"):
        mrf_mean_field(f, w_s, LowRank(w_c[:, :2], w_c[:4, :2]))
    with pytest.raises(ValueError, match="grid of 2 x 4, but unary has n = 6"):
        mrf_mean_field(f, GridWeights(w_s[:3, :3], 2, 4), w_c)
    with pytest.raises(ValueError, match=r"w_s.table must be \[kh, kw\] with odd sizes"):
        mrf_mean_field(f, GridWeights(w_s[:2, :3], 2, 3), w_c)
    with pytest.raises(ValueError, match="iterations is 0, expected at least 1"):
        mrf_mean_field(f, w_s, w_c, iterations=0)
    with pytest.raises(ValueError, match="damping is 1, expected 0 to less than 1"):
        mrf_mean_field(f, w_s, w_c, damping=1)
    with pytest.raises(ValueError, match="temperature is 0, expected"):
        mrf_mean_field(f, w_s, w_c, temperature=0)
    with pytest.raises(ValueError, match="candidates is 0, expected at least 1"):
        mrf_mean_field(f, w_s, w_c, candidates=0)
    with pytest.raises(TypeError, match="w_c must be a dense tensor, a LowRank or a number"):
        mrf_mean_field(f, w_s, [1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="known must be int64, got int32"):
        mrf_mean_field(f, w_s, w_c, known=torch.zeros(2, 6, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match=r"known is \[6\], expected \[2, 6\]"):
        mrf_mean_field(f, w_s, w_c, known=torch.zeros(6, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="w_c is on meta but unary is on"):
        mrf_mean_field(f, w_s, w_c.to("meta"))
    with pytest.raises(ValueError, match="connectivity is 6, expected 4 or 8"):
        grid_neighbours(2, 2, connectivity=6)
    with pytest.raises(ValueError, match="pair_sum='all' is not supported"):
        mrf_energy(f, w_s, w_c, torch.zeros(2, 6, dtype=torch.int64), pair_sum="all")


def test_known_label_out_of_range() -> None:
    """An error on the CPU; on CUDA, where finding out would mean to wait, the last label."""
    with pytest.raises(ValueError, match="known holds label 5, expected less than 5"):
        mrf_mean_field(_random(2, 6, 5), _random(6, 6), 1.0, known=torch.full((2, 6), 5))
