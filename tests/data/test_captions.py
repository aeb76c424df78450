# SPDX-License-Identifier: Apache-2.0
"""Captions say their claims, and reading them gives the claims back."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2p_fast.data.captions import (
    BACKGROUND_WORDS,
    COLOR_WORDS,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    TEXTURE_WORDS,
    Claims,
    ObjectClaim,
    RelationClaim,
    in_reading_order,
    parse_caption,
    turn_relation,
    write_caption,
)
from t2p_fast.data.scenes import VOCABULARIES, SceneDataset


def _maybe(words: dict[str, tuple[str, ...]]) -> st.SearchStrategy[str | None]:
    return st.none() | st.sampled_from(sorted(words))


object_claims = st.builds(
    ObjectClaim,
    shape=st.sampled_from(sorted(SHAPE_WORDS)),
    color=_maybe(COLOR_WORDS),
    size=_maybe(SIZE_WORDS),
    texture=_maybe(TEXTURE_WORDS),
)


@st.composite
def scene_claims(draw: st.DrawFn) -> Claims:
    objects = tuple(draw(st.lists(object_claims, min_size=1, max_size=3)))
    relations: tuple[RelationClaim, ...] = ()
    if draw(st.booleans()):
        words = st.sampled_from(sorted(RELATION_WORDS))
        relations = tuple(RelationClaim(i, draw(words), i + 1) for i in range(len(objects) - 1))
    return Claims(objects, relations, draw(_maybe(BACKGROUND_WORDS)))


@given(claims=scene_claims(), seed=st.integers(0, 2**32))
def test_reading_undoes_writing(claims: Claims, seed: int) -> None:
    caption = write_caption(claims, random.Random(seed))
    assert parse_caption(caption) == claims
    assert parse_caption(f"  {caption.upper()}. ") == claims


@pytest.mark.parametrize("vocabulary", sorted(VOCABULARIES))
def test_captions_of_datasets_read_back(vocabulary: str) -> None:
    # The smallest pictures: only the words matter here.
    for split, count in (("train", 1000), ("test", 100)):
        dataset = SceneDataset(vocabulary, split=split, size=16, seed=9)  # type: ignore[arg-type]
        for i in range(count):
            sample = dataset[i]
            assert parse_caption(sample.caption) == sample.claims


@given(claims=scene_claims(), seed=st.integers(0, 2**32))
def test_turning_a_relation_round(claims: Claims, seed: int) -> None:
    turned, ordered = turn_relation(claims), in_reading_order(claims)
    beside = len(claims.objects) == 2 and claims.relations[:1] != ()
    if not beside or claims.relations[0].relation == "inside":
        assert turned is None
        assert ordered == claims
        return
    assert turned is not None
    pair = {claims.relations[0].relation, turned.relations[0].relation}
    assert pair in ({"above", "below"}, {"left of", "right of"})
    assert turned.objects == claims.objects
    assert turn_relation(turned) == claims
    assert ordered.relations[0].relation in ("above", "left of")
    if ordered != claims:
        assert ordered.objects == claims.objects[::-1]
        assert ordered.relations == turned.relations
    # Turning round is naming the other first.
    assert in_reading_order(turned).objects == ordered.objects[::-1]
    assert "it" not in write_caption(ordered, random.Random(seed), subject_first=True).split()


def test_every_word_is_read() -> None:
    for shape, words in SHAPE_WORDS.items():
        assert all(parse_caption(f"a {w}").objects[0].shape == shape for w in words)
    for table, name in ((COLOR_WORDS, "color"), (SIZE_WORDS, "size"), (TEXTURE_WORDS, "texture")):
        for value, words in table.items():
            for word in words:
                assert getattr(parse_caption(f"a {word} star").objects[0], name) == value
    for background, words in BACKGROUND_WORDS.items():
        assert all(parse_caption(f"a star on {w}").background == background for w in words)
    for relation, words in RELATION_WORDS.items():
        for word in words:
            (claim,) = parse_caption(f"a star {word} a ring").relations
            assert claim == RelationClaim(0, relation, 1)


def test_no_word_means_two_things() -> None:
    tables = (
        SHAPE_WORDS, COLOR_WORDS, SIZE_WORDS, TEXTURE_WORDS, RELATION_WORDS, BACKGROUND_WORDS,
    )  # fmt: skip
    words = [word for table in tables for group in table.values() for word in group]
    assert len(words) == len(set(words))


def test_the_wording_varies_and_the_seed_decides_it() -> None:
    claims = Claims(
        (ObjectClaim("circle", "red", "big"), ObjectClaim("ring", "orange")),
        (RelationClaim(0, "above", 1),),
        "gray",
    )
    captions = {write_caption(claims, random.Random(seed)) for seed in range(200)}
    assert len(captions) > 50
    assert any("with a" in c and "it" in c.split() for c in captions)
    assert write_caption(claims, random.Random(3)) == write_caption(claims, random.Random(3))


@pytest.mark.parametrize(
    ("caption", "claims"),
    [
        ("star", Claims((ObjectClaim("star"),))),
        ("an orange star.", Claims((ObjectClaim("star", "orange"),))),
        (
            "a middle-sized red disc",
            Claims((ObjectClaim("circle", "red", "medium"),)),
        ),
        (
            "a blue box with a red disc to the left of it, pink background",
            Claims(
                (ObjectClaim("circle", "red"), ObjectClaim("square", "blue")),
                (RelationClaim(0, "left of", 1),),
                "pink",
            ),
        ),
        (
            "a red star inside a blue box, which is under a ring, on a grey background",
            Claims(
                (ObjectClaim("star", "red"), ObjectClaim("square", "blue"), ObjectClaim("ring")),
                (RelationClaim(0, "inside", 1), RelationClaim(1, "below", 2)),
                "gray",
            ),
        ),
        (
            "a star, a ring and a heart",
            Claims((ObjectClaim("star"), ObjectClaim("ring"), ObjectClaim("heart"))),
        ),
    ],
)
def test_captions_by_hand(caption: str, claims: Claims) -> None:
    assert parse_caption(caption) == claims


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("", "no shape is named in ''"),
        ("a big red", "no shape is named in 'a big red'"),
        ("gray background", "no shape is named"),
        ("a red dog", "'dog' is not a word of scene captions: 'a red dog'"),
        ("a star on a red background", "'on' is not a word"),
        ("a star, big red", "'big, red' belongs to no shape|'red, big' belongs to no shape"),
        ("a star above", "'above' belongs to no shape"),
    ],
)
def test_what_is_no_caption_is_refused(caption: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^parse_caption: ({message})"):
        parse_caption(caption)
