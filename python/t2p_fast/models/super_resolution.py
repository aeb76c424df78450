# SPDX-License-Identifier: Apache-2.0
"""Muse's second stage: tokens of a small picture to those of one with a finer grid.

H. Chang et al., "Muse: Text-To-Image Generation via Masked Generative Transformers", 2023,
arXiv 2301.00704, section 2.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from t2p_fast.checkpoints import check_numbers
from t2p_fast.models.muse import Muse, MuseConfig, TokenTable


@dataclass(frozen=True)
class MuseSuperResolutionConfig(MuseConfig):
    """Architecture of a :class:`MuseSuperResolution`.

    Attributes:
        token_grid: tokens along a side of the fine picture, a multiple of ``low_token_grid``.
        low_token_grid: tokens along a side of the small picture.
    """

    token_grid: int = 16
    low_token_grid: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "MuseSuperResolutionConfig: ", low_token_grid="[1, 256]")
        if self.token_grid % self.low_token_grid:
            raise ValueError(
                f"MuseSuperResolutionConfig: token_grid is {self.token_grid}, expected a multiple "
                f"of low_token_grid, {self.low_token_grid}"
            )


class MuseSuperResolution(Muse):
    """Logits of a fine picture's tokens from those that are known, a text, and a small picture.

    Both pictures have the tokens of one tokenizer. Those of the small one reach each fine position
    from the 3 x 3 around where it lies, and are added to its embedding. (In the paper they go
    through layers of their own and join the text in cross-attention, where training has to find out
    what lies where.)
    """

    config_class = MuseSuperResolutionConfig
    config: MuseSuperResolutionConfig

    def __init__(self, config: MuseSuperResolutionConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.low_table = TokenTable(config)
        self.low_conv = nn.Conv2d(width, width, 3, padding=1)
        self.low_out = nn.Conv2d(width, width * self.upscale**2, 1)

    @property
    def upscale(self) -> int:
        return self.config.token_grid // self.config.low_token_grid

    def context(self, low_tokens: Tensor) -> Tensor:
        """What the small picture says of each fine position, for :meth:`generate`.

        Args:
            low_tokens: ``[b, low_token_grid ** 2]`` int64 in ``[0, V)``.

        Returns:
            ``[b, n, hidden]``.
        """
        grid, vocab_size = self.config.low_token_grid, self.config.vocab_size
        if low_tokens.ndim != 2 or low_tokens.shape[1] != grid**2:
            raise ValueError(
                f"MuseSuperResolution.context: low_tokens are {list(low_tokens.shape)}, expected "
                f"[b, {grid**2}]"
            )
        if low_tokens.numel() and not 0 <= low_tokens.min() <= low_tokens.max() < vocab_size:
            raise ValueError(
                f"MuseSuperResolution.context: low_tokens are {int(low_tokens.min())} to "
                f"{int(low_tokens.max())}, expected 0 to {vocab_size - 1}"
            )
        x = F.embedding(low_tokens, self.low_table(self.codes))
        x = x.transpose(1, 2).unflatten(2, (grid, grid))
        x = self.low_out(F.gelu(self.low_conv(x)))
        return F.pixel_shuffle(x, self.upscale).flatten(2).transpose(1, 2)
