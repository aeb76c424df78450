# SPDX-License-Identifier: Apache-2.0
"""The pipeline: seeds, batches, inpainting, errors; and what the embedded weights can do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import t2p_fast
from t2p_fast.checkpoints import CheckpointError
from t2p_fast.metrics.scenes import prompt_accuracy
from t2p_fast.pipelines import MusePipeline
from tiny_models import (
    make_muse,
    make_pipeline,
    make_super_resolution,
    make_text_encoder,
    make_vqgan,
    save_pipeline,
)

EMBEDDED = Path(t2p_fast.__file__).parent / "weights" / "muse" / "model.safetensors"


@pytest.fixture(scope="module")
def pipeline() -> MusePipeline:
    return make_pipeline()


def test_same_seed_same_picture(pipeline: MusePipeline) -> None:
    first = pipeline("a red circle", seed=3, steps=4)
    again = pipeline("a red circle", seed=3, steps=4)
    other = pipeline("a red circle", seed=4, steps=4)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.images[0].size == (16, 16)
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(again.images[0]))


def test_picture_does_not_depend_on_its_batch(pipeline: MusePipeline) -> None:
    batch = pipeline(["a red circle", "a green star above a red circle"], seed=7, steps=4)
    assert batch.seeds == [7, 8]
    alone = pipeline("a green star above a red circle", seed=8, steps=4)
    assert torch.equal(batch.tokens[1], alone.tokens[0])


def test_num_images_and_random_seed(pipeline: MusePipeline) -> None:
    result = pipeline("a red circle", num_images=3, steps=2)
    assert len(result.images) == 3
    assert result.seeds == [result.seeds[0] + i for i in range(3)]
    again = pipeline("a red circle", num_images=3, steps=2, seed=result.seeds[0])
    assert torch.equal(result.tokens, again.tokens)
    assert set(result.timings) == {"text", "tokens", "decode"}


def test_negative_prompt_changes_the_picture(pipeline: MusePipeline) -> None:
    plain = pipeline("a red circle", seed=1, steps=4)
    steered = pipeline("a red circle", negative_prompt="a blue square", seed=1, steps=4)
    assert not torch.equal(plain.tokens, steered.tokens)


def test_inpainting_keeps_the_rest(pipeline: MusePipeline) -> None:
    before = pipeline("a red circle", seed=1).images[0]
    tokens = pipeline.vqgan.encode_to_indices(
        torch.from_numpy(np.array(before)).permute(2, 0, 1)[None].float() / 127.5 - 1
    ).flatten()
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2:] = True
    result = pipeline("a blue square", image=before, mask=mask, seed=5, num_images=2)
    for row in result.tokens:
        assert torch.equal(row[:8], tokens[:8])
    assert not torch.equal(result.tokens[0, 8:], tokens[8:])


def test_on_step_sees_every_round(pipeline: MusePipeline) -> None:
    masked = []
    mask_token = pipeline.muse.config.mask_token
    pipeline(
        "a red circle",
        seed=0,
        steps=5,
        on_step=lambda _, tokens: masked.append(int((tokens == mask_token).sum())),
    )
    assert len(masked) == 5
    assert masked == sorted(masked, reverse=True)
    assert masked[-1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt is ''"),
        ({"prompt": []}, "prompt is"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"num_images": 0}, "num_images is 0"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"min_p": 1.5}, "min_p is 1.5, expected at most 1"),
        ({"seed": -1}, "seed is -1"),
        ({"mask": torch.ones(4, 4, dtype=torch.bool)}, "image and mask go together"),
        ({"prompt": "circle " * 40}, "at most 24"),
        ({"prompt": "a red \ud800 circle"}, "prompt is .*, expected a text of valid Unicode"),
        ({"negative_prompt": "\udcff"}, "negative_prompt is .*, expected a text of valid Unicode"),
        ({"seed": 1 << 62}, r"seed is \d+, expected less than"),
    ],
)
def test_errors(pipeline: MusePipeline, options: dict[str, object], message: str) -> None:
    arguments = {"prompt": "a red circle", **options}
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", 5),
        ("prompt", ["a", None]),
        ("prompt", b"a red circle"),
        ("negative_prompt", None),
        ("negative_prompt", ["a", "b"]),
        ("num_images", 1.5),
        ("steps", "4"),
        ("steps", True),
        ("guidance", "1"),
        ("temperature", None),
        ("seed", 1.5),
        ("image", "x.png"),
        ("image", np.zeros((16, 16, 3), np.uint8)),
        ("mask", "all"),
    ],
)
def test_arguments_of_wrong_types(pipeline: MusePipeline, name: str, value: object) -> None:
    given = {
        "image": Image.new("RGB", (16, 16)),
        "mask": torch.ones(4, 4, dtype=torch.bool),
    }
    arguments = {"prompt": "a", **given, name: value}
    with pytest.raises(TypeError, match=rf"^MusePipeline: {name} is .*, expected "):
        pipeline(**arguments)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers(pipeline: MusePipeline) -> None:
    options = {"steps": np.int64(2), "seed": np.int32(3), "guidance": np.float32(2)}
    result = pipeline("a red circle", **options)  # type: ignore[arg-type]
    assert torch.equal(result.tokens, pipeline("a red circle", steps=2, seed=3).tokens)


def test_wrong_mask_and_picture(pipeline: MusePipeline) -> None:
    image = pipeline("a red circle", seed=0).images[0]
    with pytest.raises(ValueError, match=r"mask is \[3, 3\].*expected \[4, 4\]"):
        pipeline("a", image=image, mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="image is 8x8, expected 16x16"):
        pipeline("a", image=image.resize((8, 8)), mask=torch.ones(4, 4, dtype=torch.bool))


def test_larger_pictures_by_a_second_stage(tmp_path: Path, pipeline: MusePipeline) -> None:
    make_super_resolution().save_pretrained(save_pipeline(tmp_path) / "super_resolution")
    two_stages = MusePipeline.from_pretrained(tmp_path)
    assert (pipeline.sizes, two_stages.sizes) == ((16,), (16, 32))
    small = pipeline("a red circle", seed=2, steps=4)
    same = two_stages("a red circle", seed=2, steps=4)
    assert torch.equal(small.tokens, same.tokens)
    assert "finer tokens" not in same.timings
    large = two_stages("a red circle", seed=2, steps=4, size=32, num_images=2)
    assert (large.tokens.shape, large.images[0].size) == ((2, 64), (32, 32))
    assert set(large.timings) == {"text", "tokens", "finer tokens", "decode"}
    alone = two_stages("a red circle", seed=3, steps=4, size=32)
    assert torch.equal(alone.tokens[0], large.tokens[1])
    # One round fills in all tokens at once, each by itself.
    early = two_stages("a red circle", seed=2, steps=4, size=32, finer_steps=8, exit_step=1)
    assert early.tokens.max() < 16

    with pytest.raises(ValueError, match="MusePipeline: size is 64, expected one of 16, 32"):
        two_stages("a", size=64)
    with pytest.raises(ValueError, match="MusePipeline: size is 32, expected one of 16"):
        pipeline("a", size=32)
    with pytest.raises(ValueError, match="finer_steps is 0, expected at least 1"):
        two_stages("a", size=32, finer_steps=0)
    everything = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="size is 32, but pictures are inpainted at 16 only"):
        two_stages("a", size=32, image=small.images[0], mask=everything)


def test_models_must_fit() -> None:
    with pytest.raises(ValueError, match="super_resolution takes 16 tokens on a grid of 8"):
        MusePipeline(
            make_text_encoder(), make_muse(), make_vqgan(), make_super_resolution(low_token_grid=8)
        )
    with pytest.raises(ValueError, match="vqgan has 32 tokens on a grid of 4, but muse has 16"):
        MusePipeline(make_text_encoder(), make_muse(), make_vqgan(num_vq_embeddings=32))
    with pytest.raises(ValueError, match="embeddings of 16, but muse takes 8"):
        MusePipeline(make_text_encoder(), make_muse(text_embed_dim=8), make_vqgan())
    with pytest.raises(ValueError, match="MusePipeline: vqgan has 1 channels in and 1 out"):
        MusePipeline(make_text_encoder(), make_muse(), make_vqgan(in_channels=1, out_channels=1))


def test_device_that_cannot_be(pipeline: MusePipeline) -> None:
    device = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(RuntimeError, match=rf"MusePipeline: device is '{device}', which torch"):
        pipeline.to(device)
    with pytest.raises(RuntimeError, match=rf"from_pretrained: device is '{device}', which torch"):
        MusePipeline.from_pretrained(device=device)


def test_from_pretrained(tmp_path: Path, pipeline: MusePipeline) -> None:
    loaded = MusePipeline.from_pretrained(save_pipeline(tmp_path))
    assert torch.equal(
        loaded("a red circle", seed=2).tokens, pipeline("a red circle", seed=2).tokens
    )
    half = MusePipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert len(half("a red circle", seed=2).images) == 1
    (tmp_path / "muse" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"muse/model\.safetensors"):
        MusePipeline.from_pretrained(tmp_path)


def test_embedded_weights_obey_the_prompt() -> None:
    assert EMBEDDED.exists(), "the package ships without its weights"
    prompts = ["a red circle above a blue square", "a big yellow triangle on gray"] * 4
    pipeline = MusePipeline.from_pretrained("embedded")
    assert pipeline.sizes == (64, 128)
    for size in pipeline.sizes:
        result = pipeline(prompts, size=size, seed=0)
        assert result.images[0].size == (size, size)
        accuracy = prompt_accuracy([np.asarray(image) for image in result.images], prompts)
        # Chance is about one in four for a colour or a shape, and less for a relation.
        assert accuracy.accuracy > 0.8
        assert accuracy.background == 1.0
