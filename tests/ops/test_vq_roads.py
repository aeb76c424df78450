# SPDX-License-Identifier: Apache-2.0
"""The roads that a search may take on CUDA, each by shapes about the edges of its tiles."""

import pytest
import torch

from t2p_fast._library import _C
from t2p_fast.ops import vq_nearest
from vq_cases import HARD, METRICS, assert_nearest, assert_nearest_by, case_of

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# On CUDA, rows in registers: each width, edges of groups (16), tiles and row blocks, many splits.
SMALL_CASES = [
    (1, 3, 1),
    (1030, 37, 4),
    (300, 2100, 5),
    (129, 1025, 8),
    (20, 600, 16),
    (800, 70, 32),
]


def _launched_by_exact_search(n: int, k: int, d: int, device: torch.device, emulated: bool) -> str:
    """Holds a search to exactness; the kernels it launched, where that can be seen."""
    x, codebook = (t.to(device) for t in case_of(n, k, d))
    if emulated:
        _C.device.launches.clear()
    assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))
    return " ".join(_C.device.launches) if emulated else ""


@pytest.mark.parametrize(("n", "k", "d"), SMALL_CASES, ids=lambda v: str(v))
def test_nearest_is_exact_of_few_channels(
    n: int, k: int, d: int, device: torch.device, emulated: bool
) -> None:
    launched = _launched_by_exact_search(n, k, d, device, emulated)
    assert not emulated or "small_kernel" in launched


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
    launched = _launched_by_exact_search(n, k, d, device, emulated)
    if emulated and _C.build_info()["cuda_archs"] != ["75-virtual"]:
        assert "coarse_kernel" in launched
        assert "scan_kernel" not in launched


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
    launched = _launched_by_exact_search(n, k, d, device, emulated)
    assert not emulated or "coarse_hopper_kernel" in launched


@pytest.mark.not_emulated(reason="more rows than the workspace is for at a time")
def test_nearest_of_more_rows_than_a_slab(device: torch.device) -> None:
    x, codebook = (t.to(device) for t in case_of(135168 + 300, 128, 32))
    assert_nearest(x, codebook, *vq_nearest(x, codebook, return_distance=True))


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
