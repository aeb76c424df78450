# SPDX-License-Identifier: Apache-2.0
"""Losses of the picture tokenizer, and the contrast of captions."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureExtractor(Protocol):
    """Anything that turns pictures ``[b, 3, h, w]`` in [-1, 1] into feature maps."""

    def features(self, pictures: Tensor) -> list[Tensor]: ...


def perceptual_loss(extractor: FeatureExtractor, a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of channel-normalised features, summed over the maps.

    The form of LPIPS without learned channel weights (Zhang et al., CVPR 2018, equation 1).
    """
    with torch.no_grad():
        targets = extractor.features(b.detach())
    total = a.new_zeros((), dtype=torch.float32)
    for x, y in zip(extractor.features(a), targets, strict=True):
        x, y = F.normalize(x.float(), dim=1), F.normalize(y.float(), dim=1)
        total = total + (x - y).square().sum(1).mean()
    return total


class PatchDiscriminator(nn.Module):
    """Says of every overlapping patch whether it is real (Isola et al., CVPR 2017).

    Args:
        channels: of the first layer; they double at each of the ``num_layers`` halvings.
    """

    def __init__(self, channels: int = 32, num_layers: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1)]
        for _ in range(num_layers - 1):
            layers += [
                nn.LeakyReLU(0.2),
                nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
                nn.GroupNorm(8, 2 * channels),
            ]
            channels *= 2
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(channels, 1, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.layers(pictures)
        return logits


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator's two outputs."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """How much the adversarial loss may weigh beside the reconstruction loss.

    The ratio of their gradients at the decoder's last layer, at most 1e4 (Esser et al., equation
    7).
    """
    (a,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (b,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    weight: Tensor = (a.norm() / (b.norm() + 1e-6)).clamp(0, 1e4).detach()
    return weight


def caption_contrast(right: Tensor, wrong: Tensor, temperature: float) -> Tensor:
    """How hard it is to tell the right captions from wrong ones; 0 if there are none.

    Args:
        right, wrong: ``[k]``, negative log-likelihoods of the same tokens, in nats.
        temperature: of the differences.
    """
    return F.softplus((right - wrong) / temperature).sum() / max(1, len(right))
