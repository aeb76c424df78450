# SPDX-License-Identifier: Apache-2.0
"""How Muse is built, trained and decoded, against the papers."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from t2p_fast.models import muse as muse_module
from t2p_fast.models.muse import (
    Muse,
    MuseConfig,
    concatenate,
    draw_seeds,
    guided_scores,
    random_mask,
)
from t2p_fast.models.text_encoder import TextEncoding, TextTransformer
from t2p_fast.ops import MaskedSample, mask_counts, masked_sample
from tiny_models import CAPTIONS, make_muse, make_text_encoder, one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

MASK = 16


@pytest.fixture(scope="module")
def muse() -> Muse:
    return make_muse().requires_grad_(False)


@pytest.fixture(scope="module")
def encoder() -> TextTransformer:
    return make_text_encoder().requires_grad_(False)


@pytest.fixture(scope="module")
def text(encoder: TextTransformer) -> TextEncoding:
    return encoder.encode(CAPTIONS)


@pytest.fixture(scope="module")
def negative(encoder: TextTransformer) -> TextEncoding:
    return encoder.encode([""] * 3)


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


# The schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "counts"),
    [
        # Counts after each round of MaskGIT's published decoding.
        (256, "251 236 212 181 142 97 49 1"),
        (256, "253 247 236 221 203 181 155 128 97 66 33 1"),
        (256, "255 252 247 240 232 221 209 196 181 164 146 128 108 87 66 44 22 1"),
        (256, "255 253 251 247 242 236 229 221 212 203 192 181 168 155 142 128 113 97 82 66 49 33"
              " 16 1"),
        (1024, "1004 946 851 724 568 391 199 1"),
        (4096, "4017 3784 3405 2896 2275 1567 799 1"),
    ],
)  # fmt: skip
def test_mask_counts_are_those_of_maskgit(n: int, counts: str) -> None:
    expected = [int(count) for count in counts.split()]
    unknown, made = torch.tensor([n]), []
    for step in range(len(expected)):
        unknown = mask_counts(step, len(expected), torch.tensor([n]), unknown)
        made.append(int(unknown))
    assert made == expected


def test_mask_counts_fall_by_one_at_least_and_never_below_one() -> None:
    start = torch.tensor([5, 1, 0])
    unknown, made = start, []
    for step in range(8):
        unknown = mask_counts(step, 8, start, unknown)
        made.append(unknown.tolist())
    assert [m[0] for m in made] == [4, 3, 2, 1, 1, 1, 1, 1]
    assert [m[1] for m in made] == [1] * 8
    assert [m[2] for m in made] == [0] * 8


# Sampling ----------------------------------------------------------------------------------------


def test_draw_seeds() -> None:
    torch.manual_seed(0)
    first = draw_seeds(3)
    assert (first.shape, first.dtype) == ((3,), torch.int64)
    assert not torch.equal(draw_seeds(3), first)
    torch.manual_seed(0)
    assert torch.equal(draw_seeds(3), first)
    assert torch.equal(draw_seeds(2, seeds(5, 6)).flip(0), draw_seeds(2, seeds(6, 5)))


def test_random_mask_follows_the_arcsine_density() -> None:
    torch.manual_seed(0)
    tokens = torch.arange(256).expand(4000, 256)
    masked_tokens, masked = random_mask(tokens, 999)
    assert torch.equal(masked_tokens == 999, masked)
    assert torch.equal(masked_tokens[~masked], tokens[~masked])
    share = masked.float().mean(1)
    assert float(share.min()) >= 1 / 256
    assert float(share.mean()) == pytest.approx(2 / math.pi, abs=0.015)
    for r in (0.25, 0.5, 0.9):
        assert float((share <= r).float().mean()) == pytest.approx(
            2 / math.pi * math.asin(r), abs=0.025
        )
    # Every position is masked equally often.
    assert float((masked.float().mean(0) - 2 / math.pi).abs().max()) < 0.04


def test_random_mask_masks_at_least_one() -> None:
    torch.manual_seed(0)
    _, masked = random_mask(torch.zeros(2000, 2, dtype=torch.int64), 9)
    assert int(masked.sum(1).min()) == 1


# The model ---------------------------------------------------------------------------------------


def test_logits_do_not_depend_on_padding(muse: Muse, encoder: TextTransformer) -> None:
    tokens = torch.randint(0, MASK + 1, (3, 16), generator=seeds(0)[0])
    together = muse(tokens, encoder.encode(CAPTIONS))
    assert together.shape == (3, 16, 16)
    for i, caption in enumerate(CAPTIONS):
        alone = muse(tokens[i : i + 1], encoder.encode([caption]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_logits_depend_on_text_and_tokens(muse: Muse, encoder: TextTransformer) -> None:
    masked = torch.full((1, 16), MASK)
    known = masked.clone()
    known[0, 3] = 5
    first = muse(masked, encoder.encode(["a red circle"]))
    assert not torch.allclose(first, muse(masked, encoder.encode(["a blue square"])), atol=1e-2)
    assert not torch.allclose(first, muse(known, encoder.encode(["a red circle"])), atol=1e-2)


def test_tables_at_hand_change_nothing(muse: Muse, text: TextEncoding) -> None:
    tokens = torch.full((3, 16), MASK)
    assert torch.equal(muse(tokens, text, muse.tables()), muse(tokens, text))


def test_concatenate_pads(encoder: TextTransformer) -> None:
    a, b = encoder.encode(["a green star above a red circle"]), encoder.encode([""])
    for both in (concatenate(a, b), concatenate(b, a)):
        assert both.embeddings.shape[:2] == both.mask.shape == (2, a.mask.shape[1])
    both = concatenate(a, b)
    assert both.mask.sum(1).tolist() == [a.mask.shape[1], 1]
    assert torch.equal(both.embeddings[1, :1], b.embeddings[0])


def test_codes_say_what_tokens_look_like() -> None:
    model = make_muse(codebook_dim=3)
    codebook = torch.randn(16, 3, generator=seeds(0)[0]) * 5 + 2
    codebook[7] = codebook[4]
    model.set_codebook(codebook)
    torch.testing.assert_close(model.codes.mean(0), torch.zeros(3), atol=0.3, rtol=0)
    assert float(model.codes.abs().max()) <= 4
    embed, score = model.tables()
    assert embed.shape == (17, 16)
    assert score.shape == (16, 16)
    # Of equal codes, only the free parts differ.
    for table, whole, factor in ((model.input_table, embed, 1), (model.output_table, score, 0.06)):
        free = table.free
        torch.testing.assert_close(whole[7] - whole[4], factor * (free[7] - free[4]))
    assert "codes" in model.state_dict()  # saved with the model
    with pytest.raises(ValueError, match=r"codebook is \[16, 4\], expected \[16, 3\]"):
        model.set_codebook(torch.zeros(16, 4))


def test_relative_bias_starts_as_shifts() -> None:
    """Half of the heads begin by looking at one neighbour each, on a grid row by row."""
    torch.manual_seed(0)
    model = Muse(MuseConfig(vocab_size=4, token_grid=4, hidden_size=16, num_heads=8, num_layers=2,
                            text_embed_dim=16))  # fmt: skip
    centre = 5  # row 1, column 1
    for layer, neighbours in ((0, [6, 4, 9, 1]), (1, [10, 8, 2, 0])):
        bias = model.layers[layer].relative_bias()
        assert bias.shape == (1, 8, 16, 16)
        assert bias[0, :4, centre].argmax(1).tolist() == neighbours
        assert not bias[0, 4:].any()


def test_errors(muse: Muse, text: TextEncoding, negative: TextEncoding) -> None:
    with pytest.raises(ValueError, match=r"tokens are \[3, 15\], expected \[b, 16\]"):
        muse(torch.zeros(3, 15, dtype=torch.int64), text)
    for heads in (0, 3):
        with pytest.raises(ValueError, match="num_heads"):
            MuseConfig(num_heads=heads)
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        muse.generate(text, negative, steps=0)
    with pytest.raises(ValueError, match="guidance needs negative"):
        muse.generate(text)
    with pytest.raises(ValueError, match="there are 2 generators, expected one for each of the 3"):
        muse.generate(text, negative, generators=seeds(1, 2))
    one = TextEncoding(*(x[:1] for x in negative))
    with pytest.raises(ValueError, match="negative has 1 prompts, expected 3"):
        muse.generate(text, one)
    for known in (torch.full((3, 15), MASK), torch.full((3, 16), 17), torch.full((3, 16), -1)):
        with pytest.raises(ValueError, match=r"known is .* expected \[3, 16\] with values 0 to 16"):
            muse.generate(text, negative, known=known)


# Decoding ----------------------------------------------------------------------------------------


def test_unlikely_tokens_are_never_drawn(muse: Muse, text: TextEncoding) -> None:
    """Whatever guidance makes of them: a token must be likely enough under the prompt."""
    with torch.no_grad():
        muse.output_bias[:3] = 40.0  # three tokens that the model believes in, whatever the prompt
        negative = TextEncoding(-5 * text.embeddings, text.mask)
        drawn = [
            muse.generate(text, negative, steps=3, guidance=1e3, min_p=p, generators=seeds(1, 2, 3))
            for p in (0.0, 0.01)
        ]
        muse.output_bias[:3] = 0.0
    assert int(drawn[1].max()) < 3
    assert int(drawn[0].max()) >= 3
    with pytest.raises(ValueError, match="min_p is -1, expected 0 to 1"):
        muse.generate(text, text, min_p=-1)


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_generate_fills_in_everything(
    muse: Muse, text: TextEncoding, negative: TextEncoding, steps: int, guidance: float
) -> None:
    rounds: list[Tensor] = []
    tokens = muse.generate(
        text, negative, steps=steps, guidance=guidance,
        on_step=lambda _, tokens: rounds.append(tokens.clone()),
    )  # fmt: skip
    assert tokens.shape == (3, 16)
    assert tokens.dtype == torch.int64
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < MASK
    assert len(rounds) == steps
    assert torch.equal(rounds[-1], tokens)
    for before, after in pairwise(rounds):
        fixed = before != MASK
        assert torch.equal(before[fixed], after[fixed])  # what is kept is never masked again
    counts = [int((r == MASK).sum(1)[0]) for r in rounds[:-1]]
    unknown, expected = torch.tensor([16]), []
    for step in range(steps - 1):
        unknown = mask_counts(step, steps, torch.tensor([16]), unknown)
        expected.append(int(unknown))
    assert counts == expected


def test_known_tokens_are_kept(muse: Muse, text: TextEncoding, negative: TextEncoding) -> None:
    known = torch.randint(0, MASK, (3, 16), generator=seeds(3)[0])
    known[0, :10] = MASK  # ten, one and none to fill in
    known[1, 7] = MASK
    before = known.clone()
    tokens = muse.generate(text, negative, steps=4, known=known)
    assert torch.equal(known, before)
    keep = known != MASK
    assert torch.equal(tokens[keep], known[keep])
    assert int(tokens.max()) < MASK


def test_seeds_reproduce_and_pictures_do_not_depend_on_their_batch(
    muse: Muse, encoder: TextTransformer
) -> None:
    def draw(prompts: list[str], *numbers: int) -> Tensor:
        text, negative = encoder.encode(prompts), encoder.encode([""] * len(prompts))
        return muse.generate(text, negative, steps=5, generators=seeds(*numbers))

    together = draw(CAPTIONS, 1, 2, 3)
    assert torch.equal(draw(CAPTIONS, 1, 2, 3), together)
    assert torch.equal(draw(CAPTIONS[1:2], 2), together[1:2])
    assert torch.equal(draw(CAPTIONS[::-1], 3, 2, 1), together.flip(0))
    assert not torch.equal(draw(CAPTIONS, 4, 5, 6), together)


def test_temperature_zero_is_deterministic(
    muse: Muse, text: TextEncoding, negative: TextEncoding
) -> None:
    cold = {"steps": 4, "temperature": 0.0, "choice_temperature": 0.0}
    first = muse.generate(text, negative, generators=seeds(1, 2, 3), **cold)
    assert torch.equal(muse.generate(text, negative, generators=seeds(7, 8, 9), **cold), first)
    one_step = muse.generate(text, guidance=0.0, steps=1, temperature=0.0)
    assert torch.equal(one_step, muse(torch.full((3, 16), MASK), text).argmax(-1))


def test_guidance_away_from_the_prompt_itself_is_no_guidance(
    muse: Muse, text: TextEncoding, negative: TextEncoding
) -> None:
    """``(1 + t) c - t u`` with ``u = c`` is ``c``."""
    plain = muse.generate(text, guidance=0.0, steps=5, generators=seeds(1, 2, 3))
    same = muse.generate(text, text, guidance=7.0, steps=5, generators=seeds(1, 2, 3))
    assert torch.equal(plain, same)
    other = muse.generate(text, negative, guidance=7.0, steps=5, generators=seeds(1, 2, 3))
    assert not torch.equal(plain, other)


def test_guidance_rises_and_choice_temperature_falls_linearly(
    muse: Muse, text: TextEncoding, negative: TextEncoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[dict[str, Any]] = []

    def spy(logits: Tensor, tokens: Tensor, **options: Any) -> MaskedSample:
        rounds.append(options)
        return masked_sample(logits, tokens, **options)

    monkeypatch.setattr(muse_module, "masked_sample", spy)
    muse.generate(text, negative, steps=4, guidance=6.0, choice_temperature=4.0, min_p=0.25)
    assert [r["guidance"] for r in rounds] == [1.5, 3.0, 4.5, 6.0]
    assert [r["choice_temperature"] for r in rounds] == [3.0, 2.0, 1.0, 0.0]
    assert [r["step"] for r in rounds] == [0, 1, 2, 3]
    assert [r["min_p"] for r in rounds] == [0.25] * 4
    assert rounds[3]["mask_count"] is None


def test_learns_pairs_of_captions_and_tokens() -> None:
    """A small model learns eight pictures by heart and draws each from its caption."""
    torch.manual_seed(0)
    captions = [f"a {color} {shape}" for color in ("red", "blue", "green", "white")
                for shape in ("circle", "star")]  # fmt: skip
    tokens = torch.randint(0, 16, (8, 16))
    encoder = make_text_encoder()
    model = Muse(MuseConfig(vocab_size=16, token_grid=4, hidden_size=48, num_layers=2, num_heads=4,
                            text_embed_dim=16))  # fmt: skip
    parameters = [*model.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=6e-3, weight_decay=0.0)
    pairs = torch.arange(8).repeat(4)
    ids, text_mask = encoder.tokenize(captions)
    steps = 250
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1, (step + 1) / 20, (steps - step) / 80)
        masked_tokens, masked = random_mask(tokens[pairs], model.config.mask_token)
        text = TextEncoding(encoder(ids, text_mask)[pairs], text_mask[pairs])
        loss = F.cross_entropy(model(masked_tokens, text)[masked], tokens[pairs][masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    encoder.eval()
    text = encoder.encode(captions)
    likely = model.generate(text, guidance=0.0, steps=4, temperature=0.0)
    assert torch.equal(likely, tokens)
    drawn = model.generate(text, guidance=0.0, steps=4, generators=seeds(*range(8)))
    assert float((drawn == tokens).float().mean()) > 0.9


def test_absurd_sizes_are_laid_out_without_memory() -> None:
    with torch.device("meta"):
        model = Muse(MuseConfig(token_grid=256, num_heads=256, hidden_size=256, num_layers=2))
    assert model.layers[0].relative_bias.bias.shape == (256, 511**2)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_guided_scores_are_what_a_round_draws_from(temperature: float) -> None:
    """Frequencies of many draws, against the softmax of the scores."""
    torch.manual_seed(0)
    conditional, unconditional = torch.randn(2, 1, 1, 5).mul(2).expand(2, 1, 20_000, 5)
    options = {"guidance": 1.3, "temperature": temperature, "min_p": 0.1}
    scores = guided_scores(conditional, unconditional, **options)
    drawn = masked_sample(
        conditional.contiguous(),
        torch.full((1, 20_000), 5),
        mask_token=5,
        uncond_logits=unconditional.contiguous(),
        seed=0,
        **options,
    ).tokens
    expected = scores[0, 0].softmax(-1)
    assert (expected == 0).any()  # min_p leaves some out
    found = torch.bincount(drawn[0], minlength=5) / 20_000
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)
    assert torch.equal(found == 0, expected == 0)
