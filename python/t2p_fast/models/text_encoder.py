# SPDX-License-Identifier: Apache-2.0
"""Prompts to embeddings: the protocol, and a small transformer trained with its generator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from typing_extensions import Self

from t2p_fast.checkpoints import (
    CheckpointError,
    PretrainedModel,
    check_numbers,
    resolve_folder,
    shown,
    write_atomically,
)

TOKENIZER_NAME = "tokenizer.json"


class TextEncoding(NamedTuple):
    """Embedded prompts."""

    embeddings: Tensor  # [b, l, e]
    mask: Tensor  # [b, l] bool, False on padding


@runtime_checkable
class TextEncoder(Protocol):
    """What a generator needs of a text encoder; ``""`` must encode to at least one position."""

    @property
    def embed_dim(self) -> int:
        """Length ``e`` of the embeddings."""
        ...

    def encode(self, prompts: Sequence[str]) -> TextEncoding:
        """Embeds prompts."""
        ...


@dataclass(frozen=True)
class TextTransformerConfig:
    """Architecture of a :class:`TextTransformer`.

    ``relative_span``: tokens up to so far apart attend with a learned bias of their offset; with 0
    there is the position embedding alone.
    """

    vocab_size: int = 512
    max_length: int = 40
    hidden_size: int = 256
    num_layers: int = 2
    num_heads: int = 4
    relative_span: int = 0

    def __post_init__(self) -> None:
        check_numbers(
            self, "TextTransformerConfig: ", vocab_size="[1, 1048576]", max_length="[1, 65536]",
            hidden_size="[1, 16384]", num_layers="[1, 256]", num_heads="[1, 256]",
            relative_span="[0, 65536]",
        )  # fmt: skip
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"TextTransformerConfig: hidden_size is {self.hidden_size}, expected a multiple of "
                f"num_heads, {self.num_heads}"
            )


class TextTransformer(PretrainedModel):
    """A bidirectional pre-norm transformer over byte-pair tokens."""

    config_class = TextTransformerConfig
    config: TextTransformerConfig

    def __init__(self, config: TextTransformerConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config)
        self.tokenizer = tokenizer
        width = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(config.max_length, width))
        self.layers = nn.ModuleList(
            _TextLayer(width, config.num_heads, config.relative_span)
            for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        # Words large beside what the layers add at first: which word it is must not drown.
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        nn.init.normal_(self.position_embedding, std=0.1)

    @property
    def embed_dim(self) -> int:
        return self.config.hidden_size

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts to ids ``[b, l]`` and a mask that is False on padding.

        Raises:
            ValueError: if a prompt has more than ``max_length`` tokens.
        """
        if self.tokenizer is None:
            raise ValueError("TextTransformer: has no tokenizer, give one to the constructor")
        encodings = self.tokenizer.encode_batch(list(prompts))
        length = max(len(e.ids) for e in encodings)
        if length > self.config.max_length:
            long = max(zip(encodings, prompts, strict=True), key=lambda pair: len(pair[0].ids))[1]
            raise ValueError(
                f"TextTransformer: the prompt {shown(long)} has {length} tokens, at most "
                f"{self.config.max_length} are allowed"
            )
        ids = torch.zeros(len(encodings), length, dtype=torch.int64)
        mask = torch.zeros(len(encodings), length, dtype=torch.bool)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
            mask[row, : len(encoding.ids)] = True
        return ids.to(self.device), mask.to(self.device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids ``[b, l]`` and mask to embeddings ``[b, l, hidden_size]``."""
        x = self.token_embedding(ids) + self.position_embedding[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        embeddings: Tensor = self.norm_out(x)
        return embeddings

    def encode(self, prompts: Sequence[str]) -> TextEncoding:
        ids, mask = self.tokenize(prompts)
        return TextEncoding(self(ids, mask), mask)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        super().save_pretrained(folder, dtype=dtype)
        if self.tokenizer is not None:
            text = self.tokenizer.to_str(pretty=True)
            write_atomically(
                Path(folder) / TOKENIZER_NAME,
                lambda temporary: temporary.write_text(text, encoding="utf-8"),
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        subfolder: str = "",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> Self:
        folder = resolve_folder(name, revision=revision)
        model = super().from_pretrained(folder, subfolder=subfolder, dtype=dtype, device=device)
        path = folder / subfolder / TOKENIZER_NAME
        try:
            tokenizer = Tokenizer.from_file(str(path))
            empty = tokenizer.encode("").ids
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path}: not a readable tokenizer ({error})") from error
        size = 1 + max([*tokenizer.get_vocab().values(), *empty], default=0)
        if size > model.config.vocab_size:
            raise CheckpointError(
                f"{path}: has {size} tokens, but the model has {model.config.vocab_size}"
            )
        if not 1 <= len(empty) <= model.config.max_length:
            raise CheckpointError(
                f"{path}: makes {len(empty)} tokens of an empty prompt, expected 1 to "
                f"{model.config.max_length}"
            )
        model.tokenizer = tokenizer
        return model


class _TextLayer(nn.Module):
    def __init__(self, width: int, num_heads: int, relative_span: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.relative_bias: nn.Parameter | None = None
        if relative_span > 0:
            self.relative_bias = nn.Parameter(_first_bias(num_heads, relative_span))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.relative_bias is not None:
            mask = self._bias(length).to(q.dtype).masked_fill(~mask, -torch.inf)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(h.transpose(1, 2).reshape(b, length, width))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x

    def _bias(self, length: int) -> Tensor:
        """The bias ``[heads, l, l]`` of keys to queries."""
        assert self.relative_bias is not None
        span = self.relative_bias.shape[1] // 2
        position = torch.arange(length, device=self.relative_bias.device)
        offset = (position[None, :] - position[:, None]).clamp(-span, span) + span
        return self.relative_bias[:, offset]


def _first_bias(num_heads: int, span: int) -> Tensor:
    """The bias before training, ``[heads, 2 span + 1]``, of key minus query from -span to span.

    Half of the heads begin by looking at the word before, the one after, or the ones next to those,
    so that which adjective is of which noun need not be discovered from absolute positions: as in
    `muse.RelativeBias`.
    """
    bias = torch.zeros(num_heads, 2 * span + 1)
    if bias.is_meta:
        return bias
    offsets = torch.arange(-span, span + 1)
    for head in range(num_heads // 2):
        target = (-1, 1, -2, 2)[head % 4]
        bias[head] = -1.5 * (offsets - target).square().clamp_max(6)
    return bias


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding of lower-cased words, learned from captions.

    Bytes are the alphabet, so no prompt has an unknown word; every prompt ends in ``[END]``.
    """
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["[PAD]", "[END]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [END]", special_tokens=[("[END]", tokenizer.token_to_id("[END]"))]
    )
    return tokenizer
