# SPDX-License-Identifier: Apache-2.0
"""Masked decoding: one round of drawing tokens and masking the least confident ones again.

Sizes: `b` pictures, `n` positions, `v` words.
"""

import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from t2p_fast._checks import check_choice, describe
from t2p_fast._library import _C, define_op

__all__ = ["MaskedSample", "mask_counts", "masked_sample"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCHEDULES = ("cosine", "linear")


class MaskedSample(NamedTuple):
    """One round of masked decoding.

    Attributes:
        tokens: ``[b, n]`` int64, with the least confident positions masked again.
        sampled: ``[b, n]`` int64 before that: every position has a token.
        log_probability: ``[b, n]`` float32, of the token that was drawn, at temperature 1; 0 where
            the token was known.
    """

    tokens: Tensor
    sampled: Tensor
    log_probability: Tensor


# The kernel, for CPU and CUDA tensors, beside its fake --------------------------------------------


def _sample(
    logits: Tensor,
    tokens: Tensor,
    uncond: Tensor | None,
    mask_count: Tensor | None,
    seeds: Tensor,
    token_noise: Tensor | None,
    confidence_noise: Tensor | None,
    mask_token: int,
    guidance: float,
    temperature: float,
    choice_temperature: float,
    min_p: float,
    top_k: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    # The logits of an image model, [b, v, h, w], are read where they lie.
    transposed = _is_transposed(logits) and (uncond is None or _is_transposed(uncond))
    if transposed:
        logits, uncond = logits.mT, None if uncond is None else uncond.mT
    results = torch.empty_like(tokens), torch.empty_like(tokens), _log_probability_like(tokens)
    _C.masked_sample(
        logits.contiguous(),
        _ready(uncond),
        tokens.contiguous(),
        _ready(mask_count),
        seeds.contiguous(),
        _ready(token_noise),
        _ready(confidence_noise),
        mask_token,
        guidance,
        temperature,
        choice_temperature,
        math.log(min_p) if min_p > 0 else -math.inf,
        top_k,
        step,
        transposed,
        *results,
        torch.get_num_threads(),
    )
    return results


def _is_transposed(logits: Tensor) -> bool:
    return not logits.is_cuda and not logits.is_contiguous() and logits.mT.is_contiguous()


def _ready(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _log_probability_like(tokens: Tensor) -> Tensor:
    return torch.empty_like(tokens, dtype=torch.float32)


def _sample_fake(
    logits: Tensor,  # noqa: ARG001
    tokens: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty_like(tokens), _log_probability_like(tokens)


_masked_sample = define_op(
    "masked_sample(Tensor logits, Tensor tokens, Tensor? uncond, Tensor? mask_count, "
    "Tensor seeds, Tensor? token_noise, Tensor? confidence_noise, int mask_token, float guidance, "
    "float temperature, float choice_temperature, float min_p, int top_k, int step) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=_sample,
    fake=_sample_fake,
)


# Public functions --------------------------------------------------------------------------------


def masked_sample(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_token: int | None = None,
    mask_count: Tensor | int | None = None,
    uncond_logits: Tensor | None = None,
    guidance: float | None = None,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    choice_temperature: float = 0.0,
    min_p: float = 0.0,
    top_k: int = 0,
    seed: Tensor | int | None = None,
    step: int = 0,
    noise: tuple[Tensor, Tensor] | None = None,
) -> MaskedSample:
    """Draws a token for every masked position and masks the least confident ones again.

    With ``x = c + guidance (c - u)`` of the conditional and unconditional logits, less the words
    that `min_p` and `top_k` take out, a masked position gets
    ``argmax_v x_v + temperature g_v``, a draw from ``softmax(x / temperature)``, and the confidence
    ``log softmax(x)[token] + choice_temperature g``, where all ``g`` are standard Gumbel noise
    (Muse, section 2.8; MaskGIT, section 3.2; the official parallel_decode). The `mask_count`
    positions of least confidence, of equals the first, are masked again; never one that was known.

    The logits are read once. Noise comes from Philox4x32-10 by counter (SC 2011), so that a seed
    gives the same tokens on any number of threads, any instruction set, and on CUDA; on the CPU
    `log_probability` has the same bits too.

    Args:
        logits: ``[b, n, v]``, conditional; float32, bfloat16 or float16. Computed on in float32.
            -inf forbids a word. A position with a NaN or +inf, or with -inf alone, gets token 0
            and log-probability NaN, and is the first to be masked again.
        tokens: ``[b, n]`` int64.
        mask_token: the token of a position to fill in; ``v`` if not given.
        mask_count: how many positions of a picture to mask again, ``[b]`` int64 or one number for
            all, see `mask_counts`; at most those that were masked. ``None`` is 0.
        uncond_logits: ``[b, n, v]``, for classifier-free guidance; of the dtype of `logits`.
        guidance: ``t`` in Muse's ``(1 + t) c - t u``.
        guidance_scale: the same as diffusers has it, ``s`` in ``u + s (c - u)``: ``s = 1 + t``.
        temperature: of the tokens; 0 takes the likeliest word, of equals the first.
        choice_temperature: of the confidences.
        min_p: words that the conditional logits make less likely than `min_p` times the likeliest
            are never drawn (Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024).
        top_k: only the `top_k` largest ``x``, and what equals the last of them, are drawn from; 0
            is all.
        seed: int64 ``[b]``, one per picture, so that a picture does not depend on its batch; an
            int stands for ``seed, seed + 1, ...``; ``None`` draws from torch's default generator.
        step: number of the round: every round of one seed has noise of its own.
        noise: Gumbel noise to use instead, of the words ``[b, n, v]`` and of the confidences
            ``[b, n]``, float32.

    Returns:
        A `MaskedSample`. Nothing in it is differentiable.

    Raises:
        ValueError: shapes, devices or numbers do not fit.
        TypeError: dtypes do not fit.

    Complexity:
        ``O(b n v)`` time, one pass over the logits; ``O(v)`` memory a thread.
    """
    op = "masked_sample"
    _check_logits(op, logits, tokens, uncond_logits)
    b, n, v = logits.shape
    mask_token = v if mask_token is None else mask_token
    if guidance is not None and guidance_scale is not None:
        raise ValueError(f"{op}: give guidance or guidance_scale, not both")
    if guidance_scale is not None:
        guidance = guidance_scale - 1
    if guidance and uncond_logits is None:
        raise ValueError(f"{op}: guidance needs uncond_logits")
    for name, value, low, high in (
        ("guidance", guidance or 0.0, -1e30, 1e30),
        ("temperature", temperature, 0.0, 1e30),
        ("choice_temperature", choice_temperature, 0.0, 1e30),
        ("min_p", min_p, 0.0, 1.0),
        ("top_k", top_k, 0, math.inf),
        ("step", step, 0, 2**32 - 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"{op}: {name} is {value}, expected {low:g} to {high:g}")
    if not (mask_count is None or isinstance(mask_count, (Tensor, int))):
        if not hasattr(mask_count, "__index__"):  # as numpy's integers have
            raise TypeError(
                f"{op}: mask_count must be an int or an int64 tensor, got {describe(mask_count)}"
            )
        mask_count = operator.index(mask_count)
    if isinstance(mask_count, int):
        mask_count = tokens.new_full([b], mask_count)
    token_noise, confidence_noise = noise if noise is not None else (None, None)
    seeds = _seeds(op, seed, tokens, noise is not None)
    for name, tensor, shape, dtype in (
        ("mask_count", mask_count, [b], torch.int64),
        ("seed", seeds, [b], torch.int64),
        ("noise", token_noise, [b, n, v], torch.float32),
        ("noise", confidence_noise, [b, n], torch.float32),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {_name(dtype)}, got {_name(tensor.dtype)}")
        if list(tensor.shape) != shape or tensor.device != logits.device:
            raise ValueError(
                f"{op}: {name} is {list(tensor.shape)} on {tensor.device}, expected {shape} on "
                f"{logits.device}"
            )
    uncond = uncond_logits.detach() if uncond_logits is not None and guidance else None
    return MaskedSample(
        *_masked_sample(
            logits.detach(), tokens, uncond, mask_count, seeds, token_noise, confidence_noise,
            mask_token, float(guidance or 0.0), float(temperature), float(choice_temperature),
            float(min_p), top_k, step,
        )
    )  # fmt: skip


def mask_counts(
    step: int, steps: int, masked_at_start: Tensor, unknown: Tensor, *, schedule: str = "cosine"
) -> Tensor:
    """How many tokens stay masked after round `step` of `steps`, per picture.

    MaskGIT's schedule with its floor and clamps,
    ``max(1, min(unknown - 1, floor(N gamma((step + 1) / steps))))``, where ``gamma(r)`` is
    ``cos(pi / 2 r)`` or ``1 - r``; a picture with nothing left to fill in keeps 0. The last round
    is for the caller to leave out: it keeps what was drawn.

    Args:
        step: the round, from 0.
        steps: their number.
        masked_at_start: ``N``, ``[b]`` int64.
        unknown: positions that are masked as the round begins, ``[b]`` int64.
        schedule: ``"cosine"`` or ``"linear"``.

    Returns:
        ``[b]`` int64.
    """
    check_choice("mask_counts", "schedule", schedule, _SCHEDULES)
    ratio = (step + 1) / steps
    share = math.cos(math.pi / 2 * ratio) if schedule == "cosine" else 1 - ratio
    count = (masked_at_start.double() * min(max(share, 1e-6), 1.0)).floor().long()
    return torch.minimum(count, unknown - 1).clamp_min(1).minimum(unknown)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_logits(op: str, logits: Tensor, tokens: Tensor, uncond: Tensor | None) -> None:
    tensors = {"logits": logits, "tokens": tokens}
    if uncond is not None:
        tensors["uncond_logits"] = uncond
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got {describe(tensor)}")
        if tensor.device != logits.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but logits are on {logits.device}"
            )
    if logits.dtype not in _DTYPES:
        wanted = ", ".join(_name(dtype) for dtype in _DTYPES)
        raise TypeError(f"{op}: logits must be {wanted}, got {_name(logits.dtype)}")
    if logits.ndim != 3 or logits.shape[2] == 0:
        raise ValueError(f"{op}: logits must be [b, n, v >= 1], got {list(logits.shape)}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"{op}: tokens must be int64, got {_name(tokens.dtype)}")
    if tokens.shape != logits.shape[:2]:
        raise ValueError(
            f"{op}: tokens are {list(tokens.shape)}, expected {list(logits.shape[:2])}"
        )
    if uncond is not None and uncond.dtype != logits.dtype:
        raise TypeError(
            f"{op}: uncond_logits are {_name(uncond.dtype)} but logits are {_name(logits.dtype)}"
        )
    if uncond is not None and uncond.shape != logits.shape:
        raise ValueError(
            f"{op}: uncond_logits are {list(uncond.shape)} but logits are {list(logits.shape)}"
        )


def _seeds(op: str, seed: Tensor | int | None, tokens: Tensor, unused: bool) -> Tensor:
    """A key for every picture."""
    b, device = tokens.shape[0], tokens.device
    if isinstance(seed, Tensor):
        return seed
    if unused:
        return torch.zeros(b, dtype=torch.int64, device=device)
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, [b], device=device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: seed must be an int or an int64 tensor, got {describe(seed)}")
    return seed + torch.arange(b, device=device)
