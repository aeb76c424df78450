# SPDX-License-Identifier: Apache-2.0
"""The roads that a search may take on CUDA, each by shapes about the edges of its tiles."""

import math

import pytest
import torch
from torch import Tensor

from t2p_fast._library import _C
from t2p_fast.ops import vq_nearest
from vq_cases import HARD, METRICS, assert_nearest, assert_nearest_by, case_of

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# On CUDA, rows in registers: each width, edges of groups (16), tiles and row blocks, many splits.
# Emulated, tiles are of 32 codes, and splits of 4 groups or more have several.
SMALL_CASES = [
    (1, 3, 1), (1030, 37, 4), (300, 2100, 5), (129, 1025, 8), (1025, 333, 7), (20, 600, 16),
    (800, 70, 32),
]  # fmt: skip


def _launched_by_exact_search(
    n: int, k: int, d: int, device: torch.device, emulated: bool,
    dtype: torch.dtype = torch.float32,
) -> str:  # fmt: skip
    """Holds a search to exactness; the kernels it launched, where that can be seen."""
    x, codebook = (t.to(device, dtype) for t in case_of(n, k, d))
    if emulated:
        _C.device.launches.clear()
    found = vq_nearest(x, codebook, return_distance=True)
    assert_nearest(x.float(), codebook.float(), *found)
    return " ".join(_C.device.launches) if emulated else ""


@pytest.mark.parametrize(("n", "k", "d"), SMALL_CASES, ids=lambda v: str(v))
def test_nearest_is_exact_of_few_channels(
    n: int, k: int, d: int, device: torch.device, emulated: bool
) -> None:
    launched = _launched_by_exact_search(n, k, d, device, emulated)
    assert not emulated or "small_kernel" in launched


# Rows, codes or products too few for tensor cores, but more channels than registers hold: splits of
# several tiles (128 codes; emulated, of 4 splits at most), chunks of 16 channels, ragged ends.
PLAIN_CASES = [(15, 700, 33), (1, 1200, 40), (15, 520, 50), (70, 127, 49), (200, 60, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "d"), PLAIN_CASES, ids=lambda v: str(v))
def test_nearest_is_exact_without_tensor_cores(
    n: int, k: int, d: int, dtype: torch.dtype, device: torch.device, emulated: bool
) -> None:
    launched = _launched_by_exact_search(n, k, d, device, emulated, dtype)
    assert not emulated or "scan_kernel" in launched


@pytest.mark.parametrize("metric", METRICS)
def test_few_rows_whose_codes_many_blocks_share(
    metric: str, device: torch.device, emulated: bool
) -> None:
    """Whichever block has the best code, the second best, a duplicate, or no usable code at all."""
    n, share, d = 15, 128, 40
    x, codes = (t.to(device) for t in case_of(n, 4 * share, d))
    x[0] = 0  # of products with it all are alike
    for start, channel, bad in ((0, 1, math.nan), (1, 0, math.inf), (2, 39, -math.inf)):
        codes[start::5, channel] = bad
    codes[share : 2 * share, 7] = math.nan

    def expected(codebook: Tensor) -> Tensor:
        usable = codebook.isfinite().all(1).nonzero()[:, 0]
        return usable[vq_nearest(x, codebook[usable], metric=metric)]

    if emulated:
        _C.device.launches.clear()
    first, distance = vq_nearest(x, codes, metric=metric, return_distance=True)
    assert not emulated or "scan_kernel" in " ".join(_C.device.launches)
    assert torch.equal(first, expected(codes))
    assert distance.isfinite().all()
    for other in (codes.flip(0),) if emulated else (codes.flip(0), codes.roll(share, 0)):
        indices, again = vq_nearest(x, other, metric=metric, return_distance=True)
        assert torch.equal(indices, expected(other))
        assert torch.equal(again, distance)
    twice = vq_nearest(x, codes.repeat(2, 1), metric=metric, return_distance=True)
    assert torch.equal(twice[0], first)
    assert torch.equal(twice[1], distance)
    indices, nothing = vq_nearest(x, codes * math.nan, metric=metric, return_distance=True)
    assert (indices == 0).all()
    assert (nothing == math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(37, 70, 5), (33, 50, 40), (70, 300, 33), (20, 50, 3), (21, 49, 13), (22, 70, 30)],
)
def test_nearest_where_every_row_is_undecided(
    n: int, k: int, d: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Of codes all alike, but for a few far away: more rows are searched again than at a time."""
    x, codebook = (t.to(device, dtype) for t in case_of(n, k, d))
    codebook[:-3] = codebook[0]
    codebook[-3:] += 100
    indices, distance = vq_nearest(x, codebook, return_distance=True)
    assert_nearest(x.float(), codebook.float(), indices, distance)
    assert (indices == 0).all()


# On CUDA these go to the tensor cores: edges of tiles (256 rows, 128 codes) and of chunks of 32
# channels, tiles in one split and in more, rows that stay in shared memory and rows that do not.
TENSOR_CORE_CASES = [
    (512, 1024, 32), (130, 130, 34), (256, 128, 33), (257, 140, 64), (300, 500, 47),
    (17, 1000, 65), (16, 1024, 450), (16, 4300, 33),
]  # fmt: skip


@pytest.mark.parametrize(("n", "k", "d"), TENSOR_CORE_CASES, ids=lambda v: str(v))
def test_nearest_is_exact_on_tensor_cores(
    n: int, k: int, d: int, device: torch.device, emulated: bool
) -> None:
    launched = _launched_by_exact_search(n, k, d, device, emulated)
    if emulated and _C.build_info()["cuda_archs"] != ["75-virtual"]:
        assert "coarse_kernel" in launched
        assert "scan_kernel" not in launched


# As above, for blocks of 256 rows and 128 codes, chunks of 64 channels and steps of 16; more chunks
# than stages, and more work than processors.
HOPPER_CASES = [
    (512, 1024, 32), (130, 130, 34), (256, 128, 64), (300, 500, 81), (17, 1300, 300),
    (1100, 300, 65), (16, 256, 384), (16, 8440, 33),
]  # fmt: skip


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("n", "k", "d"), HOPPER_CASES, ids=lambda v: str(v))
def test_nearest_is_exact_on_hopper(
    n: int, k: int, d: int, device: torch.device, emulated: bool
) -> None:
    launched = _launched_by_exact_search(n, k, d, device, emulated)
    assert not emulated or "coarse_hopper_kernel" in launched


# On CUDA the workspace is for 528 * 256 rows at a time, emulated for 512.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("more", "k", "d"), [(513, 130, 33), (41, 140, 34), (300, 130, 47)])
def test_nearest_of_more_rows_than_a_slab(
    more: int, k: int, d: int, dtype: torch.dtype, device: torch.device, emulated: bool,
    kernels: str,
) -> None:  # fmt: skip
    if kernels == "cpu":
        pytest.skip("slabs are a matter of CUDA")
    slab = 512 if emulated else 528 * 256
    launched = _launched_by_exact_search(slab + more, k, d, device, emulated, dtype)
    if emulated and _C.build_info()["cuda_archs"] != ["75-virtual"]:
        assert launched.count("resolve_coarse_kernel") == 2 + (more > slab)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("dtype", "hard"),
    [(torch.float32, "rows near codes"), (torch.bfloat16, "duplicates"),
     (torch.float16, "rows of all sizes")],
)  # fmt: skip
def test_hopper_of_more_rows_than_a_slab(
    dtype: torch.dtype, hard: str, device: torch.device, emulated: bool
) -> None:
    rows = 512 + 45 if emulated else 528 * 256 + 45
    x, codebook = (t.to(device, dtype) for t in HARD[hard](*case_of(rows, 140, 40)))
    if dtype == torch.float16:
        x, codebook = x.clamp(-6e4, 6e4), codebook.clamp(-6e4, 6e4)
    found = vq_nearest(x, codebook, return_distance=True)
    assert_nearest(x.float(), codebook.float(), *found)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("hard", HARD)
def test_hopper_on_hard_data(hard: str, metric: str, device: torch.device, emulated: bool) -> None:
    k = 140 if emulated else 280
    x, codebook = (t.to(device) for t in HARD[hard](*case_of(60, k, 70)))
    if metric == "cosine":
        x = x.bfloat16().float()
    found = vq_nearest(x.bfloat16() if metric == "cosine" else x, codebook, metric=metric,
                       return_distance=True)  # fmt: skip
    if metric == "l2":
        assert_nearest(x, codebook, *found)
    else:
        assert_nearest_by(metric, x, codebook, *found)
