# SPDX-License-Identifier: Apache-2.0
"""Training on several processes, and on folders."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

pytest.importorskip("accelerate")

from t2p_fast.checkpoints import read_safetensors
from t2p_fast.models.vqgan import VQGAN
from t2p_fast.training.config import DataConfig, RunConfig, VQGANLossConfig, VQGANTraining
from t2p_fast.training.trainer import StepBatches, Trainer
from t2p_fast.training.vqgan import VQGANTask
from tiny_models import one_thread, vqgan_config  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

PROGRAM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from t2p_fast.models.vqgan import VQGANConfig
from t2p_fast.training.config import DataConfig, RunConfig, VQGANLossConfig, VQGANTraining
from t2p_fast.training.trainer import Trainer
from t2p_fast.training.vqgan import VQGANTask

for name, ema_decay in (("gradient", None), ("averaged", 0.9)):
    config = VQGANTraining(
        model=VQGANConfig(
            sample_size=16, block_out_channels=(8, 8, 8), layers_per_block=1, attn_resolutions=(),
            mid_attention=False, latent_channels=8, num_vq_embeddings=16, vq_embed_dim=4,
            norm_type="rms", encoder_kernel_size=1, ema_decay=ema_decay,
        ),
        data=DataConfig(size=16),
        run=RunConfig(
            steps=4, batch_size=2, warmup_steps=1, decay_steps=1, mixed_precision="no",
            log_every=2, save_every=2, sample_every=100,
        ),
        loss=VQGANLossConfig(
            perceptual=0.0, adversarial=0.1, adversarial_start=1, quantize_start=2,
            kmeans_pictures=4, dead_code_threshold=0.5,
        ),
    )
    trainer = Trainer(VQGANTask(config), Path(sys.argv[1]) / name, cpu=True, report=lambda _: None)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    rank = trainer.accelerator.process_index
    state = {
        f"{module}/{k}": v for module in trainer.task.modules
        for k, v in trainer.unwrap(module).state_dict().items()
    }
    torch.save(state, Path(sys.argv[1]) / f"{name}-{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            _, messages = process.communicate(timeout=900)
            assert process.returncode == 0, messages
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for name in ("gradient", "averaged"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        for key, value in first.items():
            assert value.isfinite().all(), key
            assert torch.equal(value, second[key]), (name, key)
        assert any(key.startswith("discriminator/") for key in first)
        saved = read_safetensors(tmp_path / name / "state.safetensors")
        assert torch.equal(
            saved["module/vqgan/encoder.conv_in.weight"], first["vqgan/encoder.conv_in.weight"]
        )


def test_processes_share_an_epoch_without_overlap() -> None:
    length, batch, world = 30, 5, 3
    batches = [list(StepBatches(0, 4, batch, rank, world, length, 1)) for rank in range(world)]
    for epoch in range(2):
        steps = range(2 * epoch, 2 * epoch + 2)
        parts = [{i for step in steps for i in batches[rank][step]} for rank in range(world)]
        assert [len(part) for part in parts] == [10, 10, 10]
        assert set.union(*parts) == set(range(length))


def test_epochs_that_end_in_the_middle_of_a_batch() -> None:
    batches = StepBatches(0, 7, 4, 0, 1, 7, 3)
    indices = [i for batch in batches for i in batch]
    assert len(batches) == 7
    for epoch in range(4):
        assert sorted(indices[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert indices[:7] != indices[7:14]
    assert len(StepBatches(5, 3, 4, 0, 1, 7, 3)) == 0


def test_endless_data_is_taken_in_order() -> None:
    assert list(StepBatches(2, 4, 3, 1, 2, 1 << 31, 0)) == [[15, 16, 17], [21, 22, 23]]


def test_a_folder_of_few_pictures(tmp_path: Path) -> None:
    """Fewer pictures than a sheet of samples shows, and than k-means asks for."""
    lines = []
    for i, color in enumerate(("red", "green", "blue", "white", "black")):
        Image.new("RGB", (20 + i, 16), color).save(tmp_path / f"{color}.png")
        lines.append(json.dumps({"file_name": f"{color}.png", "text": f"all {color}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    config = VQGANTraining(
        model=vqgan_config(ema_decay=0.9),
        data=DataConfig(source=str(tmp_path), size=16),
        run=RunConfig(
            steps=4, batch_size=2, mixed_precision="no", log_every=2, save_every=2, num_workers=1
        ),
        loss=VQGANLossConfig(perceptual=0.0, adversarial=0.0, quantize_start=1),
    )
    out = tmp_path / "run"
    folder = Trainer(VQGANTask(config), out, cpu=True, report=lambda _: None).train()
    assert VQGAN.from_pretrained(folder).config == config.model
    with Image.open(out / "samples" / "0000004.png") as sheet:
        assert sheet.size == (8 * 16 * 2, 6 * 16 * 2)
    (tmp_path / "red.png").write_bytes(b"no picture")
    for workers in (0, 1):
        run = dataclasses.replace(config.run, num_workers=workers)
        task = VQGANTask(dataclasses.replace(config, run=run))
        with pytest.raises(ValueError, match=r"^[^\n]*/red\.png: not a readable picture[^\n]*$"):
            Trainer(task, tmp_path / "bad", cpu=True, report=lambda _: None).train()
    missing = dataclasses.replace(config, data=DataConfig(source=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"none/metadata\.jsonl: not a readable file"):
        VQGANTask(missing)
