# SPDX-License-Identifier: Apache-2.0
"""The commands: what they write, and one clear line with exit code 2 for every mistake."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2p_fast import cli
from tiny_models import make_vqgan, save_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    ramp = np.linspace(0, 255, 37 * 53 * 3).reshape(37, 53, 3).astype(np.uint8)
    Image.fromarray(ramp).save(path)
    return path


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    code = stopped.value.code
    assert isinstance(code, int)
    return code


def assert_one_line(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    captured = capsys.readouterr()
    assert captured.err.startswith("t2p-fast: error: ")
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


def resolved_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def test_generate_writes_a_grid_with_metadata(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.png"
    arguments = ("generate", "a red circle", "-o", out, "-n", 5, "--seed", 3, "--steps", 2)
    assert run(*arguments, "--model", model, "--scale", 2, "--timings") == 0
    image = opened(out)
    assert image.size == (3 * 32, 2 * 32)
    parameters = json.loads(image.info["t2p_fast"])
    assert parameters["prompt"] == "a red circle"
    assert (parameters["seed"], parameters["steps"], parameters["number"]) == (3, 2, 5)
    assert (parameters["scale"], parameters["device"]) == (2, str(resolved_device()))
    assert parameters["dtype"] == "float32"
    printed = capsys.readouterr().out
    for stage in ("imports", "load", "text", "tokens", "decode", "save", "total"):
        assert stage in printed
    first = np.asarray(image)
    assert run(*arguments, "--model", model, "--scale", 2) == 0
    assert np.array_equal(first, np.asarray(opened(out)))


def test_reconstruct_any_size_with_tokens(
    model: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tokens = tmp_path / "out.png", tmp_path / "tokens.png"
    assert run("reconstruct", photo, "-o", out, "--tokens", tokens, "--model", model) == 0
    assert opened(out).size == (53, 37)
    assert opened(tokens).size == (56, 40)
    assert "14x10 tokens" in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    keys = {"version", "cuda", "cuda_archs", "isa", "isa_built", "threads", "torch", "tensor_road"}
    assert keys <= set(facts)
    assert facts["isa"] in facts["isa_built"]
    assert run("info") == 0
    assert facts["torch"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["generate"], "'prompt'"),
        (["generate", ""], "prompt is ''"),
        (["generate", "a", "--steps", "x"], "--steps"),
        (["generate", "a", "--steps", "0"], "--steps: is 0"),
        (["generate", "a", "-n", "0"], "-n: is 0"),
        (["generate", "a", "-n", "100000"], "-n: is 100000"),
        (["generate", "a", "--scale", "0"], "--scale: is 0"),
        (["generate", "a", "--size", "32"], "--size: is 32, expected one of 16 with this model"),
        (["generate", "a", "--pipeline", "dalle"], "--pipeline: is 'dalle', expected one of muse"),
        (["generate", "a", "--exit-step", "4"], "--exit-step: goes with --pipeline markovgen"),
        (
            ["generate", "a", "--pipeline", "early-exit", "--exit-step", "33"],
            "--exit-step: is 33, expected 1 to 32",
        ),
        (["generate", "a", "--pipeline", "markovgen"], "config.json: not a readable JSON file"),
        (["generate", "a", "-n", "1024", "--scale", "64"], "--scale: is 64, 1024 pictures of 1024"),
        (["generate", "a \udcff"], "prompt is 'a \\udcff', expected a text of valid Unicode"),
        (["generate", "circle " * 5000], "at most 24 are allowed"),
        (["generate", "a", "--guidance", "nan"], "guidance is nan"),
        (["generate", "a", "--seed", "-1"], "seed is -1"),
        (["generate", "a", "--device", "tpu"], "--device: is 'tpu'"),
        (["generate", "a", "--device", "cuda:99"], "--device: is 'cuda:99'"),
        (["generate", "a", "--dtype", "int8"], "--dtype: is 'int8'"),
        (["generate", "a", "--model", "no/such/folder"], "no/such/folder: no such folder"),
        (["generate", "a", "--nonsense"], "--nonsense"),
        (["paint"], "paint"),
        (["reconstruct", "no-such.png"], "no-such.png: no such file"),
        (["train", "vqgan"], "'--out'"),
        (["train", "vqgan", "--out", "run", "--config", "nope"], "config is 'nope'"),
        (["train", "vqgan", "--out", "run", "--set", "run.steps"], "section.option=value"),
        (["train", "vqgan", "--out", "run", "--set", "run.nope=1"], "unknown option 'nope'"),
        (["train", "muse", "--out", "run", "--set", "loss.vqgan=nope/x"], "nope/x"),
    ],
)
def test_mistakes(
    arguments: list[str],
    part: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if arguments[0] == "generate" and "--model" not in arguments:
        arguments = [*arguments, "--model", str(model)]
    assert run(*arguments) == 2
    assert_one_line(capsys, part)
    assert not list(tmp_path.rglob("*.png"))


def test_file_names_that_are_not_utf8(
    model: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, out = (tmp_path / os.fsdecode(name) for name in (b"in\xff.png", b"out\xff.png"))
    picture.write_bytes(photo.read_bytes())
    assert run("reconstruct", picture, "-o", out, "--model", model) == 0
    assert "out\\udcff.png: 14x10 tokens" in capsys.readouterr().out
    assert json.loads(opened(out).info["t2p_fast"])["picture"] == "in?.png"
    assert run("reconstruct", tmp_path / "no\udcff.png", "-o", out, "--model", model) == 2
    assert_one_line(capsys, "no\\udcff.png: no such file")


def test_unwritable_outputs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, part in (
        (tmp_path / "none" / "out.png", "does not exist"),
        (tmp_path / "out.jpg", "does not end in .png"),
    ):
        assert run("generate", "a", "-o", out, "--model", model) == 2
        assert_one_line(capsys, part)
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert run("generate", "a", "-o", folder, "--model", model) == 2
    assert_one_line(capsys, "is a folder")
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    link = tmp_path / "link.png"
    link.symlink_to(pipe)
    for out in (pipe, link):
        assert run("generate", "a", "-o", out, "--model", model) == 2
        assert_one_line(capsys, "pipe.png is a pipe or a device, expected a file")
    # The tests may run as root, to whom nothing is forbidden.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert run("generate", "a", "-o", tmp_path / "out.png", "--model", model) == 2
    assert_one_line(capsys, "no permission to write")


def test_full_disk_leaves_the_old_picture(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"precious")

    def full(_: Image.Image, path: Path, *_args: object, **_options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert run("generate", "a", "-o", out, "--steps", 1, "--model", model) == 2
    assert_one_line(capsys, "No space left on device")
    assert out.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [out]


def test_damaged_pictures(
    model: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(photo.read_bytes()[:200])
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    for path in (truncated, text):
        assert run("reconstruct", path, "-o", tmp_path / "out.png", "--model", model) == 2
        assert_one_line(capsys, path.name, "not a readable picture")
    small = tmp_path / "small.png"
    Image.new("RGB", (4, 4)).save(small)
    assert run("reconstruct", small, "-o", tmp_path / "out.png", "--model", model) == 2
    assert_one_line(capsys, "is 4x4, expected at least 8x8")
    assert not (tmp_path / "out.png").exists()


def test_tokenizer_of_other_channels(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_vqgan(in_channels=1, out_channels=1).save_pretrained(tmp_path / "gray" / "vqgan")
    arguments = ("-o", tmp_path / "out.png", "--model", tmp_path / "gray")
    assert run("reconstruct", photo, *arguments) == 2
    assert_one_line(capsys, "reconstruct: vqgan has 1 channels in and 1 out, expected 3 and 3")


def test_sixteen_bit_gray_is_not_white(model: Path, tmp_path: Path) -> None:
    picture, out = tmp_path / "gray.png", tmp_path / "out.png"
    ramp = np.linspace(0, 255, 16 * 16).reshape(16, 16)
    results = []
    for array in (np.rint(ramp * 257).astype(np.uint16), np.rint(ramp).astype(np.uint8)):
        Image.fromarray(array).save(picture)
        assert run("reconstruct", picture, "-o", out, "--model", model) == 0
        results.append(np.asarray(opened(out)))
    assert np.array_equal(*results)


def test_damaged_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_pipeline(tmp_path / "model")
    weights = folder / "muse" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    arguments = ("generate", "a", "-o", tmp_path / "out.png", "--model", folder)
    assert run(*arguments) == 2
    assert_one_line(capsys, "model.safetensors", "not a readable safetensors file")
    weights.write_bytes((folder / "vqgan" / "model.safetensors").read_bytes())
    assert run(*arguments) == 2
    assert_one_line(capsys, "does not fit Muse")
    config = (folder / "vqgan" / "config.json").read_text()
    (folder / "muse" / "config.json").write_text(config)
    assert run(*arguments) == 2
    assert_one_line(capsys, "is a checkpoint of VQGAN, expected Muse")
    assert not (tmp_path / "out.png").exists()


def test_outputs_that_get_in_each_others_way(
    model: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    same = tmp_path / "." / "out.png"
    assert run("reconstruct", photo, "-o", out, "--tokens", same, "--model", model) == 2
    assert_one_line(capsys, "--tokens", "is also the file of --out")
    assert run("reconstruct", photo, "-o", out, "--tokens", "x.gif", "--model", model) == 2
    assert_one_line(capsys, "--tokens: x.gif does not end in .png")
    before = photo.read_bytes()
    assert run("reconstruct", photo, "-o", out, "--tokens", photo, "--model", model) == 2
    assert_one_line(capsys, "--tokens", "is also the picture to read")
    assert photo.read_bytes() == before
    assert not out.exists()
    (tmp_path / "file").touch()
    assert run("train", "vqgan", "--config", "warmup", "--out", tmp_path / "file") == 2
    assert_one_line(capsys, "is a file, expected a folder")
    run_folder = tmp_path / "run"
    assert run("train", "vqgan", "--out", run_folder, "--device", "tpu") == 2
    assert_one_line(capsys, "--device: is 'tpu'")
    assert not run_folder.exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes\nstack"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_too_little_memory_is_one_line(
    model: Path,
    tmp_path: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def generate(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("t2p_fast.models.muse.Muse.generate", generate)
    assert run("generate", "a", "-o", tmp_path / "out.png", "--model", model) == 2
    assert_one_line(capsys, "emory")
    assert list(tmp_path.iterdir()) == []


def test_bench_reads_its_own_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmarks = pytest.importorskip("t2p_fast.benchmarks.run")
    assert run("bench", "vq", "--help") == 0
    assert "--quick" in capsys.readouterr().out
    assert run("bench", "vq", "--nonsense") == 2
    assert "--nonsense" in capsys.readouterr().err
    assert run("bench", "no_such_op", "--quick") == 2
    assert "no_such_op" in capsys.readouterr().err
    seen: list[list[str]] = []
    monkeypatch.setattr(benchmarks, "main", lambda arguments: seen.append(arguments) or 1)
    assert run("bench", "vq", "--quick", "--threads", "1", "2") == 1
    assert seen == [["vq", "--quick", "--threads", "1", "2"]]


TINY = {
    "model": {
        "sample_size": 16, "block_out_channels": [8, 8, 8], "layers_per_block": 1,
        "attn_resolutions": [], "mid_attention": False, "latent_channels": 8,
        "num_vq_embeddings": 16, "vq_embed_dim": 4, "norm_type": "rms",
        "encoder_kernel_size": 1, "ema_decay": 0.9,
    },
    "data": {"size": 16},
    "run": {
        "steps": 3, "batch_size": 4, "mixed_precision": "no", "log_every": 1, "save_every": 1
    },
    "loss": {"perceptual": 0.0, "adversarial": 0.0, "quantize_start": 1, "kmeans_pictures": 8},
}  # fmt: skip


def tiny_training(tmp_path: Path, *settings: str) -> list[object]:
    pytest.importorskip("accelerate")
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    options = ["--config", config, "--out", tmp_path / "run", "--device", "cpu"]
    return ["train", "vqgan", *options, *(x for s in settings for x in ("--set", s))]


def test_diverged_training_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("run.learning_rate=1e30", "run.gradient_clip=0", "run.warmup_steps=0")
    assert run(*tiny_training(tmp_path, *settings)) == 2
    assert_one_line(capsys, "training diverged at step", "lower run.learning_rate")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_training_says_how_to_go_on(
    tmp_path: Path,
    signal_number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = tiny_training(tmp_path)
    trainer = pytest.importorskip("t2p_fast.training.trainer")
    write, writes = trainer.write_safetensors, []

    def interrupted(*arguments: object) -> None:
        write(*arguments)
        writes.append(arguments)
        if len(writes) == 2:
            os.kill(os.getpid(), signal_number)

    # A shell that starts the tests in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with handled(signal.SIGTERM), monkeypatch.context() as patch:
        patch.setattr(trainer, "write_safetensors", interrupted)
        assert run(*command) == 128 + signal_number
    signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err.strip()
    place = f"step 1 of 3, saved in {tmp_path / 'run'}"
    assert said == f"t2p-fast: stopped; the same command goes on from {place}"
    assert run(*command) == 0
    printed = capsys.readouterr().out
    assert "step 2/3" not in printed  # which was saved before the signal was looked at
    assert "step 3/3" in printed


@contextmanager
def handled(number: int) -> Iterator[None]:
    """Fails the test, and only the test, if nothing else handles a signal."""

    def fail(*_: object) -> None:
        raise AssertionError(f"signal {number} came through")

    before = signal.signal(number, fail)
    yield
    assert signal.signal(number, before) is fail  # and who handled it gave it back


def test_sigterm_leaves_no_temporary_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"precious")

    def stopped(_: Image.Image, path: Path, *_args: object, **_options: object) -> None:
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Image.Image, "save", stopped)
    with handled(signal.SIGTERM):
        assert run("generate", "a", "-o", out, "--steps", 1, "--model", model) == 143
    assert out.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["out.png"]


def test_wrong_instruction_set_is_one_line(run_python: Callable[..., str]) -> None:
    program = "from t2p_fast import cli; cli.main(['info'])"
    said = run_python(program, fails=True, T2P_ISA="foo")
    assert said.startswith("t2p-fast: error: T2P_ISA=foo is not one of scalar")
    assert said.count("\n") == 1


def test_train_and_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*tiny_training(tmp_path)) == 0
    run_folder, config = tmp_path / "run", tmp_path / "tiny.json"
    assert "finished after 3 steps" in capsys.readouterr().out
    assert (run_folder / "metrics.csv").read_text().count("\n") == 4
    muse = {
        "model": {
            "vocab_size": 16, "token_grid": 4, "hidden_size": 16, "num_layers": 1,
            "num_heads": 2, "text_embed_dim": 16,
        },
        "text": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
        "data": {"size": 16},
        "run": {"steps": 2, "batch_size": 4, "mixed_precision": "no"},
        "loss": {"vqgan": str(run_folder / "model")},
    }  # fmt: skip
    config.write_text(json.dumps(muse))
    muse_folder = tmp_path / "muse"
    assert run("train", "muse", "--config", config, "--out", muse_folder, "--device", "cpu") == 0
    out = tmp_path / "out.png"
    assert run("generate", "a red circle", "-o", out, "--model", muse_folder / "model") == 0
    assert opened(out).size == (16, 16)

    stage = {
        "model": {
            "vocab_size": 16, "token_grid": 8, "low_token_grid": 4, "hidden_size": 16,
            "num_layers": 1, "num_heads": 2, "text_embed_dim": 16,
        },
        "data": {"size": 32},
        "run": muse["run"],
        "loss": {"muse": str(muse_folder / "model"), "swapped": 0.1},
    }  # fmt: skip
    config.write_text(json.dumps(stage))
    finer = tmp_path / "finer"
    train = ("train", "super-resolution", "--config", config, "--out", finer, "--device", "cpu")
    assert run(*train) == 0
    (finer / "model").rename(muse_folder / "model" / "super_resolution")
    drawing = ("generate", "a red circle", "-o", out, "--model", muse_folder / "model")
    assert run(*drawing, "--size", 32, "--timings") == 0
    assert opened(out).size == (32, 32)
    assert json.loads(opened(out).info["t2p_fast"])["size"] == 32
    assert "finer tokens" in capsys.readouterr().out
