# SPDX-License-Identifier: Apache-2.0
"""Rounding without a codebook: every code is reached, and found again by its index."""

import math

import pytest
import torch

from t2p_fast.nn import FSQ, LFQ


@pytest.mark.parametrize("levels", [(2,), (3, 5), (8, 5, 5, 5), (4, 2, 7)])
def test_fsq_has_the_product_of_its_levels(levels: tuple[int, ...]) -> None:
    quantizer = FSQ(levels, channel_dim=-1)
    k = math.prod(levels)
    every = torch.arange(k)
    values = quantizer.lookup(every)
    assert values.abs().max() <= 1
    assert len(values.unique(dim=0)) == k
    # Inputs that squash to the middle of each cell come back as that code.
    half = quantizer.levels // 2
    bounded = (quantizer.levels - 1) * (1 + 1e-3) / 2
    offset = (1 - quantizer.levels % 2) / 2
    x = torch.atanh(((values * half + offset) / bounded).clamp(-0.9999, 0.9999)) - torch.atanh(
        offset / bounded
    )
    quantized, indices = quantizer(x)
    assert torch.equal(indices, every)
    torch.testing.assert_close(quantized, values)


def test_fsq_values_are_evenly_spaced_and_bounded() -> None:
    quantizer = FSQ((5,), channel_dim=-1)
    quantized, indices = quantizer(torch.linspace(-50, 50, 4001)[:, None])
    assert quantized.unique().tolist() == [-1, -0.5, 0, 0.5, 1]
    assert (indices.diff() >= 0).all()


def test_fsq_gradient_is_that_of_the_squashing() -> None:
    quantizer = FSQ((8, 6))
    x = torch.randn(2, 2, 3, 3, requires_grad=True)
    quantizer(x)[0].sum().backward()
    y = x.detach().double().requires_grad_()
    for channel, levels in enumerate((8, 6)):
        half = (levels - 1) * (1 + 1e-3) / 2
        shift = math.atanh(0.5 / half)
        (torch.tanh(y[:, channel] + shift) * half / (levels // 2)).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-6)


def test_lfq_is_the_sign() -> None:
    quantizer = LFQ(7)
    x = torch.randn(2, 7, 4, 5, requires_grad=True)
    quantized, indices, loss = quantizer(x)
    assert torch.equal(quantized, torch.where(x > 0, 1.0, -1.0))
    assert torch.equal(quantizer.lookup(indices), quantized.detach())
    assert int(indices.max()) < 128
    loss.backward()
    assert x.grad.isfinite().all()


def test_lfq_entropy_is_that_over_all_codes() -> None:
    """The sum over bits against a softmax over the distances to all 2^c codes."""
    torch.manual_seed(0)
    t, c = 0.7, 4
    quantizer = LFQ(c, beta=0, entropy_weight=1, diversity_weight=0, inverse_temperature=t)
    x = torch.randn(30, c, 1).double()
    codes = LFQ(c, channel_dim=-1).lookup(torch.arange(1 << c)).double()
    distance = (x[:, None, :, 0] - codes).square().sum(-1)
    share = (-t * distance).softmax(-1)
    expected = torch.special.entr(share).sum(-1).mean()
    torch.testing.assert_close(quantizer(x)[2].double(), expected, rtol=1e-5, atol=0)


def test_lfq_loss_wants_certain_and_diverse_codes() -> None:
    quantizer = LFQ(2, beta=0, channel_dim=-1, inverse_temperature=1)
    corners = quantizer.lookup(torch.arange(4)) * 5
    loss = {
        "all corners": quantizer(corners)[2],
        "one corner": quantizer(corners[:1].expand(4, 2))[2],
        "undecided": quantizer(corners * 0)[2],
    }
    assert loss["all corners"] < loss["one corner"] - 0.05
    assert loss["all corners"] < loss["undecided"] - 0.05


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"levels are \[1, 4\]"):
        FSQ((1, 4))
    with pytest.raises(ValueError, match="expected 2 channels in dimension 1"):
        FSQ((4, 4))(torch.randn(2, 3, 4, 4))
    with pytest.raises(IndexError, match=r"FSQ.lookup: indices are 0 to 16, expected \[0, 16\)"):
        FSQ((4, 4)).lookup(torch.tensor([0, 16]))
    with pytest.raises(ValueError, match="channels is 63, expected 1 to 62"):
        LFQ(63)
    with pytest.raises(IndexError, match="indices are -1 to 0"):
        LFQ(3).lookup(torch.tensor([0, -1]))
