# SPDX-License-Identifier: Apache-2.0
"""Training of Muse's second stage (Chang et al. 2023, section 2.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2p_fast.models.muse import random_mask
from t2p_fast.models.super_resolution import MuseSuperResolution
from t2p_fast.models.text_encoder import TextEncoding, TextTransformer
from t2p_fast.models.vqgan import VQGAN
from t2p_fast.training.config import SuperResolutionTraining
from t2p_fast.training.muse import attention_backend
from t2p_fast.training.pictures import PictureDataset, save_sheet, to_images, to_tensor
from t2p_fast.training.trainer import Task, Trainer


class StageWithContext(nn.Module):
    """The second stage as one call, from the small picture's tokens to scores."""

    def __init__(self, stage: MuseSuperResolution) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, tokens: Tensor, low: Tensor, text: TextEncoding, where: Tensor) -> Tensor:
        """Logits ``[m, V]`` of the ``m`` positions ``where``."""
        logits: Tensor = self.stage(tokens, text, where=where, context=self.stage.context(low))
        return logits


class SuperResolutionTask(Task):
    """Cross-entropy of a fine picture's masked tokens, given those of the same picture made small.

    A share of the small picture's tokens is swapped for those of another, since the first stage
    draws some that are wrong.
    """

    averaged = "super_resolution"
    dataset: PictureDataset

    def __init__(self, config: SuperResolutionTraining) -> None:
        self.config, self.run = config, config.run
        source = config.loss.muse
        self.vqgan = VQGAN.from_pretrained(source, subfolder="vqgan")
        self.vqgan.check_rgb("train super-resolution")
        self.text_encoder = TextTransformer.from_pretrained(source, subfolder="text_encoder")
        codes, factor = self.vqgan.config.num_vq_embeddings, self.vqgan.config.downsampling_factor
        model, width = config.model, self.text_encoder.embed_dim
        if (model.vocab_size, model.text_embed_dim) != (codes, width):
            raise ValueError(
                f"train super-resolution: the model has {model.vocab_size} tokens and text of "
                f"{model.text_embed_dim}, but {source} has {codes} and {width}"
            )
        if config.data.size != model.token_grid * factor:
            raise ValueError(
                f"train super-resolution: data.size is {config.data.size}, expected "
                f"{model.token_grid * factor}, {factor} pixels for each token along a side"
            )
        self.dataset = PictureDataset(config.data, seed=config.run.seed)
        self.held_out = PictureDataset(config.data, split="test")
        torch.manual_seed(config.run.seed)
        stage = MuseSuperResolution(model)
        if model.codebook_dim > 0:
            stage.set_codebook(self.vqgan.quantize.codebook)
        self.modules = {"super_resolution": StageWithContext(stage)}

    def collate(self, samples: list[Any]) -> tuple[Tensor, list[str]]:
        return to_tensor([s.image for s in samples]), [s.caption for s in samples]

    @torch.no_grad()
    def tokens_of(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of pictures, fine ``[b, n]`` and small ``[b, l]``."""
        upscale = self.config.model.token_grid // self.config.model.low_token_grid
        small = F.avg_pool2d(pictures, upscale)
        fine, low = (self.vqgan.encode_to_indices(p).flatten(1) for p in (pictures, small))
        return fine, low

    def step(self, batch: Any, step: int, trainer: Trainer) -> dict[str, Tensor]:  # noqa: ARG002
        pictures, captions = batch
        options = self.config.loss
        self.vqgan.to(trainer.device)
        self.text_encoder.to(trainer.device)
        tokens, low = self.tokens_of(pictures.to(trainer.device))
        swapped = torch.rand(low.shape, device=low.device) < options.swapped
        low = torch.where(swapped, low.roll(1, 0), low)
        drop = (torch.rand(len(captions)) < options.text_drop).tolist()
        prompts = ["" if d else c for c, d in zip(captions, drop, strict=True)]
        masked_tokens, masked = random_mask(tokens, self.config.model.mask_token)
        with torch.no_grad():
            text = self.text_encoder.encode(prompts)
        with attention_backend(trainer.device):
            with trainer.accelerator.autocast():
                logits = self.modules["super_resolution"](masked_tokens, low, text, masked)
            loss = F.cross_entropy(logits.float(), tokens[masked])
            trainer.optimize("super_resolution", loss)
        right = (logits.argmax(-1) == tokens[masked]).float().mean()
        return {"loss": loss, "accuracy": right}

    def save_pretrained(self, module: nn.Module, folder: Path) -> None:
        assert isinstance(module, StageWithContext)
        module.stage.save_pretrained(folder, dtype=torch.bfloat16)

    @torch.no_grad()
    def sample_sheet(self, module: nn.Module, path: Path) -> None:
        """Held-out pictures made small, made large again, and as they were."""
        assert isinstance(module, StageWithContext)
        stage = module.stage
        samples = [self.held_out[i % len(self.held_out)] for i in range(12)]
        pictures = to_tensor([s.image for s in samples])
        _, low = self.tokens_of(pictures)
        text = self.text_encoder.encode([s.caption for s in samples])
        negative = self.text_encoder.encode([""] * len(samples))
        generators = [torch.Generator().manual_seed(i) for i in range(len(samples))]
        tokens = stage.generate(
            text, negative, steps=8, context=stage.context(low), generators=generators
        )
        fine, grid = stage.config.token_grid, stage.config.low_token_grid
        size = (self.config.data.size,) * 2
        small = F.interpolate(self.vqgan.decode_indices(low.view(-1, grid, grid)), size=size)
        made = self.vqgan.decode_indices(tokens.view(-1, fine, fine))
        rows = [to_images(p) for p in (small, made, pictures)]
        save_sheet(path, [x[i : i + 4] for i in (0, 4, 8) for x in rows], scale=1)
