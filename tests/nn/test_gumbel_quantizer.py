# SPDX-License-Identifier: Apache-2.0
"""The Gumbel-softmax quantiser: its mixtures, its distribution and its loss."""

import pytest
import torch

from t2p_fast.nn import GumbelQuantizer


def make(**options: object) -> GumbelQuantizer:
    torch.manual_seed(0)
    return GumbelQuantizer(5, 3, input_dim=4, **options)  # type: ignore[arg-type]


def test_evaluation_takes_the_most_likely_code() -> None:
    quantizer = make().eval()
    x = torch.randn(2, 4, 3, 3)
    quantized, indices, _ = quantizer(x)
    expected = quantizer.proj(x.movedim(1, -1)).argmax(-1)
    assert torch.equal(indices, expected)
    assert torch.equal(quantized, quantizer.codebook[indices].movedim(-1, 1))


def test_training_draws_from_the_distribution() -> None:
    quantizer = make(hard=True, channel_dim=-1).train()
    x = torch.randn(1, 4)
    share = quantizer.proj(x).softmax(-1)[0]
    quantized, indices, _ = quantizer(x.expand(20000, 4))
    frequency = torch.bincount(indices, minlength=5) / 20000
    torch.testing.assert_close(frequency, share, rtol=0, atol=4 * 0.5 / 20000**0.5)
    torch.testing.assert_close(quantized, quantizer.codebook[indices])


def test_low_temperature_mixes_less() -> None:
    x = torch.randn(200, 4)
    distance = []
    for temperature in (5.0, 0.05):
        quantizer = make(temperature=temperature, channel_dim=-1).train()
        quantized, indices, _ = quantizer(x)
        distance.append((quantized - quantizer.codebook[indices]).norm(dim=-1).mean())
    assert distance[1] < 0.2 * distance[0]


def test_loss_is_the_divergence_from_uniform() -> None:
    quantizer = make(kl_weight=2.0)
    x = torch.randn(2, 4, 3, 3)
    share = quantizer.proj(x.movedim(1, -1)).softmax(-1).double()
    expected = 2 * (share * (share * 5).log()).sum(-1).mean()
    torch.testing.assert_close(quantizer(x)[2].double(), expected, rtol=1e-4, atol=1e-6)


def test_gradients_reach_everything() -> None:
    quantizer = make().train()
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    quantized, _, loss = quantizer(x)
    (quantized.square().sum() + loss).backward()
    assert all(p.grad.abs().sum() > 0 for p in (x, *quantizer.parameters()))


def test_errors() -> None:
    with pytest.raises(ValueError, match="temperature is 0"):
        make(temperature=0)
