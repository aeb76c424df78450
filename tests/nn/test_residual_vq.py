# SPDX-License-Identifier: Apache-2.0
"""Residual quantisers against the sums written out."""

import pytest
import torch
from torch import Tensor

from t2p_fast.nn import GroupedResidualVQ, ResidualVQ


def make(**options: object) -> ResidualVQ:
    torch.manual_seed(0)
    quantizer = ResidualVQ(3, 20, 6, **options)  # type: ignore[arg-type]
    for scale, level in zip((1.0, 0.5, 0.2), quantizer.quantizers, strict=True):
        torch.nn.init.normal_(level.embedding.weight, std=scale)  # type: ignore[union-attr,arg-type]
    return quantizer


def by_hand(quantizer: ResidualVQ, rows: Tensor) -> tuple[Tensor, Tensor]:
    residual, total, indices = rows.double(), torch.zeros_like(rows).double(), []
    for level in quantizer.quantizers:
        codes = level.embedding.weight.detach().double()  # type: ignore[union-attr,operator]
        indices.append(torch.cdist(residual, codes).argmin(1))
        total = total + codes[indices[-1]]
        residual = residual - codes[indices[-1]]
    return total, torch.stack(indices, -1)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_each_codes_what_is_left(channel_dim: int) -> None:
    quantizer = make(channel_dim=channel_dim)
    x = torch.randn(2, 6, 4, 5) if channel_dim == 1 else torch.randn(40, 6)
    quantized, indices, losses = quantizer(x)
    rows = x.movedim(channel_dim, -1).reshape(-1, 6)
    total, expected = by_hand(quantizer, rows)
    assert torch.equal(indices.reshape(-1, 3), expected)
    torch.testing.assert_close(
        quantized.movedim(channel_dim, -1).reshape(-1, 6).double(), total, rtol=1e-6, atol=1e-6
    )
    assert losses.shape == (3,)
    assert torch.equal(quantizer.encode(x), indices)
    torch.testing.assert_close(quantizer.lookup(indices), quantized.detach())


def test_more_quantizers_come_closer() -> None:
    quantizer = make(channel_dim=-1)
    x = torch.randn(500, 6)
    indices = quantizer.encode(x)
    errors = [(x - quantizer.lookup(indices[:, : i + 1])).square().mean() for i in range(3)]
    assert errors[0] > 1.2 * errors[1] > 1.3 * errors[2]


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_gradients(gradient: str) -> None:
    quantizer = make(gradient=gradient)
    x = torch.randn(2, 6, 3, 3, requires_grad=True)
    quantized, _, losses = quantizer(x)
    weight = torch.randn_like(x)
    (quantized * weight).sum().backward(retain_graph=True)
    assert x.grad is not None
    if gradient == "straight_through":
        torch.testing.assert_close(x.grad, weight)
    losses.sum().backward()
    for level in quantizer.quantizers:
        assert level.embedding.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_dropped_quantizers() -> None:
    quantizer = make(quantizer_dropout=1.0, channel_dim=-1).train()
    x = torch.randn(10, 6)
    seen = set()
    for _ in range(60):
        quantized, indices, losses = quantizer(x)
        used = int((indices[0] >= 0).sum())
        seen.add(used)
        assert (indices[:, :used] >= 0).all()
        assert (indices[:, used:] == -1).all()
        assert (losses[used:] == 0).all()
        torch.testing.assert_close(quantizer.lookup(indices), quantized)
    assert seen == {1, 2, 3}
    assert (quantizer.eval()(x)[1] >= 0).all()


def test_groups_are_quantised_by_themselves() -> None:
    torch.manual_seed(0)
    quantizer = GroupedResidualVQ(2, 3, 20, 8)
    x = torch.randn(2, 8, 3, 4)
    quantized, indices, losses = quantizer(x)
    assert (indices.shape, losses.shape) == ((2, 2, 3, 4, 3), (2, 3))
    for g, part in enumerate(x.chunk(2, 1)):
        expected = quantizer.groups[g](part)
        assert torch.equal(quantized.chunk(2, 1)[g], expected[0])
        assert torch.equal(indices[g], expected[1])
    torch.testing.assert_close(quantizer.lookup(indices), quantized)


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_quantizers is 0, expected at least 1"):
        ResidualVQ(0, 4, 4)
    with pytest.raises(ValueError, match="quantizer_dropout is 2"):
        ResidualVQ(1, 4, 4, quantizer_dropout=2)
    with pytest.raises(ValueError, match="only 'l2' leaves a residual"):
        ResidualVQ(1, 4, 4, metric="cosine")
    with pytest.raises(ValueError, match="embedding_dim is 7, expected a multiple of num_groups"):
        GroupedResidualVQ(2, 1, 4, 7)
    with pytest.raises(ValueError, match="expected 1 to 3 in the last dimension"):
        make().lookup(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected 2 in the first dimension"):
        GroupedResidualVQ(2, 1, 4, 8).lookup(torch.zeros(3, 4, 1, dtype=torch.int64))
