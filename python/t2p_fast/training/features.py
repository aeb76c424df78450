# SPDX-License-Identifier: Apache-2.0
"""Training of the feature encoder: which objects does a scene show?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2p_fast.data.scenes import (
    BACKGROUND_COLORS,
    OBJECT_COLORS,
    RADII,
    SHAPES,
    TEXTURES,
    Scene,
    SceneDataset,
)
from t2p_fast.models.feature_encoder import FeatureEncoder
from t2p_fast.training.config import FeatureEncoderTraining
from t2p_fast.training.pictures import save_sheet, to_tensor
from t2p_fast.training.trainer import Task, Trainer

# A label for every pair that an object can show, and one for every background.
LABELS = (
    [(s, c) for s in SHAPES for c in OBJECT_COLORS]
    + [(s, z) for s in SHAPES for z in RADII]
    + [(t, z) for t in TEXTURES for z in RADII]
    + [(b,) for b in BACKGROUND_COLORS]
)
_INDEX = {label: i for i, label in enumerate(LABELS)}


def scene_labels(scene: Scene) -> Tensor:
    """Which of ``LABELS`` a scene shows, ``[len(LABELS)]`` of 0 and 1."""
    labels = torch.zeros(len(LABELS))
    labels[_INDEX[(scene.background,)]] = 1
    for o in scene.objects:
        for pair in ((o.shape, o.color), (o.shape, o.size), (o.texture, o.size)):
            labels[_INDEX[pair]] = 1
    return labels


class FeatureEncoderTask(Task):
    """Multi-label classification of scenes, under noise and changes of brightness."""

    averaged = "encoder"

    def __init__(self, config: FeatureEncoderTraining) -> None:
        if config.data.source != "scenes":
            raise ValueError("train features: data.source must be 'scenes', which has labels")
        if config.model.num_labels != len(LABELS):
            raise ValueError(
                f"train features: model.num_labels is {config.model.num_labels}, expected "
                f"{len(LABELS)}"
            )
        self.config, self.run = config, config.run
        torch.manual_seed(config.run.seed)
        self.modules = {"encoder": FeatureEncoder(config.model)}
        self.dataset = SceneDataset(  # type: ignore[assignment]
            config.data.vocabulary, size=config.data.size, seed=config.run.seed
        )
        self.held_out = SceneDataset(config.data.vocabulary, split="test", size=config.data.size)

    def collate(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        pictures = to_tensor([s.image for s in samples])
        return pictures, torch.stack([scene_labels(s.scene) for s in samples])

    def step(self, batch: Any, step: int, trainer: Trainer) -> dict[str, Tensor]:  # noqa: ARG002
        pictures, labels = (x.to(trainer.device) for x in batch)
        gain = 1 + 0.1 * torch.randn(len(pictures), 3, 1, 1, device=trainer.device)
        noisy = pictures * gain + 0.1 * torch.randn_like(pictures)
        with trainer.accelerator.autocast():
            logits = self.modules["encoder"](noisy)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels)
        trainer.optimize("encoder", loss)
        right = ((logits > 0) == (labels > 0.5)).all(1).float().mean()
        return {"loss": loss, "all_labels_right": right}

    def save_pretrained(self, module: nn.Module, folder: Path) -> None:
        assert isinstance(module, FeatureEncoder)
        module.save_pretrained(folder, dtype=torch.bfloat16)

    @torch.no_grad()
    def sample_sheet(self, module: nn.Module, path: Path) -> None:
        """Held-out scenes; below each, the one of 256 others whose features are nearest."""
        assert isinstance(module, FeatureEncoder)
        device = module.device
        images = np.stack([self.held_out[i].image for i in range(264)])
        features = torch.cat(
            [module.embed(to_tensor(list(c)).to(device)) for c in np.split(images, 8)]
        )
        nearest = (features[:8] @ features[8:].T).argmax(1).cpu().numpy()
        save_sheet(path, [images[:8], images[8:][nearest]])
