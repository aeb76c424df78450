# SPDX-License-Identifier: Apache-2.0
"""The comparison of diffusers' pipelines before and after `accelerate`, on tiny ones."""

import csv
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from t2p_fast.benchmarks import run
from t2p_fast.benchmarks.run import MALLOC, main
from t2p_fast.benchmarks.timing import alternate_ms

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from t2p_fast.benchmarks import drop_in
from t2p_fast.benchmarks.drop_in import PIPELINES, compare

# What diffusers says of its own pipelines and configurations.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning:diffusers.*"
)

SWAPPED = {
    "stable-diffusion": {"scheduler", "group_norm", "attention"},
    "ldm": {"scheduler", "group_norm", "vq", "attention"},
    "ddpm": {"scheduler", "group_norm", "attention"},
    "amused": {"scheduler", "group_norm", "vq", "attention"},
    "sana": {"scheduler", "linear_attention", "attention"},
    "unet": {"group_norm", "attention"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_pipeline_is_compared() -> None:
    assert {*PIPELINES} - {*SWAPPED} == {"unet-batch"}  # as unet but for its sizes


@pytest.mark.parametrize("name", SWAPPED)
def test_compare(name: str) -> None:
    result = compare(
        name, tiny=True, dtype="float32", threads=1, malloc="default", rounds=1, profile=False
    )
    assert {line.split(":")[0] for line in result.swaps.splitlines()} == SWAPPED[name]
    assert result.largest_output > 0.5
    assert 0 < result.largest_difference < 1e-4
    assert min(result.before_ms, result.after_ms, result.before_cpu_ms, result.after_cpu_ms) > 0


def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = []

    def in_this_process(command: list[str], env: dict[str, str], check: bool) -> Any:  # noqa: ARG001
        environments.append(env)
        return SimpleNamespace(returncode=main(command[3:]))

    monkeypatch.setattr(subprocess, "run", in_this_process)
    monkeypatch.setattr(drop_in, "machine_facts", lambda _: {"cpu": "some"})
    # torch's profiler takes seconds to start.
    monkeypatch.setattr(drop_in, "_shares", lambda _: {"linear": 0.25, "convolution": 0.75})
    arguments = ["--pipeline", "ddpm", "--size", "tiny", "--rounds", "2", "--threads", "1"]
    assert main(["drop-in", *arguments, "--profile", "--out", str(tmp_path)]) == 0
    assert len(environments) == 2
    assert MALLOC["tuned"].items() <= environments[1].items()
    assert environments[0]["OMP_NUM_THREADS"] == "1"
    printed = capsys.readouterr().out
    for words in ("ddpm: tiny, float32, 1 thread", "scheduler: DDPMScheduler ->",
                  "(with attention, group_norm)", "share of the time in torch", "convolution",
                  "tuned"):  # fmt: skip
        assert words in printed
    with (tmp_path / "drop-in-cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["malloc"] for row in rows] == ["glibc", "tuned"]
    for row in rows:
        ratio = float(row["before_ms"]) / float(row["after_ms"])
        assert float(row["ratio"]) == pytest.approx(ratio, rel=1e-2)
        assert row["shares"] == "convolution=0.750/0.750 linear=0.250/0.250"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("t2p_fast::attention", "attention"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::addmm", "linear"),
        ("aten::native_group_norm", "group norm"),
        ("aten::native_layer_norm", "other norms"),
        ("t2p_fast::vq_nearest", "quantiser"),
        ("aten::copy_", "copies"),
        ("aten::sort", "other"),
    ],
)
def test_kinds_of_layers(name: str, kind: str) -> None:
    assert drop_in.kind_of(name) == kind


def test_alternation() -> None:
    order: list[str] = []
    times = alternate_ms([lambda: order.append("a"), lambda: order.append("b")], 2)
    assert order == list("ab" + "ab" + "ba")
    assert all(wall > 0 for wall, _ in times)


def test_mistakes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["drop-in", "--pipeline", "none"]) == 2
    assert "invalid choice: 'none'" in capsys.readouterr().err
    assert main(["drop-in", "--rounds", "0"]) == 2
    assert "--rounds 0" in capsys.readouterr().err
    assert main(["drop-in", "--help"]) == 0
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3))
    assert main(["drop-in", "--pipeline", "unet"]) == 1
    assert "the measuring process ended with code 3" in capsys.readouterr().err
    assert run.environment_of("glibc", 2)["OMP_NUM_THREADS"] == "2"
