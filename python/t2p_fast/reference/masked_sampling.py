# SPDX-License-Identifier: Apache-2.0
"""Masked decoding in plain PyTorch: one round of Muse and MaskGIT, and its counter-based noise.

H. Chang et al., "MaskGIT: Masked Generative Image Transformer", CVPR 2022; H. Chang et al.,
"Muse", 2023. Noise: J. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MaskedSample", "confidence_noise", "masked_sample", "philox", "token_noise"]


class MaskedSample(NamedTuple):
    """As `t2p_fast.ops.MaskedSample`."""

    tokens: Tensor
    sampled: Tensor
    log_probability: Tensor


def masked_sample(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_token: int | None = None,
    mask_count: Tensor | None = None,
    uncond_logits: Tensor | None = None,
    guidance: float = 0.0,
    temperature: float = 1.0,
    choice_temperature: float = 0.0,
    min_p: float = 0.0,
    top_k: int = 0,
    seeds: Tensor | None = None,
    step: int = 0,
    noise: tuple[Tensor, Tensor] | None = None,
) -> MaskedSample:
    """As `t2p_fast.ops.masked_sample`; `seeds` ``[b]`` or `noise` must be given."""
    _, n, v = logits.shape
    unknown = tokens == (v if mask_token is None else mask_token)
    x = logits
    if uncond_logits is not None:
        x = torch.where(logits == -math.inf, logits, logits + guidance * (logits - uncond_logits))
    if min_p > 0:
        least = logits.amax(-1, keepdim=True) + math.log(min_p)
        x = x.masked_fill(logits < least, -math.inf)
    if 0 < top_k < v:
        x = x.masked_fill(x < x.topk(top_k).values[..., -1:], -math.inf)
    if noise is None:
        if seeds is None:
            raise ValueError("reference.masked_sample: neither seeds nor noise are given")
        noise = token_noise(seeds, n, v, step), confidence_noise(seeds, n, step)
    scores = x.double() + temperature * noise[0] if temperature > 0 else x
    sampled = torch.where(unknown, scores.argmax(-1), tokens)
    chosen = x.gather(-1, torch.where(unknown, sampled, 0)[..., None])[..., 0]
    log_probability = torch.where(unknown, chosen - x.logsumexp(-1), 0)
    if mask_count is None:
        return MaskedSample(sampled, sampled, log_probability)
    confidence = log_probability + choice_temperature * noise[1]
    order = confidence.masked_fill(~unknown, math.inf).argsort(dim=1, stable=True).argsort(1)
    again = (order < mask_count[:, None]) & unknown
    masked = sampled.masked_fill(again, v if mask_token is None else mask_token)
    return MaskedSample(masked, sampled, log_probability)


def token_noise(seeds: Tensor, n: int, v: int, step: int) -> Tensor:
    """The Gumbel noise ``[b, n, v]`` of the words, float64."""
    words = torch.arange(v)
    counter = words // 64 * 16 + words % 16
    position = torch.arange(n)[:, None]
    four = philox(seeds.cpu()[:, None, None], counter, position, step, 0)
    chosen = four.gather(0, (words % 64 // 16).expand(1, *four.shape[1:]))[0]
    return _gumbel(chosen).to(seeds.device)


def confidence_noise(seeds: Tensor, n: int, step: int) -> Tensor:
    """The Gumbel noise ``[b, n]`` of the confidences, float64."""
    first = philox(seeds.cpu()[:, None], torch.zeros(1).long(), torch.arange(n), step, 1)[0]
    return _gumbel(first).to(seeds.device)


def _gumbel(word: Tensor) -> Tensor:
    uniform = (word.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def philox(key: Tensor, c0: Tensor, c1: Tensor, c2: int, c3: int) -> Tensor:
    """The four 32-bit words of Philox4x32-10 at a counter, ``[4, ...]`` int64.

    Args:
        key: int64, whose 64 bits are the key.
        c0: the counter's words, low word first; all broadcast.
        c1: as `c0`.
        c2: as `c0`.
        c3: as `c0`.
    """
    low = 0xFFFFFFFF
    key, a, b = torch.broadcast_tensors(key, c0, c1)
    c, d = torch.full_like(a, c2), torch.full_like(a, c3)
    k0, k1 = key & low, key >> 32 & low
    for _ in range(10):
        p0, p1 = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = p1 >> 32 & low ^ b ^ k0, p1 & low, p0 >> 32 & low ^ d ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return torch.stack([a, b, c, d])
