# SPDX-License-Identifier: Apache-2.0
"""Text to pictures with Muse: a text encoder, masked decoding of tokens, a token decoder."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from t2p_fast.checkpoints import PretrainedModel, check_device, resolve_folder, shown
from t2p_fast.data.pictures import to_rgb
from t2p_fast.models.muse import Muse, most_likely
from t2p_fast.models.super_resolution import MuseSuperResolution
from t2p_fast.models.text_encoder import TextEncoder, TextTransformer
from t2p_fast.models.vqgan import VQGAN


@dataclass(frozen=True)
class MuseOutput:
    """What :class:`MusePipeline` returns.

    Attributes:
        images: one per prompt and picture.
        tokens: ``[b, n]``, the picture tokens, of the finer grid if there was a second stage.
        seeds: the seed of each picture.
        timings: seconds per stage: ``text``, ``tokens``, ``finer tokens``, ``decode``.
    """

    images: list[Image.Image]
    tokens: Tensor
    seeds: list[int]
    timings: dict[str, float] = field(default_factory=dict)


class MusePipeline:
    """Draws pictures from prompts; each of its models can be replaced.

    It goes through all rounds, unless it is given an ``exit_step``; then it takes the likeliest
    token for each that is masked still.

    Args:
        text_encoder: anything that follows the ``TextEncoder`` protocol.
        muse: the masked transformer.
        vqgan: the tokenizer whose tokens it was trained on.
        super_resolution: the second stage, which finds the tokens of a larger picture; without it
            there are pictures of one size.
    """

    models: ClassVar[dict[str, type[PretrainedModel]]] = {
        "text_encoder": TextTransformer, "muse": Muse, "vqgan": VQGAN
    }  # fmt: skip
    optional_models: ClassVar[dict[str, type[PretrainedModel]]] = {
        "super_resolution": MuseSuperResolution
    }

    def __init__(
        self,
        text_encoder: TextEncoder,
        muse: Muse,
        vqgan: VQGAN,
        super_resolution: MuseSuperResolution | None = None,
    ) -> None:
        if text_encoder.embed_dim != muse.config.text_embed_dim:
            raise ValueError(
                f"MusePipeline: text_encoder makes embeddings of {text_encoder.embed_dim}, but "
                f"muse takes {muse.config.text_embed_dim}"
            )
        tokens = (vqgan.config.num_vq_embeddings, vqgan.config.token_grid)
        if tokens != (muse.config.vocab_size, muse.config.token_grid):
            raise ValueError(
                f"MusePipeline: vqgan has {tokens[0]} tokens on a grid of {tokens[1]}, but muse "
                f"has {muse.config.vocab_size} on a grid of {muse.config.token_grid}"
            )
        if super_resolution is not None:
            stage = super_resolution.config
            takes = (stage.vocab_size, stage.low_token_grid, stage.text_embed_dim)
            if takes != (*tokens, text_encoder.embed_dim):
                raise ValueError(
                    f"MusePipeline: super_resolution takes {takes[0]} tokens on a grid of "
                    f"{takes[1]} and text of {takes[2]}, but vqgan has {tokens[0]} on a grid of "
                    f"{tokens[1]} and text_encoder makes {text_encoder.embed_dim}"
                )
        vqgan.check_rgb("MusePipeline")
        self.text_encoder = text_encoder
        self.muse = muse
        self.vqgan = vqgan
        self.super_resolution = super_resolution

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "embedded",
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> Self:
        """Loads a pipeline.

        Args:
            name: ``"embedded"`` (the weights in this package), a folder that holds
                ``text_encoder``, ``muse``, ``vqgan`` and perhaps ``super_resolution``, or a
                repository on the hub.
            dtype: of the weights and of the computation.
            device: where it runs.
            revision: branch, tag or commit of the hub repository.

        Raises:
            CheckpointError: if files are missing, damaged, or belong to other models.
            TypeError: if ``dtype`` is not a floating-point type.
            RuntimeError: if torch cannot use ``device``.
        """
        folder = resolve_folder(name, revision=revision)
        optional = {k: v for k, v in cls.optional_models.items() if (folder / k).is_dir()}
        loaded: dict[str, Any] = {
            name: kind.from_pretrained(folder, subfolder=name, dtype=dtype, device=device)
            for name, kind in {**cls.models, **optional}.items()
        }
        return cls(**loaded)

    def to(self, device: str | torch.device) -> Self:
        """Moves all models."""
        device = check_device("MusePipeline", device)
        for model in vars(self).values():
            if isinstance(model, torch.nn.Module):
                model.to(device)
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the pictures that can be drawn, in pixels."""
        size, stage = self.vqgan.config.sample_size, self.super_resolution
        return (size,) if stage is None else (size, size * stage.upscale)

    def default_exit_step(self, steps: int) -> int:
        """Where to stop when nothing is said: after all ``steps`` rounds."""
        return steps

    def finish(self, scores: Tensor, tokens: Tensor) -> Tensor:
        """Fills in what is masked after ``exit_step``; see :meth:`Muse.generate`."""
        return most_likely(scores, tokens)

    def finish_finer(self, scores: Tensor, tokens: Tensor) -> Tensor:
        """The same for the second stage."""
        return most_likely(scores, tokens)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        num_images: int = 1,
        size: int | None = None,
        steps: int = 32,
        guidance: float = 2.0,
        temperature: float = 1.0,
        min_p: float = 0.1,
        choice_temperature: float = 4.0,
        seed: int | None = None,
        image: Image.Image | None = None,
        mask: NDArray[np.bool_] | Tensor | None = None,
        exit_step: int | None = None,
        finer_steps: int = 8,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> MuseOutput:
        """Draws ``num_images`` pictures of each prompt.

        Args:
            prompt: one prompt or several.
            negative_prompt: what to steer away from.
            num_images: pictures per prompt.
            size: side of the pictures in pixels, one of `sizes`; ``None`` is the smallest.
            steps: rounds of mask-predict.
            guidance: final classifier-free guidance scale, ``(1 + t) c - t u``; 0 is none.
            temperature: of the token distribution; 0 always takes the most likely token.
            min_p: tokens less likely than this times the likeliest are never drawn; 0 allows all.
            choice_temperature: of the choice which tokens to keep; 0 keeps the most confident.
            seed: picture ``i`` is drawn with ``seed + i``, whatever its batch; ``None`` draws a
                seed, which the result names.
            image, mask: a picture to inpaint, and which tokens of its grid to draw anew,
                ``[grid, grid]`` bool; both or none.
            exit_step: the round after which the tokens that are masked still are all filled in at
                once; see the class for how. ``None`` takes the default of the class.
            finer_steps: rounds of the second stage, if ``size`` asks for it. The small picture says
                nearly all, so it works without guidance, and always takes the likeliest tokens; an
                ``exit_step`` shortens it by the same share.
            on_step: called after every round of the first stage with its number and the tokens so
                far.

        Raises:
            ValueError, TypeError: naming the argument that is wrong.
        """
        alone = isinstance(prompt, str) or not isinstance(prompt, Iterable)
        prompts: list[str] = [prompt] if alone else list(prompt)  # type: ignore[list-item]
        if not prompts:
            raise ValueError("MusePipeline: prompt is empty, expected at least one text")
        for text in prompts:
            _check_text("prompt", text)
            if not text.strip():
                raise ValueError(
                    f"MusePipeline: prompt is {shown(text)}, expected a text that says something"
                )
        _check_text("negative_prompt", negative_prompt)
        if seed is None:
            seed = int(torch.randint(1 << 31, ()).item())
        _check_number("num_images", num_images, 1, whole=True)
        _check_number("steps", steps, 1, whole=True)
        if exit_step is None:
            exit_step = self.default_exit_step(steps)
        _check_number("exit_step", exit_step, 1, whole=True)
        if exit_step > steps:
            raise ValueError(
                f"{type(self).__name__}: exit_step is {exit_step}, expected at most steps, {steps}"
            )
        _check_number("finer_steps", finer_steps, 1, whole=True)
        if size is None:
            size = self.sizes[0]
        _check_number("size", size, 1, whole=True)
        if size not in self.sizes:
            raise ValueError(
                f"{type(self).__name__}: size is {size}, expected one of "
                f"{', '.join(map(str, self.sizes))}"
            )
        if size != self.sizes[0] and image is not None:
            raise ValueError(
                f"{type(self).__name__}: size is {size}, but pictures are inpainted at "
                f"{self.sizes[0]} only"
            )
        _check_number("guidance", guidance, 0)
        _check_number("temperature", temperature, 0)
        _check_number("min_p", min_p, 0)
        if min_p > 1:
            raise ValueError(f"MusePipeline: min_p is {min_p}, expected at most 1")
        _check_number("choice_temperature", choice_temperature, 0)
        _check_number("seed", seed, 0, whole=True)
        if seed >= 1 << 62:
            raise ValueError(f"MusePipeline: seed is {seed}, expected less than 2**62")
        seed = int(seed)
        prompts = [p for p in prompts for _ in range(num_images)]
        seeds = [seed + i for i in range(len(prompts))]
        known = self._known_tokens(image, mask, len(prompts))

        generators = [torch.Generator().manual_seed(s) for s in seeds]
        start = time.perf_counter()
        encoding = self.text_encoder.encode(prompts)
        negative = self.text_encoder.encode([negative_prompt] * len(prompts))
        encoded = time.perf_counter()
        tokens = self.muse.generate(
            encoding,
            negative,
            steps=steps,
            guidance=guidance,
            temperature=temperature,
            min_p=min_p,
            choice_temperature=choice_temperature,
            known=known,
            generators=generators,
            exit_step=exit_step,
            finish=self.finish,
            on_step=on_step,
        )
        # Reading one token waits for an accelerator, so that the clock is honest.
        tokens[0, 0].item()
        generated = time.perf_counter()
        if size != self.sizes[0]:
            assert self.super_resolution is not None
            tokens = self.super_resolution.generate(
                encoding,
                steps=finer_steps,
                guidance=0,
                temperature=0,
                choice_temperature=0,
                context=self.super_resolution.context(tokens),
                generators=generators,
                exit_step=-(-finer_steps * exit_step // steps),
                finish=self.finish_finer,
            )
            tokens[0, 0].item()
        refined = time.perf_counter()
        images = self.decode(tokens)
        decoded = time.perf_counter()
        timings = {
            "text": encoded - start,
            "tokens": generated - encoded,
            "finer tokens": refined - generated,
            "decode": decoded - refined,
        }
        if size == self.sizes[0]:
            del timings["finer tokens"]
        return MuseOutput(images, tokens, seeds, timings)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> list[Image.Image]:
        """Tokens ``[b, n]`` to pictures."""
        grid = math.isqrt(tokens.shape[1])
        pictures = self.vqgan.decode_indices(tokens.view(-1, grid, grid))
        scaled = (pictures.float().clamp(-1, 1) + 1) * 127.5
        arrays = scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array) for array in arrays]

    def _known_tokens(
        self, image: Image.Image | None, mask: NDArray[np.bool_] | Tensor | None, count: int
    ) -> Tensor | None:
        if image is None and mask is None:
            return None
        if image is None or mask is None:
            raise ValueError("MusePipeline: image and mask go together, one is None")
        size, grid = self.vqgan.config.sample_size, self.vqgan.config.token_grid
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"MusePipeline: image is of type {type(image).__name__}, expected PIL.Image.Image"
            )
        if not isinstance(mask, Tensor | np.ndarray):
            raise TypeError(
                f"MusePipeline: mask is of type {type(mask).__name__}, expected a tensor or array"
            )
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool or mask.shape != (grid, grid):
            raise ValueError(
                f"MusePipeline: mask is {list(mask.shape)} {mask.dtype}, expected "
                f"[{grid}, {grid}] torch.bool"
            )
        if image.size != (size, size):
            raise ValueError(
                f"MusePipeline: image is {image.width}x{image.height}, expected {size}x{size}"
            )
        array = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
        picture = (array.float() / 127.5 - 1)[None].to(self.vqgan.device, self.vqgan.dtype)
        tokens = self.vqgan.encode_to_indices(picture).flatten(1)
        mask = mask.flatten().to(tokens.device)
        return tokens.masked_fill(mask, self.muse.config.mask_token).repeat(count, 1)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"MusePipeline: {name} is {shown(value)}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"MusePipeline: {name} is {shown(value)}, expected a text of valid Unicode"
        ) from error


def _check_number(name: str, value: object, low: int, *, whole: bool = False) -> None:
    kind: type = numbers.Integral if whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = "an integer" if whole else "a number"
        raise TypeError(f"MusePipeline: {name} is {shown(value)}, expected {expected}")
    if not low <= value < math.inf:  # type: ignore[operator]
        raise ValueError(f"MusePipeline: {name} is {value}, expected at least {low}")
