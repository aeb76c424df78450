# SPDX-License-Identifier: Apache-2.0
"""Training of MarkovGen's field (Jayasumana et al. 2024, section 5).

First on the tokens of real pictures, a fifth of them masked; then on what a trained Muse scores
after some rounds, to find the tokens that it ends with after all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from t2p_fast.models.muse import Muse
from t2p_fast.models.text_encoder import TextTransformer
from t2p_fast.models.vqgan import VQGAN
from t2p_fast.nn import TokenMRF
from t2p_fast.pipelines import MusePipeline
from t2p_fast.training.config import MRFTraining, part_of
from t2p_fast.training.pictures import PictureDataset, save_sheet, to_images, to_tensor
from t2p_fast.training.trainer import Task, Trainer

_AT_ONCE = 64  # captions that Muse draws together


class _Left(NamedTuple):
    """What Muse knows and does not know at an exit step.

    A row for each caption and step at which some masked token has more than one candidate: the
    others have nothing to learn from.
    """

    scores: Tensor  # of the likeliest tokens, [rows, n, candidates] bfloat16
    candidates: Tensor  # those tokens, int32
    known: Tensor  # [rows, n] int32, negative where masked
    final: Tensor  # [rows, n] int32


class _Rows(Dataset[int]):
    """Numbers that choose rows of `_Left`, which are not there yet when data loaders are made."""

    def __init__(self, captions: list[str], exit_steps: int) -> None:
        self.captions = captions
        self.exit_steps = exit_steps

    def __len__(self) -> int:
        return len(self.captions) * self.exit_steps

    def __getitem__(self, index: int) -> int:
        return index


class MRFTask(Task):
    """Cross-entropy of the tokens that are to be found.

    With ``loss.muse``, they are those that Muse leaves masked at ``loss.exit_step`` or
    ``loss.exit_spread`` rounds from it, the unary scores are its own there, and the targets are the
    tokens that it draws in the rounds after: in expectation the KL divergence from its final
    predictions, up to their entropy. Only tokens with more than one candidate count; with
    ``loss.reveal`` any share of them is known already. Pictures of ``loss.captions`` are drawn
    before the first step, in bfloat16 if ``run.mixed_precision`` says so. Without, they are a share
    of a real picture's tokens, about which the unary scores say nothing.
    """

    averaged = "mrf"
    dataset: Dataset[Any]

    def __init__(self, config: MRFTraining) -> None:
        self.config, self.run = config, config.run
        loss = config.loss
        source = loss.muse or loss.vqgan
        self.vqgan = VQGAN.from_pretrained(
            source, subfolder="vqgan" if loss.muse else part_of(source, "vqgan")
        )
        self.vqgan.check_rgb("train mrf")
        self.pipeline: MusePipeline | None = None
        if loss.muse:
            self.pipeline = MusePipeline(
                TextTransformer.from_pretrained(loss.muse, subfolder="text_encoder"),
                Muse.from_pretrained(loss.muse, subfolder="muse"),
                self.vqgan,
            )
        codes = self.vqgan.config.num_vq_embeddings
        # Real pictures may be of another size than those that the tokenizer was trained on.
        size = self.vqgan.config.sample_size if loss.muse else config.data.size
        grid = size // self.vqgan.config.downsampling_factor
        if (config.model.vocab_size, config.model.token_grid) != (codes, grid):
            raise ValueError(
                f"train mrf: the model has {config.model.vocab_size} tokens on a grid of "
                f"{config.model.token_grid}, but the tokenizer has {codes}, and pictures of {size} "
                f"pixels have a grid of {grid}"
            )
        pictures = PictureDataset(config.data, seed=config.run.seed)
        self.dataset = pictures
        if self.pipeline is not None:
            captions = list(pictures.captions(loss.captions))
            self.dataset = _Rows(captions, len(loss.exit_steps))
        self.left: _Left | None = None
        self.held_out = PictureDataset(config.data, split="validation")
        torch.manual_seed(config.run.seed)
        mrf = TokenMRF(config.model)
        if loss.initialize_from:
            start = TokenMRF.from_pretrained(
                loss.initialize_from, subfolder=part_of(loss.initialize_from, "mrf")
            )
            if replace(start.config, rounds=config.model.rounds) != config.model:
                raise ValueError(
                    f"train mrf: loss.initialize_from, {loss.initialize_from}, is {start.config}, "
                    f"expected {config.model}"
                )
            mrf.load_state_dict(start.state_dict())
        self.modules = {"mrf": mrf}

    def collate(self, samples: list[Any]) -> Tensor:
        if self.pipeline is not None:
            return torch.tensor(samples)
        return to_tensor([s.image for s in samples])

    def step(self, batch: Any, step: int, trainer: Trainer) -> dict[str, Tensor]:  # noqa: ARG002
        mrf = self.modules["mrf"]
        if self.pipeline is None:
            self.vqgan.to(trainer.device)
            scores, known, target = self._masked_pictures(batch.to(trainer.device))
            q = mrf(scores, known)
        else:
            if self.left is None:
                self.left = self._left_by_muse(trainer)
            rows = batch % len(self.left.final)
            scores, candidates, known, final = self._left_rows(rows, trainer.device)
            q = mrf(scores, known, candidates=candidates)
            found = (candidates == final[..., None]) & scores.isfinite()
            target = torch.where(found.any(-1), found.int().argmax(-1), -1)
        wanted = (known < 0) & (target >= 0) & (scores.isfinite().sum(-1) > 1)
        q, target = q[wanted].float(), target[wanted]
        loss = F.nll_loss(q.clamp_min(1e-9).log(), target)
        trainer.optimize("mrf", loss)
        alone = (scores[wanted].argmax(-1) == target).float().mean()
        right = (q.argmax(-1) == target).float().mean()
        return {"loss": loss, "accuracy": right, "accuracy_alone": alone}

    @torch.no_grad()
    def _masked_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unary scores, known tokens and all tokens of real pictures."""
        tokens = self.vqgan.encode_to_indices(pictures).flatten(1)
        masked = torch.rand(tokens.shape, device=tokens.device) < self.config.loss.mask_share
        unary = torch.zeros(*tokens.shape, self.config.model.vocab_size, device=tokens.device)
        return unary, tokens.masked_fill(masked, -1), tokens

    def _left_rows(self, rows: Tensor, device: torch.device) -> _Left:
        """What Muse leaves, of which a share is shown, in the types that the field takes."""
        assert self.left is not None
        left = _Left(*(part[rows].to(device) for part in self.left))
        known = left.known
        if self.config.loss.reveal:
            share = torch.rand(len(known), 1, device=device)
            shown = torch.rand(known.shape, device=device) < share
            known = torch.where(shown, left.final, known)
        return _Left(left.scores.float(), left.candidates.long(), known.long(), left.final.long())

    @torch.no_grad()
    def _left_by_muse(self, trainer: Trainer) -> _Left:
        """Draws all captions, the same way whenever training is resumed."""
        assert self.pipeline is not None
        assert isinstance(self.dataset, _Rows)
        loss, captions = self.config.loss, self.dataset.captions
        muse, text = self.pipeline.to(trainer.device).muse, self.pipeline.text_encoder
        if self.run.mixed_precision == "bf16":
            muse.bfloat16()  # with autocast every round would round all weights anew
        mask, most = muse.config.mask_token, min(loss.candidates, muse.config.vocab_size)
        left: list[_Left] = []
        for first in range(0, len(captions), _AT_ONCE):
            trainer.report(f"drawing captions {first} of {len(captions)}")
            part = captions[first : first + _AT_ONCE]
            seeds = range(first, first + len(part))
            seen: list[tuple[Tensor, Tensor, Tensor]] = []

            def keep(
                step: int,
                given: Tensor,
                tokens: Tensor,
                seen: list[tuple[Tensor, Tensor, Tensor]] = seen,
            ) -> None:
                if step + 1 in loss.exit_steps:
                    seen.append((*given.topk(most, -1), tokens.masked_fill(tokens == mask, -1)))

            prompts, negative = (
                encoding._replace(embeddings=encoding.embeddings.to(muse.dtype))
                for encoding in (text.encode(part), text.encode([""] * len(part)))
            )
            final = muse.generate(
                prompts,
                negative,
                steps=loss.steps,
                generators=[torch.Generator().manual_seed(s) for s in seeds],
                on_scores=keep,
            )
            for scores, candidates, known in seen:
                choice = ((known < 0) & (scores[..., 1] > -torch.inf)).any(1)
                rows = (scores.bfloat16(), candidates.int(), known.int(), final.int())
                left.append(_Left(*(row[choice].cpu() for row in rows)))
        result = _Left(*(torch.cat(parts) for parts in zip(*left, strict=True)))
        if len(result.final) == 0:
            raise ValueError(
                f"train mrf: of {len(captions)} captions the generator leaves no choice after "
                f"rounds {loss.exit_steps.start} to {loss.exit_steps.stop - 1}; exit earlier or "
                "draw more"
            )
        return result

    def save_pretrained(self, module: nn.Module, folder: Path) -> None:
        assert isinstance(module, TokenMRF)
        module.save_pretrained(folder, dtype=torch.bfloat16)

    @torch.no_grad()
    def sample_sheet(self, module: nn.Module, path: Path) -> None:
        """Held-out pictures, those with a share of their tokens drawn evenly, and restored."""
        assert isinstance(module, TokenMRF)
        samples = [self.held_out[i % len(self.held_out)] for i in range(24)]
        pictures = to_tensor([s.image for s in samples])
        tokens = self.vqgan.encode_to_indices(pictures).flatten(1)
        generator = torch.Generator().manual_seed(0)
        masked = torch.rand(tokens.shape, generator=generator) < self.config.loss.mask_share
        vocab_size, grid = module.config.vocab_size, module.config.token_grid
        noise = torch.randint(vocab_size, tokens.shape, generator=generator)
        broken = torch.where(masked, noise, tokens)
        scores = torch.zeros(*tokens.shape, vocab_size)
        restored = module.finish(scores, tokens.masked_fill(masked, vocab_size))
        shown = [to_images(pictures)] + [
            to_images(self.vqgan.decode_indices(t.view(-1, grid, grid))) for t in (broken, restored)
        ]
        save_sheet(path, [x[i : i + 8] for i in (0, 8, 16) for x in shown])
