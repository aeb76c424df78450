# SPDX-License-Identifier: Apache-2.0
"""Configurations of runs: recipes, overrides, and what is said of a wrong one."""

import json
from pathlib import Path
from typing import Any

import pytest

from t2p_fast.training.config import (
    RECIPES,
    FeatureEncoderTraining,
    MuseTraining,
    VQGANTraining,
    load_config,
)

KINDS = {"vqgan": VQGANTraining, "muse": MuseTraining, "features": FeatureEncoderTraining}


def test_every_shipped_recipe_loads() -> None:
    recipes = sorted(RECIPES.glob("*.json"))
    assert recipes
    for path in recipes:
        kind, _, name = path.stem.partition("-")
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
        ("[1]", "expected a JSON object of sections"),
        ('{"run": 3}', "expected a JSON object of sections"),
        ('{"run": {"steps": 5}', "not a readable JSON file"),
        ('{"rum": {}}', "unknown section 'rum', known are model, data, run, loss"),
        ('{"run": {"step": 5}}', "run: unknown option 'step' for RunConfig"),
        ('{"run": {"steps": "many"}}', "run: steps is 'many', expected int"),
        ('{"run": {"steps": 0}}', r"run\.steps is 0, expected at least 1"),
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
    with pytest.raises(ValueError, match=r"config is 'big', expected .* one of \['embedded'"):
        load_config("muse", "big")
    with pytest.raises(ValueError, match=r"none\.json: not a readable JSON file"):
        load_config("muse", tmp_path / "none.json")


@pytest.mark.parametrize("name", ["batch_size", "log_every", "save_every", "sample_every"])
def test_counts_are_at_least_one(name: str) -> None:
    changes: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=rf"run\.{name} is 0, expected at least 1"):
        load_config("vqgan", "warmup", [f"run.{k}={v}" for k, v in changes.items()])
