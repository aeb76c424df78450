# SPDX-License-Identifier: Apache-2.0
"""The drop-in against diffusers' own scheduler, step by step."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers.schedulers.scheduling_amused")
amused = pytest.importorskip("t2p_fast.interop.amused")

MASK = 40


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("steps", [8, 12])
def test_decoding_masks_as_many_as_diffusers(schedule: str, image: bool, steps: int) -> None:
    theirs = diffusers.AmusedScheduler(mask_token_id=MASK, masking_schedule=schedule)
    ours = amused.AmusedScheduler.from_config(theirs.config)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    shape = (2, 8, 8) if image else (2, 64)
    a = b = torch.full(shape, MASK)
    a[0].view(-1)[:20] = 7  # known from the start, in both
    for timestep in theirs.timesteps:
        logits = torch.randn((2, MASK, 8, 8) if image else (2, 64, MASK))
        generator = torch.Generator().manual_seed(int(timestep))
        before = b
        expected = theirs.step(logits, timestep, a, 0.8, generator)
        found = ours.step(logits, timestep, b, 0.8, generator)
        a, b = expected.prev_sample, found.prev_sample
        assert torch.equal((a == MASK).flatten(1).sum(1), (b == MASK).flatten(1).sum(1))
        assert not (found.pred_original_sample == MASK).any()
        assert torch.equal(b[before != MASK], before[before != MASK])
        assert b.shape == shape
    assert not (b == MASK).any()


def test_seeds_and_tuples() -> None:
    scheduler = amused.AmusedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(4, temperature=1)
    logits, masked = torch.randn(1, 64, MASK), torch.full((1, 64), MASK)

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        tokens, drawn = scheduler.step(logits, 2, masked, 1.0, generator, return_dict=False)
        assert torch.equal(tokens[tokens != MASK], drawn[tokens != MASK])
        return tokens

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    for timestep in (-1, 4):
        with pytest.raises(ValueError, match=f"timestep is {timestep}, expected 0 to 3"):
            scheduler.step(logits, timestep, masked)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        amused.AmusedScheduler(mask_token_id=MASK).step(logits, 2, masked)
