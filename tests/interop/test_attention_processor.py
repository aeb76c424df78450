# SPDX-License-Identifier: Apache-2.0
"""Our attention processor beside diffusers' own."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention

from t2p_fast.interop.attention_processor import AttnProcessor2_0

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}


def _both(attn: Attention, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    attn.set_processor(attention_processor.AttnProcessor2_0())
    theirs = attn(*inputs, **options)
    attn.set_processor(AttnProcessor2_0())
    return attn(*inputs, **options), theirs


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cross_attention_dim": 24},
        {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"},
        {"qk_norm": "rms_norm"},
        {"residual_connection": True, "norm_num_groups": 4, "rescale_output_factor": 1.5},
        {"spatial_norm_dim": 6, "norm_num_groups": 4, "residual_connection": True},
    ],
)
@torch.no_grad()
def test_result_is_theirs(options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attn = Attention(32, heads=4, dim_head=8, bias=True, **options).to(dtype)
    source = torch.randn(2, 7, 24, dtype=dtype) if "cross_attention_dim" in options else None
    n = 30 if source is None else 7
    if "spatial_norm_dim" in options:
        x, call = torch.randn(2, 32, 5, 6, dtype=dtype), {"temb": torch.randn(2, 6, 5, 6).to(dtype)}
    elif "norm_num_groups" in options:
        x, call = torch.randn(2, 32, 5, 6, dtype=dtype), {}
    else:
        x, call = torch.randn(2, 30, 32, dtype=dtype), {}
    left_out = torch.zeros(2, 1, n, dtype=dtype)
    left_out[1, 0, n // 2 :] = -10000.0
    for mask in (None, left_out, left_out.expand(2, x[0, 0].numel() if x.ndim == 4 else 30, n)):
        if mask is not None and mask.shape[1] > 1:
            mask = mask.repeat_interleave(4, 0)  # a row of its own for every query and head
        ours, theirs = _both(attn, x, source, mask, **call)
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_gradients_and_autocast() -> None:
    torch.manual_seed(0)
    attn = Attention(32, heads=4, dim_head=8)
    x = torch.randn(2, 30, 32, requires_grad=True)
    ours, theirs = _both(attn, x)
    for one, other in zip(
        torch.autograd.grad(ours.square().sum(), [x, *attn.parameters()]),
        torch.autograd.grad(theirs.square().sum(), [x, *attn.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(*_both(attn, x))
