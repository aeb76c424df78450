# SPDX-License-Identifier: Apache-2.0
"""Products on a CPU in bfloat16: with packed label weights, and between positions by tiles."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from t2p_fast import build_info, reference
from t2p_fast._library import _C
from t2p_fast.ops import mrf_mean_field, mrf_pack

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("v", "unknown"), [(512, 66), (1023, 7), (1024, 31), (1024, 32), (1024, 129)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_packed_label_weights(v: int, unknown: int, threads: int) -> None:
    """They change nothing but the rounding of messages."""
    f = _random(2, 80, v, seed=1)
    w_s, w_c = _random(80, 80, seed=2) / 9, (0.2 * _random(v, v, seed=3)).bfloat16()
    known = torch.randint(0, v, (2, 80), generator=torch.Generator().manual_seed(4))
    known.view(-1)[torch.randperm(160, generator=torch.Generator().manual_seed(5))[:unknown]] = -1
    truth = reference.mrf_mean_field(
        f.double(), w_s.double(), w_c.double(), iterations=3, known=known
    )
    packed, before = mrf_pack(w_c), torch.get_num_threads()
    whole = 4 * -(-v // 32) * 32 * -(-v // 512) * 256
    assert packed.numel() in (0, 4 * v * v, whole, whole + 8 * v + 5 * v * v // 2)
    try:
        torch.set_num_threads(threads)
        ours = mrf_mean_field(f, w_s, w_c, iterations=3, known=known, packed=packed)
    finally:
        torch.set_num_threads(before)
    plain = mrf_mean_field(f, w_s, w_c, iterations=3, known=known)
    assert float((ours - truth).abs().max()) <= max(2e-2, float((plain - truth).abs().max()))


@pytest.mark.parametrize("r", [33, 256, 300])
@pytest.mark.parametrize("threads", [1, 2])
def test_label_product_by_halves(r: int, threads: int) -> None:
    """No row or label loses precision to one of larger numbers, and an infinity stays its own."""
    v = 1024
    if not _C.mrf_packed_size(v):
        pytest.skip("this processor has no product for packed labels")
    rows = _random(r, v, seed=1) * 10 ** torch.linspace(-4, 4, r)[:, None]
    w_c = _random(v, v, seed=2) * 10 ** torch.linspace(5, -5, v)[:, None]
    w_c[7] = 0
    rows, w_c, message = rows.bfloat16(), w_c.bfloat16(), torch.empty(r, v)
    for value in (None, float("inf")):
        if value is not None:
            w_c[3, 5] = value
        _C.mrf_label_product(rows, mrf_pack(w_c), message, threads)
        truth = rows.double() @ w_c.double().T
        size = rows.double().norm(dim=1)[:, None] * w_c.double().norm(dim=1)
        error = ((message - truth) / size)[:, size[0].isfinite() & (size[0] > 0)]
        assert float(error.abs().max()) < (3e-3 if value is None else 1e-6)
        assert not message[:, 7].any()
    assert not message[:, 3].isfinite().any()
    rows[1, 2] = float("nan")
    _C.mrf_label_product(rows, mrf_pack(w_c.nan_to_num(0, 0, 0)), message, threads)
    assert message.isnan().any(1).tolist() == [i == 1 for i in range(r)]


@pytest.mark.parametrize("v", [466, 500, 511, 512, 1001, 1024])
def test_label_product(v: int) -> None:
    """Any number of rows and labels, to the accuracy of sums in float32; threads change no bit."""
    if not _C.mrf_packed_size(v):
        pytest.skip("this processor has no product for packed labels")
    w_c = _random(v, v, seed=2).bfloat16()
    packed = mrf_pack(w_c)
    for r in (*range(1, 37), 47, 48, 49, 63, 64, 65, 70):
        rows = _random(r, v, seed=r).bfloat16()
        results = []
        for threads in (1, 2, 3):
            message = torch.full((r, v), math.nan)
            _C.mrf_label_product(rows, packed, message, threads)
            results.append(message)
        truth = rows.double() @ w_c.double().T
        halves = v % 1024 == 0 and r >= 32 and _C.build_info()["isa"] != "amx"
        error = float((results[0] - truth).abs().max()) / v**0.5
        assert error < (2e-2 if halves else 2e-6), (v, r)
        assert all(torch.equal(results[0], other) for other in results[1:]), (v, r)


def test_label_product_has_no_rows() -> None:
    if not _C.mrf_packed_size(512):
        pytest.skip("this processor has no product for packed labels")
    rows = torch.empty(0, 512, dtype=torch.bfloat16)
    _C.mrf_label_product(rows, mrf_pack(torch.zeros(512, 512).bfloat16()), rows.float(), 2)


@pytest.mark.skipif(not _C.mrf_has_mix(), reason="this processor has no tiles")
@pytest.mark.parametrize("v", [1, 31, 33, 127, 128, 300])
def test_mix_by_tiles(v: int) -> None:
    """Rounded once, for any number of positions and labels; threads change no bit."""
    for r in (1, 2, 15, 16, 17, 31, 32, 33, 66, 70, 256, 257, 300):
        weights, q = _random(r, r, seed=r).bfloat16(), _random(r, v, seed=v).bfloat16()
        k = r // 2
        others = _random(r, k, seed=3)
        labels = torch.randint(0, v, (k,), generator=torch.Generator().manual_seed(r))
        truth = (weights.double() @ q.double()).index_add_(1, labels, others.double())
        results = []
        for threads in (1, 2, 3):
            message = torch.full((r, v), math.nan).bfloat16()
            _C.mrf_mix(weights, q, others, labels, message, threads)
            results.append(message)
        scale = truth.abs() + 1e-3 * r**0.5
        assert float(((results[0] - truth) / scale).abs().max()) < 2**-8 + 1e-4, r
        assert all(torch.equal(results[0], other) for other in results[1:]), r


def test_tiles_agree_with_avx512_bf16(run_python: Callable[..., str]) -> None:
    """A whole inference, some positions known, is as near to float64 by either."""
    if build_info()["isa"] != "amx":
        pytest.skip("this processor has no tiles")
    program = """
import torch
from t2p_fast import reference
from t2p_fast.ops import mrf_mean_field, mrf_pack
g = torch.Generator().manual_seed(0)
n, v = 70, 1000
f, w_s = 3 * torch.randn(2, n, v, generator=g), 0.1 * torch.randn(n, n, generator=g)
w_c = torch.randn(v, v, generator=g).bfloat16()
known = torch.randint(0, v, (2, n), generator=g)
known[:, ::3] = -1
for fixed in (None, known):
    truth = reference.mrf_mean_field(f.double(), w_s.double(), w_c.double(), known=fixed)
    q = mrf_mean_field(f, w_s, w_c, known=fixed, packed=mrf_pack(w_c))
    assert float((q - truth).abs().max()) < 2e-2
    assert float((q.argmax(-1) == truth.argmax(-1)).double().mean()) > 0.999
    torch.set_num_threads(3 - torch.get_num_threads() % 3)
    assert torch.equal(mrf_mean_field(f, w_s, w_c, known=fixed, packed=mrf_pack(w_c)), q)
print("done")
"""
    for isa in ("avx512_bf16", "amx"):
        assert run_python(program, T2P_ISA=isa).strip() == "done"
