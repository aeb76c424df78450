# SPDX-License-Identifier: Apache-2.0
"""The second stage sees the small picture where it lies, and decodes as the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from t2p_fast.models.muse import Muse, MuseConfig
from t2p_fast.models.super_resolution import MuseSuperResolution, MuseSuperResolutionConfig
from t2p_fast.models.text_encoder import TextEncoding
from tiny_models import make_super_resolution, one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def _text(b: int, width: int = 16) -> TextEncoding:
    torch.manual_seed(b)
    return TextEncoding(torch.randn(b, 5, width), torch.ones(b, 5, dtype=torch.bool))


def test_each_token_of_the_small_picture_is_seen_around_its_place() -> None:
    stage = make_super_resolution()
    low = torch.randint(16, (1, 16))
    before = stage.context(low)
    assert before.shape == (1, 64, 16)
    changed = low.clone()
    changed[0, 5] = (low[0, 5] + 1) % 16  # row 1, column 1 of 4 x 4
    moved = (stage.context(changed) != before).any(2).view(8, 8)
    reach = torch.zeros(8, 8, dtype=torch.bool)
    reach[0:6, 0:6] = True  # the 3 x 3 tokens around it, two fine ones a side each
    assert torch.equal(moved, reach)
    # The four fine tokens of one place are told apart.
    here = before.view(8, 8, 16)[2:4, 2:4].flatten(0, 1)
    assert torch.pdist(here).min() > 1e-3


def test_generates_by_what_the_small_picture_says() -> None:
    stage = make_super_resolution()
    low = torch.randint(16, (3, 16))
    text, context = _text(3), stage.context(low)
    tokens = stage.generate(text, steps=4, guidance=0, temperature=0, context=context)
    assert tokens.shape == (3, 64)
    assert tokens.max() < 16
    other = stage.generate(text, steps=4, guidance=0, temperature=0, context=context.flip(0))
    assert not torch.equal(tokens, other)
    guided = stage.generate(text, _text(3), steps=4, guidance=2.0, context=context)
    assert guided.shape == (3, 64)
    # Each picture by itself, whatever its batch.
    alone = stage.generate(
        TextEncoding(text.embeddings[1:2], text.mask[1:2]),
        steps=4, guidance=0, temperature=0, choice_temperature=0, context=context[1:2],
    )  # fmt: skip
    many = stage.generate(
        text, steps=4, guidance=0, temperature=0, choice_temperature=0, context=context
    )
    assert torch.equal(alone[0], many[1])


def test_saved_and_loaded(tmp_path: Path) -> None:
    stage = make_super_resolution()
    stage.save_pretrained(tmp_path)
    again = MuseSuperResolution.from_pretrained(tmp_path)
    assert again.config == stage.config
    low = torch.randint(16, (2, 16))
    assert torch.equal(again.context(low), stage.context(low))


def test_tokens_by_their_codes_alone() -> None:
    muse = Muse(MuseConfig(vocab_size=16, codebook_dim=4, free_embeddings=False, num_layers=1))
    assert not any(name.endswith("table.free") for name, _ in muse.named_parameters())
    with pytest.raises(ValueError, match="free_embeddings is False and codebook_dim 0"):
        MuseConfig(free_embeddings=False)


@pytest.mark.parametrize(
    ("low", "message"),
    [
        (torch.zeros(2, 15, dtype=torch.int64), r"low_tokens are \[2, 15\], expected \[b, 16\]"),
        (torch.full((1, 16), 16), "low_tokens are 16 to 16, expected 0 to 15"),
        (torch.full((1, 16), -1), "low_tokens are -1 to -1, expected 0 to 15"),
    ],
)
def test_wrong_tokens(low: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_super_resolution().context(low)


def test_grids_must_fit() -> None:
    with pytest.raises(ValueError, match="token_grid is 12, expected a multiple of low_token_grid"):
        MuseSuperResolutionConfig(token_grid=12, low_token_grid=8)
