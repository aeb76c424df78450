# SPDX-License-Identifier: Apache-2.0
"""Models small enough to be made anew in every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from t2p_fast.models.muse import Muse, MuseConfig
from t2p_fast.models.super_resolution import MuseSuperResolution, MuseSuperResolutionConfig
from t2p_fast.models.text_encoder import TextTransformer, TextTransformerConfig, train_tokenizer
from t2p_fast.models.vqgan import VQGAN, VQGANConfig
from t2p_fast.pipelines import MusePipeline

CAPTIONS = ["a red circle", "a blue square", "a green star above a red circle"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors of a few hundred numbers are quicker on one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vqgan_config(**changes: object) -> VQGANConfig:
    """16x16 pixels, 4x4 tokens of a vocabulary of 16, each token of its own patch alone."""
    options = {
        "sample_size": 16,
        "block_out_channels": (8, 8, 8),
        "layers_per_block": 1,
        "attn_resolutions": (),
        "mid_attention": False,
        "latent_channels": 8,
        "num_vq_embeddings": 16,
        "vq_embed_dim": 4,
        "norm_type": "rms",
        "encoder_kernel_size": 1,
    }
    return VQGANConfig(**{**options, **changes})  # type: ignore[arg-type]


def make_vqgan(seed: int = 0, **changes: object) -> VQGAN:
    torch.manual_seed(seed)
    vqgan = VQGAN(vqgan_config(**changes))
    # Fresh codes lie closer together than float16 can tell apart.
    torch.nn.init.normal_(vqgan.quantize.embedding.weight, std=0.5)
    return vqgan.requires_grad_(False).eval()


def make_muse(seed: int = 0, **changes: int) -> Muse:
    torch.manual_seed(seed)
    options = {
        "vocab_size": 16,
        "token_grid": 4,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "text_embed_dim": 16,
    }
    muse = Muse(MuseConfig(**{**options, **changes}))
    # Fresh weights are so small that neither the text nor the tokens would matter.
    for name, parameter in muse.layers.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.normal_(muse.output_table.free, std=20.0)
    return muse.eval()


def make_super_resolution(seed: int = 0, **changes: int) -> MuseSuperResolution:
    torch.manual_seed(seed)
    options = {
        "vocab_size": 16, "codebook_dim": 4, "free_embeddings": False, "token_grid": 8,
        "low_token_grid": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
        "text_embed_dim": 16,
    }  # fmt: skip
    stage = MuseSuperResolution(MuseSuperResolutionConfig(**{**options, **changes}))
    stage.set_codebook(torch.randn(16, 4))
    for name, parameter in stage.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return stage.eval()


def make_text_encoder(seed: int = 0, max_length: int = 24) -> TextTransformer:
    tokenizer = train_tokenizer(CAPTIONS, 280)
    torch.manual_seed(seed)
    config = TextTransformerConfig(
        vocab_size=280, max_length=max_length, hidden_size=16, num_layers=1, num_heads=2
    )
    encoder = TextTransformer(config, tokenizer)
    torch.nn.init.normal_(encoder.token_embedding.weight)
    return encoder.eval()


def make_pipeline() -> MusePipeline:
    return MusePipeline(make_text_encoder(), make_muse(), make_vqgan())


def save_pipeline(folder: Path) -> Path:
    """Writes the three models in the layout that ``MusePipeline.from_pretrained`` reads."""
    pipeline = make_pipeline()
    assert isinstance(pipeline.text_encoder, TextTransformer)
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    pipeline.muse.save_pretrained(folder / "muse")
    pipeline.vqgan.save_pretrained(folder / "vqgan")
    return folder
