# SPDX-License-Identifier: Apache-2.0
"""Vector quantisation against the float64 reference. Distances are compared, not indices."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2p_fast import reference
from t2p_fast._library import _C
from t2p_fast.ops import vq_lookup, vq_nearest, vq_quantize, vq_topk
from t2p_fast.reference.vq import _distances as distances

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# Sizes about the edges of tiles (8), panels (8, 24, 48), blocks (64, 256) and vectors (16).
CASES = [
    (1, 1, 1), (5, 3, 2), (63, 47, 17), (64, 48, 16), (65, 49, 15), (257, 1000, 8),
    (300, 100, 256), (7, 5000, 33), (1000, 64, 3), (9, 100, 1030), (3, 20, 4096),
]  # fmt: skip


METRICS = ("l2", "dot", "cosine")


def _case(n: int, k: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


def _assert_nearest(x: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor) -> None:
    """The chosen codes are nearest in float64, the distances theirs to float32 rounding."""
    assert indices.dtype == torch.int64
    assert ((indices >= 0) & (indices < len(codebook))).all()
    x64, codes64 = x.double().cpu(), codebook.double().cpu()
    _, best = reference.vq_nearest(x64, codes64, return_distance=True)
    chosen = (x64 - codes64[indices.cpu()]).square().sum(-1)
    # Two float64 sums of d terms in different orders.
    torch.testing.assert_close(chosen, best, rtol=x.shape[-1] * 2.0**-52, atol=0)
    torch.testing.assert_close(distance.double().cpu(), best, rtol=2.0**-22, atol=1e-44)


@pytest.mark.parametrize(("n", "k", "d"), CASES, ids=lambda v: str(v))
def test_nearest_is_exact(n: int, k: int, d: int, device: torch.device) -> None:
    x, codebook = (t.to(device) for t in _case(n, k, d))
    _assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


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
    x, codebook = _case(n, k, d, seed)
    if grid:  # exact ties
        x, codebook = x.round(), codebook.round()
    if duplicates:
        codebook = codebook[torch.arange(k) // 3]
    x, codebook = (x * scale + offset).to(device), (codebook * scale + offset).to(device)
    assume(n > 0)
    _assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


# On CUDA these go to the tensor cores: edges of tiles (256 rows, 128 codes) and of chunks of 32
# channels, tiles in one split and in more, rows that stay in shared memory and rows that do not.
TENSOR_CORE_CASES = [
    (512, 1024, 32), (130, 130, 34), (256, 128, 33), (257, 140, 64), (300, 500, 47),
    (17, 1000, 65), (16, 1024, 450),
]  # fmt: skip


@pytest.mark.parametrize(("n", "k", "d"), TENSOR_CORE_CASES, ids=lambda v: str(v))
def test_nearest_is_exact_on_tensor_cores(
    n: int, k: int, d: int, device: torch.device, emulated: bool
) -> None:
    x, codebook = (t.to(device) for t in _case(n, k, d))
    if emulated:
        _C.device.launches.clear()
    _assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))
    if emulated and _C.build_info()["cuda_archs"] != ["75-virtual"]:
        launched = " ".join(_C.device.launches)
        assert "coarse_kernel" in launched
        assert "scan_kernel" not in launched


@pytest.fixture
def hopper(emulated: bool, kernels: str) -> Iterator[None]:
    """An emulated device is one of compute capability 9.0."""
    if kernels == "cpu":
        pytest.skip("as on any other CPU")
    if not emulated:
        yield
        return
    before, _C.device.capability = _C.device.capability, (9, 0)
    yield
    _C.device.capability = before


# As above, for blocks of 256 rows and 128 codes, chunks of 64 channels and steps of 16; more chunks
# than stages, and more work than processors.
HOPPER_CASES = [
    (512, 1024, 32), (130, 130, 34), (256, 128, 64), (300, 500, 81), (17, 1300, 300),
    (1100, 300, 65), (16, 256, 384),
]  # fmt: skip


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("n", "k", "d"), HOPPER_CASES, ids=lambda v: str(v))
def test_nearest_is_exact_on_hopper(
    n: int, k: int, d: int, device: torch.device, emulated: bool
) -> None:
    x, codebook = (t.to(device) for t in _case(n, k, d))
    if emulated:
        _C.device.launches.clear()
    _assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))
    if emulated:
        assert "coarse_hopper_kernel" in " ".join(_C.device.launches)


@pytest.mark.not_emulated(reason="more rows than the workspace is for at a time")
def test_nearest_of_more_rows_than_a_slab(device: torch.device) -> None:
    x, codebook = (t.to(device) for t in _case(135168 + 300, 128, 32))
    _assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


# What the coarse stage has to get right: its bounds, its formats, many candidates and none.
HARD: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rows of all sizes": lambda x, c: (x * 10 ** torch.linspace(-6, 6, len(x))[:, None], c),
    "codes of all sizes": lambda x, c: (x, c * 10 ** torch.linspace(-6, 6, len(c))[:, None]),
    "a few codes large": lambda x, c: (x, c * (1e-5 + (torch.arange(len(c)) % 60 == 0))[:, None]),
    "codes almost alike": lambda x, c: (x, c[:1] + 1e-5 * c),
    "rows near codes": lambda x, c: (c[torch.arange(len(x)) % len(c)] + 1e-3 * x, c),
    "rows that are codes": lambda x, c: (c[torch.arange(len(x)) % len(c)], c),
    "one channel large": lambda x, c: (x.index_fill(1, torch.tensor(0), 1e5), c),
    "far clusters": lambda x, c: (
        x + 100 * c[torch.arange(len(x)) % 7],
        c + 100 * c[torch.arange(len(c)) % 7],
    ),
    "an outlier": lambda x, c: (x, c.index_fill(0, torch.tensor(7), 1e9)),
    "rows of zeros": lambda x, c: (x * 0, c),
    "codes of zeros": lambda x, c: (x, c * 0),
    "all alike": lambda x, c: (x * 0 + 1, c * 0 + 1),
    "tiny": lambda x, c: (x * 1e-13, c * 1e-13),
    "large": lambda x, c: (x * 1e12, c * 1e12),
    "duplicates": lambda x, c: (x, c[torch.arange(len(c)) // 3]),
    "more duplicates than a list holds": lambda x, c: (x, c[torch.arange(len(c)) // 50]),
    "sorted, the nearest last": lambda x, c: (x, c[(x[0] - c).square().sum(1).argsort().flip(0)]),
    "far from the origin": lambda x, c: (x + 1e4, c + 1e4),
    "below what can be squared": lambda x, c: (x * 1e-30, c * 1e-30),
}


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(130, 3000, 5), (130, 9000, 8), (130, 500, 100), (40, 420, 33), (130, 500, 3), (75, 333, 7)],
)
def test_nearest_is_exact_on_hard_data(
    hard: str, n: int, k: int, d: int, device: torch.device, emulated: bool
) -> None:
    k = k // 5 if emulated and n == 130 else k
    x, codebook = (t.to(device) for t in HARD[hard](*_case(n, k, d)))
    _assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


def _assert_nearest_by(
    metric: str, x: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor
) -> None:
    """As `_assert_nearest`, with the float64 rounding of products in units of |x| |c|."""
    x64, codes64 = x.double().cpu(), codebook.double().cpu()
    indices, distance = indices.cpu(), distance.double().cpu()
    _, best = reference.vq_nearest(x64, codes64, metric=metric, return_distance=True)
    chosen = torch.stack(
        [distances(row, codes64[i][None], metric)[0] for row, i in zip(x64, indices)]  # noqa: B905
    )
    scale = 1 if metric == "cosine" else (x64.norm(dim=1) * codes64.norm(dim=1).max()) + 1e-300
    error = x.shape[1] * 2.0**-50 * scale
    assert ((chosen - best).abs() <= error).all()
    assert ((distance - best).abs() <= 2.0**-23 * best.abs() + error + 1e-44).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), CASES, ids=lambda v: str(v))
def test_metrics(metric: str, n: int, k: int, d: int, device: torch.device, emulated: bool) -> None:
    d = min(d, 300) if emulated else d
    x, codebook = (t.to(device) for t in _case(n, k, d))
    x[0], codebook[-1] = 0, 0  # at a right angle to all, by definition
    found = vq_nearest(x, codebook, metric=metric, return_distance=True)
    _assert_nearest_by(metric, x, codebook, *found)


# By how they go on CUDA: rows in registers, tensor cores, neither.
METRIC_CASES = [(40, 150, 3), (40, 300, 20), (60, 280, 33), (9, 100, 70)]


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_metrics_on_hard_data(metric: str, hard: str, device: torch.device, emulated: bool) -> None:
    for n, k, d in METRIC_CASES[1:3] if emulated else METRIC_CASES:
        x, codebook = (t.to(device) for t in HARD[hard](*_case(n, k, d)))
        found = vq_nearest(x, codebook, metric=metric, return_distance=True)
        _assert_nearest_by(metric, x, codebook, *found)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("n", "k", "d"), METRIC_CASES[1:], ids=lambda v: str(v))
def test_metrics_of_what_is_not_finite(
    bad: float, metric: str, n: int, k: int, d: int, device: torch.device
) -> None:
    x, codebook = (t.to(device) for t in _case(n, k, d))
    spoiled = codebook.clone()
    spoiled[::3, 1] = bad
    keep = torch.arange(k, device=device)[torch.arange(k, device=device) % 3 != 0]
    clean = keep[vq_nearest(x, codebook[keep], metric=metric)]
    x[n // 2, 1] = bad
    indices, distance = vq_nearest(x, spoiled, metric=metric, return_distance=True)
    assert indices[n // 2] == 0
    assert distance[n // 2].isnan()
    others = torch.arange(n, device=device) != n // 2
    assert torch.equal(indices[others], clean[others])
    nothing = vq_nearest(x, torch.full_like(codebook, bad), metric=metric, return_distance=True)
    assert (nothing[0] == 0).all()
    assert nothing[1][others].isinf().all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), METRIC_CASES, ids=lambda v: str(v))
def test_metrics_ties_go_to_the_lowest_index(
    metric: str, n: int, k: int, d: int, device: torch.device, emulated: bool
) -> None:
    x, codebook = (t.to(device) for t in _case(n, k // 4 if emulated else k, d))
    x = x[:20] if emulated else x
    plain = vq_nearest(x, codebook, metric=metric)
    assert torch.equal(vq_nearest(x, codebook.repeat(3, 1), metric=metric), plain)
    assert torch.equal(vq_nearest(x, codebook.repeat_interleave(20, 0), metric=metric), 20 * plain)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("hard", HARD)
def test_hopper_on_hard_data(hard: str, metric: str, device: torch.device) -> None:
    x, codebook = (t.to(device) for t in HARD[hard](*_case(60, 280, 70)))
    if metric == "cosine":
        x = x.bfloat16().float()
    found = vq_nearest(x.bfloat16() if metric == "cosine" else x, codebook, metric=metric,
                       return_distance=True)  # fmt: skip
    if metric == "l2":
        _assert_nearest(x, codebook, *found)
    else:
        _assert_nearest_by(metric, x, codebook, *found)


@pytest.mark.parametrize("metric", METRICS)
def test_metric_gradients(metric: str, device: torch.device) -> None:
    x, codebook = (t.to(device).requires_grad_() for t in _case(50, 9, 5))
    weight = torch.linspace(-1, 1, 50, device=device)
    distance = vq_nearest(x, codebook, metric=metric, return_distance=True)[1]
    (distance * weight).sum().backward()
    x64, codes64 = (t.detach().double().requires_grad_() for t in (x, codebook))
    truth = reference.vq_nearest(x64, codes64, metric=metric, return_distance=True)[1]
    (truth * weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codebook.grad.double(), codes64.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), METRIC_CASES, ids=lambda v: str(v))
def test_low_precision_rows(
    n: int, k: int, d: int, metric: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Rows of low precision mean the numbers that they hold, whatever way they are read."""
    x, codebook = (t.to(device) for t in _case(n, k, d))
    image = x.to(dtype).T.reshape(1, d, n, 1).contiguous()
    found = vq_nearest(image, codebook, metric=metric, channel_dim=1, return_distance=True)
    _assert_nearest_by(metric, x.to(dtype).float(), codebook, *(t.view(n) for t in found))
    plain = vq_nearest(x.to(dtype), codebook, metric=metric)
    assert torch.equal(found[0].view(n), plain)


# On CUDA, rows in registers: each width, edges of groups (16), tiles and row blocks, many splits.
SMALL_CASES = [
    (1, 3, 1),
    (1030, 37, 4),
    (300, 2100, 5),
    (129, 1025, 8),
    (20, 600, 16),
    (800, 70, 32),
]


@pytest.mark.parametrize(("n", "k", "d"), SMALL_CASES, ids=lambda v: str(v))
def test_nearest_is_exact_of_few_channels(
    n: int, k: int, d: int, device: torch.device, emulated: bool
) -> None:
    x, codebook = (t.to(device) for t in _case(n, k, d))
    if emulated:
        _C.device.launches.clear()
    _assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))
    if emulated:
        assert "small_kernel" in " ".join(_C.device.launches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(dtype: torch.dtype, device: torch.device) -> None:
    """Inputs of low precision mean the numbers that they hold; nothing else is rounded."""
    x, codebook = (t.to(device).to(dtype) for t in _case(300, 100, 24))
    _assert_nearest(x.float(), codebook.float(), *vq_nearest(x, codebook, return_distance=True))
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
    x, codebook = (t.to(device) for t in _case(30, 100, 8))
    view = torch._neg_view(x)
    _assert_nearest(-x, codebook, *vq_nearest(view, codebook, return_distance=True))


def test_nearest_far_from_the_origin(device: torch.device) -> None:
    x, codebook = (1e4 + t.to(device) for t in _case(512, 1024, 64))
    _assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


def test_nearest_with_tiny_codes(device: torch.device) -> None:
    x, codebook = (t.to(device) for t in _case(512, 2048, 64))
    codebook = codebook / 2048 / 4
    _assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


def test_nearest_with_clusters_far_apart(device: torch.device) -> None:
    x, codebook = (t.to(device) for t in _case(100, 300, 16))
    x[::2] += 1e6
    codebook[::2] += 1e6
    _assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


@pytest.mark.parametrize(("n", "k", "d"), [(100, 200, 8), (60, 280, 33)])
def test_nearest_of_huge_values(n: int, k: int, d: int, device: torch.device) -> None:
    x, codebook = (t.to(device) * 5e37 for t in _case(n, k, d))
    indices, distance = vq_nearest(x, codebook, return_distance=True)
    chosen = (x.double() - codebook.double()[indices]).square().sum(-1)
    _, best = reference.vq_nearest(x.double(), codebook.double(), return_distance=True)
    torch.testing.assert_close(chosen, best, rtol=1e-14, atol=0)
    assert distance.isinf().all()  # 1e75 is beyond float32


@pytest.mark.parametrize("d", [24, 33])
@pytest.mark.parametrize("times", [3, 100])
def test_nearest_ties_go_to_the_lowest_index(times: int, d: int, device: torch.device) -> None:
    x, codebook = (t.to(device) for t in _case(50, 700 // times, d))
    repeated = codebook.repeat(times, 1)
    assert torch.equal(vq_nearest(x, repeated), vq_nearest(x, codebook))
    assert (vq_nearest(x, torch.zeros(500, d, device=device)) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("k", "d"), [(100, 9), (300, 40)])
def test_nearest_of_rows_not_finite(bad: float, k: int, d: int, device: torch.device) -> None:
    x, codebook = (t.to(device) for t in _case(70, k, d))
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
    x, codebook = (t.to(device) for t in _case(70, k, d))
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
    rows, codebook = (t.to(device) for t in _case(210, k, d))
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


def test_quantize_gradient_far_from_the_origin(device: torch.device) -> None:
    x, codebook = (1e4 + t.to(device) for t in _case(256, 16, 8))
    codebook.requires_grad_()
    vq_quantize(x, codebook)[2].backward()
    truth = codebook.detach().double().requires_grad_()
    reference.vq_quantize(x.double(), truth)[2].backward()
    torch.testing.assert_close(codebook.grad.double(), truth.grad, rtol=1e-5, atol=1e-7)


def test_nearest_distance_gradient(device: torch.device) -> None:
    x, codebook = (t.to(device).requires_grad_() for t in _case(50, 9, 5))
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
    x, codebook = _case(3000, 500, 24)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            runs.append(vq_quantize(x, codebook, return_statistics=True))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_opcheck(device: torch.device) -> None:
    ops = torch.ops.t2p_fast
    x = torch.randn(2, 6, 5, 3, device=device, requires_grad=True)
    codebook = torch.randn(20, 6, device=device, requires_grad=True)
    indices = torch.randint(0, 20, (2, 5, 3), device=device)
    for metric in METRICS:
        torch.library.opcheck(ops.vq_nearest.default, (x, codebook, metric, 1))
    half = x.detach().bfloat16().requires_grad_()
    torch.library.opcheck(ops.vq_nearest.default, (half, codebook, "l2", 1))
    torch.library.opcheck(ops.vq_quantize.default, (half, codebook, 0.2, 1.0, "l2", 1, True))
    torch.library.opcheck(ops.vq_lookup.default, (indices, codebook, 1))
    torch.library.opcheck(ops.vq_accumulate.default, (x.detach(), indices, 20, 1))
    for statistics in (False, True):
        arguments = (x, codebook, 0.25, 1.0, "l2", 1, statistics)
        torch.library.opcheck(ops.vq_quantize.default, arguments)


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


def test_autocast_computes_in_float32(device: torch.device) -> None:
    x, codebook = (t.to(device) for t in _case(40, 30, 8))
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
    x, codebook = _case(10, 5, 4)
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
    x, codebook = _case(10, 5, 4)
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
        assert vq_lookup(indices, codebook)[1].isnan().all()
        return
    with pytest.raises(IndexError, match=rf"vq_lookup: index {index} is outside \[0, 5\)"):
        vq_lookup(indices, codebook)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), [(50, 300, 17), (33, 12, 4), (5, 40, 1)])
def test_topk(metric: str, n: int, k: int, d: int, device: torch.device) -> None:
    x, codebook = (t.to(device) for t in _case(n, k, d))
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
    x, codebook = (t.to(device) for t in HARD[hard](*_case(40, 200, 9)))
    x, codebook = 100 + x, 100 + torch.cat([codebook, codebook[:50]])  # far away, and with ties
    distance, indices = vq_topk(x, codebook, 7)
    truth, expected = reference.vq_topk(x.double(), codebook.double(), 7)
    torch.testing.assert_close(distance.double(), truth, rtol=2.0**-22, atol=1e-44)
    assert torch.equal(indices, expected)


def test_topk_of_what_is_not_finite(device: torch.device) -> None:
    x, codebook = (t.to(device) for t in _case(20, 30, 4))
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
