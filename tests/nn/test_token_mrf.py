# SPDX-License-Identifier: Apache-2.0
"""MarkovGen's field: a fresh one changes nothing, known tokens stay, it learns what fits."""

import copy
from pathlib import Path

import pytest
import torch

from t2p_fast.checkpoints import CheckpointError
from t2p_fast.nn import TokenMRF, TokenMRFConfig
from t2p_fast.reference import mrf_mean_field


@pytest.mark.parametrize("rank", [0, 3])
def test_a_fresh_field_changes_nothing(rank: int) -> None:
    mrf = TokenMRF(TokenMRFConfig(vocab_size=11, token_grid=3, rank=rank))
    unary = torch.randn(2, 9, 11)
    torch.testing.assert_close(mrf(unary), unary.softmax(-1))
    assert mrf.w_s.diagonal().eq(0).all()
    torch.testing.assert_close(mrf.w_s.sum(1), torch.ones(9))
    assert mrf.w_s[4, 1] > mrf.w_s[4, 0] > 0  # a neighbour beside, and one across


@pytest.mark.parametrize("rank", [0, 3])
def test_it_is_mean_field_with_its_weights(rank: int) -> None:
    torch.manual_seed(0)
    mrf = TokenMRF(TokenMRFConfig(vocab_size=11, token_grid=3, rank=rank, iterations=4))
    torch.nn.init.normal_(mrf.w_c)
    unary, known = torch.randn(2, 9, 11), torch.full((2, 9), -1)
    known[0, :4], known[1, 8] = 2, 5
    w_c = mrf.w_c if mrf.w_b is None else mrf.w_c @ mrf.w_b.T
    expected = mrf_mean_field(unary, mrf.w_s, w_c, iterations=4, known=known)
    for told in (None, 8):
        torch.testing.assert_close(mrf(unary, known, told), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [0, 3])
def test_candidates_are_as_if_all_else_were_ruled_out(rank: int) -> None:
    torch.manual_seed(0)
    mrf = TokenMRF(TokenMRFConfig(vocab_size=40, token_grid=3, rank=rank, iterations=3))
    torch.nn.init.normal_(mrf.w_c)
    known = torch.full((2, 9), -1)
    known[0, :4], known[1, 8] = 2, 35
    candidates = torch.rand(2, 9, 40).topk(4).indices
    scores = torch.randn(2, 9, 4)
    scores[:, ::2, 3] = -torch.inf
    scores[0, 0] = torch.nan  # known, so that it may be anything
    full = torch.full((2, 9, 40), -torch.inf).scatter(2, candidates, scores)
    wanted, weights = known < 0, torch.randn(2, 9, 4)
    results = []
    for alone in (True, False):
        unary = (scores if alone else full).clone().requires_grad_()
        q = (
            mrf(unary, known, candidates=candidates)
            if alone
            else mrf(unary, known).gather(2, candidates)
        )
        gradients = torch.autograd.grad((q * weights)[wanted].sum(), [unary, *mrf.parameters()])
        of_scores = gradients[0] if alone else gradients[0].gather(2, candidates)
        results.append([q[wanted].float(), of_scores[wanted], *gradients[1:]])
    torch.testing.assert_close(*results, atol=2e-6, rtol=1e-5)


def test_candidates_need_what_is_known() -> None:
    mrf = TokenMRF(TokenMRFConfig(vocab_size=7, token_grid=2))
    scores, candidates = torch.zeros(1, 4, 2), torch.zeros(1, 4, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"candidates is \[1, 4, 3\] and known None, expected"):
        mrf(scores, candidates=candidates)
    known, candidates = torch.tensor([[-1, 2, -1, 0]]), candidates[..., :2] + torch.tensor([1, 3])
    assert mrf(scores, known, candidates=candidates).shape == (1, 4, 2)
    for change, message in (
        ((scores, known, candidates + 4), "candidates holds tokens 5 to 7, expected 0 to 6"),
        ((scores, known, candidates - 2), "candidates holds tokens -1 to 1, expected 0 to 6"),
        ((scores, known + 5, candidates), "known holds token 7, expected less than 7"),
        ((scores - torch.inf, known, candidates), "scores of position 0 have a NaN"),
        ((scores.where(known[..., None] != 0, torch.nan), known - 1, candidates), "of position 3"),
    ):
        with pytest.raises(ValueError, match=message):
            mrf(*change[:2], candidates=change[2])


def test_candidates_are_not_looked_at_by_a_compiler() -> None:
    mrf = TokenMRF(TokenMRFConfig(vocab_size=7, token_grid=2))
    known = torch.full((1, 4), -1)
    scores, candidates = torch.randn(1, 4, 2), torch.tensor([1, 3]).expand(1, 4, 2).contiguous()
    compiled = torch.compile(mrf, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(scores, known, candidates=candidates), mrf(scores, known, candidates=candidates)
    )


@pytest.mark.parametrize("rank", [0, 3])
def test_float64_is_computed_in_float32(rank: int) -> None:
    torch.manual_seed(0)
    mrf = TokenMRF(TokenMRFConfig(vocab_size=11, token_grid=3, rank=rank, rounds=2))
    torch.nn.init.normal_(mrf.w_c)
    unary, tokens = torch.randn(2, 9, 11), torch.full((2, 9), 11)
    single, labels = mrf(unary), mrf.finish(unary, tokens)
    mrf.double()
    for scores in (unary, unary.double()):
        q = mrf(scores)
        assert q.dtype == scores.dtype
        assert torch.equal(q.float(), single)
        assert torch.equal(mrf.finish(scores, tokens), labels)


def test_finish_keeps_what_is_known() -> None:
    torch.manual_seed(0)
    mrf = TokenMRF(TokenMRFConfig(vocab_size=11, token_grid=3))
    torch.nn.init.normal_(mrf.w_c)
    tokens = torch.randint(12, (4, 9))
    full = mrf.finish(torch.randn(4, 9, 11), tokens, unknown=9)
    assert torch.equal(full[tokens < 11], tokens[tokens < 11])
    assert full.max() < 11
    assert full.min() >= 0


def test_it_learns_which_tokens_stand_together() -> None:
    """Rows of equal tokens: one known token tells the others of its row."""
    torch.manual_seed(0)
    mrf = TokenMRF(TokenMRFConfig(vocab_size=6, token_grid=4, iterations=3))
    optimizer = torch.optim.Adam(mrf.parameters(), 0.1)
    for _ in range(120):
        rows = torch.randint(6, (16, 4)).repeat_interleave(4, 1)
        known = rows.masked_fill(torch.rand(16, 16) < 0.4, -1)
        q = mrf(torch.zeros(16, 16, 6), known)
        loss = -q.gather(2, rows[..., None]).clamp_min(1e-9).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = torch.randint(6, (64, 4)).repeat_interleave(4, 1)
    tokens = rows.clone()
    tokens[:, 1::4] = 6
    tokens[:, 2::4] = 6
    assert (mrf.finish(torch.zeros(64, 16, 6), tokens) == rows).float().mean() > 0.98


@pytest.mark.parametrize("rank", [0, 2])
def test_rounds_settle_what_one_inference_cannot(rank: int) -> None:
    """An object at one of two places, each of which is as likely to be empty as the other."""
    empty, thing = 0, 1
    config = TokenMRFConfig(vocab_size=3, token_grid=2, rank=rank)
    mrf = TokenMRF(config)
    with torch.no_grad():
        mrf.w_s.copy_(torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
        w_c = torch.tensor([[-6.0, 6, 0], [6, -6, 0], [0, 0, 0]])
        mrf.w_c.copy_(w_c if rank == 0 else w_c[:, :2])
        if mrf.w_b is not None:
            mrf.w_b.copy_(torch.eye(3, 2))
    scores = torch.zeros(1, 4, 3)
    scores[..., 2] = -torch.inf
    scores[:, 2:, thing] = -torch.inf  # no choice there
    scores[0, 0, thing] = 1e-3
    scores[0, 1, thing] = 1e-3
    masked = torch.full((1, 4), 3)
    alone = mrf.finish(scores, masked)[0]
    assert alone[0] == alone[1]
    settling = TokenMRF(TokenMRFConfig(vocab_size=3, token_grid=2, rank=rank, rounds=2))
    settling.load_state_dict(mrf.state_dict())
    for unknown in (None, 4):
        full = settling.finish(scores, masked, unknown)
        assert sorted(full[0, :2].tolist()) == [empty, thing]
        assert full[0, 2:].tolist() == [empty, empty]
    tokens = torch.tensor([[3, thing, 3, 3]])
    assert settling.finish(scores, tokens)[0].tolist() == [empty, thing, empty, empty]
    full = torch.tensor([[1, 1, 0, 0]])
    assert torch.equal(settling.finish(scores, full), full)
    both = settling.finish(scores.repeat(3, 1, 1), torch.cat([full, masked, tokens]))
    each = [settling.finish(scores, t) for t in (full, masked, tokens)]
    assert torch.equal(both, torch.cat(each))


def test_packed_labels_are_kept_until_they_change() -> None:
    torch.manual_seed(0)
    mrf = TokenMRF(TokenMRFConfig(vocab_size=512, token_grid=3)).bfloat16().eval()
    assert mrf.train()._packed_labels() is None
    first = mrf.eval()._packed_labels()
    assert first is mrf._packed_labels()
    with torch.no_grad():
        mrf.w_c.normal_()
    second = mrf._packed_labels()
    assert second is not first
    unary, known = torch.randn(1, 9, 512), torch.tensor([[3, -1, -1, 5, -1, 6, 7, 8, 9]])
    with torch.no_grad():
        kept, fresh = mrf(unary, known), mrf.train()(unary, known)
    torch.testing.assert_close(kept, fresh, rtol=0, atol=2e-2)
    assert copy.deepcopy(mrf)._packed is None


def test_checkpoint(tmp_path: Path) -> None:
    mrf = TokenMRF(TokenMRFConfig(vocab_size=11, token_grid=3, rank=3))
    torch.nn.init.normal_(mrf.w_c)
    mrf.save_pretrained(tmp_path)
    again = TokenMRF.from_pretrained(tmp_path)
    assert again.config == mrf.config
    unary = torch.randn(1, 9, 11)
    assert torch.equal(again(unary), mrf(unary))
    (tmp_path / "config.json").write_text('{"vocab_size": 11, "token_grid": 4, "rank": 3}')
    with pytest.raises(CheckpointError):
        TokenMRF.from_pretrained(tmp_path)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="TokenMRFConfig: rank is -1"):
        TokenMRFConfig(rank=-1)
    mrf = TokenMRF(TokenMRFConfig(vocab_size=11, token_grid=3))
    with pytest.raises(ValueError, match="mrf_mean_field: w_"):
        mrf(torch.zeros(1, 9, 12))
