# SPDX-License-Identifier: Apache-2.0
"""Scenes: a function of seed and index, true to their claims, and never in both splits."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2p_fast.data.scenes import (
    BACKGROUND_COLORS,
    OBJECT_COLORS,
    RADII,
    SHAPES,
    TEXTURES,
    VOCABULARIES,
    Scene,
    SceneDataset,
    SceneObject,
    Split,
    Vocabulary,
    content,
    relation_holds,
    relation_holds_at,
    render,
    sample_scene,
    second_tone,
    shape_mask,
    texture_mask,
)

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
places = st.tuples(st.integers(0, 64), st.integers(0, 64), st.sampled_from(sorted(RADII.values())))


@pytest.mark.parametrize("vocabulary", sorted(VOCABULARIES))
def test_an_index_is_always_the_same_scene(vocabulary: str) -> None:
    first, again = (SceneDataset(vocabulary, seed=4) for _ in range(2))
    backwards = {i: again[i] for i in reversed(range(20))}
    for i in range(20):
        one, other = first[i], backwards[i]
        assert (one.scene, one.caption, one.claims) == (other.scene, other.caption, other.claims)
        assert (one.image == other.image).all()


def test_scenes_stay_what_they_were() -> None:
    """Published numbers name seeds: a seed must mean the same scenes in every version."""
    dataset = SceneDataset("full", split="test", seed=1)
    assert [dataset[i].caption for i in range(2)] == [
        "a large dotted purple cross, brown background",
        "a spotted red heart above a medium stripy yellow hoop, "
        "which is to the right of an orange heart",
    ]


def test_seed_split_and_index_make_other_scenes() -> None:
    captions = [
        [SceneDataset("full", split=split, seed=seed)[i].caption for i in range(20)]
        for seed in (0, 1, -1)
        for split in SPLITS
    ]
    assert all(len(set(c)) > 15 for c in captions)
    assert len({tuple(c) for c in captions}) == len(captions)


@pytest.mark.parametrize("vocabulary", sorted(VOCABULARIES))
def test_no_content_is_in_two_splits(vocabulary: str) -> None:
    seen: set[object] = set()
    for split, count in (("train", 1000), ("validation", 150), ("test", 150)):
        dataset = SceneDataset(vocabulary, split=split, size=16)  # type: ignore[arg-type]
        mine = {content(dataset[i].scene) for i in range(count)}
        assert mine
        assert not mine & seen
        seen |= mine


def test_single_objects_are_as_frequent_in_every_split() -> None:
    for split in SPLITS:
        dataset = SceneDataset("basic", split=split, size=16)
        single = [i for i in range(300) if len(dataset[i].scene.objects) == 1]
        assert 110 < len(single) < 190, split
        assert split == "validation" or len({content(dataset[i].scene) for i in single}) >= 8


@pytest.mark.parametrize("vocabulary", sorted(VOCABULARIES))
def test_scenes_keep_to_their_vocabulary_and_their_claims(vocabulary: str) -> None:
    words = VOCABULARIES[vocabulary]
    dataset = SceneDataset(vocabulary, size=16)
    for i in range(300):
        sample = dataset[i]
        scene, claims = sample.scene, sample.claims
        assert len(scene.objects) in words.object_counts
        assert scene.background in words.backgrounds
        assert claims.background in (None, scene.background)
        assert claims.relations in ((), scene.relations)
        for item, claim in zip(scene.objects, claims.objects, strict=True):
            assert item.shape in words.shapes
            assert item.color in words.colors
            assert item.size in words.sizes
            assert item.texture in words.textures
            assert item.radius <= min(item.x, item.y)
            assert max(item.x, item.y) <= 64 - item.radius
            assert item.x % words.lattice == item.y % words.lattice == 0
            assert (claim.shape, claim.color) == (item.shape, item.color)
            assert claim.size in (None, item.size)
            assert claim.texture in (None, item.texture)
        assert len({(o.shape, o.color) for o in scene.objects}) == len(scene.objects)
        for relation in scene.relations:
            assert relation.relation in words.relations
            subject, target = scene.objects[relation.subject], scene.objects[relation.object]
            assert relation_holds(relation.relation, subject, target)


def test_everything_occurs_about_equally_often() -> None:
    rng = random.Random(0)
    scenes = [sample_scene(VOCABULARIES["full"], rng, 1 + i % 3) for i in range(1500)]
    objects = [o for scene in scenes for o in scene.objects]
    for name, words in (("shape", SHAPES), ("color", OBJECT_COLORS), ("texture", TEXTURES)):
        counts = Counter(getattr(o, name) for o in objects)
        assert set(counts) == set(words)
        assert min(counts.values()) * 2.5 > max(counts.values()), counts
    assert set(Counter(s.background for s in scenes)) == set(BACKGROUND_COLORS)
    assert {r.relation for s in scenes for r in s.relations} == set(VOCABULARIES["full"].relations)


@pytest.mark.parametrize("size", [16, 32, 48, 128])
def test_other_sizes_show_the_same_scene(size: int) -> None:
    small, standard = (SceneDataset("full", size=s, seed=2) for s in (size, 64))
    for i in range(20):
        assert small[i].scene == standard[i].scene
        assert small[i].caption == standard[i].caption
        picture = small[i].image
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
    item = SceneObject("square", "red", "big", "solid", 32, 16)
    picture = render(Scene((item,), "cyan", ()), size)
    assert tuple(picture[size // 4, size // 2]) == OBJECT_COLORS["red"]
    assert tuple(picture[-1, 0]) == BACKGROUND_COLORS["cyan"]
    share = (picture == OBJECT_COLORS["red"]).all(-1).mean()
    assert share == pytest.approx((0.82 * 32 / 64) ** 2, abs=3 / size)


def test_pictures_hold_the_colours_they_should() -> None:
    item = SceneObject("circle", "green", "big", "checkered", 32, 32)
    picture = render(Scene((item,), "pink", ()))
    colors = {tuple(int(v) for v in c) for c in picture.reshape(-1, 3)}
    assert {OBJECT_COLORS["green"], second_tone("green"), BACKGROUND_COLORS["pink"]} <= colors


def test_what_is_inside_stays_visible() -> None:
    outer = SceneObject("square", "yellow", "big", "solid", 32, 32)
    inner = SceneObject("circle", "red", "small", "solid", 32, 32)
    for objects in ((outer, inner), (inner, outer)):
        assert tuple(render(Scene(objects, "gray", ()))[32, 32]) == OBJECT_COLORS["red"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [2, 8, 16, 32])
def test_shapes_fill_their_square_and_no_more(shape: str, radius: int) -> None:
    mask = shape_mask(shape, radius)
    assert mask.shape == (2 * radius, 2 * radius)
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert 0.2 < mask.mean() < 0.8
    if radius >= 8:
        # Symmetric left to right, and no shape is another.
        assert np.abs(mask - mask[:, ::-1]).max() < 0.1
        others = [shape_mask(s, radius) for s in SHAPES if s != shape]
        assert min(np.abs(mask - other).mean() for other in others) > 0.03


@pytest.mark.parametrize("radius", sorted(RADII.values()))
def test_textures_differ_and_show_both_tones(radius: int) -> None:
    masks = {t: texture_mask(t, radius) for t in TEXTURES}
    assert not masks.pop("solid").any()
    for mask in masks.values():
        assert set(np.unique(mask)) == {0.0, 1.0}
        assert 0.2 < mask.mean() < 0.6
    assert len({mask.tobytes() for mask in masks.values()}) == 3


@given(a=places, b=places)
def test_relations_are_opposites_and_exclude_each_other(
    a: tuple[int, int, int], b: tuple[int, int, int]
) -> None:
    assert relation_holds_at("above", a, b) == relation_holds_at("below", b, a)
    assert relation_holds_at("left of", a, b) == relation_holds_at("right of", b, a)
    sides = [r for r in ("above", "below", "left of", "right of") if relation_holds_at(r, a, b)]
    assert len(sides) <= 1
    # On a diagonal, and only there, none of the four holds.
    assert (not sides) == (abs(a[0] - b[0]) == abs(a[1] - b[1]))
    if relation_holds_at("inside", a, b):
        assert a[2] < b[2]
        assert not relation_holds_at("inside", b, a)


def test_a_vocabulary_of_ones_own() -> None:
    words = Vocabulary(shapes=("star",), sizes=("big",), textures=("solid",), object_counts=(1,))
    sample = SceneDataset(words)[0]
    assert [(o.shape, o.size, o.texture) for o in sample.scene.objects] == [
        ("star", "big", "solid")
    ]


def test_length_and_iteration() -> None:
    dataset = SceneDataset(length=3)
    assert len(dataset) == 3
    assert [s.caption for s in dataset] == [dataset[i].caption for i in range(3)]


@pytest.mark.parametrize("index", [-1, 3, 1 << 40])
def test_indices_beyond_the_length_are_refused(index: int) -> None:
    with pytest.raises(
        IndexError, match=f"SceneDataset: index is {index}, expected 0 <= index < 3"
    ):
        SceneDataset(length=3)[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": "huge"}, "vocabulary is 'huge', expected one of .*'full'"),
        ({"split": "valid"}, "split is 'valid', expected one of train, test, validation"),
        ({"size": 0}, "size is 0, expected a multiple of 16"),
        ({"size": 72}, "size is 72, expected a multiple of 16"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^SceneDataset: {message}"):
        SceneDataset(**arguments)  # type: ignore[arg-type]


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape is 'cube', expected one of"):
        shape_mask("cube", 8)
