# SPDX-License-Identifier: Apache-2.0
"""MarkovGen: the first rounds are Muse's, the rest is the field's."""

from pathlib import Path

import pytest
import torch

from t2p_fast.checkpoints import CheckpointError
from t2p_fast.nn import TokenMRF, TokenMRFConfig
from t2p_fast.pipelines import MarkovGenPipeline, MusePipeline, markovgen_exit_step
from tiny_models import make_pipeline, make_super_resolution, save_pipeline


def make_mrf(seed: int = 0, token_grid: int = 4) -> TokenMRF:
    torch.manual_seed(seed)
    mrf = TokenMRF(TokenMRFConfig(vocab_size=16, token_grid=token_grid))
    torch.nn.init.normal_(mrf.w_c, std=20.0)
    return mrf


def markovgen(mrf: TokenMRF) -> MarkovGenPipeline:
    muse = make_pipeline()
    return MarkovGenPipeline(muse.text_encoder, muse.muse, muse.vqgan, mrf)


def test_rounds_before_the_exit_are_muses() -> None:
    muse, short = make_pipeline(), markovgen(make_mrf())
    seen: dict[str, list[torch.Tensor]] = {"muse": [], "short": []}
    muse("a red circle", seed=3, steps=8, on_step=lambda _, t: seen["muse"].append(t.clone()))
    result = short(
        "a red circle", seed=3, steps=8, on_step=lambda _, t: seen["short"].append(t.clone())
    )
    assert len(seen["short"]) == markovgen_exit_step(8) == 4
    for a, b in zip(seen["muse"], seen["short"], strict=False):
        assert torch.equal(a, b)
    kept = seen["short"][-1] != 16
    assert not kept.all()
    assert torch.equal(result.tokens[kept], seen["short"][-1][kept])
    assert result.tokens.max() < 16


def test_a_fresh_field_is_an_early_exit_and_a_trained_one_is_not() -> None:
    fresh = TokenMRF(TokenMRFConfig(vocab_size=16, token_grid=4))
    early = make_pipeline()(["a red circle"] * 3, seed=3, steps=8, exit_step=4)
    same = markovgen(fresh)(["a red circle"] * 3, seed=3, steps=8)
    assert torch.equal(early.tokens, same.tokens)
    other = markovgen(make_mrf())(["a red circle"] * 3, seed=3, steps=8)
    assert not torch.equal(early.tokens, other.tokens)


def test_all_rounds_leave_nothing_to_the_field() -> None:
    muse = make_pipeline()("a red circle", seed=3, steps=4)
    assert torch.equal(markovgen(make_mrf())("a red circle", seed=3, steps=4, exit_step=4).tokens,
                       muse.tokens)  # fmt: skip
    assert [markovgen_exit_step(s) for s in (1, 2, 8, 32)] == [1, 1, 4, 18]


def test_second_stage_ends_with_its_own_field(tmp_path: Path) -> None:
    save_pipeline(tmp_path)
    make_mrf().save_pretrained(tmp_path / "mrf")
    make_super_resolution().save_pretrained(tmp_path / "super_resolution")
    plain = MarkovGenPipeline.from_pretrained(tmp_path)
    make_mrf(token_grid=8).save_pretrained(tmp_path / "super_resolution_mrf")
    whole = MarkovGenPipeline.from_pretrained(tmp_path)
    a, b = (p("a red circle", seed=2, steps=4, size=32) for p in (plain, whole))
    assert a.tokens.shape == b.tokens.shape == (1, 64)
    assert b.tokens.max() < 16
    assert not torch.equal(a.tokens, b.tokens)
    # Where both stages go through all rounds there is nothing to fill in.
    a, b = (p("a red circle", seed=2, steps=4, exit_step=4, size=32) for p in (plain, whole))
    assert torch.equal(a.tokens, b.tokens)
    with pytest.raises(ValueError, match="super_resolution_mrf has 16 tokens on a grid of 4, but"):
        MarkovGenPipeline(
            whole.text_encoder, whole.muse, whole.vqgan, whole.mrf, whole.super_resolution,
            make_mrf(),
        )  # fmt: skip


def test_saved_and_loaded(tmp_path: Path) -> None:
    save_pipeline(tmp_path)
    with pytest.raises(CheckpointError, match="mrf"):
        MarkovGenPipeline.from_pretrained(tmp_path)
    make_mrf().save_pretrained(tmp_path / "mrf")
    loaded = MarkovGenPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.mrf.w_c, make_mrf().w_c)
    assert len(loaded("a red circle", steps=4, seed=0).images) == 1


def test_mistakes() -> None:
    muse = make_pipeline()
    with pytest.raises(ValueError, match="MarkovGenPipeline: mrf has 9 tokens on a grid of 4"):
        MarkovGenPipeline(
            muse.text_encoder, muse.muse, muse.vqgan,
            TokenMRF(TokenMRFConfig(vocab_size=9, token_grid=4)),
        )  # fmt: skip
    for pipeline in (muse, markovgen(make_mrf())):
        with pytest.raises(ValueError, match="exit_step is 5, expected at most steps, 4"):
            pipeline("a red circle", steps=4, exit_step=5)
        with pytest.raises(ValueError, match="exit_step is 0, expected at least 1"):
            pipeline("a red circle", steps=4, exit_step=0)


def test_embedded_field_fits_the_embedded_generator() -> None:
    pipeline = MarkovGenPipeline.from_pretrained("embedded")
    assert isinstance(pipeline, MusePipeline)
    result = pipeline("a big red circle", seed=0)
    assert result.images[0].size == (64, 64)
