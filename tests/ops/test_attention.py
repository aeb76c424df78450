# SPDX-License-Identifier: Apache-2.0
"""Attention against the float64 reference."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import attention

pytestmark = pytest.mark.usefixtures("poisoned_empty")

LEVELS = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _case(
    b: int, h: int, m: int, n: int, d: int, e: int, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(b, h, *shape, generator=generator).to(dtype)
        for shape in ((m, d), (n, d), (n, e))
    )
    return q, k, v


def _assert_close(ours: Tensor, truth: Tensor, v: Tensor) -> None:
    """Within the rounding of weights, and of the result, of a mean of values."""
    assert ours.shape == truth.shape
    assert ours.dtype == v.dtype
    if truth.numel() == 0:
        return
    step = 2.0**-7 if v.dtype == torch.bfloat16 else 2.0**-10 if v.dtype == torch.float16 else 0
    largest = float(v.abs().max()) if v.numel() else 0.0
    error = float((ours.double() - truth).abs().max())
    assert error <= largest * (step + 2.0**-17) + 1e-30


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(0, 2),
    h=st.integers(1, 3),
    m=st.integers(0, 300),
    n=st.integers(0, 200),
    d=st.sampled_from([1, 7, 8, 20, 40, 64, 80, 130, 257, 512]),
    e=st.sampled_from([1, 7, 8, 20, 33, 40, 64, 512]),
    scale=st.sampled_from([None, 0.0, 1.0, -0.25]),
    biased=st.booleans(),
    layout=st.sampled_from(["bhnd", "bnhd"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_attention_is_the_reference(
    b: int, h: int, m: int, n: int, d: int, e: int, scale: float | None, biased: bool, layout: str,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    q, k, v = _case(b, h, m, n, d, e, seed, dtype)
    if d > 64:  # keep scores where float32 knows them well
        q = q * 0.25
    bias = torch.randn(b, n, generator=torch.Generator().manual_seed(seed)) if biased else None
    if bias is not None and n > 1:
        bias[:, n // 2 :: 3] = -torch.inf
    truth = reference.attention(
        q.double(), k.double(), v.double(), bias=None if bias is None else bias.double(),
        scale=scale,
    )  # fmt: skip
    if layout == "bnhd":  # as views of other memory
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    ours = attention(q, k, v, bias=bias, scale=scale, layout=layout)
    assert ours.is_contiguous()
    _assert_close(ours if layout == "bhnd" else ours.transpose(1, 2), truth, v)


def skip_beyond_this_processor(level: str, run_python: Callable[..., str]) -> None:
    best = run_python("import t2p_fast; print(t2p_fast.build_info()['isa'])").strip()
    if LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"this processor ends at {best}")


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level: str, run_python: Callable[..., str]) -> None:
    program = """
import torch
from t2p_fast import build_info, reference
from t2p_fast.ops import attention
levels = build_info()["isa_built"]
assert build_info()["isa"] == LEVEL
worst = 0.0
for dtype, step in ((torch.float32, 0.0), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
    for b, h, m, n, d, e in ((1, 2, 300, 77, 20, 20), (2, 1, 17, 200, 33, 50), (1, 1, 5, 1, 1, 3)):
        generator = torch.Generator().manual_seed(n)
        q, k, v = (torch.randn(b, h, *s, generator=generator).to(dtype)
                   for s in ((m, d), (n, d), (n, e)))
        bias = torch.randn(b, n, generator=generator)
        for extra in (None, bias):
            truth = reference.attention(q.double(), k.double(), v.double(),
                                        bias=None if extra is None else extra.double())
            error = (attention(q, k, v, bias=extra).double() - truth).abs().max()
            assert error <= v.abs().max() * (step + 2.0**-17), (dtype, n, float(error))
print("right")
"""
    skip_beyond_this_processor(level, run_python)
    assert run_python(program.replace("LEVEL", repr(level)), T2P_ISA=level).strip() == "right"


@pytest.mark.parametrize("m", [1, 16, 31, 33, 255, 257])
@pytest.mark.parametrize("n", [16, 31, 33, 127, 128, 129, 260])
def test_sizes_around_tiles(m: int, n: int) -> None:
    """Tiles hold 16 queries, 16 keys and 32 channels, blocks 128 keys, tasks 256 queries."""
    for d, e in ((31, 15), (32, 16), (33, 17), (96, 47), (64, 48)):
        q, k, v = _case(1, 2, m, n, d, e, seed=m + n, dtype=torch.bfloat16)
        truth = reference.attention(q.double(), k.double(), v.double())
        _assert_close(attention(q, k, v), truth, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_and_infinite_numbers(dtype: torch.dtype) -> None:
    """They reach the queries and keys that hold them, and no bit of the others."""
    q, k, v = _case(1, 3, 70, 150, 40, 40, dtype=dtype)
    clean = attention(q, k, v)
    truth = reference.attention(q.double(), k.double(), v.double())
    q[0, 0, 5, 0] = torch.inf
    q[0, 0, 40] *= 1000
    v[0, 1, 140, 7] = torch.inf
    ours = attention(q, k, v)
    assert ours[0, 0, 5].isnan().all()
    best = (q[0, 0, 40].double() @ k[0, 0].double().mT).argmax()
    _assert_close(ours[0, 0, 40], v[0, 0, best].double(), v[0, 0])
    assert (ours[0, 1, :, 7] == torch.inf).all()
    ours[0, 0, 5], ours[0, 0, 40], ours[0, 1, :, 7] = (
        clean[0, 0, 5], clean[0, 0, 40], clean[0, 1, :, 7],
    )  # fmt: skip
    assert torch.equal(ours, clean)
    # As masks have it: the lowest number, not -inf, even for all keys of a query.
    bias = torch.zeros(1, 150)
    bias[:, 100:] = torch.finfo(torch.float32).min
    q, k, v = _case(1, 3, 70, 150, 40, 40, dtype=dtype)
    _assert_close(
        attention(q, k, v, bias=bias),
        reference.attention(q.double(), k[:, :, :100].double(), v[:, :, :100].double()), v,
    )  # fmt: skip
    _assert_close(
        attention(q, k, v, bias=torch.full_like(bias, torch.finfo(torch.float32).min)),
        v.double().mean(2, keepdim=True).expand_as(truth), v,
    )  # fmt: skip
    bias[0, 3] = torch.nan
    assert attention(q, k, v, bias=bias).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_neighbours_change_no_bit(dtype: torch.dtype) -> None:
    q, k, v = _case(2, 3, 600, 130, 40, 40, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = attention(q, k, v)
        torch.set_num_threads(2)
        assert torch.equal(attention(q, k, v), alone)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(attention(q[:1], k[:1], v[:1]), alone[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_any_size(dtype: torch.dtype) -> None:
    """Scores far apart: the largest takes all. Scores that are all huge: only differences count."""
    q, k, v = _case(1, 2, 40, 100, 16, 8, dtype=dtype)
    best = (q.double() @ k.double().mT).argmax(-1)
    _assert_close(
        attention(q, k, v, scale=1e4), v.double().gather(2, best[..., None].expand(-1, -1, -1, 8)),
        v,
    )  # fmt: skip
    shifted = attention(q, k, v, bias=torch.full([1, 100], -1e4))
    _assert_close(shifted, reference.attention(q.double(), k.double(), v.double()), v * 64)
    rising = torch.linspace(-3e4, 0, 100)[None]
    _assert_close(attention(q, k, v, bias=rising), v[:, :, -1:].double().expand(-1, -1, 40, -1), v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_left_out_keys_and_queries_without_any(dtype: torch.dtype) -> None:
    q, k, v = _case(2, 2, 30, 90, 20, 20, dtype=dtype)
    bias = torch.zeros(2, 90)
    bias[0, 10:] = bias[1] = -torch.inf
    ours = attention(q, k, v, bias=bias)
    _assert_close(
        ours[:1],
        reference.attention(q[:1].double(), k[:1, :, :10].double(), v[:1, :, :10].double()),
        v,
    )
    assert torch.equal(ours[1], torch.zeros_like(ours[1]))
    assert torch.equal(attention(q, k[:, :, :0], v[:, :, :0]), torch.zeros_like(q))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    q, k, v = _case(1, 2, 40, 70, 20, 20, dtype=dtype)
    clean = attention(q, k, v)
    q[0, 1, 3, 5] = torch.nan
    ours = attention(q, k, v)
    assert ours[0, 1, 3].isnan().all()
    ours[0, 1, 3] = clean[0, 1, 3]
    assert torch.equal(ours, clean)
    k[0, 0, 69] = torch.nan
    assert attention(q, k, v)[0, 0].isnan().all()


def test_any_strides() -> None:
    q, k, v = _case(2, 3, 50, 60, 24, 24)
    packed = torch.cat([k, v], -1)
    left, right = packed.chunk(2, -1)
    truth = attention(q, k, v)
    assert torch.equal(attention(q, left, right), truth)
    assert torch.equal(attention(q.mT.contiguous().mT, k, v), truth)
    assert torch.equal(attention(q, k[:, :1].expand(-1, 3, -1, -1), v), attention(
        q, k[:, :1].repeat(1, 3, 1, 1), v
    ))  # fmt: skip


def test_gradients_are_those_of_torch() -> None:
    q, k, v = (x.requires_grad_() for x in _case(1, 2, 20, 30, 16, 16))
    bias = torch.randn(1, 30)
    grads = torch.autograd.grad(attention(q, k, v, bias=bias).square().sum(), (q, k, v))
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = reference.attention(*leaves, bias=bias.double())
    for ours, theirs in zip(grads, torch.autograd.grad(truth.square().sum(), leaves), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_registration() -> None:
    q, k, v = _case(1, 2, 20, 30, 16, 24)
    op = torch.ops.t2p_fast.attention.default
    for bias, layout in ((None, "bhnd"), (torch.randn(1, 30), "bnhd")):
        torch.library.opcheck(op, (q, k, v, bias, 0.25, layout))


def test_compiles_whole_and_heeds_autocast() -> None:
    q, k, v = _case(2, 2, 20, 30, 16, 16)
    compiled = torch.compile(lambda *x: attention(*x, layout="bnhd"), fullgraph=True)
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(compiled(*swapped), attention(*swapped, layout="bnhd"))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": torch.zeros(2, 3, 4)}, ValueError, r"q must have 4 dimensions, got \[2, 3, 4\]"),
        ({"k": [1.0]}, TypeError, "k must be a dense tensor, got a list"),
        ({"k": torch.zeros(1, 2, 5, 9)}, ValueError, r"k is \[1, 2, 5, 9\] but q is"),
        ({"v": torch.zeros(1, 2, 6, 8)}, ValueError, r"v is \[1, 2, 6, 8\] but k is"),
        ({"v": torch.zeros(1, 2, 5, 8).half()}, TypeError, "v is float16 but q is float32"),
        ({"k": torch.zeros(1, 2, 5, 8, device="meta")}, ValueError, "k is on meta but q is on cpu"),
        ({"bias": torch.zeros(1, 4)}, ValueError, r"bias must be \[b, n\], here \[1, 5\]"),
        ({"bias": torch.ones(1, 5).bool()}, TypeError, "bias must be a tensor of floats"),
        ({"layout": "nhd"}, ValueError, "layout='nhd' is not supported"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], text: str) -> None:
    arguments = {
        "q": torch.zeros(1, 2, 4, 8), "k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 8)
    }  # fmt: skip
    with pytest.raises(error, match=f"attention: {text}"):
        attention(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["amx", "avx512"])
def test_wide_heads_of_float32_are_torchs_where_that_is_faster(
    level: str, run_python: Callable[..., str]
) -> None:
    skip_beyond_this_processor(level, run_python)
    program = """
import torch
from t2p_fast import _C
from t2p_fast.ops import attention
kernel, called = _C.attention, []
_C.attention = lambda *given: (called.append(given), kernel(*given))
for dtype, n, d in (
    (torch.float32, 256, 160), (torch.float32, 255, 160), (torch.float32, 256, 159),
    (torch.bfloat16, 256, 160),
):
    attention(*(torch.randn(1, 1, n, d).to(dtype) for _ in range(3)))
print(len(called))
"""
    assert int(run_python(program, T2P_ISA=level)) == (3 if level == "amx" else 4)
