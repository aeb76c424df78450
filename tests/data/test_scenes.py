# SPDX-License-Identifier: Apache-2.0
"""Scenes: the same on every machine, true to their captions, never in both splits."""

import random

import numpy as np
import pytest

from t2p_fast.data.captions import Claims, ObjectClaim, parse_caption
from t2p_fast.data.leaves import dead_leaves
from t2p_fast.data.scenes import (
    BACKGROUND_COLORS,
    OBJECT_COLORS,
    SHAPES,
    VOCABULARIES,
    Scene,
    SceneDataset,
    SceneObject,
    relation_holds,
    render,
    sample_scene,
    shape_mask,
)

COUNT = 300


def content(scene: Scene) -> object:
    objects = tuple((o.shape, o.color, o.size, o.texture) for o in scene.objects)
    return objects, scene.background, tuple(r.relation for r in scene.relations)


@pytest.mark.parametrize("vocabulary", sorted(VOCABULARIES))
def test_deterministic_and_split(vocabulary: str) -> None:
    train, again = SceneDataset(vocabulary), SceneDataset(vocabulary)
    test, other = SceneDataset(vocabulary, split="test"), SceneDataset(vocabulary, seed=1)
    assert np.array_equal(train[7].image, again[7].image)
    assert train[7].caption == again[7].caption
    assert any(train[i].caption != other[i].caption for i in range(5))
    seen = {content(train[i].scene) for i in range(COUNT)}
    assert not seen & {content(test[i].scene) for i in range(COUNT)}


@pytest.mark.parametrize("vocabulary", sorted(VOCABULARIES))
def test_captions_are_true(vocabulary: str) -> None:
    words = VOCABULARIES[vocabulary]
    for sample in (SceneDataset(vocabulary)[i] for i in range(COUNT)):
        assert parse_caption(sample.caption) == sample.claims
        scene = sample.scene
        for claim, item in zip(sample.claims.objects, scene.objects, strict=True):
            assert (claim.shape, claim.color) == (item.shape, item.color)
            assert claim.size in (None, item.size)
            assert claim.texture in (None, item.texture)
            assert item.shape in words.shapes
            assert item.color in words.colors
            assert item.x % words.lattice == item.y % words.lattice == 0
            assert item.radius <= min(item.x, item.y)
            assert max(item.x, item.y) <= 64 - item.radius
        for r in sample.claims.relations:
            assert relation_holds(r.relation, scene.objects[r.subject], scene.objects[r.object])
        assert sample.claims.background in (None, scene.background)


def test_every_count_occurs() -> None:
    for words in VOCABULARIES.values():
        rng = random.Random(0)
        counts = [len(sample_scene(words, rng).objects) for _ in range(400)]
        for count in set(words.object_counts):
            expected = words.object_counts.count(count) / len(words.object_counts)
            assert counts.count(count) / 400 == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_render(shape: str) -> None:
    scene = Scene((SceneObject(shape, "red", "big", "solid", 32, 32),), "cyan", ())
    image = render(scene)
    assert image.shape == (64, 64, 3)
    assert tuple(image[0, 0]) == BACKGROUND_COLORS["cyan"]
    red = np.abs(image.astype(int) - OBJECT_COLORS["red"]).max(-1) < 2
    mask = shape_mask(shape, 16)
    assert red.sum() == pytest.approx(mask.sum(), rel=0.25)
    large = render(scene, 128)
    assert large.shape == (128, 128, 3)
    share = (np.abs(large.astype(int) - OBJECT_COLORS["red"]).max(-1) < 2).mean()
    assert share == pytest.approx(red.mean(), rel=0.25)


def test_errors() -> None:
    with pytest.raises(ValueError, match="vocabulary is 'nope', expected one of"):
        SceneDataset("nope")
    with pytest.raises(ValueError, match="split is 'dev'"):
        SceneDataset(split="dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size is 20, expected a multiple of 16"):
        SceneDataset(size=20)
    with pytest.raises(IndexError, match="index is 5, expected 0 <= index < 5"):
        SceneDataset(length=5)[5]
    with pytest.raises(ValueError, match="shape is 'blob'"):
        shape_mask("blob", 8)


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("a red circle", Claims((ObjectClaim("circle", "red"),))),
        (
            "A huge STAR with a little plus over it, grey background.",
            parse_caption("a small cross above a big star on gray"),
        ),
        (
            "a red disc to the left of the blue box",
            parse_caption("a red circle left of a blue square"),
        ),
    ],
)
def test_parse(text: str, claims: Claims) -> None:
    assert parse_caption(text) == claims


def test_parse_errors() -> None:
    with pytest.raises(ValueError, match="'dog' is not a word of scene captions"):
        parse_caption("a red dog")
    with pytest.raises(ValueError, match="no shape is named"):
        parse_caption("red on gray")


def test_dead_leaves() -> None:
    image = dead_leaves(3, 32)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, dead_leaves(3, 32))
    assert not np.array_equal(image, dead_leaves(4, 32))
    assert not np.array_equal(image, dead_leaves(3, 32, seed=1))
