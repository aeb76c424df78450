# SPDX-License-Identifier: Apache-2.0
"""Vector quantisation against the float64 reference. Distances are compared, not indices."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import vq_lookup, vq_nearest, vq_quantize, vq_topk
from vq_cases import (
    CASES,
    HARD,
    METRICS,
    assert_nearest,
    assert_same_for_any_number_of_threads,
    case_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize(("n", "k", "d"), CASES, ids=lambda v: str(v))
def test_nearest_is_exact(n: int, k: int, d: int, device: torch.device) -> None:
    x, codebook = (t.to(device) for t in case_of(n, k, d))
    assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 300),
    k=st.integers(1, 400),
    d=st.integers(1, 70),
    scale=st.sampled_from([1e-42, 1e-30, 1e-3, 1.0, 1e4, 1e15]),
    offset=st.sampled_from([0.0, 1.0, -1e4]),
    grid=st.booleans(),
    duplicates=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_nearest_is_exact_everywhere(
    n: int, k: int, d: int, scale: float, offset: float, grid: bool, duplicates: bool, seed: int,
    device: torch.device,
) -> None:  # fmt: skip
    x, codebook = case_of(n, k, d, seed)
    if grid:  # exact ties
        x, codebook = x.round(), codebook.round()
    if duplicates:
        codebook = codebook[torch.arange(k) // 3]
    x, codebook = (x * scale + offset).to(device), (codebook * scale + offset).to(device)
    assume(n > 0)
    assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(130, 3000, 5), (130, 9000, 8), (130, 500, 100), (40, 420, 33), (130, 500, 3), (75, 333, 7)],
)
def test_nearest_is_exact_on_hard_data(
    hard: str, n: int, k: int, d: int, device: torch.device, emulated: bool
) -> None:
    if emulated and (n, k) in ((130, 3000), (75, 333)):
        pytest.skip("rows in registers, as others")
    k = k // (5 if d > 32 else 12 if d < 8 else 24) if emulated and n == 130 else k
    x, codebook = (t.to(device) for t in HARD[hard](*case_of(n, k, d)))
    assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(dtype: torch.dtype, device: torch.device) -> None:
    """Inputs of low precision mean the numbers that they hold; nothing else is rounded."""
    x, codebook = (t.to(device).to(dtype) for t in case_of(300, 100, 24))
    assert_nearest(x.float(), codebook.float(), *vq_nearest(x, codebook, return_distance=True))
    for codes in (codebook, codebook.float()):
        a, c = x.clone().requires_grad_(), codes.clone().requires_grad_()
        quantized, indices, loss = vq_quantize(a, c, beta=0.5)
        assert (quantized.dtype, loss.dtype) == (dtype, torch.float32)
        assert torch.equal(quantized, codes[indices].to(dtype))
        loss.backward()
        a64, c64 = x.double().requires_grad_(), codes.double().requires_grad_()
        truth = reference.vq_quantize(a64, c64, beta=0.5)[2]
        truth.backward()
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(a.grad.double(), a64.grad, rtol=unit, atol=1e-6)
        torch.testing.assert_close(c.grad.double(), c64.grad, rtol=unit, atol=1e-6)
        assert (a.grad.dtype, c.grad.dtype) == (dtype, codes.dtype)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_groups(channel_dim: int, device: torch.device) -> None:
    """A grouped codebook quantises every group of channels by itself."""
    torch.manual_seed(0)
    shape = (3, 12, 5, 4) if channel_dim == 1 else (40, 12)
    x, codebook = torch.randn(shape, device=device), torch.randn(3, 20, 4, device=device)
    indices, distance = vq_nearest(x, codebook, channel_dim=channel_dim, return_distance=True)
    assert (
        indices.shape
        == distance.shape
        == x.movedim(channel_dim, 0)[:3].movedim(0, channel_dim).shape
    )
    for g, part in enumerate(x.chunk(3, channel_dim)):
        assert torch.equal(
            indices.select(channel_dim, g), vq_nearest(part, codebook[g], channel_dim=channel_dim)
        )
    results = {}
    for name, op, dtype in (("ours", vq_quantize, torch.float32),
                            ("truth", _reference_groups, torch.float64)):  # fmt: skip
        a, c = (t.to(dtype, copy=True).requires_grad_() for t in (x, codebook))
        quantized, found, loss, counts, sums = op(
            a, c, channel_dim=channel_dim, return_statistics=True
        )
        (quantized.sin().sum() + loss).backward()
        results[name] = [quantized, found, loss, counts, sums, a.grad, c.grad]
    for ours, truth in zip(results["ours"], results["truth"], strict=True):
        torch.testing.assert_close(ours, truth.to(ours.dtype), rtol=1e-5, atol=1e-6)
    codes = vq_lookup(indices, codebook, channel_dim=channel_dim)
    assert torch.equal(codes, results["ours"][0].detach())
    assert torch.equal(codes, reference.vq_lookup(indices, codebook, channel_dim=channel_dim))


def _reference_groups(
    x: Tensor, codebook: Tensor, *, channel_dim: int, return_statistics: bool
) -> tuple[Tensor, ...]:
    parts = [
        reference.vq_quantize(
            part, codes, channel_dim=channel_dim, return_statistics=return_statistics
        )
        for part, codes in zip(x.chunk(len(codebook), channel_dim), codebook, strict=True)
    ]
    quantized, indices, loss, counts, sums = zip(*parts, strict=True)
    return (
        torch.cat(quantized, channel_dim), torch.stack(indices, channel_dim),
        torch.stack(loss).mean(), torch.stack(counts), torch.stack(sums),
    )  # fmt: skip


def test_nearest_of_a_view_that_negates(device: torch.device) -> None:
    x, codebook = (t.to(device) for t in case_of(30, 100, 8))
    view = torch._neg_view(x)
    assert_nearest(-x, codebook, *vq_nearest(view, codebook, return_distance=True))


def test_nearest_far_from_the_origin(device: torch.device) -> None:
    x, codebook = (1e4 + t.to(device) for t in case_of(512, 1024, 64))
    assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


def test_nearest_with_tiny_codes(device: torch.device) -> None:
    x, codebook = (t.to(device) for t in case_of(512, 2048, 64))
    codebook = codebook / 2048 / 4
    assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


def test_nearest_with_clusters_far_apart(device: torch.device) -> None:
    x, codebook = (t.to(device) for t in case_of(100, 300, 16))
    x[::2] += 1e6
    codebook[::2] += 1e6
    assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


@pytest.mark.parametrize(("n", "k", "d"), [(100, 200, 8), (60, 280, 33)])
def test_nearest_of_huge_values(n: int, k: int, d: int, device: torch.device) -> None:
    x, codebook = (t.to(device) * 5e37 for t in case_of(n, k, d))
    indices, distance = vq_nearest(x, codebook, return_distance=True)
    chosen = (x.double() - codebook.double()[indices]).square().sum(-1)
    _, best = reference.vq_nearest(x.double(), codebook.double(), return_distance=True)
    torch.testing.assert_close(chosen, best, rtol=1e-14, atol=0)
    assert distance.isinf().all()  # 1e75 is beyond float32


@pytest.mark.parametrize("d", [24, 33])
@pytest.mark.parametrize("times", [3, 100])
def test_nearest_ties_go_to_the_lowest_index(times: int, d: int, device: torch.device) -> None:
    x, codebook = (t.to(device) for t in case_of(50, 700 // times, d))
    repeated = codebook.repeat(times, 1)
    assert torch.equal(vq_nearest(x, repeated), vq_nearest(x, codebook))
    assert (vq_nearest(x, torch.zeros(500, d, device=device)) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("k", "d"), [(100, 9), (300, 40)])
def test_nearest_of_rows_not_finite(bad: float, k: int, d: int, device: torch.device) -> None:
    x, codebook = (t.to(device) for t in case_of(70, k, d))
    clean = vq_nearest(x, codebook)
    x[3, 4] = x[69, 0] = bad
    indices, distance = vq_nearest(x, codebook, return_distance=True)
    rows = torch.tensor([3, 69], device=device)
    assert (indices[rows] == 0).all()
    assert distance[rows].isnan().all()
    others = torch.ones(70, dtype=torch.bool, device=device).index_fill(0, rows, False)
    assert torch.equal(indices[others], clean[others])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("k", "d"), [(100, 9), (300, 40)])
def test_nearest_never_chooses_a_code_not_finite(
    bad: float, k: int, d: int, device: torch.device
) -> None:
    x, codebook = (t.to(device) for t in case_of(70, k, d))
    spoiled = codebook.clone()
    spoiled[::3, 5] = bad
    keep = torch.arange(k, device=device)[torch.arange(k, device=device) % 3 != 0]
    assert torch.equal(vq_nearest(x, spoiled), keep[vq_nearest(x, codebook[keep])])
    indices, distance = vq_nearest(x, torch.full_like(codebook, bad), return_distance=True)
    assert (indices == 0).all()
    assert distance.isinf().all()


@pytest.mark.parametrize("k", [1, 500])
def test_nearest_of_no_rows(k: int, device: torch.device) -> None:
    codebook = torch.randn(k, 6, device=device)
    assert vq_nearest(torch.empty(0, 6, device=device), codebook).shape == (0,)
    images = torch.empty(2, 6, 0, 5, device=device)
    quantized, indices, loss = vq_quantize(images, codebook, channel_dim=1)
    assert quantized.shape == images.shape
    assert indices.shape == (2, 0, 5)
    assert loss == 0


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "sequence": (lambda x: x.reshape(2, 105, -1), -1),
    "image": (lambda x: x.reshape(2, 15, 7, -1).permute(0, 3, 1, 2).contiguous(), 1),
    "channels-last": (lambda x: x.reshape(2, 15, 7, -1).permute(0, 3, 1, 2), 1),
    "transposed": (lambda x: x.t().contiguous().t(), 1),
    "channels-first": (lambda x: x.t().contiguous(), 0),
    "strided": (lambda x: torch.stack([x, x * 0], -1).flatten(1)[:, ::2], 1),
    "expanded": (lambda x: x[:1].expand(210, -1), 1),
    "swapped": (lambda x: x.reshape(2, 15, 7, -1).permute(0, 3, 2, 1), 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("k", "d"), [(33, 12), (130, 35)])
def test_layouts(layout: str, k: int, d: int, device: torch.device) -> None:
    arrange, dim = LAYOUTS[layout]
    rows, codebook = (t.to(device) for t in case_of(210, k, d))
    x = arrange(rows)
    plain = x.movedim(dim, -1).reshape(-1, d).contiguous()
    shape = x.movedim(dim, -1).shape[:-1]
    indices = vq_nearest(x, codebook, channel_dim=dim)
    assert torch.equal(indices, vq_nearest(plain, codebook).view(shape))
    codes = vq_lookup(indices, codebook, channel_dim=dim)
    assert torch.equal(codes, codebook[indices].movedim(-1, dim))
    quantized, *_, counts, sums = vq_quantize(x, codebook, channel_dim=dim, return_statistics=True)
    assert torch.equal(quantized, codes)
    expected = vq_quantize(plain, codebook, return_statistics=True)
    assert torch.equal(counts, expected[3])
    assert torch.equal(sums, expected[4])


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_quantize_and_gradients(channel_dim: int, device: torch.device) -> None:
    torch.manual_seed(0)
    shape = (3, 11, 5, 4) if channel_dim == 1 else (60, 11)
    x, codebook = torch.randn(shape, device=device), torch.randn(40, 11, device=device)
    grad = torch.randn(shape, device=device)
    results = {}
    for name, op, dtype in (("ours", vq_quantize, torch.float32),
                            ("truth", reference.vq_quantize, torch.float64)):  # fmt: skip
        a = x.to(dtype, copy=True).requires_grad_()
        c = codebook.to(dtype, copy=True).requires_grad_()
        quantized, indices, loss, counts, sums = op(
            a, c, beta=0.3, codebook_weight=0.7, channel_dim=channel_dim, return_statistics=True
        )
        ((quantized * grad).sum() + 2 * loss).backward()
        results[name] = [quantized, indices, loss, counts, sums, a.grad, c.grad]
    for ours, truth in zip(results["ours"], results["truth"], strict=True):
        torch.testing.assert_close(ours, truth.to(ours.dtype), rtol=1e-5, atol=1e-6)
    assert torch.equal(results["ours"][0], vq_lookup(indices, codebook, channel_dim=channel_dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "d"), [(1100, 3, 2), (21, 10, 150)])
def test_sums_of_more_than_a_block_has_threads(
    n: int, k: int, d: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, codebook = (t.to(device, dtype) for t in case_of(n, k, d))
    _, _, loss, counts, sums = vq_quantize(x, codebook, return_statistics=True)
    x64, codes64 = x.double(), codebook.double()
    truth = reference.vq_quantize(x64, codes64, return_statistics=True)
    torch.testing.assert_close(loss.double(), truth[2], rtol=1e-6, atol=0)
    assert torch.equal(counts.double(), truth[3].double())
    torch.testing.assert_close(sums.double(), truth[4], rtol=1e-6, atol=1e-6)


def test_quantize_gradient_far_from_the_origin(device: torch.device) -> None:
    x, codebook = (1e4 + t.to(device) for t in case_of(256, 16, 8))
    codebook.requires_grad_()
    vq_quantize(x, codebook)[2].backward()
    truth = codebook.detach().double().requires_grad_()
    reference.vq_quantize(x.double(), truth)[2].backward()
    torch.testing.assert_close(codebook.grad.double(), truth.grad, rtol=1e-5, atol=1e-7)


def test_nearest_distance_gradient(device: torch.device) -> None:
    x, codebook = (t.to(device).requires_grad_() for t in case_of(50, 9, 5))
    weight = torch.linspace(-1, 1, 50, device=device)
    (vq_nearest(x, codebook, return_distance=True)[1] * weight).sum().backward()
    x64, codes64 = (t.detach().double().requires_grad_() for t in (x, codebook))
    (reference.vq_nearest(x64, codes64, return_distance=True)[1] * weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codebook.grad.double(), codes64.grad, rtol=1e-5, atol=1e-6)


def test_lookup_gradient(device: torch.device) -> None:
    codebook = torch.randn(30, 6, device=device, requires_grad=True)
    indices = torch.randint(0, 30, (4, 5, 3), device=device)
    grad = torch.randn(4, 6, 5, 3, device=device)
    vq_lookup(indices, codebook, channel_dim=1).backward(grad)
    expected = torch.zeros(30, 6, dtype=torch.float64, device=device)
    expected.index_add_(0, indices.flatten(), grad.movedim(1, -1).reshape(-1, 6).double())
    torch.testing.assert_close(codebook.grad.double(), expected, rtol=1e-6, atol=1e-7)


def test_same_bits_for_any_number_of_threads() -> None:
    x, codebook = case_of(3000, 500, 24)
    assert_same_for_any_number_of_threads(lambda: vq_quantize(x, codebook, return_statistics=True))


def test_opcheck(device: torch.device, opcheck: Callable[..., object]) -> None:
    ops = torch.ops.t2p_fast
    x = torch.randn(2, 6, 5, 3, device=device, requires_grad=True)
    codebook = torch.randn(20, 6, device=device, requires_grad=True)
    indices = torch.randint(0, 20, (2, 5, 3), device=device)
    for metric in METRICS:
        opcheck(ops.vq_nearest.default, (x, codebook, metric, 1))
    half = x.detach().bfloat16().requires_grad_()
    opcheck(ops.vq_nearest.default, (half, codebook, "l2", 1))
    opcheck(ops.vq_quantize.default, (half, codebook, 0.2, 1.0, "l2", 1, True))
    opcheck(ops.vq_lookup.default, (indices, codebook, 1))
    opcheck(ops.vq_accumulate.default, (x.detach(), indices, 20, 1))
    for statistics in (False, True):
        arguments = (x, codebook, 0.25, 1.0, "l2", 1, statistics)
        opcheck(ops.vq_quantize.default, arguments)


@pytest.mark.not_emulated(reason="torch traces it as on a CPU")
def test_compile(device: torch.device) -> None:
    def step(x: Tensor, codebook: Tensor) -> Tensor:
        quantized, indices, loss = vq_quantize(x, codebook, channel_dim=1)
        return (quantized.sin() + vq_lookup(indices, codebook, channel_dim=1)).sum() + loss

    x = torch.randn(2, 8, 5, 4, device=device, requires_grad=True)
    codebook = torch.randn(16, 8, device=device, requires_grad=True)
    expected = torch.autograd.grad(step(x, codebook), (x, codebook))
    compiled = torch.autograd.grad(
        torch.compile(step, fullgraph=True, backend="aot_eager")(x, codebook), (x, codebook)
    )
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_rounded_as_by_a_cast(
    dtype: torch.dtype, channel_dim: int, metric: str, device: torch.device
) -> None:
    """Halfway cases, what overflows in float16, and what is subnormal there."""
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-9])
    edges = torch.tensor([65519.0, 65520.0, -1e6, 3e-8, 2**-25, 3 * 2**-25, 1e-40])
    codebook = torch.cat([ties, edges, case_of(1, 1, 84)[0][0]]).view(8, 12).to(device)
    chosen = (torch.arange(30, device=device) * 7 % 8).view(2, 15)
    x = codebook[chosen].clamp(-6e4, 6e4).to(dtype).movedim(-1, channel_dim)
    quantized, indices, loss = vq_quantize(x, codebook, metric=metric, channel_dim=channel_dim)
    codes = codebook[indices].movedim(-1, channel_dim)
    assert torch.equal(quantized, codes.to(dtype))
    # Of the codes as they are, not as they were rounded.
    squares = (x.double() - codes.double()).square().mean() * 1.25
    torch.testing.assert_close(loss.double(), squares, rtol=1e-4, atol=1e-12)
    found = vq_lookup(indices, codebook.to(dtype), channel_dim=channel_dim)
    assert found.dtype == dtype
    assert torch.equal(found, codes.to(dtype))


def test_autocast_computes_in_float32(device: torch.device) -> None:
    x, codebook = (t.to(device) for t in case_of(40, 30, 8))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        quantized, indices, loss = vq_quantize(x.bfloat16(), codebook)
        assert vq_lookup(indices, codebook.bfloat16()).dtype == torch.float32
    assert quantized.dtype == loss.dtype == torch.float32
    assert torch.equal(indices, vq_nearest(x.bfloat16().float(), codebook))


def test_vmap(device: torch.device) -> None:
    x, codebook = torch.randn(3, 10, 4, device=device), torch.randn(5, 4, device=device)
    indices = vq_nearest(x, codebook)
    assert torch.equal(torch.vmap(vq_nearest, (0, None))(x, codebook), indices)
    assert torch.equal(torch.vmap(vq_lookup, (0, None))(indices, codebook), codebook[indices])
    many = torch.randn(3, 5, 4, device=device)
    expected = torch.stack([vq_nearest(a, c) for a, c in zip(x, many, strict=True)])
    assert torch.equal(torch.vmap(vq_nearest)(x, many), expected)


def test_errors(device: torch.device) -> None:
    x, codebook = torch.randn(4, 3, device=device), torch.randn(5, 3, device=device)
    with pytest.raises(ValueError, match=r"vq_nearest: metric='l1' is not supported.*'l2'"):
        vq_nearest(x, codebook, metric="l1")
    with pytest.raises(ValueError, match=r"x has 3 channels but codebook is \[5, 2\]"):
        vq_nearest(x, codebook[:, :2])
    with pytest.raises(ValueError, match="it has no codes"):
        vq_nearest(x, codebook[:0])
    with pytest.raises(ValueError, match=r"codebook must be \[k, d\], got \[1, 1, 5, 3\]"):
        vq_nearest(x, codebook[None, None])
    with pytest.raises(ValueError, match=r"x has 3 channels, but the codebook .* is for 6"):
        vq_nearest(x, torch.stack([codebook, codebook]))
    with pytest.raises(ValueError, match=r"indices are \[4, 3\], but the codebook .* wants 2"):
        vq_lookup(torch.zeros(4, 3, dtype=torch.int64, device=device), codebook.expand(2, 5, 3))
    with pytest.raises(ValueError, match=r"x must be \[n, d\] or have more dimensions, got \[3\]"):
        vq_quantize(x[0], codebook)
    with pytest.raises(ValueError, match="channel_dim=2 is out of range for 2 dimensions"):
        vq_nearest(x, codebook, channel_dim=2)
    with pytest.raises(TypeError, match="x must be float32, bfloat16, float16, got int64"):
        vq_nearest(x.long(), codebook)
    with pytest.raises(TypeError, match=r"codebook must be float32, .*, got float64"):
        vq_nearest(x, codebook.double())
    with pytest.raises(TypeError, match="x must be a dense tensor, got a list"):
        vq_nearest(x.tolist(), codebook)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="codebook must be a dense tensor, got a sparse_coo tensor"):
        vq_nearest(x, codebook.to_sparse())
    with pytest.raises(TypeError, match="channel_dim must be an int, got a float"):
        vq_nearest(x, codebook, channel_dim=1.0)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="indices must be int64, got int32"):
        vq_lookup(torch.zeros(3, dtype=torch.int32, device=device), codebook)


@pytest.mark.parametrize("op", [vq_nearest, vq_quantize])
def test_tensors_on_two_devices_are_refused(op: Callable[..., object]) -> None:
    x, codebook = case_of(10, 5, 4)
    with pytest.raises(ValueError, match="codebook is on meta but x is on cpu"):
        op(x, codebook.to("meta"))
    with pytest.raises(ValueError, match="codebook is on cpu but x is on meta"):
        op(x.to("meta"), codebook)
    with pytest.raises(ValueError, match="codebook is on cpu but indices is on meta"):
        vq_lookup(torch.zeros(3, dtype=torch.int64, device="meta"), codebook)


def test_shapes_without_data() -> None:
    x, codebook = torch.empty(2, 6, 5, 3, device="meta"), torch.empty(9, 6, device="meta")
    quantized, indices, loss = vq_quantize(x, codebook, channel_dim=1)
    assert (quantized.shape, indices.shape, loss.shape) == (x.shape, (2, 5, 3), ())
    assert vq_lookup(indices, codebook, channel_dim=1).shape == x.shape


def test_forward_mode_is_refused() -> None:
    x, codebook = case_of(10, 5, 4)
    for function in (
        lambda c: vq_lookup(torch.tensor([1]), c),
        lambda c: vq_quantize(x, c)[2],
        lambda c: vq_nearest(x, c, return_distance=True)[1],
    ):
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            torch.func.jvp(function, (codebook,), (codebook,))


@pytest.mark.parametrize("index", [-1, 5])
def test_lookup_of_an_index_out_of_range(index: int, device: torch.device, kernels: str) -> None:
    indices, codebook = torch.tensor([0, index], device=device), torch.randn(5, 3, device=device)
    if kernels == "cuda":
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert vq_lookup(indices, codebook.to(dtype))[1].isnan().all()
        return
    with pytest.raises(IndexError, match=rf"vq_lookup: index {index} is outside \[0, 5\)"):
        vq_lookup(indices, codebook)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), [(50, 300, 17), (33, 12, 4), (5, 40, 1)])
def test_topk(metric: str, n: int, k: int, d: int, device: torch.device) -> None:
    x, codebook = (t.to(device) for t in case_of(n, k, d))
    for count in (1, 5, 12):
        distance, indices = vq_topk(x, codebook, count, metric=metric)
        truth, expected = reference.vq_topk(x.double(), codebook.double(), count, metric=metric)
        assert torch.equal(indices, expected)
        torch.testing.assert_close(distance.double(), truth, rtol=2.0**-22, atol=1e-12)
    image = x.T.reshape(1, d, n, 1)
    assert torch.equal(vq_topk(image, codebook, 3, metric=metric, channel_dim=1)[1].view(n, 3),
                       vq_topk(x, codebook, 3, metric=metric)[1])  # fmt: skip


@pytest.mark.parametrize("hard", sorted(HARD))
def test_topk_on_hard_data(hard: str, device: torch.device) -> None:
    x, codebook = (t.to(device) for t in HARD[hard](*case_of(40, 200, 9)))
    x, codebook = 100 + x, 100 + torch.cat([codebook, codebook[:50]])  # far away, and with ties
    distance, indices = vq_topk(x, codebook, 7)
    truth, expected = reference.vq_topk(x.double(), codebook.double(), 7)
    torch.testing.assert_close(distance.double(), truth, rtol=2.0**-22, atol=1e-44)
    assert torch.equal(indices, expected)


def test_topk_of_what_is_not_finite(device: torch.device) -> None:
    x, codebook = (t.to(device) for t in case_of(20, 30, 4))
    clean = vq_topk(x, codebook[1:], 5)[1] + 1
    x[3, 1], codebook[0, 2] = math.nan, math.inf
    distance, indices = vq_topk(x, codebook, 5)
    assert distance[3].isnan().all()
    others = torch.arange(20, device=device) != 3
    assert torch.equal(indices[others], clean[others])


def test_topk_errors(device: torch.device) -> None:
    x, codebook = torch.randn(4, 3, device=device), torch.randn(5, 3, device=device)
    with pytest.raises(ValueError, match="count is 6, expected 1 to 5"):
        vq_topk(x, codebook, 6)
    with pytest.raises(ValueError, match=r"x has 3 channels but codebook is \[5, 2\]"):
        vq_topk(x, codebook[:, :2], 1)
    assert vq_topk(x[:0], codebook, 2)[1].shape == (0, 2)
