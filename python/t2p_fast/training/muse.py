# SPDX-License-Identifier: Apache-2.0
"""Training of Muse with its text encoder (Chang et al. 2023, section 2)."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2p_fast.data.captions import (
    Claims,
    in_reading_order,
    parse_caption,
    turn_relation,
    write_caption,
)
from t2p_fast.models.muse import Muse, random_mask
from t2p_fast.models.text_encoder import TextEncoding, TextTransformer, train_tokenizer
from t2p_fast.models.vqgan import VQGAN
from t2p_fast.training.config import MuseTraining, part_of
from t2p_fast.training.losses import caption_contrast
from t2p_fast.training.pictures import PictureDataset, save_sheet, to_images, to_tensor
from t2p_fast.training.trainer import Task, Trainer

TOKENIZER_CAPTIONS = 20_000


def attention_backend(device: torch.device) -> AbstractContextManager[None]:
    """The form of attention that trains fastest on ``device``."""
    # torch's fused attention has a slow backward on the CPU at these lengths: the plain form
    # makes a whole training step 1.25 times as fast (64 tokens, 4 heads of 64, bf16, 2 threads).
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


class MuseWithText(nn.Module):
    """The generator and its text encoder, trained as one."""

    def __init__(self, muse: Muse, text_encoder: TextTransformer) -> None:
        super().__init__()
        self.muse = muse
        self.text_encoder = text_encoder

    def forward(self, tokens: Tensor, ids: Tensor, text_mask: Tensor, where: Tensor) -> Tensor:
        """Logits ``[m, V]`` of the ``m`` positions ``where``; see :class:`Muse`."""
        text = TextEncoding(self.text_encoder(ids, text_mask), text_mask)
        logits: Tensor = self.muse(tokens, text, where=where)
        return logits


def rare_mask(tokens: Tensor, vocab_size: int) -> Tensor:
    """Masks the rarest tokens of each picture, a share ``U(0.2, 1)`` of them.

    Decoding fills in first what it is sure of: the background. What remains are whole objects, of
    which only the prompt tells one from the other. Masks drawn evenly hardly ever look like that:
    with them, a few tokens of an object are seen, and the prompt need not be understood.

    Args:
        tokens: ``[b, n]``; how rare a token is, is counted in the batch, and blurred by Gumbel
            noise on the logarithm.

    Returns:
        Where they are masked, ``[b, n]`` bool, at least one each.
    """
    b, n = tokens.shape
    frequency = torch.bincount(tokens.flatten(), minlength=vocab_size)[tokens].float().log()
    noise = -torch.rand(b, n, device=tokens.device).clamp_min(1e-6).log().neg().log()
    rank = (frequency + noise).argsort(1).argsort(1)
    share = 0.2 + 0.8 * torch.rand(b, 1, device=tokens.device)
    return rank < (n * share).round().clamp_min(1)


def contrasting_captions(
    caption: str, rng: random.Random, *, reading_order: float
) -> tuple[str, str | None]:
    """A caption of a scene in other words, and the same with its relation turned round.

    Args:
        caption: in the language of `data.captions`.
        reading_order: how often the first object named is the one above or to the left.

    Returns:
        The right caption, and the wrong one in words drawn alike: nothing but what is above what
        tells them apart. The wrong one is ``None`` if no two objects stand in a relation.
    """
    claims = parse_caption(caption)
    ordered, seed = rng.random() < reading_order, rng.random()

    def worded(claims: Claims) -> str:
        claims = in_reading_order(claims) if ordered else claims
        return write_caption(claims, random.Random(seed), subject_first=ordered)

    turned = turn_relation(claims)
    return worded(claims), None if turned is None else worded(turned)


class MuseTask(Task):
    """Cross-entropy of masked tokens, masks by the cosine schedule, prompts now and then empty.

    With ``loss.rare_mask``, some of the masks hide whole objects instead. With ``loss.contrast``,
    ``softplus((log p(tokens | wrong) - log p(tokens | right)) / T)`` is added, where the wrong
    caption has its relation turned round, for the pictures of which at least half is hidden: what
    tells the two apart is a hundredth of the cross-entropy, and lost in the noise of the rest,
    which their difference is free of.
    """

    averaged = "muse"
    dataset: PictureDataset

    def __init__(self, config: MuseTraining) -> None:
        self.config, self.run = config, config.run
        source = config.loss.vqgan
        self.vqgan = VQGAN.from_pretrained(source, subfolder=part_of(source, "vqgan"))
        self.vqgan.check_rgb("train muse")
        codes, grid = self.vqgan.config.num_vq_embeddings, self.vqgan.config.token_grid
        if (config.model.vocab_size, config.model.token_grid) != (codes, grid):
            raise ValueError(
                f"train muse: the model has {config.model.vocab_size} tokens on a grid of "
                f"{config.model.token_grid}, but the tokenizer has {codes} on a grid of {grid}"
            )
        if config.model.text_embed_dim != config.text.hidden_size:
            raise ValueError(
                f"train muse: model.text_embed_dim is {config.model.text_embed_dim}, but "
                f"text.hidden_size is {config.text.hidden_size}"
            )
        self.dataset = PictureDataset(config.data, seed=config.run.seed)
        self.held_out = PictureDataset(config.data, split="test")
        start: TextTransformer | None = None
        if config.loss.initialize_from:
            start = TextTransformer.from_pretrained(
                config.loss.initialize_from, subfolder="text_encoder"
            )
        self.tokenizer = self._tokenizer(start)
        torch.manual_seed(config.run.seed)
        text_encoder = TextTransformer(config.text, self.tokenizer)
        muse = Muse(config.model)
        if config.model.codebook_dim > 0:
            muse.set_codebook(self.vqgan.quantize.codebook)
        model = MuseWithText(muse, text_encoder)
        if start is not None:
            _initialize(model, config.loss.initialize_from, start)
        self.modules = {"muse": model}

    def _tokenizer(self, start: TextTransformer | None) -> Tokenizer:
        if start is not None:
            assert start.tokenizer is not None
            tokenizer = start.tokenizer
        else:
            count = min(TOKENIZER_CAPTIONS, len(self.dataset))
            tokenizer = train_tokenizer(self.dataset.captions(count), self.config.text.vocab_size)
        if tokenizer.get_vocab_size() > self.config.text.vocab_size:
            raise ValueError(
                f"train muse: text.vocab_size is {self.config.text.vocab_size}, expected at "
                f"least {tokenizer.get_vocab_size()}"
            )
        return tokenizer

    def collate(self, samples: list[Any]) -> tuple[Tensor, list[str]]:
        return to_tensor([s.image for s in samples]), [s.caption for s in samples]

    def step(self, batch: Any, step: int, trainer: Trainer) -> dict[str, Tensor]:  # noqa: ARG002
        pictures, captions = batch
        self.vqgan.to(trainer.device)
        with torch.no_grad():
            tokens = self.vqgan.encode_to_indices(pictures.to(trainer.device)).flatten(1)
        options, mask_token = self.config.loss, self.config.model.mask_token
        wrong: list[str | None] = [None] * len(captions)
        if options.contrast + options.reading_order > 0:
            rng, share = random.Random(int(torch.randint(1 << 31, ()))), options.reading_order
            pairs = [contrasting_captions(c, rng, reading_order=share) for c in captions]
            captions, wrong = [right for right, _ in pairs], [turned for _, turned in pairs]
        drop = (torch.rand(len(captions)) < options.text_drop).tolist()
        prompts = ["" if d else c for c, d in zip(captions, drop, strict=True)]
        masked_tokens, masked = random_mask(tokens, mask_token)
        if options.rare_mask > 0:
            rare = torch.rand(len(captions), 1, device=tokens.device) < options.rare_mask
            masked = torch.where(rare, rare_mask(tokens, mask_token), masked)
            masked_tokens = tokens.masked_fill(masked, mask_token)
        hidden = (2 * masked.sum(1) >= masked.shape[1]).tolist()
        contrasted = [
            i
            for i, text in enumerate(wrong)
            if options.contrast > 0 and text is not None and hidden[i] and not drop[i]
        ]
        prompts += [text for i in contrasted if (text := wrong[i]) is not None]
        rows = [*range(len(captions)), *contrasted]
        model = trainer.unwrap("muse")
        assert isinstance(model, MuseWithText)
        ids, text_mask = model.text_encoder.tokenize(prompts)
        tokens, masked, masked_tokens = tokens[rows], masked[rows], masked_tokens[rows]
        with attention_backend(trainer.device):
            with trainer.accelerator.autocast():
                logits = self.modules["muse"](masked_tokens, ids, text_mask, masked)
            losses = F.cross_entropy(
                logits.float(),
                tokens[masked],
                label_smoothing=options.label_smoothing,
                reduction="none",
            )
            shown_right = int(masked[: len(captions)].sum())
            loss = losses[:shown_right].mean()
            report = {"loss": loss}
            if options.contrast > 0:
                sums = torch.zeros_like(tokens, dtype=losses.dtype).masked_scatter(masked, losses)
                right, wrong_sums = sums[contrasted].sum(1), sums[len(captions) :].sum(1)
                contrast = caption_contrast(right, wrong_sums, options.contrast_temperature)
                report["contrast"] = contrast
                loss = loss + options.contrast * contrast
            trainer.optimize("muse", loss)
        logits, targets = logits[:shown_right], tokens[masked][:shown_right]
        report["accuracy"] = (logits.argmax(-1) == targets).float().mean()
        return report

    def save_pretrained(self, module: nn.Module, folder: Path) -> None:
        assert isinstance(module, MuseWithText)
        module.muse.save_pretrained(folder / "muse", dtype=torch.bfloat16)
        module.text_encoder.save_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
        self.vqgan.save_pretrained(folder / "vqgan", dtype=torch.bfloat16)

    @torch.no_grad()
    def sample_sheet(self, module: nn.Module, path: Path) -> None:
        """Held-out pictures, and below each one drawn from its caption."""
        assert isinstance(module, MuseWithText)
        samples = [self.held_out[i % len(self.held_out)] for i in range(24)]
        text = module.text_encoder.encode([s.caption for s in samples])
        negative = module.text_encoder.encode([""] * len(samples))
        generators = [torch.Generator().manual_seed(i) for i in range(len(samples))]
        tokens = module.muse.generate(text, negative, generators=generators)
        grid = self.vqgan.config.token_grid
        made = to_images(self.vqgan.decode_indices(tokens.view(-1, grid, grid)))
        true = to_images(to_tensor([s.image for s in samples]))
        save_sheet(path, [x[i : i + 8] for i in (0, 8, 16) for x in (true, made)])


def _initialize(module: MuseWithText, folder: str, text_encoder: TextTransformer) -> None:
    """Copies the weights of a trained generator, and of its text encoder if that is of one kind."""
    muse = Muse.from_pretrained(folder, subfolder=part_of(folder, "muse") or "muse")
    if muse.config != module.muse.config:
        raise ValueError(
            f"train muse: loss.initialize_from, {folder}, is {muse.config}, expected "
            f"{module.muse.config}"
        )
    module.muse.load_state_dict(muse.state_dict())
    if text_encoder.config == module.text_encoder.config:
        module.text_encoder.load_state_dict(text_encoder.state_dict())
