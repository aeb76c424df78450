# SPDX-License-Identifier: Apache-2.0
"""MarkovGen against the Muse it shortens: time, quality and pictures, side by side.

Full Muse, Muse that exits early, and MarkovGen (which exits at the same step and lets the field
find the rest) draw the same captions with the same seeds, in turns.
"""

import argparse
import csv
import dataclasses
from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from t2p_fast.checkpoints import write_atomically
from t2p_fast.data.scenes import SceneDataset, SceneSample
from t2p_fast.metrics.cmmd import cmmd
from t2p_fast.metrics.scenes import prompt_accuracy
from t2p_fast.models.feature_encoder import FeatureEncoder
from t2p_fast.nn import TokenMRF
from t2p_fast.pipelines import MarkovGenPipeline, MusePipeline
from t2p_fast.training.pictures import save_sheet, to_tensor

from .report import machine_facts
from .timing import median_ms

METHODS = ("muse", "early-exit", "markovgen")


@dataclasses.dataclass
class Run:
    """One method with one seed."""

    method: str
    seed: int
    steps: int
    captions: int
    batch_size: int
    dtype: str
    threads: int
    tokens_ms: float  # a picture
    decode_ms: float
    text_ms: float
    prompt_accuracy: float
    cmmd: float
    all_right: float
    attributes: str


def main(argv: Sequence[str]) -> int:
    """Command line of ``t2p-fast bench markovgen``."""
    parser = argparse.ArgumentParser("t2p-fast bench markovgen", description=__doc__)
    parser.add_argument("--model", default="embedded", help="'embedded' or a folder")
    parser.add_argument("--mrf", default="", help="folder of the field; by default the model's")
    parser.add_argument("--count", type=int, default=500, help="held-out captions")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--exit-step", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--vocabulary", default="basic")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the CSV and the sheet of pictures")
    options = parser.parse_args(argv)
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    if options.mrf:
        muse = MusePipeline.from_pretrained(options.model, **place)
        field = TokenMRF.from_pretrained(options.mrf, **place)
        pipeline = MarkovGenPipeline(muse.text_encoder, muse.muse, muse.vqgan, field)
    else:
        pipeline = MarkovGenPipeline.from_pretrained(options.model, **place)
    exit_step = options.exit_step or pipeline.default_exit_step(options.steps)
    dataset = SceneDataset(
        options.vocabulary, split=options.split, size=pipeline.vqgan.config.sample_size
    )
    samples = [dataset[i] for i in range(options.count)]
    features = FeatureEncoder.from_pretrained("embedded", subfolder="features")
    true = embed(features, [s.image for s in samples])
    runs: list[Run] = []
    first_pictures: dict[str, list[Any]] = {}
    for seed in range(options.seeds):
        part, pictures = compare(
            pipeline, samples, features, true, seed=seed * options.count, steps=options.steps,
            exit_step=exit_step, batch_size=options.batch_size,
        )  # fmt: skip
        runs += part
        first_pictures = first_pictures or pictures
    accounting = account(pipeline, [s.caption for s in samples], options.steps, exit_step)
    console = Console()
    for table in (quality_table(runs), accounting_table(accounting, options.steps, exit_step)):
        console.print(table)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_runs(options.out / f"markovgen-{options.device}.csv", runs, options.device)
        width = min(8, options.count)
        starts = [i for i in (0, 8, 16) if i + width <= options.count]
        rows = [np.stack(first_pictures[m][i : i + width]) for i in starts for m in METHODS]
        save_sheet(options.out / f"markovgen-{options.device}.png", rows)
    return 0


def embed(features: FeatureEncoder, images: Sequence[Any]) -> Tensor:
    """Unit vectors of pictures, ``[n, d]``."""
    with torch.no_grad():
        return torch.cat(
            [
                features.embed(to_tensor(list(images[i : i + 100])))
                for i in range(0, len(images), 100)
            ]
        )


def compare(
    pipeline: MarkovGenPipeline,
    samples: Sequence[SceneSample],
    features: FeatureEncoder,
    true: Tensor,
    *,
    seed: int,
    steps: int,
    exit_step: int,
    batch_size: int,
) -> tuple[list[Run], dict[str, list[Any]]]:
    """Draws all captions by all methods, batch by batch in turns."""
    full = MusePipeline(pipeline.text_encoder, pipeline.muse, pipeline.vqgan)
    ways: dict[str, tuple[MusePipeline, int]] = {
        "muse": (full, steps),
        "early-exit": (full, exit_step),
        "markovgen": (pipeline, exit_step),
    }
    captions = [s.caption for s in samples]
    pictures: dict[str, list[Any]] = {m: [] for m in METHODS}
    times: dict[str, list[dict[str, float]]] = {m: [] for m in METHODS}
    for first in range(0, len(samples), batch_size):
        part = captions[first : first + batch_size]
        for method, (drawer, stop) in ways.items():
            result = drawer(part, seed=seed + first, steps=steps, exit_step=stop)
            pictures[method] += [np.asarray(image) for image in result.images]
            if len(part) == batch_size or not times[method]:
                spent = {k: 1000 * v / len(part) for k, v in result.timings.items()}
                times[method].append(spent)
    runs = []
    for method in METHODS:
        score = prompt_accuracy(pictures[method], captions)
        spent = {k: median(t[k] for t in times[method]) for k in ("text", "tokens", "decode")}
        attributes = " ".join(f"{k}={v:.3f}" for k, v in score.attributes.items())
        runs.append(
            Run(
                method=method, seed=seed, steps=ways[method][1], captions=len(samples),
                batch_size=batch_size, dtype=str(pipeline.muse.dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                tokens_ms=spent["tokens"], decode_ms=spent["decode"], text_ms=spent["text"],
                prompt_accuracy=score.accuracy,
                cmmd=cmmd(embed(features, pictures[method]), true),
                all_right=score.perfect, attributes=attributes,
            )
        )  # fmt: skip
    return runs, pictures


def account(
    pipeline: MarkovGenPipeline, captions: Sequence[str], steps: int, exit_step: int
) -> dict[int, dict[str, float]]:
    """Milliseconds of each stage for batches of 1 and 8: the terms of the paper's table 1."""
    return {batch: _stages(pipeline, list(captions[:batch]), steps, exit_step) for batch in (1, 8)}


@torch.no_grad()
def _stages(
    pipeline: MarkovGenPipeline, captions: list[str], steps: int, exit_step: int
) -> dict[str, float]:
    encode = pipeline.text_encoder.encode
    text, negative = encode(captions), encode([""] * len(captions))
    held: list[tuple[Tensor, Tensor]] = []

    def keep(scores: Tensor, tokens: Tensor) -> Tensor:
        held[:] = [(scores, tokens)]
        return tokens

    def rounds(count: int) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
        return pipeline.muse.generate(
            text, negative, steps=steps, exit_step=count, finish=keep, generators=generators
        )

    # One inference, as the paper has it; the field may settle the tokens in several.
    once = copy(pipeline.mrf)
    once.config = dataclasses.replace(once.config, rounds=1)
    tokens = rounds(steps)
    return {
        "t_base": median_ms(partial(rounds, exit_step)) / exit_step,
        "t_MRF": median_ms(lambda: once.finish(*held[0])),
        "t_finish": median_ms(lambda: pipeline.finish(*held[0])),
        "t_text": median_ms(partial(encode, captions)),
        "t_dec": median_ms(partial(pipeline.decode, tokens)),
    }


def quality_table(runs: Sequence[Run]) -> Table:
    """Means over the seeds, with their spread."""
    table = Table(title="means over seeds ± standard deviation", box=box.SIMPLE)
    for column in ("", "rounds", "ms a picture", "speed", "prompt accuracy", "all right", "CMMD"):
        # Where a terminal is narrow, other columns fold; a method's name stays whole.
        table.add_column(column, justify="left" if not column else "right", no_wrap=not column)
    whole = [r.tokens_ms + r.decode_ms + r.text_ms for r in runs if r.method == "muse"]
    for method in METHODS:
        part = [r for r in runs if r.method == method]
        spent = [r.tokens_ms + r.decode_ms + r.text_ms for r in part]
        table.add_row(
            method,
            str(part[0].steps),
            f"{mean(spent):.1f}",
            f"{median(a / b for a, b in zip(whole, spent, strict=True)):.2f}x",
            _spread([100 * r.prompt_accuracy for r in part], "%"),
            _spread([100 * r.all_right for r in part], "%"),
            _spread([r.cmmd for r in part], ""),
        )
    return table


def _spread(values: Sequence[float], unit: str) -> str:
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.3g} ± {deviation:.2g}{unit}"


def accounting_table(terms: dict[int, dict[str, float]], steps: int, exit_step: int) -> Table:
    """``k t_base + t_finish + t_text + t_dec``; the paper's field finishes in one inference."""
    table = Table(title="ms a batch: k t_base + t_finish + t_text + t_dec", box=box.SIMPLE)
    names = ("t_base", "t_MRF", "t_finish", "t_text", "t_dec")
    for column in ("batch", *names, "muse", "markovgen", "ratio", "t_MRF / t_base"):
        table.add_column(column, justify="right")
    for batch, spent in terms.items():
        rest = spent["t_text"] + spent["t_dec"]
        muse = steps * spent["t_base"] + rest
        short = exit_step * spent["t_base"] + spent["t_finish"] + rest
        table.add_row(
            str(batch),
            *[f"{spent[n]:.3g}" for n in names],
            f"{muse:.4g}",
            f"{short:.4g}",
            f"{muse / short:.2f}x",
            f"{100 * spent['t_MRF'] / spent['t_base']:.1f} %",
        )
    return table


def write_runs(path: Path, runs: Sequence[Run], device: str) -> None:
    """One line per method and seed."""
    facts = machine_facts(device)

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            columns = [f.name for f in dataclasses.fields(Run)]
            writer = csv.DictWriter(file, [*columns, *facts])
            writer.writeheader()
            for run in runs:
                row = dataclasses.asdict(run)
                shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow({**shown, **facts})

    write_atomically(path, write)
