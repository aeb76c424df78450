# SPDX-License-Identifier: Apache-2.0
"""``t2p-fast``: generate, reconstruct, train, bench, info.

Imports of torch and of models are inside the commands, so that ``--help`` and mistakes answer at
once. Every foreseeable error is one line on stderr and exit code 2.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from PIL import Image

_PROCESS_START = time.perf_counter()

# Of a result: 0.8 GB of memory.
_MOST_PIXELS = 1 << 28

_PIPELINES = ("muse", "markovgen", "early-exit")

# The base class of all mistakes on the command line; typer brings its own copy of click since 0.20
# and does not export it.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Text to pixels, fast.",
)
train_app = typer.Typer(help="Train a model on scenes or on a folder.")
app.add_typer(train_app, name="train")

_Out = Annotated[Path, typer.Option("--out", "-o", help="PNG file to write.")]
_Model = Annotated[str, typer.Option(help="'embedded', a folder, or a repository on the hub.")]
_Device = Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda', 'cuda:1', ...")]
_DType = Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'float16'.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: _Out = Path("out.png"),
    number: Annotated[int, typer.Option("-n", "--number", help="Pictures, as a grid.")] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Of the first picture; random if absent.")
    ] = None,
    pipeline: Annotated[
        str, typer.Option(help="'muse', 'markovgen' or 'early-exit' (markovgen without its field).")
    ] = "muse",
    steps: Annotated[int, typer.Option(help="Rounds of mask-predict.")] = 32,
    exit_step: Annotated[
        int | None, typer.Option(help="Round after which markovgen and early-exit end.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 2.0,
    negative: Annotated[str, typer.Option(help="What to steer away from.")] = "",
    temperature: Annotated[float, typer.Option(help="Of the token distribution.")] = 1.0,
    size: Annotated[
        int | None, typer.Option(help="Side in pixels: 64, or 128 by a second stage.")
    ] = None,
    scale: Annotated[int, typer.Option(help="Enlarge the result by this factor.")] = 1,
    model: _Model = "embedded",
    device: _Device = "auto",
    dtype: _DType = "float32",
    timings: Annotated[bool, typer.Option("--timings", help="Print seconds per stage.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Draw pictures from a prompt."""
    _check_range("-n", number, 1, 1024)
    _check_range("--steps", steps, 1, 4096)
    _check_range("--scale", scale, 1, 64)
    if pipeline not in _PIPELINES:
        raise ValueError(f"--pipeline: is {pipeline!r}, expected one of {', '.join(_PIPELINES)}")
    if exit_step is not None:
        if pipeline == "muse":
            raise ValueError("--exit-step: goes with --pipeline markovgen or early-exit")
        _check_range("--exit-step", exit_step, 1, steps)
    _check_output(out)
    import torch

    from t2p_fast.pipelines import MarkovGenPipeline, MusePipeline, markovgen_exit_step

    imported = time.perf_counter()
    kind = MarkovGenPipeline if pipeline == "markovgen" else MusePipeline
    drawer = kind.from_pretrained(model, dtype=_dtype(dtype), device=_device(device))
    if pipeline != "muse" and exit_step is None:
        exit_step = markovgen_exit_step(steps)
    loaded = time.perf_counter()
    size = size or drawer.sizes[0]
    if size not in drawer.sizes:
        known = ", ".join(map(str, drawer.sizes))
        raise ValueError(f"--size: is {size}, expected one of {known} with this model")
    side = size * scale
    if number * side**2 > _MOST_PIXELS:
        raise ValueError(
            f"--scale: is {scale}, {number} pictures of {side}x{side} pixels, expected at most "
            f"{_MOST_PIXELS} pixels in all"
        )
    with _progress("drawing", exit_step or steps, progress) as advance:
        result = drawer(
            prompt,
            negative_prompt=negative,
            num_images=number,
            size=size,
            steps=steps,
            exit_step=exit_step,
            guidance=guidance,
            temperature=temperature,
            seed=seed,
            on_step=lambda *_: advance(),
        )
    drawn = time.perf_counter()
    from t2p_fast import __version__

    parameters = {
        "prompt": prompt,
        "negative": negative,
        "number": number,
        "seed": result.seeds[0],
        "pipeline": pipeline,
        "steps": steps,
        "exit_step": exit_step or steps,
        "guidance": guidance,
        "temperature": temperature,
        "size": size,
        "scale": scale,
        "model": model,
        "device": str(drawer.vqgan.device),
        "dtype": dtype,
        "version": __version__,
    }
    _save_png(_grid(result.images, scale), out, parameters)
    typer.echo(f"{out}: {number} picture{'s' * (number > 1)}, seed {result.seeds[0]}")
    if timings:
        stages = {
            "imports": imported - _PROCESS_START,
            "load": loaded - imported,
            **result.timings,
            "save": time.perf_counter() - drawn,
            "total": time.perf_counter() - _PROCESS_START,
        }
        for name, seconds in stages.items():
            typer.echo(f"{name:>12} {seconds:8.3f} s")
        typer.echo(f"{'threads':>12} {torch.get_num_threads():8d}")


@app.command()
def reconstruct(
    picture: Annotated[Path, typer.Argument(help="A picture of any size.")],
    out: _Out = Path("reconstruction.png"),
    tokens: Annotated[
        Path | None, typer.Option(help="PNG file for the token map, a colour per token.")
    ] = None,
    model: _Model = "embedded",
    device: _Device = "auto",
    dtype: _DType = "float32",
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Send a picture through the tokenizer and back."""
    _check_output(out)
    if tokens is not None:
        _check_output(tokens, option="--tokens")
        for other, what in ((out, "the file of --out"), (picture, "the picture to read")):
            if os.path.realpath(tokens) == os.path.realpath(other):
                raise ValueError(f"--tokens: {tokens} is also {what}")
    from t2p_fast.data.pictures import read_picture

    image = read_picture(picture)
    if image.width < 8 or image.height < 8:
        raise ValueError(
            f"{picture}: is {image.width}x{image.height}, expected at least 8x8 pixels"
        )
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image

    from t2p_fast.models.tiling import count_tiles, decode_tiled, encode_tiled
    from t2p_fast.models.vqgan import VQGAN

    vqgan = VQGAN.from_pretrained(
        model, subfolder="vqgan", dtype=_dtype(dtype), device=_device(device)
    )
    vqgan.check_rgb("reconstruct")
    f = vqgan.config.downsampling_factor
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    pixels = (array.float() / 127.5 - 1).to(vqgan.device, vqgan.dtype)
    padding = (0, -image.width % f, 0, -image.height % f)
    indices = encode_tiled(vqgan, F.pad(pixels, padding, mode="replicate"))
    with _progress("decoding", count_tiles(*indices.shape[1:]), progress) as advance:
        made = decode_tiled(vqgan, indices, on_tile=advance)
    made = made[:, :, : image.height, : image.width].float().clamp(-1, 1)
    error = (made - pixels.float()).square().mean()
    result = ((made[0] + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    parameters = {
        "picture": picture.name, "model": model, "device": str(vqgan.device), "dtype": dtype
    }  # fmt: skip
    _save_png(Image.fromarray(result), out, parameters)
    if tokens is not None:
        _save_png(_token_map(indices[0].cpu().numpy(), f), tokens, parameters)
    different = len(torch.unique(indices))
    typer.echo(
        f"{out}: {indices.shape[2]}x{indices.shape[1]} tokens, {different} different, "
        f"PSNR {10 * torch.log10(4 / error.clamp_min(1e-10)):.2f} dB"
    )


_Config = Annotated[str, typer.Option(help="A shipped recipe ('embedded') or a JSON file.")]
_RunOut = Annotated[Path, typer.Option(help="Folder of the run; an unfinished run is resumed.")]
_Set = Annotated[list[str] | None, typer.Option("--set", help="section.option=value")]


@train_app.command("vqgan")
def train_vqgan(
    out: _RunOut, config: _Config = "embedded", set_: _Set = None, device: _Device = "auto"
) -> None:
    """Train the picture tokenizer."""
    _train("vqgan", config, out, set_, device)


@train_app.command("muse")
def train_muse(
    out: _RunOut, config: _Config = "embedded", set_: _Set = None, device: _Device = "auto"
) -> None:
    """Train the generator and its text encoder on a tokenizer's tokens."""
    _train("muse", config, out, set_, device)


@train_app.command("super-resolution")
def train_super_resolution(
    out: _RunOut, config: _Config = "embedded", set_: _Set = None, device: _Device = "auto"
) -> None:
    """Train the generator's second stage, from small pictures to finer ones."""
    _train("super-resolution", config, out, set_, device)


@train_app.command("mrf")
def train_mrf(
    out: _RunOut, config: _Config = "embedded", set_: _Set = None, device: _Device = "auto"
) -> None:
    """Train MarkovGen's field on tokens of pictures, or on a generator's last rounds."""
    _train("mrf", config, out, set_, device)


@train_app.command("features")
def train_features(
    out: _RunOut, config: _Config = "embedded", set_: _Set = None, device: _Device = "auto"
) -> None:
    """Train the feature encoder of the perceptual loss."""
    _train("features", config, out, set_, device)


@app.command(
    # The benchmarks read their own options, --help among them.
    context_settings={"ignore_unknown_options": True, "help_option_names": []}
)
def bench(
    op: Annotated[str, typer.Argument(help="Which op, e.g. 'vq'; or 'markovgen'.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="See 'bench vq --help'.")] = None,
) -> None:
    """Time an op against what people use otherwise."""
    from t2p_fast.benchmarks.run import (  # type: ignore[import-untyped,unused-ignore]
        main as run_main,
    )

    raise typer.Exit(run_main([op, *(arguments or [])]))


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Show version, build and machine."""
    import torch

    from t2p_fast import __version__, build_info

    facts: dict[str, Any] = {
        "version": __version__,
        **{k: v for k, v in build_info().items() if k != "version"},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
        typer.echo(f"{name:>13}  {shown}")


def _train(kind: str, config: str, out: Path, overrides: list[str] | None, device: str) -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise ValueError("training needs accelerate: pip install 't2p-fast[train]'") from None
    from t2p_fast.training.config import load_config

    settings = load_config(kind, config, overrides or [])
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, expected a folder")
    cpu = _device(device).type == "cpu"
    _check_output(out / "state.safetensors", make_parent=True)
    task: Any
    if kind == "vqgan":
        from t2p_fast.training.vqgan import VQGANTask

        task = VQGANTask(settings)
    elif kind == "muse":
        from t2p_fast.training.muse import MuseTask

        task = MuseTask(settings)
    elif kind == "super-resolution":
        from t2p_fast.training.super_resolution import SuperResolutionTask

        task = SuperResolutionTask(settings)
    elif kind == "mrf":
        from t2p_fast.training.mrf import MRFTask

        task = MRFTask(settings)
    else:
        from t2p_fast.training.features import FeatureEncoderTask

        task = FeatureEncoderTask(settings)
    from t2p_fast.training.trainer import Trainer

    with _progress(f"training {kind}", settings.run.steps, True) as advance:
        trainer = Trainer(task, out, cpu=cpu, report=typer.echo, on_step=advance)
        try:
            folder = trainer.train()
        except (KeyboardInterrupt, SystemExit):
            if trainer.accelerator.is_main_process:
                step, steps = trainer.saved_step, settings.run.steps
                saved = f"step {step} of {steps}, saved in {out}" if step else "the beginning"
                typer.echo(f"t2p-fast: stopped; the same command goes on from {saved}", err=True)
            raise
    typer.echo(f"{folder}: finished after {settings.run.steps} steps")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: is {value}, expected {low} to {high}")


def _check_output(path: Path, *, option: str = "--out", make_parent: bool = False) -> None:
    """Refuses an output that cannot be written before any work is done for it."""
    if path.suffix.lower() != ".png" and not make_parent:
        raise ValueError(f"{option}: {path} does not end in .png")
    path = Path(os.path.realpath(path))
    if make_parent:
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder, expected a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{option}: {path} is a pipe or a device, expected a file")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: no permission to write in {path.parent}")


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: is {name!r}, expected 'auto', 'cpu' or 'cuda'") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"--device: is {name!r}, but torch sees {count} CUDA devices")
    elif device.type != "cpu":
        raise ValueError(f"--device: is {name!r}, expected 'auto', 'cpu' or 'cuda'")
    return device


def _dtype(name: str) -> torch.dtype:
    import torch

    known = {
        "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16
    }  # fmt: skip
    if name not in known:
        raise ValueError(f"--dtype: is {name!r}, expected one of {', '.join(known)}")
    return known[name]


def _save_png(image: Image.Image, path: Path, parameters: dict[str, Any]) -> None:
    from PIL.PngImagePlugin import PngInfo

    from t2p_fast.checkpoints import write_atomically

    metadata = PngInfo()
    # File names may be bytes that are not UTF-8.
    text = json.dumps(parameters, ensure_ascii=False).encode("utf-8", "replace").decode()
    metadata.add_itxt("t2p_fast", text)
    write_atomically(path, lambda temporary: image.save(temporary, "PNG", pnginfo=metadata))


def _grid(images: list[Image.Image], scale: int) -> Image.Image:
    """Pictures in rows of about the square root of their number."""
    from PIL import Image

    columns = max(1, round(len(images) ** 0.5 + 0.49))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    if scale > 1:
        size = (sheet.width * scale, sheet.height * scale)
        sheet = sheet.resize(size, Image.Resampling.NEAREST)
    return sheet


def _token_map(indices: Any, factor: int) -> Image.Image:
    """A colour per token: hues a golden angle apart, so that near numbers look different."""
    import numpy as np
    from PIL import Image

    hue = (indices * 0.61803398875 % 1 * 255).astype(np.uint8)
    light = (155 + indices * 37 % 100).astype(np.uint8)
    array = np.stack([hue, np.full_like(hue, 150), light], -1)
    image = Image.fromarray(array, "HSV").convert("RGB")
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


@contextmanager
def _progress(what: str, total: int, enabled: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr if that is a terminal."""
    if not (enabled and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def _orderly_end() -> Iterator[None]:
    """Lets SIGTERM end the process as Ctrl-C does, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():  # which alone sees signals
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``t2p-fast``."""
    if arguments is None:
        arguments = sys.argv[1:]
    # What a terminal cannot show, such as the name of a file, must not end a command.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _orderly_end():
            code = app(args=arguments or ["--help"], standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except _UsageError as error:
        code = _fail(error.format_message())
    except (ValueError, TypeError, OSError, MemoryError, FloatingPointError) as error:
        code = _fail(str(error) or type(error).__name__)
    except ImportError as error:
        # The compiled module refuses what the environment asks of it when it is imported.
        if "T2P_" not in str(error):
            raise
        code = _fail(str(error))
    except RuntimeError as error:
        # torch says it in several ways, and which class it raises depends on the device.
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        code = _fail(f"not enough memory ({error})")
    sys.exit(code or 0)


def _fail(message: str) -> int:
    sys.stderr.write(f"t2p-fast: error: {' '.join(message.split())}\n")
    return 2


if __name__ == "__main__":
    main()
