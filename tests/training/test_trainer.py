# SPDX-License-Identifier: Apache-2.0
"""The training loop: resumes to the bit, survives a kill, refuses what does not fit."""

import csv
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

pytest.importorskip("accelerate")

from t2p_fast.checkpoints import CheckpointError, read_safetensors, write_safetensors
from t2p_fast.data.captions import in_reading_order, parse_caption, turn_relation
from t2p_fast.data.scenes import SceneDataset
from t2p_fast.models.muse import Muse, MuseConfig
from t2p_fast.models.text_encoder import TextTransformer, TextTransformerConfig
from t2p_fast.models.vqgan import VQGAN
from t2p_fast.nn import TokenMRF, TokenMRFConfig
from t2p_fast.training.config import (
    DataConfig,
    MRFLossConfig,
    MRFTraining,
    MuseLossConfig,
    MuseTraining,
    RunConfig,
    SuperResolutionLossConfig,
    SuperResolutionTraining,
    VQGANLossConfig,
    VQGANTraining,
    load_config,
)
from t2p_fast.training.mrf import MRFTask
from t2p_fast.training.muse import MuseTask, contrasting_captions, rare_mask
from t2p_fast.training.pictures import PictureDataset
from t2p_fast.training.super_resolution import SuperResolutionTask
from t2p_fast.training.trainer import DivergedError, StepBatches, Task, Trainer, learning_rate
from t2p_fast.training.vqgan import VQGANTask
from tiny_models import (
    make_super_resolution,
    make_text_encoder,
    make_vqgan,
    save_pipeline,
    vqgan_config,
)

RUN = RunConfig(
    steps=6, batch_size=4, warmup_steps=2, decay_steps=2, mixed_precision="no",
    log_every=1, save_every=2, sample_every=100, ema_decay=0.9,
)  # fmt: skip


def vqgan_training(**run: Any) -> VQGANTraining:
    return VQGANTraining(
        model=vqgan_config(ema_decay=0.9),
        data=DataConfig(size=16, leaves=0.25),
        run=dataclasses.replace(RUN, **run),
        loss=VQGANLossConfig(
            perceptual=0.0, adversarial=0.1, adversarial_start=3, quantize_start=1,
            kmeans_pictures=8, dead_code_threshold=0.5,
        ),
    )  # fmt: skip


def muse_training(
    folder: Path, *, contrast: float = 0, reading_order: float = 0, **run: Any
) -> MuseTraining:
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        make_vqgan().save_pretrained(tokenizer)
    return MuseTraining(
        model=MuseConfig(
            vocab_size=16, codebook_dim=4, token_grid=4, hidden_size=16, num_layers=1,
            num_heads=2, text_embed_dim=16,
        ),
        text=TextTransformerConfig(hidden_size=16, num_layers=1, num_heads=2),
        data=DataConfig(size=16),
        run=dataclasses.replace(RUN, **run),
        loss=MuseLossConfig(
            vqgan=str(tokenizer), contrast=contrast, reading_order=reading_order
        ),
    )  # fmt: skip


def super_resolution_training(folder: Path, size: int = 32) -> SuperResolutionTraining:
    save_pipeline(folder / "generator")
    longer = make_text_encoder(max_length=80)
    longer.save_pretrained(folder / "generator" / "text_encoder")
    return SuperResolutionTraining(
        model=make_super_resolution().config,
        data=DataConfig(size=size),
        run=RUN,
        loss=SuperResolutionLossConfig(muse=str(folder / "generator"), swapped=0.2),
    )


def quiet(task: Task, out: Path) -> Trainer:
    return Trainer(task, out, cpu=True, report=lambda _: None)


def steps_logged(out: Path) -> list[int]:
    with (out / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def mrf_training(folder: Path, *, with_muse: bool = False, **run: object) -> MRFTraining:
    make_vqgan().save_pretrained(folder / "tokenizer")
    if with_muse:
        save_pipeline(folder / "generator")
        longer = make_text_encoder(max_length=80)
        longer.save_pretrained(folder / "generator" / "text_encoder")
    return MRFTraining(
        model=TokenMRFConfig(vocab_size=16, token_grid=4, iterations=2),
        data=DataConfig(size=16),
        run=dataclasses.replace(RUN, **run),
        loss=MRFLossConfig(
            vqgan=str(folder / "tokenizer"),
            muse=str(folder / "generator") if with_muse else "",
            steps=6,
            exit_step=2,
            captions=7,
        ),
    )


@pytest.mark.parametrize(
    "kind", ["vqgan", "muse", "muse-contrast", "super-resolution", "mrf", "mrf-muse"]
)
def test_resumed_run_ends_in_the_same_weights(kind: str, tmp_path: Path) -> None:
    def task() -> Task:
        if kind == "vqgan":
            return VQGANTask(vqgan_training())
        if kind == "muse":
            return MuseTask(muse_training(tmp_path))
        if kind == "muse-contrast":
            return MuseTask(muse_training(tmp_path, contrast=1.0, reading_order=0.5))
        if kind == "super-resolution":
            return SuperResolutionTask(super_resolution_training(tmp_path))
        return MRFTask(mrf_training(tmp_path, with_muse=kind == "mrf-muse"))

    quiet(task(), tmp_path / "whole").train()
    quiet(task(), tmp_path / "parts").train(stop_at=3)
    assert not (tmp_path / "parts" / "model").exists()
    quiet(task(), tmp_path / "parts").train()
    whole = read_safetensors(tmp_path / "whole" / "state.safetensors")
    parts = read_safetensors(tmp_path / "parts" / "state.safetensors")
    assert whole.keys() == parts.keys()
    assert any(key.startswith("optimizer/") for key in whole)
    for key, value in whole.items():
        assert torch.equal(value, parts[key]), key
    assert steps_logged(tmp_path / "parts") == [1, 2, 3, 4, 5, 6]


def test_training_changes_weights_and_lowers_the_loss(tmp_path: Path) -> None:
    config = vqgan_training(steps=150, batch_size=8, learning_rate=2e-3, decay_steps=50)
    config = dataclasses.replace(
        config,
        data=DataConfig(size=16),
        loss=dataclasses.replace(config.loss, adversarial=0.0, quantize_start=1000),
    )
    quiet(VQGANTask(config), tmp_path).train()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
sys.path.insert(0, {here!r})
from test_trainer import VQGANTask, quiet, vqgan_training
quiet(VQGANTask(vqgan_training(steps={steps}, save_every=1)), Path({out!r})).train()
"""


def test_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent
    names = {"tests": str(here.parent), "here": str(here), "out": str(tmp_path / "run")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(steps=100_000, **names)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    state = tmp_path / "run" / "state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # However the kill fell, the checkpoint is whole and names a step that was reached.
    before = steps_logged(tmp_path / "run")
    trainer = quiet(VQGANTask(vqgan_training(steps=100_000)), tmp_path / "run")
    step = trainer._resume()
    assert step >= 1
    assert abs(step - before[-1]) <= 1
    trainer.train(stop_at=step + 2)
    assert steps_logged(tmp_path / "run") == list(range(1, step + 3))


def test_other_configuration_is_refused(tmp_path: Path) -> None:
    quiet(VQGANTask(vqgan_training()), tmp_path).train(stop_at=2)
    other = dataclasses.replace(vqgan_training(), model=vqgan_config(ema_decay=0.5))
    with pytest.raises(CheckpointError, match="another configuration: its model"):
        quiet(VQGANTask(other), tmp_path).train()
    # A longer run is the same run.
    quiet(VQGANTask(vqgan_training(steps=7)), tmp_path).train()
    assert steps_logged(tmp_path)[-1] == 7


def test_damaged_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(CheckpointError, match="not a readable training state"):
        quiet(VQGANTask(vqgan_training()), tmp_path).train()


class _Diverging(VQGANTask):
    """Goes wrong in step 5 of 6: in what it logs, or in the weights alone."""

    def __init__(self, where: str) -> None:
        super().__init__(vqgan_training())
        self.where = where

    def step(self, batch: Any, step: int, trainer: Trainer) -> dict[str, Tensor]:
        logs = super().step(batch, step, trainer)
        if step == 4 and self.where == "loss":
            logs["loss"] = logs["loss"] * torch.nan
        if step == 5 and self.where == "weight":
            with torch.no_grad():
                trainer.unwrap("vqgan").get_parameter("decoder.conv_in.bias")[0] = torch.inf
        return logs


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", "training diverged at step 5: loss is nan; the state of step 4 is kept"),
        ("weight", r"step 6: module/vqgan/decoder\.conv_in\.bias holds NaN .*step 4 is kept"),
    ],
)
def test_diverged_training_keeps_the_last_good_state(
    tmp_path: Path, where: str, message: str
) -> None:
    with pytest.raises(DivergedError, match=message):
        quiet(_Diverging(where), tmp_path).train()
    assert not (tmp_path / "model").exists()
    trainer = quiet(VQGANTask(vqgan_training()), tmp_path)
    assert trainer._resume() == trainer.saved_step == 4
    trainer.train()


def test_state_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    quiet(VQGANTask(vqgan_training()), tmp_path).train(stop_at=1)
    path = tmp_path / "state.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    broken = {"module/vqgan/decoder.conv_in.bias": torch.full((8,), torch.nan)}
    write_safetensors(path, {**read_safetensors(path), **broken}, metadata)
    with pytest.raises(CheckpointError, match=r"state\.safetensors: module/.*bias holds NaN"):
        quiet(VQGANTask(vqgan_training()), tmp_path).train()


def test_shorter_run_than_the_one_there_is_refused(tmp_path: Path) -> None:
    quiet(VQGANTask(vqgan_training(steps=3)), tmp_path).train()
    quiet(VQGANTask(vqgan_training(steps=3)), tmp_path).train()  # finished is finished
    with pytest.raises(CheckpointError, match=r"is of step 3, beyond run\.steps, 2; expected at"):
        quiet(VQGANTask(vqgan_training(steps=2)), tmp_path).train()


@pytest.mark.parametrize(
    "content",
    [b"loss\n0.5\n", b"step,loss\nx,0.5\n", b"step,loss\n1,\xff\n", b"step\n1,2,3\n", b"\xff"],
)
def test_damaged_metrics_are_refused(tmp_path: Path, content: bytes) -> None:
    quiet(VQGANTask(vqgan_training()), tmp_path).train(stop_at=1)
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"metrics\.csv: not a readable log of metrics"):
        quiet(VQGANTask(vqgan_training()), tmp_path).train(stop_at=2)


def test_starting_from_the_embedded_tokenizer() -> None:
    config = load_config("vqgan", "embedded", ["loss.initialize_from=embedded"])
    task = VQGANTask(config)
    source = VQGAN.from_pretrained("embedded", subfolder="vqgan")
    model = task.modules["vqgan"]
    assert torch.equal(
        model.get_parameter("decoder.conv_in.weight"),
        source.get_parameter("decoder.conv_in.weight"),
    )


def test_a_decoder_alone(tmp_path: Path) -> None:
    source = make_vqgan()
    source.save_pretrained(tmp_path / "tokenizer")
    config = vqgan_training(steps=4)
    loss = dataclasses.replace(
        config.loss, initialize_from=str(tmp_path / "tokenizer"), decoder_only=True
    )
    data = dataclasses.replace(config.data, size=32)
    out = quiet(
        VQGANTask(dataclasses.replace(config, data=data, loss=loss)), tmp_path / "r"
    ).train()
    after = VQGAN.from_pretrained(out).state_dict()
    before = source.to(torch.bfloat16).state_dict()
    changed = {key for key in before if not torch.equal(after[key], before[key])}
    assert {key.split(".")[0] for key in changed} == {"decoder", "post_quant_conv"}
    assert {"decoder.conv_in.weight", "decoder.conv_out.weight"} <= changed
    with pytest.raises(ValueError, match=r"loss.decoder_only is true, but loss.initialize_from"):
        dataclasses.replace(loss, initialize_from="")


def test_starting_from_a_generator(tmp_path: Path) -> None:
    make_vqgan().save_pretrained(tmp_path / "tokenizer")
    config = muse_training(tmp_path, steps=1)
    first = Trainer(MuseTask(config), tmp_path / "first").train()
    source = TextTransformer.from_pretrained(first, subfolder="text_encoder")
    loss = dataclasses.replace(config.loss, initialize_from=str(first))
    run = dataclasses.replace(config.run, seed=5)
    model = MuseTask(dataclasses.replace(config, loss=loss, run=run)).modules["muse"]
    for key, value in source.state_dict().items():
        assert torch.equal(model.get_parameter(f"text_encoder.{key}"), value)
    muse = Muse.from_pretrained(first, subfolder="muse")
    for key, parameter in muse.named_parameters():
        assert torch.equal(model.get_parameter(f"muse.{key}"), parameter)

    # A text encoder of another kind begins anew, with the words of the first.
    other = dataclasses.replace(config.text, relative_span=2)
    task = MuseTask(dataclasses.replace(config, text=other, loss=loss, run=run))
    assert task.tokenizer.to_str() == source.tokenizer.to_str()
    fresh = task.modules["muse"].get_parameter("text_encoder.token_embedding.weight")
    assert not torch.equal(fresh, source.token_embedding.weight)
    wide = dataclasses.replace(config.model, hidden_size=32)
    with pytest.raises(ValueError, match=r"initialize_from, .*, is MuseConfig\(.*, expected"):
        MuseTask(dataclasses.replace(config, model=wide, loss=loss))


def test_second_stage_and_its_pictures_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.size is 16, expected 32, 4 pixels for each token"):
        SuperResolutionTask(super_resolution_training(tmp_path, size=16))
    config = super_resolution_training(tmp_path)
    other = make_super_resolution(text_embed_dim=8).config
    with pytest.raises(ValueError, match=r"16 tokens and text of 8, but .* has 16 and 16"):
        SuperResolutionTask(dataclasses.replace(config, model=other))


def test_masks_of_rare_tokens_hide_what_is_rare() -> None:
    torch.manual_seed(0)
    tokens = torch.zeros(64, 50, dtype=torch.int64)
    tokens[:, 20:30] = torch.randint(1, 500, (64, 10))  # an object on its background
    masked = rare_mask(tokens, 500)
    share = masked.sum(1) / 50
    assert 0.2 <= share.min() < 0.3
    assert 0.9 < share.max() <= 1
    few = masked[share < 0.5]
    assert few[:, 20:30].float().mean() > 0.95
    assert few[:, :20].float().mean() < 0.3
    assert rare_mask(torch.zeros(3, 1, dtype=torch.int64), 1).all()


@pytest.mark.parametrize("reading_order", [0.0, 1.0])
def test_contrasting_captions_differ_in_their_relation_alone(reading_order: float) -> None:
    rng, named_first = random.Random(1), []
    dataset = SceneDataset("basic", size=16, seed=4)
    for i in range(300):
        sample = dataset[i]
        right, wrong = contrasting_captions(sample.caption, rng, reading_order=reading_order)
        claims = parse_caption(right)
        assert in_reading_order(claims) == in_reading_order(sample.claims)
        if not sample.claims.relations:
            assert wrong is None
            continue
        assert wrong is not None
        assert in_reading_order(parse_caption(wrong)) == in_reading_order(
            turn_relation(claims) or claims
        )
        # No word gives the wrong one away: that would be learned, and not what is above what.
        later = [
            parse_caption(c).relations[0].relation in ("below", "right of") for c in (right, wrong)
        ]
        named_first.append(later[0])
        assert later == ([False, False] if reading_order else [later[0], not later[0]])
    assert len(named_first) > 100
    assert 0.3 < sum(named_first) / len(named_first) < 0.7 or reading_order


def test_contrast_is_logged_and_needs_scenes(tmp_path: Path) -> None:
    config = muse_training(tmp_path, contrast=1.0)
    quiet(MuseTask(config), tmp_path / "out").train()
    with (tmp_path / "out" / "metrics.csv").open(newline="") as file:
        contrast = [float(row["contrast"]) for row in csv.DictReader(file)]
    # Nothing is known yet of what is above what; without a picture of two objects it is 0.
    assert all(c == 0 or 0.6 < c < 0.8 for c in contrast)
    assert any(contrast)

    with pytest.raises(ValueError, match=r"contrast .* need captions of scenes"):
        dataclasses.replace(config, data=DataConfig(source=str(tmp_path), size=16))


def test_field_learns_what_muse_ends_with(tmp_path: Path) -> None:
    config = mrf_training(tmp_path, with_muse=True, steps=40, learning_rate=0.1, decay_steps=10)
    quiet(MRFTask(config), tmp_path / "run").train()
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert TokenMRF.from_pretrained(tmp_path / "run" / "model").config == config.model


@torch.no_grad()
def undecided(task: MRFTask) -> MRFTask:
    """Makes the generator leave a choice everywhere."""
    assert task.pipeline is not None
    task.pipeline.muse.norm_out.weight.mul_(0.02)
    return task


def test_a_field_sees_what_muse_leaves_at_every_exit_step(tmp_path: Path) -> None:
    config = mrf_training(tmp_path, with_muse=True)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, exit_spread=1))
    task = undecided(MRFTask(config))
    trainer = quiet(task, tmp_path / "run")
    left = task._left_by_muse(trainer)
    assert len(task.dataset) == 3 * 7 == len(left.scores) == len(left.known) == len(left.final)
    task.left = left
    rows = task._left_rows(torch.arange(21), "cpu")
    assert task.pipeline is not None
    muse, encode = task.pipeline.muse, task.pipeline.text_encoder.encode
    captions = list(PictureDataset(config.data, seed=config.run.seed).captions(7))
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for exit_step in (1, 2, 3, 6):
        final = muse.generate(
            encode(captions), encode([""] * 7), steps=6, exit_step=exit_step,
            generators=[torch.Generator().manual_seed(i) for i in range(7)],
            finish=lambda s, t, k=exit_step: seen.setdefault(k, (s, t))[1],
        )  # fmt: skip
    for row, exit_step in enumerate((1, 2, 3)):
        scores, tokens = seen[exit_step]
        own = slice(7 * row, 7 * row + 7)
        likeliest = scores.topk(8, -1)
        assert torch.equal(rows.scores[own], likeliest.values.bfloat16().float())
        assert torch.equal(rows.candidates[own], likeliest.indices)
        assert torch.equal(rows.known[own], tokens.masked_fill(tokens == 16, -1))
        assert torch.equal(rows.final[own], final)
    run = dataclasses.replace(config.run, mixed_precision="bf16")
    rounded = undecided(MRFTask(dataclasses.replace(config, run=run)))
    scores = rounded._left_by_muse(trainer).scores
    near = (scores[:7] - seen[1][0].topk(8, -1).values).abs()
    assert 0 < near[near.isfinite()].mean() < 0.1


def test_a_field_that_settles_in_rounds_is_shown_a_share(tmp_path: Path) -> None:
    config = mrf_training(tmp_path, with_muse=True)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, reveal=True))
    task = undecided(MRFTask(config))
    left = task.left = task._left_by_muse(quiet(task, tmp_path / "run"))
    torch.manual_seed(0)
    rows = torch.arange(200) % len(left.final)
    scores, candidates, known, final = task._left_rows(rows, "cpu")
    assert scores.shape == candidates.shape == (200, 16, config.loss.candidates)
    masked = left.known[rows] < 0
    assert torch.equal(known[~masked], left.known[rows][~masked].long())
    shown = (known >= 0) & masked
    assert torch.equal(known[shown], final[shown])
    share = shown.sum(1) / masked.sum(1)
    assert 0.4 < share.mean() < 0.6
    assert share.min() < 0.1
    assert share.max() > 0.9


def test_a_generator_that_leaves_no_choice_is_refused(tmp_path: Path) -> None:
    config = mrf_training(tmp_path, with_muse=True)
    task = MRFTask(config)
    assert task.pipeline is not None
    with torch.no_grad():
        task.pipeline.muse.output_bias[3] = 100
    with pytest.raises(ValueError, match="of 7 captions the generator leaves no choice after"):
        task._left_by_muse(quiet(task, tmp_path / "run"))


def test_fields_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = mrf_training(tmp_path)
    other = dataclasses.replace(config.model, vocab_size=9)
    with pytest.raises(ValueError, match="train mrf: the model has 9 tokens on a grid of 4, but"):
        MRFTask(dataclasses.replace(config, model=other))
    TokenMRF(dataclasses.replace(config.model, rank=2)).save_pretrained(tmp_path / "field")
    loss = dataclasses.replace(config.loss, initialize_from=str(tmp_path / "field"))
    with pytest.raises(ValueError, match=r"initialize_from, .*, is TokenMRFConfig\(.*, expected"):
        MRFTask(dataclasses.replace(config, loss=loss))
    with pytest.raises(ValueError, match=r"exit_step is 6, expected less than loss\.steps, 6"):
        dataclasses.replace(config.loss, exit_step=6)
    with pytest.raises(
        ValueError, match=r"exit_spread is 2, expected at most 1, from loss\.exit_s"
    ):
        dataclasses.replace(config.loss, exit_spread=2)


def test_models_of_other_than_three_channels_are_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(vqgan_training(), model=vqgan_config(in_channels=1))
    with pytest.raises(ValueError, match="train vqgan: vqgan has 1 channels in and 3 out"):
        VQGANTask(config)
    make_vqgan(out_channels=1).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="train muse: vqgan has 3 channels in and 1 out"):
        MuseTask(muse_training(tmp_path))


def test_learning_rate() -> None:
    run = RunConfig(steps=100, learning_rate=2.0, warmup_steps=10, decay_steps=20)
    assert learning_rate(0, run) == pytest.approx(0.2)
    assert learning_rate(9, run) == 2.0
    assert learning_rate(80, run) == 2.0
    assert learning_rate(90, run) == pytest.approx(1.0)
    assert learning_rate(99, run) == pytest.approx(0.1)


def test_batches_cover_every_epoch_once() -> None:
    length, batch, world = 24, 3, 2
    seen = [
        [index for b in StepBatches(0, 8, batch, rank, world, length, 0) for index in b]
        for rank in range(world)
    ]
    for epoch in range(2):
        part = [i for rank in seen for i in rank[epoch * 12 : (epoch + 1) * 12]]
        assert sorted(part) == list(range(length))
    assert seen[0][:12] != seen[0][12:]
    later = [index for b in StepBatches(3, 8, batch, 0, world, length, 0) for index in b]
    assert later == seen[0][9:]


def test_recipes_load() -> None:
    for kind, name in (
        ("vqgan", "warmup"), ("vqgan", "embedded"), ("muse", "embedded"), ("features", "embedded")
    ):  # fmt: skip
        assert load_config(kind, name).run.steps > 0
    changed = load_config("muse", "embedded", ["run.steps=7", "data.vocabulary=full"])
    assert (changed.run.steps, changed.data.vocabulary) == (7, "full")
