# SPDX-License-Identifier: Apache-2.0
"""The quantiser: on CUDA its codes are written by the kernels that find them, road by road."""

import math

import pytest
import torch
from torch import Tensor

from t2p_fast import reference
from t2p_fast._library import _C
from t2p_fast.ops import vq_nearest, vq_quantize
from vq_cases import METRICS, case_of

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# By how they go on CUDA: rows in registers, neither, tensor cores, and more rows than a slab of
# those or than a part of the loss's sum has, emulated.
CASES = [(37, 70, 5), (20, 50, 32), (15, 300, 40), (33, 130, 41), (560, 140, 33)]


def _checked(
    x: Tensor, codebook: Tensor, channel_dim: int, metric: str = "l2"
) -> tuple[Tensor, Tensor, Tensor]:
    """A quantisation whose indices are `vq_nearest`'s, and whose codes and loss are theirs."""
    quantized, indices, loss = vq_quantize(x, codebook, metric=metric, channel_dim=channel_dim)
    assert torch.equal(indices, vq_nearest(x, codebook, metric=metric, channel_dim=channel_dim))
    codes = codebook[indices].movedim(-1, channel_dim)
    assert (quantized.shape, quantized.dtype) == (x.shape, x.dtype)
    assert torch.equal(quantized, codes.to(x.dtype))
    truth = 1.25 * (x.double() - codes.double()).square().mean()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    return quantized, indices, loss


def _image(rows: Tensor) -> Tensor:
    """Rows `[n, d]` as an image `[1, d, n, 1]`."""
    return rows.T[None, :, :, None].contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d"), CASES, ids=lambda v: str(v))
def test_quantize_by_every_road(
    n: int, k: int, d: int, dtype: torch.dtype, device: torch.device, emulated: bool, kernels: str
) -> None:
    x, codebook = (t.to(device) for t in case_of(n, k, d))
    x = x.to(dtype)
    if emulated:
        _C.device.launches.clear()
    quantized, indices, loss = vq_quantize(x, codebook)
    if emulated:
        launched = " ".join(_C.device.launches)
        assert "lookup_kernel" not in launched
        assert launched.count("total_kernel") == 1
    again = _checked(x, codebook, 1)
    image = _checked(_image(x), codebook, 1)
    assert torch.equal(image[0][0, :, :, 0].T, quantized)
    assert torch.equal(image[1].flatten(), indices)
    for other in (again, image) if kernels == "cuda" else (again,):
        assert torch.equal(other[2], loss)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_on_hopper(dtype: torch.dtype, device: torch.device) -> None:
    x, codebook = (t.to(device) for t in case_of(33, 130, 81))
    assert torch.equal(_checked(x.to(dtype), codebook, 1)[2],
                       _checked(_image(x.to(dtype)), codebook, 1)[2])  # fmt: skip


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize(("n", "k", "d"), CASES[:4], ids=lambda v: str(v))
def test_quantize_by_other_metrics(
    metric: str, n: int, k: int, d: int, device: torch.device
) -> None:
    """Codes are chosen by them; the loss is of squared differences."""
    x, codebook = (t.to(device) for t in case_of(n, k, d))
    _checked(x, codebook, 1, metric)
    _checked(_image(x).bfloat16(), codebook, 1, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), [(37, 60, 5), (15, 40, 40), (33, 130, 40)])
def test_quantize_where_every_row_is_undecided(
    metric: str, n: int, k: int, d: int, device: torch.device
) -> None:
    x, codebook = (t.to(device) for t in case_of(n, k, d))
    codebook[:-3] = codebook[0]
    for channel_dim, rows in ((1, x), (1, _image(x))):
        _checked(rows, codebook, channel_dim, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("n", "k", "d"), [(37, 60, 5), (15, 40, 40), (33, 130, 40)])
def test_quantize_of_what_is_not_finite(
    bad: float, metric: str, n: int, k: int, d: int, device: torch.device
) -> None:
    """A row that is not finite gets code 0, and the loss is not finite either; no other row, and
    nothing of a code that is not chosen, shows it."""
    x, codebook = (t.to(device) for t in case_of(n, k, d))
    spoiled = codebook.clone()
    spoiled[1::3, 2] = bad
    clean, _, loss = vq_quantize(x, spoiled, metric=metric)
    assert clean.isfinite().all()
    assert loss.isfinite()
    x[3, 1] = bad
    for rows in (x, _image(x)):
        quantized, indices, loss = vq_quantize(rows, spoiled, metric=metric, channel_dim=1)
        quantized = quantized if rows.ndim == 2 else quantized[0, :, :, 0].T
        assert indices.flatten()[3] == 0
        assert torch.equal(quantized[3], codebook[0])
        others = torch.arange(n, device=device) != 3
        assert torch.equal(quantized[others], clean[others])
        assert not loss.isfinite()
    nothing, indices, loss = vq_quantize(x, torch.full_like(codebook, bad), metric=metric)
    assert (indices == 0).all()
    assert not nothing.isfinite().any()
    assert not loss.isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_of_no_rows(dtype: torch.dtype, device: torch.device) -> None:
    codebook = torch.randn(20, 6, device=device)
    for x, channel_dim in ((torch.empty(0, 6), 1), (torch.empty(2, 6, 0, 3), 1)):
        rows = x.to(device, dtype).requires_grad_()
        quantized, indices, loss, counts, sums = vq_quantize(
            rows, codebook, channel_dim=channel_dim, return_statistics=True
        )
        assert (quantized.shape, quantized.dtype) == (x.shape, dtype)
        assert indices.numel() == 0
        assert loss == 0
        assert not counts.any()
        assert not sums.any()
        loss.backward()


@pytest.mark.parametrize("n", [511, 512, 513, 1100])
def test_loss_of_many_rows(n: int, device: torch.device, emulated: bool) -> None:
    """About the edges of the parts that the sum is made of on CUDA: 2048 rows; emulated, 512."""
    n = n if emulated else 4 * n
    x, codebook = (t.to(device) for t in case_of(n, 4, 2))
    losses = [vq_quantize(rows, codebook, channel_dim=1)[2] for rows in (x, x, 3 * x)]
    assert torch.equal(losses[0], losses[1])
    for rows, loss in zip((x, 3 * x), losses[1:], strict=True):
        truth = reference.vq_quantize(rows.double(), codebook.double())[2]
        torch.testing.assert_close(loss.double(), truth, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [5, 40])
def test_codes_go_where_a_view_says(
    d: int, dtype: torch.dtype, device: torch.device, kernels: str
) -> None:
    if kernels == "cpu":
        pytest.skip("the binding is CUDA's")
    n, k = 33, 130
    x, codebook = (t.to(device) for t in case_of(n, k, d))
    x = x.to(dtype)
    whole = torch.full((3, n, 2, d), 7, dtype=dtype, device=device)
    view = whole[1, :, 1].T[None]  # [1, d, n], with gaps
    workspace = torch.empty(_C.vq_workspace_size(n, k, d, "l2"), device=device)
    indices = torch.empty(n, dtype=torch.int64, device=device)
    distance, total = torch.empty(n, device=device), torch.empty([], device=device)
    rows = x[:, :, None]  # of another shape than what is written
    _C.vq_quantize(rows, codebook, "l2", 1.0, workspace, indices, distance, view, total)
    assert torch.equal(whole[1, :, 1], codebook[indices].to(dtype))
    assert (whole[::2] == 7).all()
    assert (whole[1, :, 0] == 7).all()
    with pytest.raises(ValueError, match=r"vq_quantize: x is \[33, .* but quantized is \[1, "):
        _C.vq_quantize(rows, codebook, "l2", 1.0, workspace, indices, distance, view[..., 1:],
                       total)  # fmt: skip
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    with pytest.raises(TypeError, match=r"vq_quantize: x is \w+ but quantized is \w+"):
        _C.vq_quantize(rows, codebook, "l2", 1.0, workspace, indices, distance, view.to(other),
                       total)  # fmt: skip


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (70, 3), (300, 40), (300, 1100), (100, 2100)])
def test_sums_are_of_rows_in_their_order(
    n: int, k: int, channel_dim: int, device: torch.device
) -> None:
    """To the bit, for numbers whose sum depends on the order; about the edges of chunks and scans
    on CUDA (chunks of 512 rows, emulated of 64 and not more than 4)."""
    generator = torch.Generator().manual_seed(n)
    x = case_of(n, 1, 3)[0] * 10.0 ** torch.randint(0, 18, (n, 3), generator=generator)
    indices = torch.randint(0, k, (n,), generator=generator)
    indices[n // 3 :: 4] = k - 1  # one more often than others, and for long
    sums = torch.zeros(k, 3, dtype=torch.float64)
    for row, j in zip(x.double(), indices.tolist(), strict=True):
        sums[j] += row
    rows = x.to(device) if channel_dim == -1 else x.T[None].contiguous().to(device)
    found = indices.to(device) if channel_dim == -1 else indices[None].to(device)
    counts, ours = torch.ops.t2p_fast.vq_accumulate(rows, found, k, channel_dim % rows.ndim)
    assert torch.equal(counts.cpu(), indices.bincount(minlength=k).float())
    assert torch.equal(ours.cpu(), sums.float())


@pytest.mark.parametrize("n", [0, 5])
def test_sums_of_codes_without_rows(n: int, device: torch.device) -> None:
    x, indices = torch.ones(n, 4, device=device), torch.full((n,), 6, device=device)
    counts, sums = torch.ops.t2p_fast.vq_accumulate(x, indices, 10, 1)
    assert counts.tolist() == [n if j == 6 else 0 for j in range(10)]
    assert sums.tolist() == [[n if j == 6 else 0] * 4 for j in range(10)]


def test_sums_leave_out_what_is_no_code(device: torch.device, kernels: str) -> None:
    """On CUDA; on the CPU such an index is an error."""
    x, indices = torch.ones(70, 2, device=device), torch.arange(-3, 67, device=device)
    if kernels == "cpu":
        with pytest.raises(IndexError, match=r"vq_accumulate: index -3 is outside \[0, 9\)"):
            torch.ops.t2p_fast.vq_accumulate(x, indices, 9, 1)
        return
    counts, sums = torch.ops.t2p_fast.vq_accumulate(x, indices, 9, 1)
    assert counts.tolist() == [1] * 9
    assert (sums == 1).all()
