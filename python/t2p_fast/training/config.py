# SPDX-License-Identifier: Apache-2.0
"""Configurations of training runs: JSON files, with the shipped recipes by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2p_fast.checkpoints import check_numbers, config_from_dict, read_json, shown
from t2p_fast.models.feature_encoder import FeatureEncoderConfig
from t2p_fast.models.muse import MuseConfig
from t2p_fast.models.super_resolution import MuseSuperResolutionConfig
from t2p_fast.models.text_encoder import TextTransformerConfig
from t2p_fast.models.vqgan import VQGANConfig
from t2p_fast.nn import TokenMRFConfig

RECIPES = Path(__file__).resolve().parent / "recipes"


@dataclass(frozen=True)
class DataConfig:
    """Where pictures and captions come from.

    Attributes:
        source: ``"scenes"``, or a folder of pictures with captions in ``metadata.jsonl``.
        vocabulary: which scenes.
        leaves: share of the pictures that are dead leaves (for tokenizers; no captions).
        size: side of the pictures in pixels.
    """

    source: str = "scenes"
    vocabulary: str = "basic"
    leaves: float = 0.0
    size: int = 64

    def __post_init__(self) -> None:
        check_numbers(self, "data.", leaves="[0, 1]", size="[16, 4096]")


@dataclass(frozen=True)
class RunConfig:
    """What every training run has in common.

    Attributes:
        steps: optimiser steps in all.
        batch_size: pictures per step and process.
        learning_rate: reached after ``warmup_steps``, held, then lowered to zero linearly over
            the last ``decay_steps``.
        ema_decay: of the averaged weights that are evaluated and saved; 0 keeps none.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        log_every, save_every, sample_every: in steps.
        num_workers: processes that make batches; 0 makes them in the training process.
    """

    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay_steps: int = 200
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "bf16"
    seed: int = 0
    log_every: int = 50
    save_every: int = 200
    sample_every: int = 500
    num_workers: int = 0

    def __post_init__(self) -> None:
        check_numbers(
            self, "run.", steps="[1, 1e9]", batch_size="[1, 65536]", learning_rate="(0, inf)",
            warmup_steps="[0, 1e9]", decay_steps="[0, 1e9]", betas="[0, 1)",
            weight_decay="[0, inf)", gradient_clip="[0, inf)", ema_decay="[0, 1)",
            seed="[0, 2147483647]", log_every="[1, 1e9]", save_every="[1, 1e9]",
            sample_every="[1, 1e9]", num_workers="[0, 256]",
        )  # fmt: skip
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(
                f"run.mixed_precision is {self.mixed_precision!r}, expected 'no', 'bf16' or 'fp16'"
            )


@dataclass(frozen=True)
class VQGANLossConfig:
    """Weights of the tokenizer's losses.

    Attributes:
        l1, l2: of the reconstruction.
        perceptual: of the feature distance.
        features: feature encoder for it, a folder or ``"embedded"``.
        adversarial: of the patch discriminator, times the adaptive weight.
        adversarial_start: step at which it begins.
        quantize_start: step at which quantisation begins, with the codes placed by k-means on
            latents that already mean something; until then the model is an autoencoder.
        kmeans_pictures: how many pictures that k-means sees.
        initialize_from: a trained tokenizer, a folder or ``"embedded"``, whose encoder and decoder
            this one starts from; the codebook is placed anew, and may have another size. Empty
            for none.
        decoder_only: trains the decoder of ``initialize_from`` alone. Encoder and codes stay, and
            with them what every token means to a generator. Every second batch is made half as
            large, for one decoder to serve both sizes.
        dead_code_threshold: see ``nn.VectorQuantizer``; codes are revived in the first half only,
            since a late revival only duplicates codes.
    """

    l1: float = 0.5
    l2: float = 1.0
    perceptual: float = 0.05
    features: str = "embedded"
    adversarial: float = 0.1
    adversarial_start: int = 1000
    quantize_start: int = 200
    kmeans_pictures: int = 1024
    initialize_from: str = ""
    decoder_only: bool = False
    dead_code_threshold: float = 0.05

    def __post_init__(self) -> None:
        if self.decoder_only and not self.initialize_from:
            raise ValueError(
                "loss.decoder_only is true, but loss.initialize_from names no tokenizer"
            )
        check_numbers(
            self, "loss.", l1="[0, inf)", l2="[0, inf)", perceptual="[0, inf)",
            adversarial="[0, inf)", adversarial_start="[0, 1e9]", quantize_start="[0, 1e9]",
            kmeans_pictures="[1, 1e6]", dead_code_threshold="[0, inf)",
        )  # fmt: skip


@dataclass(frozen=True)
class VQGANTraining:
    """A run of ``t2p-fast train vqgan``."""

    model: VQGANConfig = field(default_factory=VQGANConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    loss: VQGANLossConfig = field(default_factory=VQGANLossConfig)


@dataclass(frozen=True)
class MuseLossConfig:
    """How Muse is trained.

    Attributes:
        vqgan: the tokenizer, a folder or ``"embedded"``.
        text_drop: share of the prompts that are replaced by ``""`` (10 % in the paper).
        label_smoothing: of the cross-entropy.
        initialize_from: a trained generator with its text encoder, a folder or ``"embedded"``, from
            whose weights training begins; a text encoder of another architecture begins anew. Empty
            begins from nothing.
        rare_mask: share of the pictures of which the rarest tokens are masked, see `rare_mask`.
        contrast: weight of the contrast with captions whose relation is turned round, see
            `MuseTask`; for pictures of scenes.
        contrast_temperature: what differences of log-likelihood are divided by there, in nats.
        reading_order: share of the captions of two objects that are worded in the order of
            reading, which is what breaks the symmetry: "above" and "below" alone, each as frequent,
            tell nothing of which object is up, nor does which is named first, only both.
    """

    vqgan: str = "embedded"
    initialize_from: str = ""
    text_drop: float = 0.1
    label_smoothing: float = 0.0
    rare_mask: float = 0.0
    contrast: float = 0.0
    contrast_temperature: float = 3.0
    reading_order: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(
            self, "loss.", text_drop="[0, 1]", label_smoothing="[0, 1)", rare_mask="[0, 1]",
            contrast="[0, inf)", contrast_temperature="(0, inf)", reading_order="[0, 1]",
        )  # fmt: skip


@dataclass(frozen=True)
class MuseTraining:
    """A run of ``t2p-fast train muse``."""

    model: MuseConfig = field(default_factory=MuseConfig)
    text: TextTransformerConfig = field(default_factory=TextTransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    loss: MuseLossConfig = field(default_factory=MuseLossConfig)

    def __post_init__(self) -> None:
        if self.data.source != "scenes" and self.loss.contrast + self.loss.reading_order > 0:
            raise ValueError(
                "train muse: loss.contrast and loss.reading_order need captions of scenes, but "
                f"data.source is {shown(self.data.source)}"
            )


@dataclass(frozen=True)
class SuperResolutionLossConfig:
    """How Muse's second stage is trained.

    Attributes:
        muse: a generator's text encoder and tokenizer, a folder or ``"embedded"``.
        text_drop: share of the prompts that are replaced by ``""``.
        swapped: share of the small picture's tokens that are those of another picture.
    """

    muse: str = "embedded"
    text_drop: float = 0.1
    swapped: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, "loss.", text_drop="[0, 1]", swapped="[0, 1]")


@dataclass(frozen=True)
class SuperResolutionTraining:
    """A run of ``t2p-fast train super-resolution``."""

    model: MuseSuperResolutionConfig = field(default_factory=MuseSuperResolutionConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(size=128))
    run: RunConfig = field(default_factory=RunConfig)
    loss: SuperResolutionLossConfig = field(default_factory=SuperResolutionLossConfig)


@dataclass(frozen=True)
class MRFLossConfig:
    """How MarkovGen's field is trained.

    Attributes:
        vqgan: the tokenizer whose tokens it learns from real pictures, a folder or ``"embedded"``.
        muse: a generator with its text encoder and tokenizer, a folder or ``"embedded"``, whose
            last rounds it learns to replace; empty learns from real pictures.
        initialize_from: a trained field to begin with, a folder or ``"embedded"``; empty begins
            anew.
        mask_share: of the tokens of real pictures (20 % in the paper).
        steps, exit_step: rounds of the generator, and the one after which the field takes over.
        exit_spread: it learns to take over so many rounds earlier and later as well.
        captions: number of captions that the generator draws for it.
        reveal: whether a share of the tokens that are to be found, any, is shown to it: for a field
            that settles them in several rounds.
        candidates: tokens that are kept of what the generator draws from, at every position; those
            less likely count as impossible.
    """

    vqgan: str = "embedded"
    muse: str = ""
    initialize_from: str = ""
    mask_share: float = 0.2
    steps: int = 32
    exit_step: int = 12
    exit_spread: int = 0
    captions: int = 512
    reveal: bool = False
    candidates: int = 8

    def __post_init__(self) -> None:
        check_numbers(
            self, "loss.", mask_share="(0, 1)", steps="[2, 4096]", exit_step="[1, 4095]",
            exit_spread="[0, 4095]", captions="[1, 1e6]", candidates="[2, 65536]",
        )  # fmt: skip
        if self.exit_step >= self.steps:
            raise ValueError(
                f"loss.exit_step is {self.exit_step}, expected less than loss.steps, {self.steps}"
            )
        most = min(self.exit_step, self.steps - self.exit_step) - 1
        if self.exit_spread > most:
            raise ValueError(
                f"loss.exit_spread is {self.exit_spread}, expected at most {most}, from "
                f"loss.exit_step, {self.exit_step}, to the first and the last of "
                f"{self.steps} rounds"
            )

    @property
    def exit_steps(self) -> range:
        """All rounds after which the field learns to take over."""
        return range(self.exit_step - self.exit_spread, self.exit_step + self.exit_spread + 1)


@dataclass(frozen=True)
class MRFTraining:
    """A run of ``t2p-fast train mrf``."""

    model: TokenMRFConfig = field(default_factory=TokenMRFConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    loss: MRFLossConfig = field(default_factory=MRFLossConfig)


@dataclass(frozen=True)
class FeatureEncoderTraining:
    """A run of ``t2p-fast train features``."""

    model: FeatureEncoderConfig = field(default_factory=FeatureEncoderConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(vocabulary="full"))
    run: RunConfig = field(default_factory=RunConfig)


TRAININGS: dict[str, type[Any]] = {
    "vqgan": VQGANTraining,
    "muse": MuseTraining,
    "super-resolution": SuperResolutionTraining,
    "mrf": MRFTraining,
    "features": FeatureEncoderTraining,
}


def load_config(kind: str, name: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Reads the configuration of a run.

    Args:
        kind: one of ``TRAININGS``, such as ``"vqgan"``.
        name: a JSON file, or the name of a shipped recipe (``"embedded"``).
        overrides: ``"section.option=value"``, with values in JSON.

    Raises:
        ValueError: naming the file, section and option that is wrong.
    """
    path = Path(name)
    if path.suffix != ".json":
        path = RECIPES / f"{kind}-{name}.json"
        if not path.exists():
            known = sorted(p.stem.removeprefix(f"{kind}-") for p in RECIPES.glob(f"{kind}-*.json"))
            raise ValueError(
                f"train {kind}: config is {str(name)!r}, expected a .json file or one of {known}"
            )
    values = read_json(path)
    _check_sections(values, str(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        section, dot, option = key.partition(".")
        if not separator or not dot:
            raise ValueError(
                f"train {kind}: {shown(override)} is not of the form section.option=value"
            )
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        values.setdefault(section, {})[option] = value
    return config_from_values(kind, values, str(path))


def config_from_values(kind: str, values: dict[str, Any], source: str) -> Any:
    """Builds the configuration of a run from nested dictionaries."""
    _check_sections(values, source)
    training = TRAININGS[kind]
    sections = {f.name: f for f in dataclasses.fields(training)}
    unknown = sorted(values.keys() - sections.keys())
    if unknown:
        raise ValueError(
            f"{source}: unknown section {shown(unknown[0])}, known are {', '.join(sections)}"
        )
    built = {}
    for name, section in sections.items():
        assert section.default_factory is not dataclasses.MISSING
        default = section.default_factory()
        merged = {**dataclasses.asdict(default), **values.get(name, {})}
        built[name] = config_from_dict(type(default), merged, f"{source}: {name}")
    return training(**built)


def part_of(source: str, part: str) -> str:
    """The subfolder of ``source`` that holds a model: ``"embedded"`` holds several."""
    return part if source == "embedded" else ""


def _check_sections(values: Any, source: str) -> None:
    if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
        raise ValueError(f"{source}: expected a JSON object of sections, each an object of options")
