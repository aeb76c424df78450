# SPDX-License-Identifier: Apache-2.0
"""Muse: a transformer that fills in masked picture tokens under a text prompt.

H. Chang et al., "Muse: Text-To-Image Generation via Masked Generative Transformers", 2023,
arXiv 2301.00704. Decoding is that of MaskGIT (H. Chang et al., CVPR 2022, arXiv 2202.04200).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2p_fast.checkpoints import PretrainedModel, check_numbers
from t2p_fast.models.text_encoder import TextEncoding
from t2p_fast.ops import mask_counts, masked_sample


@dataclass(frozen=True)
class MuseConfig:
    """Architecture of a :class:`Muse`.

    Attributes:
        vocab_size: number of picture tokens ``V``; the mask is token ``V``.
        codebook_dim: length of the tokenizer's codes. Tokens are embedded, and scored, by what
            their codes say as well as by number, so that what is learned of one holds for all
            that look like it. 0 uses the number alone.
        free_embeddings: False leaves out the number and embeds tokens by their codes alone.
        token_grid: tokens along a side, so ``n = token_grid ** 2``.
        text_embed_dim: length of the text embeddings.
    """

    vocab_size: int = 1024
    codebook_dim: int = 0
    token_grid: int = 8
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 8
    mlp_ratio: int = 4
    text_embed_dim: int = 256
    free_embeddings: bool = True

    def __post_init__(self) -> None:
        check_numbers(
            self, "MuseConfig: ", vocab_size="[1, 1048576]", codebook_dim="[0, 16384]",
            token_grid="[1, 256]", hidden_size="[1, 16384]", num_layers="[1, 256]",
            num_heads="[1, 256]", mlp_ratio="[1, 64]", text_embed_dim="[1, 16384]",
        )  # fmt: skip
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"MuseConfig: hidden_size is {self.hidden_size}, expected a multiple of "
                f"num_heads, {self.num_heads}"
            )
        if not self.free_embeddings and self.codebook_dim == 0:
            raise ValueError(
                "MuseConfig: free_embeddings is False and codebook_dim 0, expected one of the two"
            )

    @property
    def sequence_length(self) -> int:
        return self.token_grid**2

    @property
    def mask_token(self) -> int:
        return self.vocab_size


class TokenTable(nn.Module):
    """A vector per picture token: a free one plus a function of the token's code."""

    def __init__(self, config: MuseConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.free: nn.Parameter | None = None
        if config.free_embeddings:
            self.free = nn.Parameter(torch.empty(config.vocab_size, width))
            nn.init.normal_(self.free, std=0.5)
        self.from_code: nn.Sequential | None = None
        if config.codebook_dim > 0:
            first = nn.Linear(config.codebook_dim, 2 * width)
            second = nn.Linear(2 * width, width)
            # A large first gain makes features that tell neighbouring codes apart.
            nn.init.normal_(first.weight, std=2 / math.sqrt(config.codebook_dim))
            nn.init.normal_(second.weight, std=1.5 / math.sqrt(2 * width))
            self.from_code = nn.Sequential(first, nn.GELU(), second)

    def forward(self, codes: Tensor) -> Tensor:
        """Standardised codes ``[V, codebook_dim]`` to vectors ``[V, hidden_size]``."""
        if self.from_code is None:
            assert self.free is not None
            return self.free
        described: Tensor = self.from_code(codes)
        return described if self.free is None else self.free + described


class RelativeBias(nn.Module):
    """A learned bias of self-attention per head and offset between two positions of the grid.

    Half of the heads begin by looking at one neighbour each, the others everywhere: a soft
    convolution that training is free to leave (d'Ascoli et al., "ConViT", ICML 2021, section 3).
    """

    def __init__(self, config: MuseConfig, layer: int) -> None:
        super().__init__()
        grid = config.token_grid
        self.token_grid = grid
        self.bias = nn.Parameter(_first_bias(grid, config.num_heads, layer))

    def forward(self) -> Tensor:
        """The bias ``[1, heads, n, n]``."""
        return self.bias[None, :, _offset_index(self.token_grid, self.bias.device)]


def _first_bias(grid: int, num_heads: int, layer: int) -> Tensor:
    """The bias before training, ``[heads, (2 grid - 1) ** 2]``."""
    bias = torch.zeros(num_heads, (2 * grid - 1) ** 2)
    if bias.is_meta:  # laid out without memory; arithmetic there would import the compiler
        return bias
    span = torch.arange(1 - grid, grid)
    offsets = torch.cartesian_prod(span, span)
    # Beside and above in even layers, diagonal in odd ones.
    neighbours = torch.tensor(
        [(0, 1), (0, -1), (1, 0), (-1, 0)]
        if layer % 2 == 0
        else [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    )
    for head in range(num_heads // 2):
        distance = (offsets - neighbours[head % 4]).square().sum(1)
        bias[head] = -1.5 * distance.clamp_max(6)
    return bias


@lru_cache(maxsize=16)
def _offset_index(grid: int, device: torch.device) -> Tensor:
    """Number of the offset from query to key, ``[n, n]``, counted row by row."""
    # Kept over calls, so it must not be born as a tensor that gradients refuse.
    with torch.inference_mode(False):
        axis = torch.arange(grid, device=device)
        position = torch.cartesian_prod(axis, axis)
        offset = position[None, :] - position[:, None] + grid - 1
        return offset[..., 0] * (2 * grid - 1) + offset[..., 1]


class MuseLayer(nn.Module):
    """Self-attention, cross-attention to the text, and an MLP, each behind a layer norm."""

    def __init__(self, config: MuseConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.relative_bias = RelativeBias(config, layer)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.cross_q = nn.Linear(width, width)
        self.cross_kv = nn.Linear(config.text_embed_dim, 2 * width)
        self.cross_proj = nn.Linear(width, width)
        self.norm3 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.mlp_ratio * width)
        self.fc2 = nn.Linear(config.mlp_ratio * width, width)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        q, k, v = self._heads(self.qkv(self.norm1(x)), 3)
        bias = self.relative_bias().to(q.dtype)
        x = x + self.proj(self._merge(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))
        (q,) = self._heads(self.cross_q(self.norm2(x)), 1)
        k, v = self._heads(self.cross_kv(text), 2)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=text_mask)
        x = x + self.cross_proj(self._merge(h))
        mlp: Tensor = self.fc2(F.gelu(self.fc1(self.norm3(x))))
        return x + mlp

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        b, length, width = x.shape
        heads = x.view(b, length, parts, self.num_heads, width // (parts * self.num_heads))
        return heads.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def _merge(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class Muse(PretrainedModel):
    """Logits for every picture token from the tokens that are known and a text."""

    config_class = MuseConfig
    config: MuseConfig
    codes: Tensor

    def __init__(self, config: MuseConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.register_buffer("codes", torch.zeros(config.vocab_size, config.codebook_dim))
        self.input_table = TokenTable(config)
        self.mask_embedding = nn.Parameter(torch.empty(1, width))
        self.row_embedding = nn.Parameter(torch.empty(config.token_grid, 1, width))
        self.column_embedding = nn.Parameter(torch.empty(1, config.token_grid, width))
        nn.init.normal_(self.mask_embedding, std=0.5)
        nn.init.normal_(self.row_embedding, std=0.3)
        nn.init.normal_(self.column_embedding, std=0.3)
        self.layers = nn.ModuleList(MuseLayer(config, i) for i in range(config.num_layers))
        self.norm_out = nn.LayerNorm(width)
        self.output_table = TokenTable(config)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        for name, parameter in self.layers.named_parameters():
            if name.endswith(("proj.weight", "fc2.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(3 * config.num_layers))
            elif name.endswith(("qkv.weight", "q.weight", "kv.weight", "fc1.weight")):
                nn.init.normal_(parameter, std=0.02)

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor) -> None:
        """Tells the model what its tokens look like, before it is trained.

        Args:
            codebook: the tokenizer's codes, ``[V, codebook_dim]``.
        """
        if codebook.shape != self.codes.shape:
            raise ValueError(
                f"Muse.set_codebook: codebook is {list(codebook.shape)}, expected "
                f"{list(self.codes.shape)}"
            )
        codebook = codebook.float()
        standard = (codebook - codebook.mean(0)) / codebook.std(0).clamp_min(1e-6)
        self.codes.copy_(standard.clamp(-4, 4))

    def tables(self) -> tuple[Tensor, Tensor]:
        """Vectors to embed tokens, ``[V + 1, hidden]``, and to score them, ``[V, hidden]``.

        They depend on the weights alone: decoding computes them once.
        """
        embed = torch.cat([self.input_table(self.codes), self.mask_embedding])
        # The factor makes first logits small beside the bias, which learns frequencies at once.
        return embed, 0.06 * self.output_table(self.codes)

    def forward(
        self,
        tokens: Tensor,
        text: TextEncoding,
        tables: tuple[Tensor, Tensor] | None = None,
        where: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Predicts all tokens.

        Args:
            tokens: ``[b, n]`` int64 in ``[0, V]``, where ``V`` is the mask.
            text: the encoded prompts, ``[b, l, text_embed_dim]``.
            tables: the result of :meth:`tables`, if it is at hand.
            where: ``[b, n]`` bool, the ``m`` positions that are to be scored; ``None`` scores all.
            context: ``[b, n, hidden]``, what else is known of each position, added to its
                embedding; see `MuseSuperResolution`.

        Returns:
            Logits ``[b, n, V]``, or ``[m, V]`` of the positions ``where``.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.config.sequence_length:
            raise ValueError(
                f"Muse: tokens are {list(tokens.shape)}, expected [b, "
                f"{self.config.sequence_length}]"
            )
        embed, score = tables if tables is not None else self.tables()
        position = (self.row_embedding + self.column_embedding).flatten(0, 1)
        x = F.embedding(tokens, embed) + position
        if context is not None:
            x = x + context
        mask = text.mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, text.embeddings, mask)
        if where is not None:
            x = x[where]
        return F.linear(self.norm_out(x), score, self.output_bias)

    @torch.no_grad()
    def generate(
        self,
        text: TextEncoding,
        negative: TextEncoding | None = None,
        *,
        steps: int = 32,
        guidance: float = 2.0,
        temperature: float = 1.0,
        min_p: float = 0.1,
        choice_temperature: float = 4.0,
        known: Tensor | None = None,
        context: Tensor | None = None,
        generators: list[torch.Generator] | None = None,
        exit_step: int | None = None,
        finish: Callable[[Tensor, Tensor], Tensor] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
        on_scores: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Fills in all masked tokens in ``steps`` rounds of predicting and re-masking.

        Args:
            text: the encoded prompts, ``b`` of them.
            negative: encoded prompts to steer away from, usually of ``""``; needed if
                ``guidance`` is not 0.
            steps: number of rounds, at least 1.
            guidance: final scale ``t`` of classifier-free guidance, ``(1 + t) l_c - t l_u``
                (Muse, section 2.7); it rises linearly over the rounds.
            temperature: of the token distribution; 0 takes the most likely tokens.
            min_p: tokens that the prompt makes less likely than ``min_p`` times the likeliest are
                never drawn (Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024); guidance
                would otherwise raise some that neither distribution believes in. 0 allows all.
            choice_temperature: of the Gumbel noise on the confidences; it falls linearly.
            known: ``[b, n]`` int64, tokens to keep, with the mask token where to fill in;
                ``None`` fills in everything.
            context: ``[b, n, hidden]``, see :meth:`forward`.
            generators: one per picture, so that a picture does not depend on its batch.
            exit_step: the round after which to stop, ``finish`` doing the rest; ``None`` and
                ``steps`` do all.
            finish: given the last round's scores ``[b, n, V]`` (see `guided_scores`) and the tokens
                so far, returns all tokens; ``None`` takes the likeliest, each by itself.
                `TokenMRF.finish` makes them fit each other, as MarkovGen does.
            on_step: called after every round with its number and the tokens so far.
            on_scores: called after every round with its number, the scores that ``finish`` would be
                given there, and the tokens so far.

        Returns:
            Tokens ``[b, n]``.
        """
        b, n = text.embeddings.shape[0], self.config.sequence_length
        mask_token = self.config.mask_token
        if known is None:
            known = torch.full((b, n), mask_token, device=self.device)
        if steps < 1:
            raise ValueError(f"Muse.generate: steps is {steps}, expected at least 1")
        if exit_step is not None and not 1 <= exit_step <= steps:
            raise ValueError(f"Muse.generate: exit_step is {exit_step}, expected 1 to {steps}")
        if known.shape != (b, n) or known.min() < 0 or known.max() > mask_token:
            raise ValueError(
                f"Muse.generate: known is {list(known.shape)} with values {int(known.min())} to "
                f"{int(known.max())}, expected [{b}, {n}] with values 0 to {mask_token}"
            )
        if not 0 <= min_p <= 1:
            raise ValueError(f"Muse.generate: min_p is {min_p}, expected 0 to 1")
        if generators is not None and len(generators) != b:
            raise ValueError(
                f"Muse.generate: there are {len(generators)} generators, expected one for each of "
                f"the {b} pictures"
            )
        both = text
        if guidance != 0:
            if negative is None:
                raise ValueError("Muse.generate: guidance needs negative, usually of ''")
            if negative.embeddings.shape[0] != b:
                raise ValueError(
                    f"Muse.generate: negative has {negative.embeddings.shape[0]} prompts, expected "
                    f"{b} as in text"
                )
            both = concatenate(text, negative)
            context = None if context is None else context.repeat(2, 1, 1)
        tables = self.tables()
        tokens = known.clone()
        masked_at_start = (known == mask_token).sum(1)
        seeds = draw_seeds(b, generators).to(tokens.device)
        for step in range(steps):
            seen = tokens.repeat(2, 1) if guidance != 0 else tokens
            logits = self(seen, both, tables, context=context)
            if logits.dtype == torch.float64:
                logits = logits.float()
            conditional, unconditional = logits.chunk(2) if guidance != 0 else (logits, None)
            last = step + 1 == steps
            unknown = (tokens == mask_token).sum(1)
            tokens = masked_sample(
                conditional,
                tokens,
                mask_token=mask_token,
                mask_count=None if last else mask_counts(step, steps, masked_at_start, unknown),
                uncond_logits=unconditional,
                guidance=guidance * (step + 1) / steps,
                temperature=temperature,
                choice_temperature=choice_temperature * (1 - (step + 1) / steps),
                min_p=min_p,
                seed=seeds,
                step=step,
            ).tokens
            if on_step is not None:
                on_step(step, tokens)
            leaves = step + 1 == exit_step and not last
            if not leaves and on_scores is None:
                continue
            scores = guided_scores(
                conditional,
                unconditional,
                guidance=guidance * (step + 1) / steps,
                temperature=temperature,
                min_p=min_p,
            )
            if on_scores is not None:
                on_scores(step, scores, tokens)
            if leaves:
                return (finish or most_likely)(scores, tokens)
        return tokens


def guided_scores(
    conditional: Tensor,
    unconditional: Tensor | None,
    *,
    guidance: float,
    temperature: float,
    min_p: float,
) -> Tensor:
    """Logits of the distribution that a round draws from, ``[b, n, V]`` float32.

    Args:
        conditional, unconditional: logits under the prompt and under the negative one.
        guidance, temperature, min_p: as in :meth:`Muse.generate`; tokens below ``min_p`` get
            -inf. A temperature of 0 counts as 1: the likeliest tokens are the same.
    """
    conditional = conditional.float()
    scores = conditional
    if unconditional is not None:
        scores = torch.lerp(unconditional.float(), conditional, 1 + guidance)
    if temperature > 0:
        scores = scores / temperature
    if min_p > 0:
        least = conditional.amax(-1, keepdim=True) + math.log(min_p)
        scores = scores.masked_fill(conditional < least, -torch.inf)
    return scores


def most_likely(scores: Tensor, tokens: Tensor) -> Tensor:
    """Fills in masked tokens (those that are ``V``), each by itself: an early exit."""
    return torch.where(tokens == scores.shape[-1], scores.argmax(-1), tokens)


def concatenate(a: TextEncoding, b: TextEncoding) -> TextEncoding:
    """Stacks two batches of encodings, padding the shorter texts."""
    length = max(a.mask.shape[1], b.mask.shape[1])
    pad_a, pad_b = length - a.mask.shape[1], length - b.mask.shape[1]
    return TextEncoding(
        torch.cat([F.pad(a.embeddings, (0, 0, 0, pad_a)), F.pad(b.embeddings, (0, 0, 0, pad_b))]),
        torch.cat([F.pad(a.mask, (0, pad_a)), F.pad(b.mask, (0, pad_b))]),
    )


def draw_seeds(b: int, generators: list[torch.Generator] | None = None) -> Tensor:
    """A seed per picture, ``[b]`` int64; that of picture ``i`` from ``generators[i]``."""
    if generators is None:
        return torch.randint(2**63 - 1, (b,))
    drawn = [torch.randint(2**63 - 1, (), generator=g, device=g.device) for g in generators]
    return torch.stack([seed.cpu() for seed in drawn])


def random_mask(tokens: Tensor, mask_token: int) -> tuple[Tensor, Tensor]:
    """Masks tokens as in training: a share ``cos(pi / 2 u)``, ``u ~ U(0, 1)``, per picture.

    Args:
        tokens: ``[b, n]``.

    Returns:
        The masked tokens and where they are masked (at least one position), both ``[b, n]``.
    """
    b, n = tokens.shape
    share = torch.cos(math.pi / 2 * torch.rand(b, device=tokens.device))
    count = (share * n).round().clamp_min(1)
    order = torch.rand(b, n, device=tokens.device).argsort(1).argsort(1)
    masked = order < count[:, None]
    return tokens.masked_fill(masked, mask_token), masked
