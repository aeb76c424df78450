# SPDX-License-Identifier: Apache-2.0
"""The text encoder and its tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from t2p_fast.checkpoints import CheckpointError
from t2p_fast.models.text_encoder import (
    TextEncoder,
    TextEncoding,
    TextTransformer,
    TextTransformerConfig,
    train_tokenizer,
)
from tiny_models import CAPTIONS, make_text_encoder, one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder() -> TextTransformer:
    return make_text_encoder()


@pytest.mark.parametrize("prompt", [*CAPTIONS, "grün ☃ 猫", "tab\there", "a" * 50])
def test_tokenizer_round_trip(prompt: str) -> None:
    tokenizer = train_tokenizer(CAPTIONS, 300)
    encoding = tokenizer.encode(prompt)
    assert encoding.tokens[-1] == "[END]"
    assert tokenizer.decode(encoding.ids).strip() == prompt


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_no_prompt_has_an_unknown_word(prompt: str) -> None:
    tokenizer = train_tokenizer(CAPTIONS, 300)
    ids = tokenizer.encode(prompt).ids
    assert ids[-1] == tokenizer.token_to_id("[END]")
    assert all(0 <= i < tokenizer.get_vocab_size() for i in ids)
    # Bytes are never lost: what is left after decoding says the same to the model.
    assert tokenizer.encode(tokenizer.decode(ids)).ids == ids or "[" in prompt


def test_words_of_the_captions_are_one_token_each(encoder: TextTransformer) -> None:
    assert encoder.tokenizer is not None
    large = train_tokenizer(CAPTIONS * 5, 400)
    assert large.encode("A Red CIRCLE ").tokens == ["Ġa", "Ġred", "Ġcircle", "[END]"]


def test_vocabulary_size_is_respected() -> None:
    assert train_tokenizer(CAPTIONS * 5, 270).get_vocab_size() == 270


def test_empty_prompt_is_one_token(encoder: TextTransformer) -> None:
    for prompt in ("", "  "):
        embeddings, mask = encoder.encode([prompt])
        assert embeddings.shape == (1, 1, 16)
        assert mask.tolist() == [[True]]


def test_padding_is_marked_and_has_no_influence(encoder: TextTransformer) -> None:
    prompts = ["a red circle", "", "a green star above a red circle"]
    embeddings, mask = encoder.encode(prompts)
    assert embeddings.shape[:2] == mask.shape
    for i, prompt in enumerate(prompts):
        alone = encoder.encode([prompt])
        length = alone.mask.shape[1]
        assert mask[i].tolist() == [True] * length + [False] * (mask.shape[1] - length)
        torch.testing.assert_close(embeddings[i, :length], alone.embeddings[0])


def test_order_of_words_matters(encoder: TextTransformer) -> None:
    a, b = encoder.encode(["a red circle", "a circle red"]).embeddings
    assert not torch.allclose(a[-1], b[-1], atol=1e-3)


def test_too_long_prompt_is_named(encoder: TextTransformer) -> None:
    long = "x" * 30
    with pytest.raises(
        ValueError, match=rf"the prompt '{long}' has \d+ tokens, at most 24 are allowed"
    ):
        encoder.encode(["a red circle", long])
    with pytest.raises(ValueError, match="at most 24 are allowed") as caught:
        encoder.encode(["x" * 10_000])
    assert len(str(caught.value)) < 200


def test_without_a_tokenizer() -> None:
    config = TextTransformerConfig(hidden_size=16, num_layers=1)
    with pytest.raises(ValueError, match="has no tokenizer"):
        TextTransformer(config).encode(["a"])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="hidden_size is 16, expected a multiple of num_heads, 3"):
        TextTransformerConfig(hidden_size=16, num_heads=3)
    with pytest.raises(ValueError, match=r"num_heads is 0, expected within \[1, 256\]"):
        TextTransformerConfig(hidden_size=16, num_heads=0)


def test_protocol(encoder: TextTransformer) -> None:
    class Other:
        embed_dim = 3

        def encode(self, prompts: Sequence[str]) -> TextEncoding:
            return TextEncoding(
                torch.zeros(len(prompts), 1, 3), torch.ones(len(prompts), 1, dtype=torch.bool)
            )

    assert isinstance(encoder, TextEncoder)
    assert isinstance(Other(), TextEncoder)
    assert not isinstance(torch.nn.Linear(1, 1), TextEncoder)


def test_save_and_load(encoder: TextTransformer, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "sub")
    for loaded in (
        TextTransformer.from_pretrained(tmp_path / "sub"),
        TextTransformer.from_pretrained(tmp_path, subfolder="sub"),
    ):
        assert torch.equal(loaded.encode(CAPTIONS).embeddings, encoder.encode(CAPTIONS).embeddings)


def test_damaged_tokenizer(encoder: TextTransformer, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text()
    train_tokenizer(CAPTIONS * 5, 300).save(str(path))
    with pytest.raises(CheckpointError, match=r"has \d+ tokens, but the model has 280"):
        TextTransformer.from_pretrained(tmp_path)
    path.write_text(whole[:100])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"):
        TextTransformer.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"):
        TextTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"post_processor": None}, r"makes 0 tokens of an empty prompt, expected 1 to 24"),
        ({"added": 9999}, r"has 10000 tokens, but the model has 280"),
        ({"padding": 30}, r"makes 30 tokens of an empty prompt"),
    ],
)
def test_tokenizer_that_does_not_fit(
    encoder: TextTransformer, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    encoder.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    if "added" in change:
        content["added_tokens"][1]["id"] = change["added"]
        content["model"]["vocab"]["[END]"] = change["added"]
        content["post_processor"]["special_tokens"]["[END]"]["ids"] = [change["added"]]
    elif "padding" in change:
        assert encoder.tokenizer is not None
        padded = Tokenizer.from_str(encoder.tokenizer.to_str())
        padded.enable_padding(length=change["padding"])
        content = json.loads(padded.to_str())
    else:
        content |= change
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: {message}"):
        TextTransformer.from_pretrained(tmp_path)


def test_relative_bias_begins_at_the_neighbours(tmp_path: Path) -> None:
    """Fresh heads see the words next to a word, wherever in the prompt it is."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 300)
    config = TextTransformerConfig(
        vocab_size=300, hidden_size=32, num_layers=1, num_heads=4, relative_span=3
    )
    encoder = TextTransformer(config, tokenizer)
    bias = encoder.layers[0]._bias(8)  # type: ignore[operator]
    attention = bias.softmax(-1)
    for head, offset in ((0, -1), (1, 1)):
        for query in range(1, 7):
            assert attention[head, query].argmax() == query + offset
            assert attention[head, query].amax() > 0.5
    assert torch.equal(bias[2:], torch.zeros(2, 8, 8))
    # Beyond the span all offsets are alike.
    assert torch.equal(bias[:, 7, 0], bias[:, 7, 4])
    padded = encoder(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[True, True, True, False]]))
    alone = encoder(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(padded[:, :3], alone)

    encoder.save_pretrained(tmp_path)
    again = TextTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again.encode(CAPTIONS).embeddings, encoder.encode(CAPTIONS).embeddings
    )
    assert "relative_bias" not in str(make_text_encoder().state_dict().keys())
