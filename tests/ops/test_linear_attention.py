# SPDX-License-Identifier: Apache-2.0
"""Linear attention against the float64 reference: results, states and gradients."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import linear_attention

pytestmark = pytest.mark.usefixtures("poisoned_empty")

FEATURES = ["relu", "elu+1", "identity"]
LEVELS = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"]
HALVES = [torch.bfloat16, torch.float16]


def _case(
    b: int,
    h: int,
    m: int,
    n: int,
    d: int,
    e: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a state whose normaliser is no cancelled sum."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(b, h, *shape, generator=generator).to(dtype)
        for shape in ((m, d), (n, d), (n, e))
    )
    return q, k, v, torch.rand(b, h, d, e + 1, generator=generator) + 0.5


def _assert_close(
    ours: Tensor, truth: Tensor, dtype: torch.dtype = torch.float32, steps: int = 1
) -> None:
    """Within the rounding of `steps` sums in float32 and of the result's own dtype.

    Sums of terms of both signs err by the size of the terms, so errors are held against the largest
    result.
    """
    assert ours.dtype == dtype
    if truth.numel() == 0:
        assert ours.shape == truth.shape
        return
    largest = float(truth.abs().max())
    tolerance = largest * (steps + 64) ** 0.5 * 2.0**-21 + 1e-30
    torch.testing.assert_close(
        ours.double(), truth.double(), rtol=torch.finfo(dtype).eps, atol=tolerance
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(0, 2),
    h=st.integers(1, 3),
    m=st.integers(0, 150),
    n=st.integers(0, 150),
    d=st.sampled_from([1, 8, 15, 32, 40, 64, 130, 256]),
    e=st.sampled_from([1, 8, 17, 32, 48, 256]),
    feature=st.sampled_from(FEATURES),
    causal=st.booleans(),
    with_state=st.booleans(),
    masked=st.booleans(),
    scale=st.sampled_from([1.0, 0.125]),
    layout=st.sampled_from(["bhnd", "bnhd"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**20),
)
def test_linear_attention_is_the_reference(
    b: int, h: int, m: int, n: int, d: int, e: int, feature: str, causal: bool, with_state: bool,
    masked: bool, scale: float, layout: str, dtype: torch.dtype, seed: int,
    device: torch.device,
) -> None:  # fmt: skip
    if causal:
        m = n
    q, k, v, initial = _case(b, h, m, n, d, e, seed, dtype)
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(seed)) < 0.7
    options: dict[str, Any] = {
        "feature": feature, "causal": causal, "normalize": feature != "identity", "scale": scale,
        "eps": 0.1, "key_mask": mask if masked else None,
    }  # fmt: skip
    truth, state_truth = reference.linear_attention(
        q.double(), k.double(), v.double(),
        initial_state=initial.double() if with_state else None, **options,
    )  # fmt: skip
    if layout == "bnhd":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    options["key_mask"] = mask.to(device) if masked else None
    out, state = linear_attention(
        *(x.to(device) for x in (q, k, v)), return_state=True, layout=layout,
        initial_state=initial.to(device) if with_state else None, **options,
    )  # fmt: skip
    assert out.is_contiguous()
    out, state = out.cpu(), state.cpu()
    _assert_close(out.transpose(1, 2) if layout == "bnhd" else out, truth, dtype, n + d)
    _assert_close(state, state_truth, steps=n)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 70, 32, 32), (1, 2, 1, 8, 13), (1, 1, 130, 72, 20), (1, 2, 35, 24, 40)]
)
def test_linear_attention_gradients(
    causal: bool, feature: str, shape: tuple[int, int, int, int, int], device: torch.device
) -> None:
    b, h, n, d, e = shape
    tensors = _case(b, h, n if causal else n + 9, n, d, e)
    mask = torch.arange(n) % 3 != 1 if n > 1 else torch.ones(n, dtype=torch.bool)
    options: dict[str, Any] = {
        "feature": feature, "causal": causal, "normalize": feature != "identity", "scale": 0.5,
        "key_mask": mask.expand(b, n), "eps": 1e-3,
    }  # fmt: skip
    ours = [x.clone().to(device).requires_grad_() for x in tensors]
    exact = [x.double().requires_grad_() for x in tensors]
    moved = {**options, "key_mask": options["key_mask"].to(device)}
    out, state = linear_attention(*ours[:3], initial_state=ours[3], return_state=True, **moved)
    truth, state_truth = reference.linear_attention(*exact[:3], initial_state=exact[3], **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator) for x in (out, state)]
    found = torch.autograd.grad([out, state], ours, [w.to(device) for w in weights])
    wanted = torch.autograd.grad([truth, state_truth], exact, [w.double() for w in weights])
    found = [gradient.cpu() for gradient in found]
    for gradient, right in zip(found, wanted, strict=True):
        _assert_close(gradient, right, steps=4 * n)
    assert (found[1][:, :, ~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_split_sequence(
    causal: bool, dtype: torch.dtype, device: torch.device, emulated: bool
) -> None:
    """Long enough to be cut into parts; the bits do not depend on the threads."""
    n = 301 if emulated else 1301
    q, k, v, initial = _case(1, 2, n, n, 32, 24, dtype=dtype)
    truth, state_truth = reference.linear_attention(
        q.double(), k.double(), v.double(), causal=causal, initial_state=initial.double()
    )
    q, k, v, initial = (x.to(device) for x in (q, k, v, initial))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear_attention(q, k, v, causal=causal, initial_state=initial,
                                            return_state=True))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for out, state in results:
        _assert_close(out.cpu(), truth, dtype, n)
        _assert_close(state.cpu(), state_truth, steps=n)
        assert torch.equal(out, results[0][0])
        assert torch.equal(state, results[0][1])


@pytest.mark.parametrize(
    ("d", "e", "feature", "normalize", "layout"),
    [
        (32, 32, "relu", True, "bhnd"),
        (8, 24, "identity", False, "bnhd"),
        (64, 40, "relu", True, "bnhd"),
        (24, 20, "elu+1", True, "bhnd"),
        (48, 56, "identity", False, "bhnd"),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_linear_attention_of_halves_keeps_float32_states(
    d: int, e: int, feature: str, normalize: bool, layout: str, causal: bool, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    """Also on tensor cores, for which a GPU splits the states."""
    n = 70 if causal else 270
    tensors = _case(2, 1, n if causal else 33, n, d, e, 7, dtype)
    mask = (torch.arange(n) % 5 != 2).repeat(2, 1)
    options: dict[str, Any] = {
        "feature": feature, "normalize": normalize, "eps": 0.1, "causal": causal,
    }  # fmt: skip
    exact = [x.double().requires_grad_() for x in tensors]
    truth, state_truth = reference.linear_attention(
        *exact[:3], initial_state=exact[3], key_mask=mask, **options
    )
    ours = [x.to(device).requires_grad_() for x in tensors]
    if layout == "bnhd":
        q, k, v = (x.transpose(1, 2).contiguous() for x in ours[:3])
    else:
        q, k, v = ours[:3]
    out, state = linear_attention(
        q, k, v, initial_state=ours[3], key_mask=mask.to(device), return_state=True,
        layout=layout, **options,
    )  # fmt: skip
    out = out.transpose(1, 2) if layout == "bnhd" else out
    _assert_close(out.detach().cpu(), truth.detach(), dtype, n + d)
    _assert_close(state.detach().cpu(), state_truth.detach(), steps=n)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(out, ours, weight.to(device))
    wanted = torch.autograd.grad(truth, exact, weight.double())
    for gradient, right in zip(found, wanted, strict=True):
        _assert_close(gradient.cpu(), right, gradient.dtype, steps=4 * n)


def test_linear_attention_state_carries_on(device: torch.device) -> None:
    q, k, v, _ = (x.to(device) for x in _case(2, 2, 90, 90, 16, 16))
    whole = linear_attention(q, k, v, causal=True)
    first, state = linear_attention(*(x[:, :, :37] for x in (q, k, v)), causal=True,
                                    return_state=True)  # fmt: skip
    second = linear_attention(*(x[:, :, 37:] for x in (q, k, v)), causal=True, initial_state=state)
    _assert_close(torch.cat([first, second], 2).cpu(), whole.cpu(), steps=90)


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_packed_sequences(causal: bool, device: torch.device) -> None:
    lengths = [5, 0, 64, 1, 33]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device)
    q, k, v, _ = (x.to(device) for x in _case(1, 2, sum(lengths), sum(lengths), 16, 8))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, state = linear_attention(q, k, v, causal=causal, cu_seqlens=offsets, return_state=True)
    alone = [
        linear_attention(*(x[:, :, a:b] for x in leaves), causal=causal, return_state=True)
        for a, b in pairwise(offsets.tolist())
    ]
    torch.testing.assert_close(out, torch.cat([o for o, _ in alone], 2))
    torch.testing.assert_close(state, torch.cat([s for _, s in alone]))
    weight = torch.randn(out.shape, device=device)
    found = torch.autograd.grad(out, leaves, weight, retain_graph=True)
    wanted = torch.autograd.grad(torch.cat([o for o, _ in alone], 2), leaves, weight)
    for gradient, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, right)


def test_linear_attention_masked_keys_do_not_matter(device: torch.device) -> None:
    q, k, v, _ = (x.to(device) for x in _case(1, 2, 20, 20, 16, 16))
    mask = torch.arange(20, device=device)[None] < 12
    k[:, :, 12:], v[:, :, 12:] = torch.nan, torch.inf
    for causal in (False, True):
        found = linear_attention(q, k, v, key_mask=mask, causal=causal)
        if causal:
            found = found[:, :, :12]
            wanted = linear_attention(q[:, :, :12], k[:, :, :12], v[:, :, :12], causal=True)
        else:
            wanted = linear_attention(q, k[:, :, :12], v[:, :, :12])
        torch.testing.assert_close(found, wanted)


@pytest.mark.not_emulated(reason="about the instructions of a CPU")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(
    ("n", "d", "e"),
    [(1, 8, 8), (2, 32, 32), (31, 33, 1), (33, 40, 17), (95, 16, 96), (130, 256, 256)],
)
def test_linear_attention_halves(n: int, d: int, e: int, feature: str, dtype: torch.dtype) -> None:
    """Odd numbers of keys and channels, strided rows, a mask over neighbours."""
    q, k, v, initial = _case(2, 3, n, n, d, e, dtype=dtype)
    mask = torch.arange(2 * n).view(2, n) % 5 > 1
    options: dict[str, Any] = {
        "feature": feature, "normalize": feature != "identity", "eps": 0.1, "key_mask": mask,
    }  # fmt: skip
    truth, state_truth = reference.linear_attention(
        q.double(), k.double(), v.double(), initial_state=initial.double(), **options
    )
    k, v = k.masked_fill(~mask[:, None, :, None], torch.nan), v.transpose(1, 2).contiguous()
    out, state = linear_attention(
        q, k, v.transpose(1, 2), initial_state=initial, return_state=True, **options
    )
    _assert_close(out, truth, dtype, n + d)
    _assert_close(state, state_truth, steps=n)


@pytest.mark.not_emulated(reason="about the instructions of a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_linear_attention_extremes(dtype: torch.dtype) -> None:
    """All keys cut off by ReLU; numbers far from 1; terms that cancel."""
    q, k, v, _ = _case(1, 2, 50, 50, 32, 32, dtype=dtype)
    assert (linear_attention(q, -k.abs(), v) == 0).all()
    scales = (1e-2, 1e2) if dtype == torch.float16 else (1e-12, 1e12)
    for scale in scales:
        x = [q, (k.double() * scale).to(dtype), (v.double() * scale).to(dtype)]
        truth, _ = reference.linear_attention(*(t.double() for t in x), eps=0.0)
        _assert_close(linear_attention(*x, eps=0.0), truth, dtype, 82)
    k[:, :, 25:], v[:, :, 25:] = k[:, :, :25], -v[:, :, :25]
    v[:, :, 7] *= 1.0625
    truth, _ = reference.linear_attention(q.double(), k.double(), v.double())
    steps = 82 * 4096  # the largest result is about a 64th of what the terms would add up to
    _assert_close(linear_attention(q, k, v), truth, dtype, steps)


@pytest.mark.not_emulated(reason="about the instructions of a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("n", [9, 40])
def test_linear_attention_keeps_nan_of_either_sign(n: int, dtype: torch.dtype, sign: float) -> None:
    nan = torch.copysign(torch.tensor(torch.nan, dtype=dtype), torch.tensor(sign, dtype=dtype))
    assert nan.isnan()
    assert bool(nan.signbit()) == (sign < 0)
    for place in (3, 4):
        q, k, v, _ = _case(1, 2, n, n, 32, 32, dtype=dtype)
        k[0, 1, place, 5] = nan
        out = linear_attention(q, k, v)
        assert out[:, 1].isnan().all()
        assert out[:, 0].isfinite().all()
        q[0, 0, place, 2] = nan
        rows = linear_attention(q, k, v)[0, 0].isnan().any(-1)
        assert rows.nonzero().flatten().tolist() == [place]


@pytest.mark.not_emulated(reason="about the instructions of a CPU")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [2.0**-110, 2.0**-60, 2.0**60])
def test_linear_attention_few_numbers_far_from_1(
    factor: float, dtype: torch.dtype, causal: bool
) -> None:
    """Tiles cannot multiply them to the last bit of float32, so what is near them goes without."""
    for which in range(3):
        x = list(_case(1, 2, 330, 330, 48, 40, dtype=dtype)[:3])
        x[which][:, :, 70:75] *= factor
        x[which][:, :, 200, ::3] *= factor
        truth, state_truth = reference.linear_attention(
            *(t.double() for t in x), causal=causal, eps=0.0
        )
        out, state = linear_attention(*x, causal=causal, eps=0.0, return_state=True)
        _assert_close(out, truth, dtype, 378)
        _assert_close(state, state_truth, steps=330)


@pytest.mark.not_emulated(reason="about the instructions of a CPU")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_linear_attention_heads_beside_each_other(dtype: torch.dtype, causal: bool) -> None:
    """How many heads a thread takes at once depends on the threads, the bits do not."""
    q, k, v, _ = (x.transpose(1, 2).contiguous() for x in _case(1, 40, 330, 330, 16, 16, 0, dtype))
    k[:, 100, ::3] = 65504.0
    k[:, 170, 7], v[:, 171, 8], q[:, 240, 9] = torch.inf, torch.nan, torch.inf
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear_attention(q, k, v, causal=causal, return_state=True,
                                            layout="bnhd"))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        for ours, first in zip(found, results[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=0, atol=0, equal_nan=True)
    for head in (0, 1, 9) if causal else (0, 1, 7, 8, 9):
        alone = (x.transpose(1, 2)[:, head : head + 1] for x in (q, k, v))
        out, _ = reference.linear_attention(*(x.double() for x in alone), causal=causal)
        ours = results[0][0][:, :, head].double()
        assert torch.equal(ours.isfinite(), out[:, 0].isfinite())


def test_linear_attention_keeps_nan(device: torch.device) -> None:
    q, k, v, _ = (x.to(device) for x in _case(1, 1, 4, 4, 8, 8))
    for x in (q, k, v):
        changed = x.clone()
        changed[0, 0, 2, 3] = torch.nan
        out = linear_attention(*(changed if x is y else y for y in (q, k, v)))
        assert out[0, 0, 2].isnan().any()


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_opcheck(
    causal: bool, device: torch.device, opcheck: Callable[..., object]
) -> None:
    q, k, v, initial = (x.to(device) for x in _case(1, 2, 9, 9, 8, 4))
    for layout, return_state in (("bhnd", True), ("bnhd", False)):
        arguments = [x.clone().requires_grad_() for x in (q, k, v)]
        opcheck(
            torch.ops.t2p_fast.linear_attention.default,
            (*arguments, None, None, initial.clone().requires_grad_(), "elu+1", causal, True, 1e-3,
             1.0, layout, return_state),
        )  # fmt: skip


def test_linear_attention_has_no_second_derivative() -> None:
    q, k, v, _ = (x.requires_grad_() for x in _case(1, 1, 4, 4, 4, 4))
    out = linear_attention(q, k, v, feature="elu+1")
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_linear_attention_compiles() -> None:
    q, k, v, _ = (x.requires_grad_() for x in _case(1, 2, 12, 12, 8, 8))
    compiled = torch.compile(
        lambda q, k, v: linear_attention(q, k, v, causal=True).sum(), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    wanted = torch.autograd.grad(linear_attention(q, k, v, causal=True).sum(), (q, k, v))
    for found, right in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("isa", LEVELS)
def test_linear_attention_on_every_isa(isa: str, run_python: Callable[..., str]) -> None:
    program = """
import torch
from t2p_fast import _C, reference
from t2p_fast.ops import linear_attention
torch.manual_seed(0)
for causal in (False, True):
    for feature in ("relu", "elu+1"):
        x = [torch.randn(1, 2, 50, c).requires_grad_() for c in (24, 24, 40)]
        y = [t.detach().double().requires_grad_() for t in x]
        out = linear_attention(*x, causal=causal, feature=feature, eps=0.1)
        truth = reference.linear_attention(*y, causal=causal, feature=feature, eps=0.1)[0]
        torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-5)
        for a, b in zip(torch.autograd.grad(out.square().sum(), x),
                        torch.autograd.grad(truth.square().sum(), y)):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
for dtype in (torch.bfloat16, torch.float16):
    for n, d, e in ((1, 8, 8), (45, 32, 32), (130, 40, 17)):
        for feature in ("relu", "elu+1"):
            x = [torch.randn(1, 2, n, c).to(dtype) for c in (d, d, e)]
            out, state = linear_attention(*x, feature=feature, eps=0.1, return_state=True)
            truth, wanted = reference.linear_attention(
                *(t.double() for t in x), feature=feature, eps=0.1)
            largest = float(truth.abs().max())
            torch.testing.assert_close(
                out.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-5 * largest)
            torch.testing.assert_close(state.double(), wanted, rtol=1e-6, atol=1e-5)
print(_C.build_info()["isa"])
"""
    if isa not in _supported():
        pytest.skip(f"no {isa} here")
    assert run_python(program, T2P_ISA=isa).strip() == isa


def _supported() -> list[str]:
    from t2p_fast import _C

    return LEVELS[: LEVELS.index(_C.build_info()["isa"]) + 1]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"feature": "gelu"}, ValueError, "feature='gelu' is not supported"),
        ({"layout": "nbhd"}, ValueError, "layout='nbhd' is not supported"),
        ({"q": torch.randn(2, 8, 4)}, ValueError, "q must have 4 dimensions"),
        ({"q": torch.randn(1, 2, 8, 4).double()}, TypeError, "got float64"),
        ({"k": torch.randn(1, 2, 8, 4).half()}, TypeError, "k is float16 but q is float32"),
        ({"k": torch.randn(1, 2, 8, 5)}, ValueError, "k must be [1, 2, 8, 4], got [1, 2, 8, 5]"),
        ({"v": torch.randn(1, 2, 7, 4)}, ValueError, "v must be [1, 2, 8, 4], got [1, 2, 7, 4]"),
        ({"q": torch.randn(1, 2, 7, 4), "causal": True}, ValueError, "as many keys as queries"),
        ({"key_mask": torch.ones(1, 8)}, TypeError, "key_mask must be bool, got float32"),
        ({"key_mask": torch.ones(1, 7).bool()}, ValueError, "key_mask must be [1, 8], got [1, 7]"),
        ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, "begin with 0 and end with 8"),
        ({"cu_seqlens": torch.tensor([0, 9, 8])}, ValueError, "must not fall, got 9 before 8"),
        ({"cu_seqlens": torch.tensor(8)}, ValueError, "cu_seqlens must be [s + 1], got []"),
        ({"initial_state": torch.zeros(1, 2, 4, 4)}, ValueError, "must be [1, 2, 4, 5]"),
    ],
)
def test_linear_attention_errors(change: dict[str, Any], error: type, text: str) -> None:
    arguments = dict(zip("qkv", (torch.randn(1, 2, 8, 4) for _ in range(3)), strict=True))
    with pytest.raises(error) as caught:
        linear_attention(**{**arguments, **change})
    assert "linear_attention: " in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("k", torch.zeros(1, 2, 8, 16)),
        ("key_mask", torch.ones(1, 8, dtype=torch.bool)),
        ("cu_seqlens", torch.tensor([0, 8])),
        ("initial_state", torch.zeros(1, 2, 16, 17)),
    ],
)
def test_tensors_on_another_device(name: str, other: torch.Tensor) -> None:
    q = torch.zeros(1, 2, 8, 16)
    arguments = {"q": q, "k": q, "v": q, name: other.to("meta")}
    with pytest.raises(ValueError, match=rf"linear_attention: {name} is on meta but q is on cpu"):
        linear_attention(**arguments)
    with pytest.raises(TypeError, match="linear_attention: key_mask must be a tensor or None, got"):
        linear_attention(q, q, q, key_mask=[True] * 8)
