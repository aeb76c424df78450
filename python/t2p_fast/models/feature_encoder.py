# SPDX-License-Identifier: Apache-2.0
"""A small convolutional classifier of scenes whose features serve as a perceptual metric.

It stands where other projects download VGG or CLIP: the perceptual loss of the tokenizer and
distances between sets of pictures need features in which shape and colour count more than pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from t2p_fast.checkpoints import PretrainedModel, check_numbers, shown

_GROUPS = 8  # of the normalisation


@dataclass(frozen=True)
class FeatureEncoderConfig:
    """Architecture of a :class:`FeatureEncoder`."""

    channels: tuple[int, ...] = (24, 48, 96, 128)
    num_labels: int = 104

    def __post_init__(self) -> None:
        check_numbers(
            self, "FeatureEncoderConfig: ", channels="[1, 16384]", num_labels="[1, 65536]"
        )
        if not 1 <= len(self.channels) <= 10 or any(c % _GROUPS for c in self.channels):
            raise ValueError(
                f"FeatureEncoderConfig: channels is {shown(self.channels)}, expected one to ten "
                f"multiples of {_GROUPS}"
            )


class FeatureEncoder(PretrainedModel):
    """Stages of two 3x3 convolutions, each at half the resolution of the one before."""

    config_class = FeatureEncoderConfig
    config: FeatureEncoderConfig

    def __init__(self, config: FeatureEncoderConfig) -> None:
        super().__init__(config)
        self.stages = nn.ModuleList()
        inputs = 3
        for outputs in config.channels:
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                    nn.GroupNorm(_GROUPS, outputs),
                    nn.SiLU(),
                    nn.Conv2d(outputs, outputs, 3, padding=1),
                    nn.GroupNorm(_GROUPS, outputs),
                    nn.SiLU(),
                )
            )
            inputs = outputs
        self.head = nn.Linear(inputs, config.num_labels)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Pictures ``[b, 3, h, w]`` in [-1, 1] to one feature map per stage."""
        maps = []
        for stage in self.stages:
            pictures = stage(pictures)
            maps.append(pictures)
        return maps

    def embed(self, pictures: Tensor) -> Tensor:
        """Pictures to one unit vector each, ``[b, channels[-1]]``."""
        return F.normalize(self.features(pictures)[-1].mean((2, 3)), dim=1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures to the logits of the labels, ``[b, num_labels]``."""
        logits: Tensor = self.head(self.features(pictures)[-1].amax((2, 3)))
        return logits
