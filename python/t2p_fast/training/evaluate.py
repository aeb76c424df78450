# SPDX-License-Identifier: Apache-2.0
"""How good a trained pipeline is, in numbers: ``python -m t2p_fast.training.evaluate``.

Draws pictures from held-out captions and reads them back; also reconstructs the held-out pictures.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2p_fast.checkpoints import write_json
from t2p_fast.data.scenes import SceneDataset, Split, content
from t2p_fast.metrics.scenes import prompt_accuracy
from t2p_fast.pipelines import MusePipeline
from t2p_fast.training.pictures import psnr, save_sheet, to_images, to_tensor


@torch.no_grad()
def evaluate(
    pipeline: MusePipeline,
    *,
    count: int = 500,
    seed: int = 0,
    vocabulary: str = "basic",
    split: Split = "test",
    batch_size: int = 50,
    sheet: Path | None = None,
    **generate: Any,
) -> dict[str, Any]:
    """Scores a pipeline on held-out scenes.

    Args:
        pipeline: what to score.
        count: number of captions.
        seed: of the captions and of the pictures.
        vocabulary, split: which scenes; choose sampling options on ``"validation"``.
        batch_size: pictures drawn at once.
        sheet: PNG file for the first pictures: true, reconstructed, drawn from the caption.
        **generate: options of the pipeline, such as ``steps`` and ``guidance``.

    Returns:
        Reconstruction PSNR in dB (mean over pictures), and prompt accuracy: the share of the
        attributes that the captions state (colour, shape, size, relation) which are right.
    """
    size = pipeline.vqgan.config.sample_size
    dataset = SceneDataset(vocabulary, split=split, size=size, seed=seed)
    samples = [dataset[i] for i in range(count)]
    made, rebuilt, quality = [], [], []
    started = time.perf_counter()
    for first in range(0, count, batch_size):
        part = samples[first : first + batch_size]
        pictures = to_tensor([s.image for s in part])
        output = pipeline.vqgan(pictures.to(pipeline.vqgan.device, pipeline.vqgan.dtype))
        quality.append(psnr(output.reconstruction.cpu(), pictures))
        rebuilt.append(to_images(output.reconstruction))
        drawn = pipeline([s.caption for s in part], seed=seed + first, **generate)
        made.append(np.stack([np.asarray(image) for image in drawn.images]))
    drawn_pictures, rebuilt_pictures = np.concatenate(made), np.concatenate(rebuilt)
    captions = [s.caption for s in samples]
    accuracy = prompt_accuracy(list(drawn_pictures), captions)
    rebuilt_accuracy = prompt_accuracy(list(rebuilt_pictures), captions)
    if sheet is not None:
        true = np.stack([s.image for s in samples[:24]])
        rows = [x[i : i + 8] for i in (0, 8, 16) for x in (true, rebuilt_pictures, drawn_pictures)]
        save_sheet(sheet, rows)
    return {
        "captions": count,
        "scenes": len({content(s.scene) for s in samples}),
        "vocabulary": vocabulary,
        "split": split,
        "seed": seed,
        **generate,
        "reconstruction_psnr": float(torch.cat(quality).mean()),
        "reconstruction_accuracy": rebuilt_accuracy.accuracy,
        "prompt_accuracy": accuracy.accuracy,
        "attributes": accuracy.attributes,
        "count": accuracy.count,
        "pictures_all_right": accuracy.perfect,
        "seconds": time.perf_counter() - started,
        "torch": torch.__version__,
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="'embedded' or a folder")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", default="basic")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--choice-temperature", type=float, default=4.0)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--sheet", type=Path, help="PNG file for a sheet of pictures")
    options = parser.parse_args(arguments)
    result = evaluate(
        MusePipeline.from_pretrained(options.model),
        count=options.count,
        seed=options.seed,
        vocabulary=options.vocabulary,
        split=options.split,
        sheet=options.sheet,
        steps=options.steps,
        guidance=options.guidance,
        choice_temperature=options.choice_temperature,
    )
    print(json.dumps(result, indent=2))
    if options.out is not None:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
