# SPDX-License-Identifier: Apache-2.0
"""The comparison of MarkovGen with Muse, on so few rounds and captions that it takes seconds."""

import csv
from pathlib import Path

import pytest
from PIL import Image
from t2p_fast.benchmarks.run import main


def test_table_csv_and_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"count": 2, "seeds": 2, "steps": 3, "exit-step": 1, "batch-size": 2, "out": tmp_path}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert main(["markovgen", *arguments]) == 0
    printed = capsys.readouterr().out
    for word in ("early-exit", "accuracy", "CMMD", "t_base", "t_MRF"):
        assert word in printed
    with (tmp_path / "markovgen-cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["muse", "early-exit", "markovgen"] * 2
    assert [row["steps"] for row in rows[:3]] == ["3", "1", "1"]
    assert all(float(row["tokens_ms"]) > 0 for row in rows)
    assert all(0 <= float(row["prompt_accuracy"]) <= 1 for row in rows)
    with Image.open(tmp_path / "markovgen-cpu.png") as sheet:
        assert sheet.size == (2 * 128, 3 * 128)


def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["markovgen", "--model", str(tmp_path / "none"), "--count", "2"]) == 2
    assert "t2p-fast bench: error: " in capsys.readouterr().err
