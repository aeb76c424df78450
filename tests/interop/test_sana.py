# SPDX-License-Identifier: Apache-2.0
"""The processor against diffusers' own, alone and in a SANA transformer."""

import pytest
import torch

attention_processor = pytest.importorskip("diffusers.models.attention_processor")
sana = pytest.importorskip("t2p_fast.interop.sana")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_processor_is_that_of_diffusers(dtype: torch.dtype, qk_norm: str | None) -> None:
    theirs = attention_processor.Attention(
        query_dim=64, heads=4, dim_head=16, qk_norm=qk_norm, kv_heads=4 if qk_norm else None,
        processor=attention_processor.SanaLinearAttnProcessor2_0(),
    ).to(dtype)  # fmt: skip
    x = torch.randn(2, 50, 64, dtype=dtype)
    with torch.no_grad():
        expected = theirs(x)
        theirs.set_processor(sana.SanaLinearAttnProcessor2_0())
        found = theirs(x)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_processor_with_norms_in_another_dtype(dtype: torch.dtype) -> None:
    layer = attention_processor.Attention(
        query_dim=64, heads=4, dim_head=16, qk_norm="rms_norm_across_heads", kv_heads=4,
        processor=attention_processor.SanaLinearAttnProcessor2_0(),
    ).to(dtype)  # fmt: skip
    layer.norm_q.float()
    layer.norm_k.float()
    x = torch.randn(2, 50, 64, dtype=dtype)
    with torch.no_grad():
        expected = layer(x)
        layer.set_processor(sana.SanaLinearAttnProcessor2_0())
        found = layer(x)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_attention_to_a_text_is_that_of_diffusers(dtype: torch.dtype, qk_norm: str | None) -> None:
    from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0

    torch.manual_seed(0)
    layer = attention_processor.Attention(
        query_dim=64, cross_attention_dim=24, heads=4, dim_head=16, qk_norm=qk_norm, bias=True,
        kv_heads=4 if qk_norm else None, processor=SanaAttnProcessor2_0(),
    ).to(dtype)  # fmt: skip
    x, text = torch.randn(2, 50, 64, dtype=dtype), torch.randn(2, 9, 24, dtype=dtype)
    padding = torch.zeros(2, 1, 9, dtype=dtype)
    padding[0, 0, 5:] = -10000.0
    every_query = padding.expand(2, 50, 9).repeat_interleave(4, 0)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for mask in (None, padding, every_query):
        with torch.no_grad():
            layer.set_processor(SanaAttnProcessor2_0())
            expected = layer(x, text, mask)
            layer.set_processor(sana.SanaAttnProcessor2_0())
            found = layer(x, text, mask)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_transformer_with_our_processors() -> None:
    from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel

    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=8, mlp_ratio=2.0, sample_size=8, patch_size=1,
    ).eval()  # fmt: skip
    x, text, t = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8), torch.tensor([3.0])
    with torch.no_grad():
        expected = model(x, text, t).sample
        for block in model.transformer_blocks:
            block.attn1.set_processor(sana.SanaLinearAttnProcessor2_0())
            block.attn2.set_processor(sana.SanaAttnProcessor2_0())
        found = model(x, text, t).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
