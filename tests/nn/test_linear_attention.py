# SPDX-License-Identifier: Apache-2.0
"""SANA's layers against their formulas, and diffusers' own where it is installed."""

import pytest
import torch

from t2p_fast import reference
from t2p_fast.nn import LinearAttention, MixFFN


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_module_is_the_formula(causal: bool) -> None:
    layer = LinearAttention(24, 3, feature="elu+1", causal=causal)
    x = torch.randn(2, 10, 24)
    mask = torch.rand(2, 10) < 0.8
    mask[:, 0] = True
    q, k, v = (
        f(x).unflatten(-1, (3, 8)).transpose(1, 2) for f in (layer.to_q, layer.to_k, layer.to_v)
    )
    truth, _ = reference.linear_attention(q, k, v, feature="elu+1", causal=causal, key_mask=mask)
    torch.testing.assert_close(layer(x, mask), layer.to_out(truth.transpose(1, 2).flatten(2)))
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_linear_attention_module_wants_whole_heads() -> None:
    with pytest.raises(ValueError, match="dim=10 is not divisible by num_heads=3"):
        LinearAttention(10, 3)


def test_mix_ffn_is_that_of_diffusers() -> None:
    sana = pytest.importorskip("diffusers.models.transformers.sana_transformer")
    theirs = sana.GLUMBConv(8, 8, 2.5, norm_type=None, residual_connection=False)
    ours = MixFFN(8)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x))
