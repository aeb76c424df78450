# SPDX-License-Identifier: Apache-2.0
"""The entries of fast-transformers and flash-linear-attention against their formulas in float64."""

import torch

from t2p_fast.interop.fast_transformers import causal_dot_product
from t2p_fast.interop.fla import chunk_linear_attn


def test_causal_dot_product_is_its_sum() -> None:
    q, k, v = (torch.randn(2, 3, 40, c) for c in (16, 16, 8))
    truth = (q.double() @ k.double().mT).tril() @ v.double()
    torch.testing.assert_close(causal_dot_product(q, k, v).double(), truth, rtol=1e-4, atol=1e-4)


def test_chunk_linear_attn_normalises_by_its_own_keys() -> None:
    q, k, v = (torch.rand(2, 40, 3, c) for c in (16, 16, 8))
    before = torch.randn(2, 3, 16, 8)
    out, state = chunk_linear_attn(q, k, v, initial_state=before, output_final_state=True)
    wide = [x.double().transpose(1, 2) for x in (q, k, v)]
    pairs = (wide[0] @ wide[1].mT / 4).tril()
    numerator = pairs @ wide[2] + wide[0] / 4 @ before.double()
    truth = numerator / (pairs.sum(-1, keepdim=True) + 1e-10)
    torch.testing.assert_close(out.double(), truth.transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert state is not None
    wanted = before.double() + wide[1].mT @ wide[2]
    torch.testing.assert_close(state.double(), wanted, rtol=1e-4, atol=1e-4)
    assert chunk_linear_attn(q, k, v)[1] is None


def test_chunk_linear_attn_takes_packed_sequences() -> None:
    q, k, v = (torch.rand(1, 40, 3, c) for c in (16, 16, 8))
    out, _ = chunk_linear_attn(q, k, v, cu_seqlens=torch.tensor([0, 15, 40], dtype=torch.int32))
    alone = [chunk_linear_attn(*(x[:, a:b] for x in (q, k, v)))[0] for a, b in ((0, 15), (15, 40))]
    torch.testing.assert_close(out, torch.cat(alone, 1))
