# SPDX-License-Identifier: Apache-2.0
"""Pipelines of diffusers before and after `t2p_fast.interop.diffusers.accelerate`, side by side.

Weights are random, so nothing is downloaded. Two copies of a pipeline are made from one seed, one
is accelerated, their outputs are compared, and then they take turns.
"""

import argparse
import csv
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from t2p_fast.checkpoints import write_atomically

from .report import machine_facts
from .run import MALLOC, environment_of
from .timing import alternate_ms

__all__ = ["PIPELINES", "Result", "Subject", "compare", "main"]

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is run.

    Attributes:
        target: A pipeline or a model.
        call: Runs it once; its output.
        random_ops: Swaps after which it draws other random numbers: not when outputs are compared.
    """

    target: Any
    call: Callable[[], Tensor]
    random_ops: tuple[str, ...] = ()


@dataclasses.dataclass
class Result:
    """One pipeline under one malloc; times are milliseconds a call."""

    pipeline: str
    what: str
    dtype: str
    threads: int
    malloc: str
    rounds: int
    before_ms: float  # median by the wall clock
    after_ms: float
    before_cpu_ms: float  # least processor time
    after_cpu_ms: float
    largest_difference: float
    largest_output: float
    compared: str  # which swaps were on when outputs were compared
    swaps: str
    shares: dict[str, list[float]]  # of a call's time before and after, by kind of layer

    @property
    def ratio(self) -> float:
        return self.before_ms / self.after_ms

    @property
    def cpu_ratio(self) -> float:
        return self.before_cpu_ms / self.after_cpu_ms


# the pipelines -----------------------------------------------------------------------------------


def _awake(model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """Norms that start as ones and zeros would hide a mistake."""
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight, 1, 0.3)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return model.to(dtype).eval().requires_grad_(False)


def _drawer(pipe: Any, **options: Any) -> Callable[[], Tensor]:
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.from_numpy(pipe(generator=generator, output_type="np", **options).images)

    return draw


def _unet(channels: Sequence[int], size: int, dtype: torch.dtype, **options: Any) -> Any:
    from diffusers import UNet2DModel

    levels = len(channels)
    return _awake(
        UNet2DModel(
            sample_size=size, in_channels=3, out_channels=3, layers_per_block=2 if size > 8 else 1,
            block_out_channels=tuple(channels), norm_num_groups=min(32, channels[0] // 2),
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            attention_head_dim=8, **options,
        ),
        dtype,
    )  # fmt: skip


def _vq_model(channels: Sequence[int], codes: int, latent: int, dtype: torch.dtype) -> Any:
    from diffusers import VQModel

    levels = len(channels)
    model = VQModel(
        in_channels=3, out_channels=3, block_out_channels=tuple(channels),
        norm_num_groups=min(32, channels[0] // 2), latent_channels=latent, num_vq_embeddings=codes,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, lookup_from_codebook=latent > 3,
    )  # fmt: skip
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return _awake(model, dtype)


def _stable_diffusion(tiny: bool, dtype: torch.dtype) -> Subject:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    channels, text, side = ((16, 32), 24, 16) if tiny else ((96, 192, 384), 256, 256)
    levels = len(channels)
    unet = UNet2DConditionModel(
        sample_size=8 if tiny else 32, block_out_channels=channels, cross_attention_dim=text,
        layers_per_block=1, norm_num_groups=8 if tiny else 32, attention_head_dim=2 if tiny else 8,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
    )  # fmt: skip
    widths = (16, 32) if tiny else (32, 64, 128, 128)
    vae = AutoencoderKL(
        block_out_channels=widths, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=_awake(vae, dtype), text_encoder=None, tokenizer=None, unet=_awake(unet, dtype),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    prompt, negative = torch.randn(2, 1, 7 if tiny else 77, text).to(dtype)
    draw = _drawer(
        pipe, prompt_embeds=prompt, negative_prompt_embeds=negative, height=side, width=side,
        num_inference_steps=3 if tiny else 4,
    )  # fmt: skip
    return Subject(pipe, draw)


def _latent_diffusion(tiny: bool, dtype: torch.dtype) -> Subject:
    from diffusers import DDIMScheduler, LDMPipeline

    channels, side = ((16, 32), 8) if tiny else ((96, 192, 384), 64)
    decoder = _vq_model((16, 16) if tiny else (32, 64, 64), 64 if tiny else 8192, 3, dtype)
    pipe = LDMPipeline(decoder, _unet(channels, side, dtype), DDIMScheduler())
    return Subject(pipe, _drawer(pipe, num_inference_steps=3 if tiny else 4))


def _pixel_diffusion(tiny: bool, dtype: torch.dtype) -> Subject:
    from diffusers import DDPMPipeline, DDPMScheduler

    channels, side = ((16, 32), 8) if tiny else ((64, 128, 128, 128), 32)
    unet = _unet(channels, side, dtype, resnet_time_scale_shift="scale_shift")
    pipe = DDPMPipeline(unet, DDPMScheduler())
    draw = _drawer(pipe, batch_size=2, num_inference_steps=3 if tiny else 10)
    return Subject(pipe, draw, ("scheduler",))


def _amused(tiny: bool, dtype: torch.dtype) -> Subject:
    from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel

    codes, hidden, side = (64, 32, 8) if tiny else (8192, 256, 64)
    transformer = UVit2DModel(
        hidden_size=hidden, cond_embed_dim=16, encoder_hidden_size=24, vocab_size=codes + 1,
        codebook_size=codes, in_channels=hidden // 2, block_out_channels=hidden // 2,
        num_res_blocks=1, num_hidden_layers=1 if tiny else 4, num_attention_heads=hidden // 16,
        block_num_heads=hidden // 16, intermediate_size=4 * hidden, micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
    )  # fmt: skip
    decoder = _vq_model((16, 16) if tiny else (32, 64, 64), codes, 16 if tiny else 64, dtype)
    pipe = AmusedPipeline(
        vqvae=decoder, tokenizer=None, text_encoder=None, transformer=_awake(transformer, dtype),
        scheduler=AmusedScheduler(mask_token_id=codes),
    )  # fmt: skip
    text, pooled = torch.randn(1, 7 if tiny else 77, 24).to(dtype), torch.randn(1, 16).to(dtype)
    draw = _drawer(
        pipe, prompt_embeds=pooled, encoder_hidden_states=text, negative_prompt_embeds=pooled,
        negative_encoder_hidden_states=text, height=side, width=side,
        num_inference_steps=3 if tiny else 8,
    )  # fmt: skip
    return Subject(pipe, draw, ("scheduler",))


def _sana(tiny: bool, dtype: torch.dtype) -> Subject:
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    levels, heads, side = (2, 2, 32) if tiny else (4, 12, 256)
    width = 8 if tiny else 32  # of a head
    channels = (8, 8) if tiny else (32, 64, 128, 128)
    blocks = ("ResBlock",) * (levels - 1) + ("EfficientViTBlock",)
    scales = ((),) * (levels - 1) + ((5,),)
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2 if tiny else 32, encoder_block_types=blocks,
        decoder_block_types=blocks, encoder_block_out_channels=channels,
        decoder_block_out_channels=channels, encoder_layers_per_block=(1,) * levels,
        decoder_layers_per_block=(1,) * levels, encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=heads, attention_head_dim=width,
        num_layers=2 if tiny else 6, num_cross_attention_heads=heads,
        cross_attention_head_dim=width, cross_attention_dim=heads * width,
        caption_channels=16 if tiny else 256, mlp_ratio=2.5, sample_size=32,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = SanaPipeline(None, None, _awake(vae, dtype), _awake(transformer, dtype), scheduler)
    length = 5 if tiny else 77
    prompt, negative = torch.randn(2, 1, length, 16 if tiny else 256).to(dtype)
    mask = torch.ones(1, length, dtype=torch.int64)
    draw = _drawer(
        pipe, prompt_embeds=prompt, negative_prompt=None, negative_prompt_embeds=negative,
        prompt_attention_mask=mask, negative_prompt_attention_mask=mask, height=side, width=side,
        num_inference_steps=3 if tiny else 4, use_resolution_binning=False,
    )  # fmt: skip
    return Subject(pipe, draw)


def _sd_unet(batch: int, side: int) -> Callable[[bool, torch.dtype], Subject]:
    """The network of Stable Diffusion 1.5 at half its width, one evaluation."""

    def build(tiny: bool, dtype: torch.dtype) -> Subject:
        from diffusers import UNet2DConditionModel

        channels = (32, 32, 64, 64) if tiny else (160, 320, 640, 640)
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8,
            block_out_channels=channels,
        )  # fmt: skip
        unet = _awake(unet, dtype)
        size = 8 if tiny else side
        sample, text = torch.randn(batch, 4, size, size), torch.randn(batch, 77, 768)
        sample, text, step = sample.to(dtype), text.to(dtype), torch.tensor(500)

        @torch.inference_mode()
        def call() -> Tensor:
            output: Tensor = unet(sample, step, text).sample
            return output

        return Subject(unet, call)

    return build


# Each with what it is and the dtype it runs in unless another is asked for.
PIPELINES: dict[str, tuple[Callable[[bool, torch.dtype], Subject], str, str]] = {
    "stable-diffusion": (_stable_diffusion, "256 x 256, guidance, 4 steps of DDIM", "float32"),
    "ldm": (_latent_diffusion, "64 x 64 latents of a VQModel, 4 steps of DDIM", "float32"),
    "ddpm": (_pixel_diffusion, "2 x 32 x 32 pixels, 10 steps of DDPM", "float32"),
    "amused": (_amused, "1,024 tokens of 8,192, guidance, 8 rounds", "float32"),
    "sana": (_sana, "1,024 latents, guidance, 4 steps of DPM-Solver++", "float32"),
    "unet": (_sd_unet(1, 64), "SD 1.5's network at half width, 1x4x64x64", "bfloat16"),
    "unet-batch": (_sd_unet(2, 32), "SD 1.5's network at half width, 2x4x32x32", "bfloat16"),
}


# the measurement ---------------------------------------------------------------------------------


def compare(
    name: str, *, tiny: bool, dtype: str, threads: int, malloc: str, rounds: int, profile: bool
) -> Result:
    """Measures one pipeline in this process, whose malloc is given by its environment."""
    from t2p_fast.interop.diffusers import accelerate

    torch.set_num_threads(threads)
    build, what, _ = PIPELINES[name]

    def make() -> Subject:
        torch.manual_seed(0)
        return build(tiny, DTYPES[dtype])

    before, after = make(), make()
    expected = before.call().double()
    swapped = accelerate(after.target)
    compared = "all"
    if after.random_ops:
        swapped.restore()
        ops = sorted({swap.op for swap in swapped.swaps} - set(after.random_ops))
        swapped, compared = accelerate(after.target, ops), ", ".join(ops)
    difference = (after.call().double() - expected).abs().max().item()
    if after.random_ops:
        swapped.restore()
        swapped = accelerate(after.target)
    times = alternate_ms([before.call, after.call], rounds)
    shares = [_shares(subject.call) if profile else {} for subject in (before, after)]
    kinds = sorted({*shares[0], *shares[1]}, key=lambda kind: -max(s.get(kind, 0) for s in shares))
    return Result(
        pipeline=name, what="tiny" if tiny else what, dtype=dtype, threads=threads, malloc=malloc,
        rounds=rounds, before_ms=times[0][0], after_ms=times[1][0], before_cpu_ms=times[0][1],
        after_cpu_ms=times[1][1], largest_difference=difference,
        largest_output=expected.abs().max().item(), compared=compared, swaps=str(swapped),
        shares={kind: [s.get(kind, 0.0) for s in shares] for kind in kinds},
    )  # fmt: skip


KINDS = {
    "attention": ("scaled_dot_product", "t2p_fast::attention", "bmm", "softmax"),
    "linear_attention": ("linear_attention",),
    "convolution": ("conv",),
    "linear": ("addmm", "aten::mm", "aten::linear", "mkldnn_linear"),
    "group norm": ("group_norm",),
    "other norms": ("layer_norm", "rms_norm", "rsqrt"),
    "activation": ("silu", "gelu", "relu"),
    "scheduler and sampling": ("scheduler", "masked_sampl", "multinomial", "exponential_"),
    "quantiser": ("vq_", "cdist", "argmin"),
    "copies": ("copy_", "aten::to", "cat", "contiguous", "clone"),
}


def kind_of(name: str) -> str:
    """The kind of layer that an op of torch, or of ours, belongs to."""
    lower = name.lower()
    return next((k for k, words in KINDS.items() if any(w in lower for w in words)), "other")


def _shares(call: Callable[[], Tensor]) -> dict[str, float]:
    """Of the time of a call that torch's profiler sees, the share of each kind of layer.

    It does not see what goes past torch's dispatcher, as our group norm and scheduler do.
    """
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: time / total for kind, time in spent.items()}


def _compare_elsewhere(order: dict[str, Any]) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "order.json"), Path(folder, "answer.json")
        question.write_text(json.dumps({**order, "answer": str(answer)}))
        command = [sys.executable, "-m", f"{__package__}.run", "drop-in", "--worker", str(question)]
        environment = environment_of(order["malloc"], order["threads"])
        environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
        code = subprocess.run(command, env=environment, check=False).returncode
        if code != 0 or not answer.exists():
            raise RuntimeError(f"the measuring process ended with code {code}")
        return Result(**json.loads(answer.read_text()))


def _work(path: Path) -> None:
    """The other end of `_compare_elsewhere`."""
    from diffusers.utils import logging

    logging.set_verbosity_error()  # its words on casts and old pipelines
    order = json.loads(path.read_text())
    answer = Path(order.pop("answer"))
    answer.write_text(json.dumps(dataclasses.asdict(compare(**order))))


# the command line --------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Command line of ``t2p-fast bench drop-in``."""
    if len(argv) == 2 and argv[0] == "--worker":
        _work(Path(argv[1]))
        return 0
    parser = argparse.ArgumentParser("t2p-fast bench drop-in", description=__doc__)
    parser.add_argument(
        "--pipeline", choices=[*PIPELINES, "all"], nargs="+", default=["stable-diffusion"]
    )
    parser.add_argument("--size", choices=("tiny", "medium"), default="medium")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: the pipeline's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--malloc", choices=tuple(MALLOC), nargs="+", default=["glibc", "tuned"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="where torch's time goes, by layer")
    parser.add_argument("--out", type=Path, help="folder for the CSV")
    options = parser.parse_args(argv)
    if options.threads < 1 or options.rounds < 1:
        raise ValueError(f"--threads {options.threads} and --rounds {options.rounds} must be >= 1")
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise ValueError("drop-in needs diffusers: pip install diffusers transformers") from None
    results = []
    console = Console()
    for name in PIPELINES if "all" in options.pipeline else options.pipeline:
        order = {
            "name": name, "tiny": options.size == "tiny", "threads": options.threads,
            "dtype": options.dtype or PIPELINES[name][2], "rounds": options.rounds,
            "profile": options.profile,
        }  # fmt: skip
        part = [_compare_elsewhere({**order, "malloc": malloc}) for malloc in options.malloc]
        results += part
        print_results(part, console)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_results(options.out / "drop-in-cpu.csv", results)
    return 0


def print_results(results: Sequence[Result], console: Console) -> None:
    """What was swapped, and the times before and after."""
    first = results[0]
    threads = f"{first.threads} thread{'s' * (first.threads != 1)}"
    console.print(escape(f"{first.pipeline}: {first.what}, {first.dtype}, {threads}"))
    console.print(escape(first.swaps), highlight=False, soft_wrap=True)
    console.print(
        f"largest difference {first.largest_difference:.2g} of {first.largest_output:.3g} "
        f"(with {first.compared}); medians of {first.rounds} calls in turns, and the least "
        "processor time",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE)
    for column in ("malloc, ms", "before", "after", "ratio", "cpu before", "after", "ratio"):
        table.add_column(column, justify="left" if "malloc" in column else "right")
    for r in results:
        times = (r.before_ms, r.after_ms, r.before_cpu_ms, r.after_cpu_ms)
        before, after, before_cpu, after_cpu = (
            f"{ms:.0f}" if ms >= 1000 else f"{ms:.4g}" for ms in times
        )
        table.add_row(
            r.malloc, before, after, f"{r.ratio:.2f}x", before_cpu, after_cpu,
            f"{r.cpu_ratio:.2f}x",
        )  # fmt: skip
    console.print(table)
    for r in results:
        if r.shares:
            shares = Table(title=f"share of the time in torch, malloc {r.malloc}", box=box.SIMPLE)
            for column in ("", "before", "after"):
                shares.add_column(column, justify="right" if column else "left")
            for kind, part in r.shares.items():
                shares.add_row(kind, *[f"{100 * share:.1f} %" for share in part])
            console.print(shares)


def write_results(path: Path, results: Sequence[Result]) -> None:
    """One line per pipeline and malloc."""
    facts = machine_facts("cpu")

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            names = [f.name for f in dataclasses.fields(Result)]
            writer = csv.DictWriter(file, [*names, "ratio", "cpu_ratio", *facts])
            writer.writeheader()
            for result in results:
                row = dataclasses.asdict(result)
                row |= {"ratio": result.ratio, "cpu_ratio": result.cpu_ratio}
                row["shares"] = " ".join(
                    f"{kind.replace(' ', '-')}={before:.3f}/{after:.3f}"
                    for kind, (before, after) in result.shares.items()
                )
                row["swaps"] = result.swaps.replace("\n", "; ")
                shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow({**shown, **facts})

    write_atomically(path, write)
