# SPDX-License-Identifier: Apache-2.0
"""The reader of scenes: right on true pictures, under noise, and hard to fool."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from t2p_fast.data.scenes import SceneDataset, render
from t2p_fast.metrics.scenes import prompt_accuracy, read_scene, score_scene


def pictures(vocabulary: str, count: int) -> tuple[list[NDArray[np.uint8]], list[str]]:
    dataset = SceneDataset(vocabulary, split="test")
    samples = [dataset[i] for i in range(count)]
    return [s.image for s in samples], [s.caption for s in samples]


@pytest.mark.parametrize(("vocabulary", "count"), [("basic", 150), ("simple", 150), ("full", 150)])
def test_true_pictures(vocabulary: str, count: int) -> None:
    accuracy = prompt_accuracy(*pictures(vocabulary, count))
    assert accuracy.pictures == count
    for name, value in accuracy.attributes.items():
        assert value >= 0.99, name


def test_blur_and_noise() -> None:
    images, captions = pictures("basic", 60)
    rng = np.random.default_rng(0)
    worn = []
    for image in images:
        soft = Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7))
        noise = rng.normal(0, 10, image.shape)
        worn.append((np.asarray(soft) + noise).clip(0, 255).astype(np.uint8))
    assert prompt_accuracy(worn, captions).accuracy >= 0.95


def test_wrong_captions_score_badly() -> None:
    images, captions = pictures("basic", 80)
    accuracy = prompt_accuracy(images, captions[1:] + captions[:1])
    assert accuracy.accuracy < 0.55
    assert accuracy.perfect < 0.1


def test_what_is_wrong_is_named() -> None:
    dataset = SceneDataset("basic")
    sample = next(s for s in dataset if len(s.scene.objects) == 1)
    item = sample.scene.objects[0]
    other = {"red": "blue"}.get(item.color, "red")
    shape = {"circle": "star"}.get(item.shape, "circle")
    right = score_scene(sample.image, f"a {item.size} {item.color} {item.shape}")
    assert right.perfect
    wrong = score_scene(sample.image, f"a {item.size} {other} {item.shape}")
    assert (wrong.right["color"], wrong.right["shape"]) == (0, 1)
    wrong = score_scene(sample.image, f"a {item.color} {shape}")
    assert (wrong.right["color"], wrong.right["shape"]) == (1, 0)
    missing = score_scene(sample.image, f"a {item.color} {item.shape} and a {other} {shape}")
    assert missing.right["count"] == 0
    assert missing.right["color"] == 1


def test_a_blob_is_no_star() -> None:
    image = np.full((64, 64, 3), 130, np.uint8)
    rows, columns = np.mgrid[:64, :64]
    image[((rows - 32) / 14) ** 2 + ((columns - 30) / 10) ** 2 < 1] = (220, 40, 40)
    assert score_scene(image, "a big red star").right["shape"] == 0


def test_empty_and_enlarged() -> None:
    reading = read_scene(np.full((64, 64, 3), 130, np.uint8))
    assert reading.objects == ()
    assert reading.background == "gray"
    scene = SceneDataset("basic")[3].scene
    found = {(o.shape, o.color) for o in read_scene(render(scene, 128)).objects}
    assert found == {(o.shape, o.color) for o in scene.objects}


def test_errors() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="got 1 images and 2 captions"):
        prompt_accuracy([image], ["a red circle", "a red circle"])
    with pytest.raises(ValueError, match="images is empty"):
        prompt_accuracy([], [])
    with pytest.raises(ValueError, match="not a word of scene captions"):
        score_scene(image, "a red dog")
    with pytest.raises(ValueError, match="read_scene"):
        read_scene(np.zeros((64, 64), np.uint8))
