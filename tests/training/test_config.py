# SPDX-License-Identifier: Apache-2.0
"""Configurations of runs: recipes, overrides, and what is said of a wrong one."""

import json
from pathlib import Path
from typing import Any

import pytest

from t2p_fast.training.config import (
    RECIPES,
    FeatureEncoderTraining,
    MRFTraining,
    MuseTraining,
    SuperResolutionTraining,
    VQGANTraining,
    load_config,
)

KINDS = {
    "vqgan": VQGANTraining,
    "muse": MuseTraining,
    "super-resolution": SuperResolutionTraining,
    "mrf": MRFTraining,
    "features": FeatureEncoderTraining,
}


def test_every_shipped_recipe_loads() -> None:
    recipes = sorted(RECIPES.glob("*.json"))
    assert recipes
    for path in recipes:
        (kind,) = (k for k in KINDS if path.stem.startswith(f"{k}-"))
        name = path.stem.removeprefix(f"{kind}-")
        assert isinstance(load_config(kind, name), KINDS[kind])
        # Nothing in it is left out.
        for section, options in json.loads(path.read_text()).items():
            for option, value in options.items():
                made = getattr(getattr(load_config(kind, path), section), option)
                assert made == (tuple(value) if isinstance(value, list) else value), path


def test_overrides_are_json_or_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"run": {"steps": 5}}')
    config = load_config(
        "vqgan",
        path,
        [
            "run.steps=7",
            "run.learning_rate=1e-3",
            "run.betas=[0.5, 0.9]",
            "model.ema_decay=null",
            "model.mid_attention=false",
            "data.source=some/folder=x",
        ],
    )
    assert config.run.steps == 7
    assert config.run.learning_rate == 1e-3
    assert config.run.betas == (0.5, 0.9)
    assert config.model.ema_decay is None
    assert config.model.mid_attention is False
    assert config.data.source == "some/folder=x"
    assert config.loss == VQGANTraining().loss  # sections that are not named are the defaults


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected a JSON object, got list"),
        ('{"run": 3}', "expected a JSON object of sections"),
        ('{"run": {"steps": 5}', "not a readable JSON file"),
        ('{"rum": {}}', "unknown section 'rum', known are model, data, run, loss"),
        ('{"run": {"step": 5}}', "run: unknown option 'step' for RunConfig"),
        ('{"run": {"steps": "many"}}', "run: steps is 'many', expected int"),
        ('{"run": {"steps": 0}}', r"run\.steps is 0, expected within \[1, 1e9\]"),
        ('{"run": {"steps": ' + "9" * 5000 + "}}", "not a readable JSON file"),
        ("[" * 100_000, "not a readable JSON file"),
        ('{"run": {"mixed_precision": "fp8"}}', r"run\.mixed_precision is 'fp8'"),
        ('{"run": {"betas": [0.9]}}', r"run: betas is \(0\.9,\), expected tuple\[float, float\]"),
        ('{"model": {"sample_size": 100}}', "model: .*expected a multiple of"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json: .*{message}"):
        load_config("vqgan", path, ["run.batch_size=4"])


@pytest.mark.parametrize("override", ["run.steps", "steps=3", "=3", "run=3"])
def test_mistakes_in_overrides(override: str) -> None:
    with pytest.raises(ValueError, match=r"is not of the form section\.option=value"):
        load_config("vqgan", "warmup", [override])


def test_unknown_recipe_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config is 'big', expected .* \['binding', 'embedded'"):
        load_config("muse", "big")
    with pytest.raises(ValueError, match=r"none\.json: not a readable JSON file"):
        load_config("muse", tmp_path / "none.json")


@pytest.mark.parametrize(
    ("kind", "section", "option", "wrong"),
    [
        ("vqgan", "run", "batch_size", [0, 65537]),
        ("vqgan", "run", "log_every", [0]),
        ("vqgan", "run", "save_every", [0]),
        ("vqgan", "run", "sample_every", [0]),
        ("vqgan", "run", "seed", [-1, 2**31]),
        ("vqgan", "run", "learning_rate", [0, -1, "NaN", "Infinity"]),
        ("vqgan", "run", "gradient_clip", [-1, "NaN", "Infinity"]),
        ("vqgan", "run", "ema_decay", [-0.1, 1, "NaN"]),
        ("vqgan", "run", "betas", [[0.9, 1]]),
        ("vqgan", "data", "leaves", [-0.1, 1.1, "NaN"]),
        ("vqgan", "data", "size", [8, 8192]),
        ("vqgan", "loss", "l1", [-1, "NaN", "Infinity"]),
        ("vqgan", "loss", "kmeans_pictures", [0]),
        ("vqgan", "model", "layers_per_block", [0, 10**9]),
        ("vqgan", "model", "block_out_channels", [[0], [10**9], [8] * 11, []]),
        ("vqgan", "model", "in_channels", [0]),
        ("vqgan", "model", "ema_decay", [1.0, "NaN"]),
        ("vqgan", "model", "commitment_weight", ["NaN"]),
        ("muse", "model", "num_layers", [0, 10**9]),
        ("muse", "model", "token_grid", [0, 10**6]),
        ("muse", "text", "num_layers", [0, 10**9]),
        ("muse", "text", "max_length", [0]),
        ("muse", "loss", "text_drop", [-0.1, 1.1, "NaN"]),
        ("muse", "loss", "label_smoothing", [-0.1, 1, "NaN"]),
        ("features", "model", "channels", [[], [0], [12], [10**9]]),
        ("features", "model", "num_labels", [0]),
    ],
)
def test_numbers_have_a_range(kind: str, section: str, option: str, wrong: list[Any]) -> None:
    for value in wrong:
        text = value if isinstance(value, str) else json.dumps(value)
        with pytest.raises(ValueError, match=rf"{section}: .*\b{option} is .*, expected"):
            load_config(kind, "embedded", [f"{section}.{option}={text}"])


def test_absurd_values_are_not_echoed_whole() -> None:
    for text in ("9" * 5000, "[" * 100_000, json.dumps("x" * 5000)):
        with pytest.raises(ValueError, match=r"steps is '.*', expected int") as caught:
            load_config("vqgan", "warmup", [f"run.steps={text}"])
        assert len(str(caught.value)) < 300
