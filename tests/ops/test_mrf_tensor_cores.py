# SPDX-License-Identifier: Apache-2.0
"""Mean field with dense bfloat16 label weights: on CUDA messages and updates by tensor cores."""

import math

import pytest
import torch
from torch import Tensor

from t2p_fast import reference
from t2p_fast._library import _C
from t2p_fast.ops import mrf_mean_field
from t2p_fast.ops.mrf_tensor_cores import LabelStep

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _spoken_to(unknown: int, v: int) -> tuple[Tensor, Tensor]:
    """Positions that hear known ones alone, with weights whose sums bfloat16 holds."""
    generator = torch.Generator().manual_seed(unknown)
    n = unknown + 12
    w_s = torch.zeros(n, n)
    w_s[:, unknown:] = torch.randint(-8, 9, (n, 12), generator=generator) / 8
    known = torch.full((1, n), -1)
    known[:, unknown:] = torch.randint(0, v, (1, 12), generator=generator)
    return w_s, known


# Tiles of 64 x 64, 128 x 64 and, of 4 processors, 128 x 128, each also with more chunks of 64
# channels than stages; and what falls back on torch.
@pytest.mark.parametrize(
    ("unknown", "v", "damping"),
    [(1, 8, 0.0), (64, 200, 0.4), (17, 456, 0.0), (65, 72, 0.4), (66, 328, 0.0), (130, 136, 0.4),
     (130, 264, 0.0), (5, 66, 0.4)],
)  # fmt: skip
def test_messages_that_bfloat16_can_hold_are_exact(
    unknown: int, v: int, damping: float, device: torch.device, kernels: str
) -> None:
    unary = 2 * _random(1, unknown + 12, v, seed=v)
    w_s, known = _spoken_to(unknown, v)
    w_c = 0.5 * _random(v, v, seed=1).bfloat16()
    options = {"iterations": 1, "damping": damping, "temperature": 0.7}
    ours = mrf_mean_field(
        unary.to(device), w_s.to(device), w_c.to(device), known=known.to(device), **options
    ).cpu()
    truth = reference.mrf_mean_field(
        unary.double(), w_s.double(), w_c.double(), known=known, **options
    )
    # The message itself is float32 in the kernel; the q that damping keeps is bfloat16.
    exact = kernels == "cuda" and v % 8 == 0
    tolerance = (2e-5 if damping == 0 else 2e-3) if exact else 2e-2
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.sum(-1), torch.ones(1, unknown + 12), rtol=0, atol=tolerance)


@pytest.mark.parametrize("transposed", [False, True])
def test_iterations_with_known_labels(transposed: bool, device: torch.device) -> None:
    unary, w_s = 2 * _random(2, 40, 104), _random(40, 40, seed=1) / 7
    w_c = 0.3 * _random(104, 104, seed=2).bfloat16()
    w_c = w_c.T if transposed else w_c
    known = torch.where(_random(2, 40, seed=3) > 0.5, 100, -1)
    for fixed in (None, known):
        options = {"iterations": 3, "damping": 0.2, "temperature": 1.5}
        ours = mrf_mean_field(
            unary.bfloat16().to(device), w_s.to(device), w_c.to(device),
            known=None if fixed is None else fixed.to(device), **options,
        )  # fmt: skip
        assert ours.dtype == torch.bfloat16
        truth = reference.mrf_mean_field(
            unary.bfloat16().double(), w_s.double(), w_c.double(), known=fixed, **options
        )
        assert float((ours.cpu() - truth).abs().max()) < 2e-2


def test_a_row_does_not_depend_on_how_many_there_are(device: torch.device, kernels: str) -> None:
    if kernels == "cpu":
        pytest.skip("torch's product on a CPU is another for other sizes")
    unary = 2 * _random(3, 50, 136)
    w_s = _random(50, 50, seed=1) * (_random(50, 50, seed=2) > 1)
    w_c = 0.3 * _random(136, 136, seed=3).bfloat16().to(device)
    edges = w_s.to_sparse_csr().to(device)
    alone, together = (
        mrf_mean_field(f.to(device), edges, w_c, iterations=2) for f in (unary[:1], unary)
    )
    assert torch.equal(alone[0], together[0])


def test_labels_ruled_out_by_the_dozen(device: torch.device) -> None:
    """More than 32 in a row: a part of the reduction that has nothing to say."""
    unary = _random(1, 6, 96)
    unary[..., 30:70] = -math.inf
    w_s, w_c = 0.2 * _random(6, 6, seed=1), _random(96, 96, seed=2).bfloat16()
    q = mrf_mean_field(unary.to(device), w_s.to(device), w_c.to(device)).cpu()
    assert (q[..., 30:70] == 0).all()
    torch.testing.assert_close(q.sum(-1), torch.ones(1, 6), rtol=0, atol=1e-2)


@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf"])
def test_scores_that_are_none_make_their_row_nan(
    bad: str, device: torch.device, kernels: str
) -> None:
    unary = _random(1, 5, 40)
    unary[0, 3] = -math.inf if bad == "all -inf" else unary[0, 3]
    if bad != "all -inf":
        unary[0, 3, 38] = float(bad)
    w_s = torch.eye(5).roll(1, 0)  # a ring in which 4 listens to 3
    w_s[4, 3] = 0
    arguments = unary.to(device), w_s.to_sparse_csr().to(device), torch.eye(40).bfloat16()
    arguments = *arguments[:2], arguments[2].to(device)
    if kernels == "cpu":
        with pytest.raises(ValueError, match="unary of position 3 has a NaN, an infinity"):
            mrf_mean_field(*arguments)
        return
    q = mrf_mean_field(*arguments, iterations=2).cpu()
    assert q[0, 3].isnan().all()
    assert q[0, [0, 1, 2, 4]].isfinite().all()


def _step(r: int, v: int, device: torch.device) -> tuple[LabelStep, Tensor, Tensor]:
    """Label weights and scores of a field; mixed rows; and an empty result."""
    unary, w_c = 2 * _random(r, v, seed=v), 0.5 * _random(v, v, seed=1).bfloat16()
    step = LabelStep(unary.to(device), w_c.to(device))
    if not step.fits:
        pytest.skip("older than tensor cores for bfloat16")
    return step, _random(r, v, seed=2).bfloat16().to(device), torch.empty(r, v, device=device)


def _launched(step: LabelStep, mixed: Tensor, q: Tensor, emulated: bool) -> str:
    """Runs an iteration; the kernels it launched, where that can be seen."""
    if emulated:
        _C.device.launches.clear()
    step(mixed, None, 0.0, 0.7, q)
    return " ".join(_C.device.launches) if emulated else ""


# Tiles of 64 labels by 32, 80 and 128 rows and, of 4 processors, of 128 labels by 128 and 256 rows;
# most also with more tiles than processors and more chunks than stages.
HOPPER_CASES = [
    (1, 8, "1ELi32E"), (17, 456, "1ELi32E"), (66, 328, "1ELi80E"), (100, 264, "1ELi128E"),
    (130, 136, "2ELi128E"), (260, 392, "2ELi128E"), (130, 264, "2ELi256E"), (390, 392, "2ELi256E"),
]  # fmt: skip


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("r", "v", "tile"), HOPPER_CASES)
def test_logits_on_hopper(r: int, v: int, tile: str, device: torch.device, emulated: bool) -> None:
    step, mixed, q = _step(r, v, device)
    launched = _launched(step, mixed, q, emulated)
    assert not emulated or ("logits_hopper_kernel" in launched and tile in launched)
    x, sums = step.logits.cpu(), step.sums.cpu()

    m, w_c, unary = (t.cpu().double() for t in (mixed, step.w_c, step.unary))
    truth = (m @ w_c.T + unary) / 0.7
    # Of 8 or 16 products each the sum is rounded, or truncated, to float32.
    bound = (v / 8 + 6) * 2**-23 * (m.abs() @ w_c.abs().T + unary.abs()) / 0.7
    assert ((x - truth).abs() <= bound).all()
    parts = torch.nn.functional.pad(x, (0, -v % 32), value=-math.inf).view(r, -1, 32)
    assert torch.equal(sums[..., 0], parts.amax(-1))
    exact = (parts - parts.amax(-1, keepdim=True)).double().exp().sum(-1)
    torch.testing.assert_close(sums[..., 1].double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(q.cpu(), x.softmax(-1), rtol=1e-4, atol=1e-7)
    if emulated and _C.build_info()["cuda_archs"] == ["80-virtual"]:
        other, _, q_of_other = _step(r, v, device)
        _C.device.capability = (8, 0)
        assert "hopper" not in _launched(other, mixed, q_of_other, emulated)
        assert ((x - other.logits).abs() <= 2 * bound).all()
        torch.testing.assert_close(q, q_of_other, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("hopper")
def test_a_row_on_hopper_does_not_depend_on_how_many_there_are(device: torch.device) -> None:
    whole, mixed, q = _step(260, 264, device)
    whole(mixed, None, 0.0, 1.0, q)
    for r in (130, 100, 66, 17):  # each of another tile
        part = LabelStep(whole.unary[:r], whole.w_c)
        q_of_part = torch.empty_like(part.unary)
        part(mixed[:r], None, 0.0, 1.0, q_of_part)
        assert torch.equal(part.logits, whole.logits[:r])
        assert torch.equal(part.sums, whole.sums[:r])
        assert torch.equal(q_of_part, q[:r])


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("r", [6, 130])
def test_scores_that_are_none_on_hopper(r: int, device: torch.device) -> None:
    step, mixed, q = _step(r, 136, device)
    step.unary[1, 30:70] = -math.inf  # more than a part
    step.unary[2] = -math.inf
    step.unary[3, 38] = math.nan
    step.unary[4, 5] = math.inf
    step(mixed, None, 0.0, 1.0, q)
    q = q.cpu()
    assert (q[1, 30:70] == 0).all()
    assert q[2:5].isnan().all()
    assert q[[0, 1, *range(5, r)]].isfinite().all()
