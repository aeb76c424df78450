# SPDX-License-Identifier: Apache-2.0
"""Text to pictures with MarkovGen: Muse's first rounds, then a Markov random field.

S. Jayasumana et al., "MarkovGen: Structured Prediction for Efficient Text-to-Image Generation",
CVPR 2024, arXiv 2308.10997.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from t2p_fast.checkpoints import PretrainedModel
from t2p_fast.models.muse import Muse
from t2p_fast.models.super_resolution import MuseSuperResolution
from t2p_fast.models.text_encoder import TextEncoder
from t2p_fast.models.vqgan import VQGAN
from t2p_fast.nn import TokenMRF
from t2p_fast.pipelines.muse import MusePipeline


def markovgen_exit_step(steps: int) -> int:
    """The round of ``steps`` after which the field takes over when nothing is said: 9 of 16.

    By then 36 % of the tokens are drawn. With half of the rounds, 29 %, the embedded field makes up
    for more, but a point of the prompt accuracy is lost.
    """
    return max(1, steps * 9 // 16)


class MarkovGenPipeline(MusePipeline):
    """Draws pictures from prompts in fewer rounds than Muse.

    After ``exit_step`` rounds (by default 9 of 16) inference in the field finds all tokens
    that are masked still, and makes them fit each other and those at hand (`TokenMRF.finish`).

    Args:
        text_encoder, muse, vqgan: as in :class:`MusePipeline`.
        mrf: the field, trained on this generator's tokens (``t2p-fast train mrf``).
        super_resolution: as in :class:`MusePipeline`.
        super_resolution_mrf: the field of the second stage; without it, that stage ends with the
            likeliest tokens.
    """

    models: ClassVar[dict[str, type[PretrainedModel]]] = {**MusePipeline.models, "mrf": TokenMRF}
    optional_models: ClassVar[dict[str, type[PretrainedModel]]] = {
        **MusePipeline.optional_models,
        "super_resolution_mrf": TokenMRF,
    }

    def __init__(
        self,
        text_encoder: TextEncoder,
        muse: Muse,
        vqgan: VQGAN,
        mrf: TokenMRF,
        super_resolution: MuseSuperResolution | None = None,
        super_resolution_mrf: TokenMRF | None = None,
    ) -> None:
        super().__init__(text_encoder, muse, vqgan, super_resolution)
        for name, field, of, model in (
            ("mrf", mrf, "muse", muse),
            ("super_resolution_mrf", super_resolution_mrf, "super_resolution", super_resolution),
        ):
            if field is None or model is None:
                continue
            has = (field.config.vocab_size, field.config.token_grid)
            wanted = (model.config.vocab_size, model.config.token_grid)
            if has != wanted:
                raise ValueError(
                    f"MarkovGenPipeline: {name} has {has[0]} tokens on a grid of {has[1]}, but "
                    f"{of} has {wanted[0]} on a grid of {wanted[1]}"
                )
        self.mrf = mrf
        self.super_resolution_mrf = super_resolution_mrf

    def default_exit_step(self, steps: int) -> int:
        return markovgen_exit_step(steps)

    def finish(self, scores: Tensor, tokens: Tensor) -> Tensor:
        return self.mrf.finish(scores, tokens)

    def finish_finer(self, scores: Tensor, tokens: Tensor) -> Tensor:
        if self.super_resolution_mrf is None:
            return super().finish_finer(scores, tokens)
        return self.super_resolution_mrf.finish(scores, tokens)
