# SPDX-License-Identifier: Apache-2.0
"""Losses against their formulas."""

import math

import pytest
import torch
from torch import Tensor, nn

from t2p_fast.models.feature_encoder import FeatureEncoder, FeatureEncoderConfig
from t2p_fast.training.losses import (
    PatchDiscriminator,
    adaptive_weight,
    caption_contrast,
    hinge_discriminator_loss,
    perceptual_loss,
)
from tiny_models import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_hinge_loss() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    # Real: 0, 0.5, 2. Fake: 0, 1, 2.
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(0.5 * (2.5 / 3 + 3 / 3))
    sure = torch.full((4,), 1.5)
    assert float(hinge_discriminator_loss(sure, -sure)) == 0


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    layer = nn.Linear(3, 2)
    out = layer(torch.randn(5, 3))
    reconstruction, adversarial = out.square().mean(), 0.3 * out.sum()
    made = adaptive_weight(reconstruction, adversarial, layer.weight)
    a = torch.autograd.grad(reconstruction, layer.weight, retain_graph=True)[0].norm()
    b = torch.autograd.grad(adversarial, layer.weight, retain_graph=True)[0].norm()
    assert float(made) == pytest.approx(float(a / b), rel=1e-4)
    assert not made.requires_grad
    # The graph is kept: both losses are still to be added up and sent backward.
    (reconstruction + made * adversarial).backward()
    assert layer.weight.grad is not None


def test_adaptive_weight_is_bounded() -> None:
    layer = nn.Linear(3, 2)
    out = layer(torch.randn(5, 3))
    assert float(adaptive_weight(1e8 * out.square().mean(), 0 * out.sum(), layer.weight)) == 1e4


class Pixels:
    """Features that are the pixels themselves, at two scales."""

    def features(self, pictures: Tensor) -> list[Tensor]:
        return [pictures, 2 * pictures[:, :, ::2, ::2]]


def test_perceptual_loss_by_hand() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    # Of unit vectors, the squared distance is 2 - 2 cos.
    cosine = torch.cosine_similarity(a, b, dim=1)
    expected = (2 - 2 * cosine).mean() + (2 - 2 * cosine[:, ::2, ::2]).mean()
    torch.testing.assert_close(perceptual_loss(Pixels(), a, b), expected)


def test_perceptual_loss_is_zero_for_equal_pictures_only() -> None:
    encoder = FeatureEncoder(FeatureEncoderConfig(channels=(8, 16), num_labels=2))
    a, b = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    assert float(perceptual_loss(encoder, a, a).detach()) == 0
    assert float(perceptual_loss(encoder, a, b).detach()) > 1e-3


def test_perceptual_loss_sends_gradient_to_the_first_picture_alone() -> None:
    a = torch.rand(1, 3, 8, 8, requires_grad=True)
    b = torch.rand(1, 3, 8, 8, requires_grad=True)
    perceptual_loss(Pixels(), a, b).backward()
    assert a.grad is not None
    assert a.grad.any()
    assert b.grad is None


def test_discriminator_sees_patches() -> None:
    discriminator = PatchDiscriminator(channels=8)
    logits = discriminator(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 1, 8, 8)


def test_contrast_of_captions() -> None:
    right = torch.tensor([3.0, 5.0], dtype=torch.float64, requires_grad=True)
    wrong = torch.tensor([3.0, 9.0], dtype=torch.float64, requires_grad=True)
    loss = caption_contrast(right, wrong, 2.0)
    assert loss.item() == pytest.approx((math.log(2) + math.log1p(math.exp(-2))) / 2)
    loss.backward()
    assert right.grad is not None
    assert wrong.grad is not None
    assert right.grad[0].item() == pytest.approx(0.125)
    assert torch.equal(right.grad, -wrong.grad)
    assert caption_contrast(right[:0], wrong[:0], 2.0).item() == 0
