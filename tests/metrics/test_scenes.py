# SPDX-License-Identifier: Apache-2.0
"""The reader of scenes: right on true pictures, on worn ones, and hard to fool."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from t2p_fast.data.captions import Claims, ObjectClaim, RelationClaim
from t2p_fast.data.scenes import (
    VOCABULARIES,
    Scene,
    SceneDataset,
    SceneObject,
    SceneSample,
    render,
)
from t2p_fast.metrics.scenes import (
    MIN_IOU,
    SceneReading,
    SceneScore,
    prompt_accuracy,
    read_scene,
    score_reading,
    score_scene,
)

Picture = NDArray[np.uint8]
Wear = Callable[[Picture, np.random.Generator], Picture]


def _samples(vocabulary: str, count: int) -> list[SceneSample]:
    """A fifth from the test split, whose scenes take longer to draw."""
    train, test = (SceneDataset(vocabulary, split=s, seed=5) for s in ("train", "test"))
    return [(test if i % 5 == 4 else train)[i] for i in range(count)]


def _accuracy(scores: Iterable[SceneScore]) -> dict[str, float]:
    right: Counter[str] = Counter()
    stated: Counter[str] = Counter()
    for score in scores:
        right.update(score.right)
        stated.update(score.stated)
    return {name: right[name] / stated[name] for name in stated}


@pytest.fixture(scope="module", params=sorted(VOCABULARIES))
def true_readings(request: pytest.FixtureRequest) -> list[tuple[SceneSample, SceneReading]]:
    return [(s, read_scene(s.image)) for s in _samples(request.param, 500)]


def _object(
    shape: str = "circle",
    color: str = "red",
    size: str = "big",
    x: int = 32,
    y: int = 32,
    texture: str = "solid",
) -> SceneObject:
    return SceneObject(shape, color, size, texture, x, y)


def _draw(*objects: SceneObject, background: str = "gray", size: int = 64) -> Picture:
    return render(Scene(objects, background, ()), size)


def test_true_pictures_are_read_right(
    true_readings: list[tuple[SceneSample, SceneReading]],
) -> None:
    accuracy = _accuracy(score_reading(reading, s.claims) for s, reading in true_readings)
    assert {"shape", "color", "size", "relation", "background", "count"} <= set(accuracy)
    assert all(share >= 0.99 for share in accuracy.values()), accuracy


def test_what_captions_do_not_say_is_read_right_too(
    true_readings: list[tuple[SceneSample, SceneReading]],
) -> None:
    right = 0
    for sample, reading in true_readings:
        expected = {(o.shape, o.color, o.size, o.texture) for o in sample.scene.objects}
        found = {(o.shape, o.color, o.size, o.texture) for o in reading.objects}
        places = {(o.x, o.y) for o in sample.scene.objects}
        # A shape's centre of mass is not its centre, and some fit as well one pixel aside.
        near = all(
            min(math.hypot(o.x - x, o.y - y) for x, y in places) <= 1.5 for o in reading.objects
        )
        right += expected == found and near and reading.background == sample.scene.background
    assert right / len(true_readings) >= 0.99


def test_other_pictures_captions_are_mostly_wrong(
    true_readings: list[tuple[SceneSample, SceneReading]],
) -> None:
    accuracy = _accuracy(
        score_reading(reading, true_readings[i - 1][0].claims)
        for i, (_, reading) in enumerate(true_readings)
    )
    # Chance is 1/4 to 1/8; the choice of the best assignment doubles it at most.
    assert accuracy["shape"] <= 0.45
    assert accuracy["color"] <= 0.45
    assert accuracy["relation"] <= 0.1
    assert accuracy["size"] <= 0.7
    assert accuracy["background"] <= 0.65


def _blur(picture: Picture, _: np.random.Generator) -> Picture:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)))


def _noise(picture: Picture, generator: np.random.Generator) -> Picture:
    worn = picture + generator.uniform(-15, 15, picture.shape)
    return np.clip(worn, 0, 255).astype(np.uint8)


def _tint(picture: Picture, generator: np.random.Generator) -> Picture:
    return np.clip(picture + generator.uniform(-15, 15, 3), 0, 255).astype(np.uint8)


def _jpeg(picture: Picture, _: np.random.Generator) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=40, subsampling=0)
    return np.asarray(Image.open(buffer))


def _ring(picture: Picture, _: np.random.Generator) -> Picture:
    soft = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7))
    return np.asarray(soft.filter(ImageFilter.UnsharpMask(2, 120, 0)))


def _bend(picture: Picture, generator: np.random.Generator) -> Picture:
    """Moves pixels by smooth random steps of a pixel or less."""
    steps = generator.normal(size=(2, 8, 8, 1)) * 0.9
    dy, dx = (
        np.asarray(Image.fromarray(s[..., 0].astype(np.float32)).resize((64, 64), 3)) for s in steps
    )
    y, x = np.mgrid[:64, :64]
    near_y = np.clip(np.rint(y + dy), 0, 63).astype(int)
    near_x = np.clip(np.rint(x + dx), 0, 63).astype(int)
    return picture[near_y, near_x]


def _all_at_once(picture: Picture, generator: np.random.Generator) -> Picture:
    for wear in (_bend, _blur, _tint, _noise):
        picture = wear(picture, generator)
    return picture


@pytest.mark.parametrize("wear", [_blur, _noise, _tint, _jpeg, _ring, _bend, _all_at_once])
def test_worn_pictures_are_read_right(wear: Wear) -> None:
    generator = np.random.default_rng(0)
    scores = [score_scene(wear(s.image, generator), s.claims) for s in _samples("simple", 80)]
    accuracy = _accuracy(scores)
    floor = 0.93 if wear in (_bend, _all_at_once) else 0.98
    assert all(share >= floor for share in accuracy.values()), accuracy


@pytest.mark.parametrize("wear", [_noise, _tint, _jpeg])
def test_textures_survive_colour_noise(wear: Wear) -> None:
    generator = np.random.default_rng(0)
    scores = [score_scene(wear(s.image, generator), s.claims) for s in _samples("full", 60)]
    assert _accuracy(scores)["texture"] >= 0.97


TRUE = "a big red star to the left of a small blue ring on gray"


def _true_scene() -> Picture:
    return _draw(
        _object("star", "red", "big", 16, 32),
        _object("ring", "blue", "small", 50, 32),
    )


def test_a_true_caption_is_all_right() -> None:
    score = score_scene(_true_scene(), TRUE)
    assert score.perfect
    assert score.stated == {
        "shape": 2, "color": 2, "size": 2, "relation": 1, "background": 1, "count": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "wrong", "attribute"),
    [
        ("red", "green", "color"),
        ("star", "circle", "shape"),
        ("big", "medium", "size"),
        ("left", "right", "relation"),
        ("gray", "pink", "background"),
    ],
)
def test_one_wrong_word_costs_its_attribute(word: str, wrong: str, attribute: str) -> None:
    score = score_scene(_true_scene(), TRUE.replace(word, wrong))
    missing = {n: score.stated[n] - score.right[n] for n in score.stated}
    assert not score.perfect
    assert missing[attribute] == 1
    assert sum(missing.values()) == 1


def test_relations_are_judged_at_the_objects_named() -> None:
    upper, lower = _object("circle", "red", "small", 32, 12), _object("square", "blue", y=44)
    picture = _draw(upper, lower)
    assert score_scene(picture, "a red circle above a blue square").right["relation"] == 1
    assert score_scene(picture, "a blue square below a red circle").right["relation"] == 1
    assert score_scene(picture, "a blue square above a red circle").right["relation"] == 0
    assert score_scene(picture, "a red circle left of a blue square").right["relation"] == 0


def test_inside() -> None:
    picture = _draw(_object("square", "yellow"), _object("star", "red", "small", 33, 31))
    score = score_scene(picture, "a small red star inside a big yellow box on grey")
    assert score.perfect, score
    assert score_scene(picture, "a yellow square inside a red star").right["relation"] == 0


def test_an_object_that_is_missing_is_wrong_in_everything() -> None:
    score = score_scene(_draw(_object("star")), "a big red star above a big red circle")
    assert score.right == {"shape": 1, "color": 1, "size": 1, "relation": 0, "count": 0}
    assert score.stated == {"shape": 2, "color": 2, "size": 2, "relation": 1, "count": 1}


def test_an_object_too_many_shows_in_the_count() -> None:
    picture = _draw(
        _object("star", x=16, y=16), _object("ring", "blue", "small", 48, 48), background="pink"
    )
    score = score_scene(picture, "a big red star on pink")
    assert score.right == {"shape": 1, "color": 1, "size": 1, "background": 1, "count": 0}
    assert not score.perfect


def test_an_empty_picture_has_nothing_right_but_its_background() -> None:
    score = score_scene(_draw(), "a red star above a blue ring on gray")
    assert score.right == {"shape": 0, "color": 0, "relation": 0, "background": 1, "count": 0}


@pytest.mark.parametrize("seed", range(8))
def test_a_blob_is_no_star(seed: int) -> None:
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    turn = np.arctan2(y - 32, x - 32)
    # A lump of two or three random bulges, far from five points.
    edge = 13 + sum(
        generator.uniform(1, 2) * np.cos(k * turn + generator.uniform(0, 6)) for k in (2, 3)
    )
    inside = np.hypot(y - 32, x - 32) < edge
    picture = _draw()
    picture[inside] = (220, 40, 40)
    score = score_scene(picture, "a red star")
    assert score.right == {"shape": 0, "color": 1, "count": 1}


def test_a_scribble_has_a_colour_but_no_shape() -> None:
    picture = _draw()
    picture[30:33, 6:58] = picture[8:56, 30:33] = picture[44:47, 12:50] = (50, 80, 220)
    reading = read_scene(picture)
    assert reading.objects
    assert all(o.color == "blue" for o in reading.objects)
    assert all(o.iou < MIN_IOU and o.shape is None for o in reading.objects)


@pytest.mark.parametrize("color", [(220, 40, 40), (0, 0, 0), (255, 255, 255)])
def test_a_flooded_picture_is_no_scene(color: tuple[int, int, int]) -> None:
    picture = np.empty((64, 64, 3), np.uint8)
    picture[:] = color
    reading = read_scene(picture)
    assert reading.background is None
    assert not score_scene(picture, "a big red circle on a gray background").perfect
    assert all(o.shape not in ("star", "ring", "circle", "cross") for o in reading.objects[:2])


def test_static_holds_no_objects() -> None:
    static = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert read_scene(static).objects == ()


@pytest.mark.parametrize("background", ["gray", "pink", "cyan", "brown"])
@pytest.mark.parametrize("color", ["black", "white", "orange", "yellow", "purple"])
def test_edges_are_no_objects(color: str, background: str) -> None:
    """Blends of two colours look like a third: black and white like gray, red and yellow orange."""
    other = {"black": "white", "white": "black", "orange": "red", "yellow": "red"}
    inner = _object("circle", other.get(color, "blue"), "small", 32, 32)
    reading = read_scene(_draw(_object("square", color), inner, background=background))
    assert {(o.shape, o.color) for o in reading.objects} == {
        ("square", color),
        ("circle", inner.color),
    }


def test_two_neighbours_of_one_colour_are_two() -> None:
    for first, second in (("square", "circle"), ("circle", "circle"), ("square", "triangle")):
        for dx, dy in ((16, 0), (0, 16)):
            left = _object(first, "green", "small", 24, 24)
            right = _object(second, "green", "small", 24 + dx, 24 + dy)
            found = read_scene(_draw(left, right, background="cyan")).objects
            assert sorted(str(o.shape) for o in found) == sorted((first, second))


@pytest.mark.parametrize("offset", [(-2, 0), (3, 1), (0, -3)])
def test_objects_may_stick_out_a_little(offset: tuple[int, int]) -> None:
    picture = np.roll(_draw(_object("star", x=16, y=48)), offset, (0, 1))
    picture[-3:] = picture[:, :3] = picture[:3] = (130, 130, 130)
    (found,) = read_scene(picture).objects
    assert (found.shape, found.color, found.size) == ("star", "red", "big")


@pytest.mark.parametrize("size", [48, 96, 128, 256])
def test_other_sizes_are_scaled(size: int) -> None:
    dataset = SceneDataset("simple", split="test", size=size, seed=2)
    scores = [score_scene(dataset[i].image, dataset[i].claims) for i in range(12)]
    assert all(share >= 0.95 for share in _accuracy(scores).values())
    found = read_scene(_draw(_object("star", x=20, y=40), size=size)).objects
    assert [(round(o.x / 2), round(o.y / 2), o.size) for o in found] == [(10, 20, "big")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_are_read_like_arrays(dtype: torch.dtype) -> None:
    picture = _true_scene()
    tensor = torch.from_numpy(picture).permute(2, 0, 1).to(dtype) / 255
    expected = read_scene(picture)
    for found, true in zip(read_scene(tensor).objects, expected.objects, strict=True):
        assert (found.shape, found.color, found.x, found.y) == (
            true.shape,
            true.color,
            true.x,
            true.y,
        )
        assert found.iou == pytest.approx(true.iou, abs=0.02)
    overshot = tensor.float() * 1.2 - 0.1
    assert score_scene(overshot.requires_grad_(), TRUE).perfect


def test_reading_changes_nothing_and_repeats() -> None:
    picture = _true_scene()
    before = picture.copy()
    picture.flags.writeable = False
    assert read_scene(picture) == read_scene(picture)
    assert (picture == before).all()


def test_prompt_accuracy_sums_up() -> None:
    star, nothing = _draw(_object("star"), background="pink"), _draw()
    caption = "a big red star on pink"
    report = prompt_accuracy(np.stack([star, nothing]), [caption, caption])
    assert report.pictures == 2
    assert report.accuracy == report.background == report.count == report.perfect == 0.5
    assert report.attributes == dict.fromkeys(
        ["shape", "color", "size", "background", "count"], 0.5
    )
    assert report.stated == {"shape": 2, "color": 2, "size": 2, "background": 2, "count": 2}
    claims = Claims((ObjectClaim("star"),))
    assert math.isnan(prompt_accuracy([star], [claims]).background)


def test_accuracy_leaves_background_and_texture_and_count_out() -> None:
    picture = _draw(_object("star", "red", "small", 16, 16), _object("ring", "blue", "big", 40, 44))
    report = prompt_accuracy([picture], ["a striped red star on pink"])
    assert report.accuracy == 1
    assert report.attributes == {
        "shape": 1, "color": 1, "texture": 0, "background": 0, "count": 0,
    }  # fmt: skip


def test_more_claims_than_objects_are_assigned() -> None:
    claims = Claims(
        tuple(ObjectClaim("star", c) for c in ("blue", "green", "red")),
        (RelationClaim(0, "above", 1), RelationClaim(1, "above", 2)),
    )
    score = score_scene(_draw(_object("star")), claims)
    assert score.right == {"shape": 1, "color": 1, "relation": 0, "count": 0}


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("picture.png", TypeError, "is a str, expected an array or a tensor"),
        (np.zeros((64, 64, 3)), TypeError, "array of float64, expected uint8"),
        (np.zeros((64, 64), np.uint8), ValueError, r"array \[64, 64\], expected \[size, size, 3\]"),
        (np.zeros((3, 64, 64), np.uint8), ValueError, r"array \[3, 64, 64\]"),
        (np.zeros((64, 32, 3), np.uint8), ValueError, r"array \[64, 32, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), ValueError, "8 x 8, expected at least 16 x 16"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), TypeError, "torch.uint8, expected a floating"),
        (torch.zeros(64, 64, 3), ValueError, r"tensor \[64, 64, 3\], expected \[3, size, size\]"),
        (torch.zeros(1, 3, 64, 64), ValueError, r"tensor \[1, 3, 64, 64\]"),
        (torch.zeros(3, 0, 0), ValueError, "0 x 0"),
        (torch.full((3, 64, 64), -1.0), ValueError, r"values from -1 to -1, expected \[0, 1\]"),
        (torch.full((3, 64, 64), 255.0), ValueError, "values from 255"),
        (torch.full((3, 64, 64), torch.nan), ValueError, "values from nan"),
    ],
)
def test_what_is_no_picture_is_refused(image: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^read_scene: image.*" + message):
        read_scene(image)  # type: ignore[arg-type]


def test_bad_claims_are_refused() -> None:
    with pytest.raises(ValueError, match="claims has 0 objects, expected 1 to 6"):
        score_scene(_draw(), Claims(()))
    with pytest.raises(ValueError, match="claims has 7 objects"):
        score_scene(_draw(), Claims((ObjectClaim("star"),) * 7))
    with pytest.raises(ValueError, match="'dog' is not a word of scene captions"):
        score_scene(_draw(), "a red dog")


def test_bad_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="images is empty"):
        prompt_accuracy([], [])
    with pytest.raises(ValueError, match="got 1 images and 2 captions"):
        prompt_accuracy([_draw()], ["a star", "a ring"])
