# SPDX-License-Identifier: Apache-2.0
"""VQGAN: pictures to a grid of tokens and back.

P. Esser, R. Rombach, B. Ommer, "Taming Transformers for High-Resolution Image Synthesis", CVPR
2021. Module names follow the paper's code, so its state dictionaries fit the published configs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2p_fast.checkpoints import PretrainedModel, check_numbers, shown
from t2p_fast.nn.vector_quantizer import VectorQuantizer


@dataclass(frozen=True)
class VQGANConfig:
    """Architecture of a :class:`VQGAN`. The defaults are the published f16, 16384 codes.

    Attributes:
        sample_size: side of the training pictures in pixels.
        block_out_channels: channels per resolution; every entry but the last halves it.
        layers_per_block: residual blocks per resolution (the decoder has one more).
        attn_resolutions: sides of the feature maps that get self-attention.
        mid_attention: whether the middle has self-attention.
        latent_channels: channels that encoder and decoder exchange with the 1x1 convolutions.
        num_vq_embeddings, vq_embed_dim: size of the codebook.
        norm_type: ``"group"`` as published, or ``"rms"``: per position, so that no code
            depends on the statistics of the whole picture.
        encoder_kernel_size: 3 as published. With 1, downsampling is by patches that do not
            overlap and every code depends on its own patch alone: such tokens are far easier
            to predict for a small transformer.
        ema_decay: decay of the moving-average codebook; ``None`` learns it by gradient.
        commitment_weight: beta of equation (4).
    """

    sample_size: int = 256
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    layers_per_block: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    mid_attention: bool = True
    latent_channels: int = 256
    num_vq_embeddings: int = 16384
    vq_embed_dim: int = 256
    norm_type: Literal["group", "rms"] = "group"
    norm_num_groups: int = 32
    encoder_kernel_size: int = 3
    ema_decay: float | None = None
    commitment_weight: float = 0.25

    def __post_init__(self) -> None:
        check_numbers(
            self, "VQGANConfig: ", sample_size="[1, 4096]", in_channels="[1, 1024]",
            out_channels="[1, 1024]", block_out_channels="[1, 16384]", layers_per_block="[1, 64]",
            attn_resolutions="[1, 4096]", latent_channels="[1, 16384]",
            num_vq_embeddings="[1, 1048576]", vq_embed_dim="[1, 16384]",
            norm_num_groups="[1, 16384]", ema_decay="[0, 1)", commitment_weight="[0, inf)",
        )  # fmt: skip
        if not 1 <= len(self.block_out_channels) <= 10:
            raise ValueError(
                f"VQGANConfig: block_out_channels is {shown(self.block_out_channels)}, expected "
                "one to ten numbers"
            )
        if self.encoder_kernel_size not in (1, 3):
            raise ValueError(
                f"VQGANConfig: encoder_kernel_size is {self.encoder_kernel_size}, expected 1 or 3"
            )
        if self.norm_type not in ("group", "rms"):
            raise ValueError(
                f"VQGANConfig: norm_type is {self.norm_type!r}, expected 'group' or 'rms'"
            )
        if self.sample_size % self.downsampling_factor:
            raise ValueError(
                f"VQGANConfig: sample_size is {self.sample_size}, expected a multiple of the "
                f"downsampling factor {self.downsampling_factor}"
            )

    @property
    def downsampling_factor(self) -> int:
        """Pixels per token along a side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def token_grid(self) -> int:
        """Tokens along a side of a training picture."""
        return self.sample_size // self.downsampling_factor


class VQGANOutput(NamedTuple):
    """What :meth:`VQGAN.forward` returns."""

    reconstruction: Tensor  # [b, c, h, w]
    indices: Tensor  # [b, h / f, w / f]
    quantizer_loss: Tensor  # scalar


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-6).to(x.dtype)
        scaled: Tensor = x * scale * self.weight[:, None, None].to(x.dtype)
        return scaled


def _norm(channels: int, config: VQGANConfig) -> nn.Module:
    if config.norm_type == "rms":
        return RMSNorm(channels)
    return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)


def _conv(inputs: int, outputs: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2)


class ResnetBlock(nn.Module):
    """norm, SiLU, convolution, twice, beside a skip connection."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm1 = _norm(inputs, config)
        self.conv1 = _conv(inputs, outputs, kernel_size)
        self.norm2 = _norm(outputs, config)
        self.conv2 = _conv(outputs, outputs, kernel_size)
        self.nin_shortcut = _conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.nin_shortcut(x) + h
        return out


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of the feature map."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm = _norm(channels, config)
        self.q = _conv(channels, channels, 1)
        self.k = _conv(channels, channels, 1)
        self.v = _conv(channels, channels, 1)
        self.proj_out = _conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # [b, h * w, c]
        projected: Tensor = self.proj_out(out.mT.reshape(x.shape))
        return x + projected


class Downsample(nn.Module):
    """Halves the resolution: a strided 3x3 convolution, or 2x2 patches if ``kernel_size`` is 1."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.pad = kernel_size == 3
        self.conv = nn.Conv2d(channels, channels, 3 if self.pad else 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad else x)
        return halved


class Upsample(nn.Module):
    """Doubles the resolution by repetition, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


class _Level(nn.Module):
    """The blocks of one resolution, and the step to the next."""

    downsample: Downsample
    upsample: Upsample

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int, kernel_size: int, config: VQGANConfig) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, kernel_size, config)
        self.attn_1 = AttnBlock(channels, config) if config.mid_attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, kernel_size, config)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return h


class Encoder(nn.Module):
    """Picture ``[b, 3, h, w]`` to latents ``[b, latent_channels, h / f, w / f]``."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        kernel, channels = config.encoder_kernel_size, config.block_out_channels
        resolution = config.sample_size
        self.conv_in = _conv(config.in_channels, channels[0], kernel)
        self.down = nn.ModuleList()
        inputs = channels[0]
        for i, outputs in enumerate(channels):
            level = _Level()
            for _ in range(config.layers_per_block):
                level.block.append(ResnetBlock(inputs, outputs, kernel, config))
                inputs = outputs
                if resolution in config.attn_resolutions:
                    level.attn.append(AttnBlock(outputs, config))
            if i < len(channels) - 1:
                level.downsample = Downsample(outputs, kernel)
                resolution //= 2
            self.down.append(level)
        self.mid = _Middle(inputs, kernel, config)
        self.norm_out = _norm(inputs, config)
        self.conv_out = _conv(inputs, config.latent_channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        latents: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return latents


class Decoder(nn.Module):
    """Latents ``[b, latent_channels, h / f, w / f]`` to a picture ``[b, 3, h, w]``."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        resolution = config.token_grid
        inputs = channels[-1]
        self.conv_in = _conv(config.latent_channels, inputs, 3)
        self.mid = _Middle(inputs, 3, config)
        levels: list[nn.Module] = []
        for i in reversed(range(len(channels))):
            outputs = channels[i]
            level = _Level()
            for _ in range(config.layers_per_block + 1):
                level.block.append(ResnetBlock(inputs, outputs, 3, config))
                inputs = outputs
                if resolution in config.attn_resolutions:
                    level.attn.append(AttnBlock(outputs, config))
            if i > 0:
                level.upsample = Upsample(outputs)
                resolution *= 2
            levels.insert(0, level)  # up[i] works at the resolution of down[i]
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(inputs, config)
        self.conv_out = _conv(inputs, config.out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        pictures: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return pictures


class VQGAN(PretrainedModel):
    """Encoder, codebook and decoder. Pictures are ``[b, 3, h, w]`` in [-1, 1].

    Heights and widths may be any multiples of ``config.downsampling_factor``.
    """

    config_class = VQGANConfig
    config: VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(
            config.num_vq_embeddings,
            config.vq_embed_dim,
            beta=config.commitment_weight,
            ema_decay=config.ema_decay,
        )
        self.quant_conv = nn.Conv2d(config.latent_channels, config.vq_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.vq_embed_dim, config.latent_channels, 1)

    def forward(self, pictures: Tensor, quantize: bool = True) -> VQGANOutput:
        """Reconstructs ``pictures``; in training mode a moving-average codebook is updated.

        Args:
            pictures: ``[b, 3, h, w]`` in [-1, 1].
            quantize: False skips the codebook, as in the first steps of training; the indices
                are then those of the nearest codes, and the loss is 0.
        """
        latents = self.encode(pictures)
        if not quantize:
            indices = self.quantize.nearest(latents)
            # Without effect, but DDP insists on a gradient for every parameter that could have one.
            loss = 0.0 * self.quantize.codebook.sum()
            return VQGANOutput(self.decode(latents), indices, loss)
        quantized, indices, loss = self.quantize(latents)
        return VQGANOutput(self.decode(quantized), indices, loss)

    def check_rgb(self, op: str) -> None:
        """Raises ValueError, for ``op``, unless pictures go in and come out with 3 channels."""
        channels = (self.config.in_channels, self.config.out_channels)
        if channels != (3, 3):
            raise ValueError(
                f"{op}: vqgan has {channels[0]} channels in and {channels[1]} out, expected 3 and "
                "3: red, green and blue"
            )

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures ``[b, 3, h, w]`` to continuous latents ``[b, vq_embed_dim, h / f, w / f]``."""
        factor = self.config.downsampling_factor
        if pictures.ndim != 4 or pictures.shape[1] != self.config.in_channels:
            raise ValueError(
                f"VQGAN: pictures are {list(pictures.shape)}, expected "
                f"[b, {self.config.in_channels}, h, w]"
            )
        if pictures.shape[2] % factor or pictures.shape[3] % factor:
            raise ValueError(
                f"VQGAN: pictures are {list(pictures.shape)}, but height and width must be "
                f"multiples of {factor}"
            )
        latents: Tensor = self.quant_conv(self.encoder(pictures))
        return latents

    def decode(self, quantized: Tensor) -> Tensor:
        """Code vectors ``[b, vq_embed_dim, h / f, w / f]`` to pictures ``[b, 3, h, w]``."""
        pictures: Tensor = self.decoder(self.post_quant_conv(quantized.to(self.dtype)))
        return pictures

    def encode_to_indices(self, pictures: Tensor) -> Tensor:
        """Pictures ``[b, 3, h, w]`` to tokens ``[b, h / f, w / f]``, int64."""
        return self.quantize.nearest(self.encode(pictures))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Tokens ``[b, h / f, w / f]`` to pictures ``[b, 3, h, w]``."""
        return self.decode(self.quantize.lookup(indices))
