# SPDX-License-Identifier: Apache-2.0
"""Text to pictures with MarkovGen: Muse's first rounds, then a Markov random field.

S. Jayasumana et al., "MarkovGen: Structured Prediction for Efficient Text-to-Image Generation",
CVPR 2024, arXiv 2308.10997.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import Self

from t2p_fast.checkpoints import resolve_folder
from t2p_fast.models.muse import Muse
from t2p_fast.models.text_encoder import TextEncoder
from t2p_fast.models.vqgan import VQGAN
from t2p_fast.nn import TokenMRF
from t2p_fast.pipelines.muse import MusePipeline


def markovgen_exit_step(steps: int) -> int:
    """The round of ``steps`` after which the field takes over when nothing is said: half."""
    return max(1, steps // 2)


class MarkovGenPipeline(MusePipeline):
    """Draws pictures from prompts in fewer rounds than Muse.

    After ``exit_step`` rounds (by default half of them) one inference in the field finds all tokens
    that are masked still, and makes them fit each other and those at hand.

    Args:
        text_encoder, muse, vqgan: as in :class:`MusePipeline`.
        mrf: the field, trained on this generator's tokens (``t2p-fast train mrf``).
    """

    def __init__(self, text_encoder: TextEncoder, muse: Muse, vqgan: VQGAN, mrf: TokenMRF) -> None:
        super().__init__(text_encoder, muse, vqgan)
        if (mrf.config.vocab_size, mrf.config.token_grid) != (
            muse.config.vocab_size,
            muse.config.token_grid,
        ):
            raise ValueError(
                f"MarkovGenPipeline: mrf has {mrf.config.vocab_size} tokens on a grid of "
                f"{mrf.config.token_grid}, but muse has {muse.config.vocab_size} on a grid of "
                f"{muse.config.token_grid}"
            )
        self.mrf = mrf

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "embedded",
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> Self:
        """Loads a pipeline; the folder also holds ``mrf``. See :class:`MusePipeline`."""
        folder = resolve_folder(name, revision=revision)
        muse = MusePipeline.from_pretrained(folder, dtype=dtype, device=device)
        mrf = TokenMRF.from_pretrained(folder, subfolder="mrf", dtype=dtype, device=device)
        return cls(muse.text_encoder, muse.muse, muse.vqgan, mrf)

    def default_exit_step(self, steps: int) -> int:
        return markovgen_exit_step(steps)

    def finish(self, scores: Tensor, tokens: Tensor) -> Tensor:
        return self.mrf.finish(scores, tokens)
