# SPDX-License-Identifier: Apache-2.0
"""Training of the picture tokenizer (Esser et al., section 3.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2p_fast.models.feature_encoder import FeatureEncoder
from t2p_fast.models.vqgan import VQGAN
from t2p_fast.training.config import VQGANTraining, part_of
from t2p_fast.training.losses import (
    FeatureExtractor,
    PatchDiscriminator,
    adaptive_weight,
    hinge_discriminator_loss,
    perceptual_loss,
)
from t2p_fast.training.pictures import PictureDataset, psnr, save_sheet, to_images, to_tensor
from t2p_fast.training.trainer import Task, Trainer


class VQGANTask(Task):
    """Reconstruction, perceptual, adversarial and quantiser losses.

    Args:
        config: the run.
        features: extractor for the perceptual loss; by default the feature encoder that
            ``config.loss.features`` names.
    """

    averaged = "vqgan"
    dataset: PictureDataset

    def __init__(self, config: VQGANTraining, features: FeatureExtractor | None = None) -> None:
        self.config, self.run = config, config.run
        torch.manual_seed(config.run.seed)
        model = VQGAN(config.model)
        model.check_rgb("train vqgan")
        if config.loss.initialize_from:
            _initialize(model, config.loss.initialize_from, codes=config.loss.decoder_only)
        if config.loss.decoder_only:
            for module in (model.encoder, model.quant_conv, model.quantize):
                module.requires_grad_(False)
        self.modules = {"vqgan": model}
        if config.loss.adversarial > 0:
            self.modules["discriminator"] = PatchDiscriminator()
        self.dataset = PictureDataset(config.data, seed=config.run.seed)
        self.held_out = PictureDataset(config.data, split="test")
        if features is None and config.loss.perceptual > 0:
            source = config.loss.features
            features = FeatureEncoder.from_pretrained(source, subfolder=part_of(source, "features"))
        self.features = features

    def collate(self, samples: list[Any]) -> Tensor:
        return to_tensor([s.image for s in samples])

    @torch.no_grad()
    def _place_codes(self, model: VQGAN) -> None:
        """Places the codes by k-means on what the encoder makes of many pictures."""
        count = min(self.config.loss.kmeans_pictures, len(self.dataset))
        pictures = to_tensor([self.dataset[i].image for i in range(count)])
        latents = [model.encode(part.to(model.device)) for part in torch.split(pictures, 64)]
        model.quantize.init_by_kmeans(torch.cat(latents))

    def step(self, batch: Any, step: int, trainer: Trainer) -> dict[str, Tensor]:
        weights = self.config.loss
        pictures = batch.to(trainer.device)
        vqgan = self.modules["vqgan"]
        model = trainer.unwrap("vqgan")
        assert isinstance(model, VQGAN)
        model.quantize.dead_code_threshold = (
            weights.dead_code_threshold if step < self.run.steps // 2 else 0.0
        )
        if weights.decoder_only:
            model.quantize.eval()
            if step % 2:
                pictures = F.avg_pool2d(pictures, 2)
        elif step == weights.quantize_start:
            self._place_codes(model)
        with trainer.accelerator.autocast():
            output = vqgan(pictures, quantize=step >= weights.quantize_start)
        made = output.reconstruction.float()
        reconstruction = weights.l1 * F.l1_loss(made, pictures)
        reconstruction = reconstruction + weights.l2 * F.mse_loss(made, pictures)
        logs = {"psnr": psnr(made.detach(), pictures).mean()}
        if self.features is not None and weights.perceptual > 0:
            if isinstance(self.features, nn.Module):
                self.features.to(trainer.device)
            with trainer.accelerator.autocast():
                distance = perceptual_loss(self.features, made, pictures)
            reconstruction = reconstruction + weights.perceptual * distance
            logs["perceptual"] = distance
        loss = reconstruction + output.quantizer_loss
        adversarial = "discriminator" in self.modules and step >= weights.adversarial_start
        if adversarial:
            discriminator = self.modules["discriminator"].requires_grad_(False)
            with trainer.accelerator.autocast():
                generator_loss = -discriminator(made).float().mean()
            last = model.decoder.conv_out.weight
            weight = weights.adversarial * adaptive_weight(reconstruction, generator_loss, last)
            loss = loss + weight * generator_loss
            logs |= {"generator": generator_loss, "adversarial_weight": weight}
        trainer.optimize("vqgan", loss)
        if adversarial:
            discriminator = self.modules["discriminator"].requires_grad_(True)
            # One forward for both halves: DDP allows one per backward.
            with trainer.accelerator.autocast():
                real, fake = discriminator(torch.cat([pictures, made.detach()])).chunk(2)
            discriminator_loss = hinge_discriminator_loss(real, fake)
            trainer.optimize("discriminator", discriminator_loss)
            logs["discriminator"] = discriminator_loss
        used = torch.bincount(output.indices.flatten()).count_nonzero()
        logs |= {
            "loss": loss,
            "quantizer": output.quantizer_loss,
            "codes_in_batch": used.float(),
        }
        return logs

    def save_pretrained(self, module: nn.Module, folder: Path) -> None:
        assert isinstance(module, VQGAN)
        module.save_pretrained(folder, dtype=torch.bfloat16)

    @torch.no_grad()
    def sample_sheet(self, module: nn.Module, path: Path) -> None:
        """Held-out pictures, and below each its reconstruction."""
        assert isinstance(module, VQGAN)
        samples = [self.held_out[i % len(self.held_out)] for i in range(24)]
        pictures = to_tensor([s.image for s in samples])
        made = to_images(module(pictures.to(module.device)).reconstruction)
        true = to_images(pictures)
        rows = [x[i : i + 8] for i in (0, 8, 16) for x in (true, made)]
        save_sheet(path, rows)


def _initialize(model: VQGAN, folder: str, *, codes: bool) -> None:
    """Copies encoder and decoder, and if wanted the codebook, from a trained tokenizer."""
    source = VQGAN.from_pretrained(folder, subfolder=part_of(folder, "vqgan"))
    state = source.state_dict()
    state = {k: v for k, v in state.items() if codes or not k.startswith("quantize.")}
    try:
        model.load_state_dict({**model.state_dict(), **state})
    except RuntimeError as error:
        raise ValueError(
            f"train vqgan: loss.initialize_from, {folder}, is of another architecture ({error})"
        ) from error
