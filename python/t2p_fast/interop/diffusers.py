# SPDX-License-Identifier: Apache-2.0
"""Puts this package's ops into an existing pipeline or model of diffusers, and takes them out.

    swapped = accelerate(pipe)
    print(swapped)
    swapped.restore()

Weights, configurations and state dicts stay as they are: modules get another `forward`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models import attention_processor
from diffusers.models.autoencoders.vae import Decoder, Encoder, VectorQuantizer
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers import sana_transformer
from torch import Tensor, nn

from t2p_fast import schedulers
from t2p_fast._checks import check_choice, describe
from t2p_fast.interop.amused import AmusedScheduler
from t2p_fast.interop.attention_processor import AttnProcessor2_0
from t2p_fast.interop.sana import SanaAttnProcessor2_0, SanaLinearAttnProcessor2_0
from t2p_fast.ops import group_norm_silu, vq_nearest

__all__ = ["Acceleration", "Swap", "accelerate"]


@dataclass(frozen=True)
class Swap:
    """One replacement.

    Attributes:
        op: A key of the table of swaps, such as ``group_norm``.
        path: Where, as in ``unet.mid_block.resnets.0``.
        what: What was there, and what is there now or why it stayed.
    """

    op: str
    path: str
    what: str


@dataclass
class Acceleration:
    """What `accelerate` did. Printed, it is a table.

    Attributes:
        swaps: What was replaced.
        kept: What could have been replaced but for its configuration or an earlier change.
    """

    swaps: list[Swap] = field(default_factory=list)
    kept: list[Swap] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _done: set[int] = field(
        default_factory=set, repr=False
    )  # modules that their owner took care of

    def restore(self) -> None:
        """Puts everything back. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute, and remembers what it was."""
        own = vars(owner).get(name) if not isinstance(value, nn.Module) else getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(
            partial(delattr, owner, name) if own is None else partial(setattr, owner, name, own)
        )

    def __str__(self) -> str:
        counts: dict[tuple[str, str], list[str]] = {}
        for swap in self.swaps:
            counts.setdefault((swap.op, swap.what), []).append(swap.path)
        lines = [f"{op}: {what} ({len(at)}x, {at[0]})" for (op, what), at in counts.items()]
        lines += [f"kept: {swap.path}: {swap.what}" for swap in self.kept]
        return "\n".join(lines) or "nothing to swap"


def accelerate(target: Any, ops: str | Iterable[str] = "auto") -> Acceleration:
    """Swaps what this package does faster in a pipeline or a model of diffusers, in place.

    Results are those of the original up to rounding: of group norm and attention a few units of
    float32, in bfloat16 as far from the exact ones as before; of the schedulers see
    `t2p_fast.schedulers`; vector quantisation returns a true nearest code, where diffusers' may be
    off by the rounding of `torch.cdist`. aMUSEd draws from the same distribution, but a generator's
    seed means other tokens. On devices other than the CPU, in other dtypes than float32, bfloat16
    and float16, and under autocast, group norms and attention run as before.

    Args:
        target: A `DiffusionPipeline`, or a model (`nn.Module`).
        ops: ``"auto"`` for all, or some of ``"scheduler"``, ``"group_norm"``, ``"vq"``,
            ``"attention"``, ``"linear_attention"``.

    Returns:
        What was swapped, with `restore()`.

    Raises:
        TypeError: `target` is neither a pipeline nor a model.
        ValueError: An op is not known.
    """
    if not isinstance(target, nn.Module) and not isinstance(
        getattr(target, "components", None), dict
    ):
        raise TypeError(
            f"accelerate: expected a pipeline of diffusers or a model, got {describe(target)}"
        )
    names = _wanted(ops)
    done = Acceleration()
    for path, part in _parts(target):
        for name in names:
            _SWAPS[name](path, part, done)
    return done


def _wanted(ops: str | Iterable[str]) -> list[str]:
    names = list(_SWAPS) if ops == "auto" else [ops] if isinstance(ops, str) else list(ops)
    for name in names:
        check_choice("accelerate", "ops", name, tuple(_SWAPS))
    return names


def _parts(target: Any) -> Iterator[tuple[str, Any]]:
    """The target and all modules in it, owners before what they own, by path."""
    if isinstance(target, nn.Module):
        yield from target.named_modules()
        return
    yield "", target
    for name, component in target.components.items():
        if isinstance(component, nn.Module):
            for path, module in component.named_modules():
                yield f"{name}.{path}" if path else name, module


def _set_forward(
    op: str, path: str, module: nn.Module, forward: Callable[..., Any], what: str,
    done: Acceleration,
) -> bool:  # fmt: skip
    """Gives a module another forward, unless something else has done so before."""
    if "forward" in vars(module):
        own = getattr(vars(module)["forward"], "func", None)
        if getattr(own, "__module__", "") != __name__:
            done.kept.append(Swap(op, path, "its forward was replaced before"))
        return False
    done.replace(module, "forward", partial(forward, module))
    done.swaps.append(Swap(op, path, what))
    return True


# Schedulers ---------------------------------------------------------------------------------------


def _swap_scheduler(path: str, part: Any, done: Acceleration) -> None:
    theirs = None if isinstance(part, nn.Module) else getattr(part, "scheduler", None)
    name = type(theirs).__name__
    if theirs is None or not type(theirs).__module__.startswith("diffusers."):
        return
    ours = AmusedScheduler if name == "AmusedScheduler" else getattr(schedulers, name, None)
    if ours is None:
        return
    at = f"{path}.scheduler".lstrip(".")
    try:
        scheduler = ours.from_config(theirs.config)
    except (ValueError, NotImplementedError) as error:
        done.kept.append(Swap("scheduler", at, str(error)))
        return
    config = scheduler.config
    if config.get("rescale_betas_zero_snr") and config.prediction_type == "epsilon":
        why = "epsilon says nothing about a sample without signal (rescale_betas_zero_snr)"
        done.kept.append(Swap("scheduler", at, why))
        return
    if "variance_type" in vars(theirs):  # which users set there
        scheduler.variance_type = theirs.variance_type
    part.scheduler = scheduler

    def undo() -> None:
        if part.scheduler is scheduler:  # and not what somebody has put there since
            part.scheduler = theirs

    done._undo.append(undo)
    done.swaps.append(Swap("scheduler", at, f"{name} -> {ours.__module__}"))


# Group norms --------------------------------------------------------------------------------------


def _is_ours(x: Tensor) -> bool:
    """Whether there is a kernel for x, and F.group_norm would return its dtype."""
    kernel = x.device.type == "cpu" and not x.is_cuda
    dtype = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return kernel and dtype and not torch.is_autocast_enabled("cpu")


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if not _is_ours(x):
        return nn.GroupNorm.forward(norm, x)
    return group_norm_silu(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, activation="none"
    )


def _group_norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if not _is_ours(x):
        return nn.functional.silu(nn.GroupNorm.forward(norm, x))
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps)


def _resnet_block(
    block: ResnetBlock2D, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor:
    """A residual block whose two norms do the activation, and the second the time embedding's scale
    and shift.
    """
    unusual = block.time_emb_proj is None and (
        temb is not None or block.time_embedding_norm == "scale_shift"
    )
    seen = _hooked(block.norm1, block.norm2, block.nonlinearity)
    if not _is_ours(input_tensor) or args or kwargs or unusual or seen:
        result: Tensor = ResnetBlock2D.forward(block, input_tensor, temb, *args, **kwargs)
        return result
    x, h = input_tensor, _group_norm_silu(block.norm1, input_tensor)
    resample = block.upsample if block.upsample is not None else block.downsample
    if resample is not None:
        if block.upsample is not None and len(h) >= 64:  # diffusers#984
            x, h = x.contiguous(), h.contiguous()
        x, h = resample(x), resample(h)
    h = block.conv1(h)

    scale = shift = None
    if block.time_emb_proj is not None:
        embedded = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
        if block.time_embedding_norm == "scale_shift":
            scale, shift = embedded.chunk(2, dim=1)
        elif block.time_embedding_norm == "default":
            h = h + embedded[:, :, None, None]
    h = group_norm_silu(
        h,
        block.norm2.num_groups,
        block.norm2.weight,
        block.norm2.bias,
        eps=block.norm2.eps,
        scale=scale,
        shift=shift,
    )
    h = block.conv2(block.dropout(h))
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x.contiguous() if block.training else x)
    summed: Tensor = (x + h) / block.output_scale_factor
    return summed


def _hooked(*modules: nn.Module) -> bool:
    """Whether someone wants to see what these modules return."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)


def _swap_group_norm(path: str, part: Any, done: Acceleration) -> None:
    if type(part) is ResnetBlock2D:
        norms = type(part.norm1) is nn.GroupNorm and type(part.norm2) is nn.GroupNorm
        if norms and isinstance(part.nonlinearity, nn.SiLU):
            what = "ResnetBlock2D -> norms with SiLU in one pass"
            if _set_forward("group_norm", path, part, _resnet_block, what, done):
                done._done |= {id(part.norm1), id(part.norm2)}
    elif type(part) in (UNet2DModel, UNet2DConditionModel, Encoder, Decoder):
        norm, activation = getattr(part, "conv_norm_out", None), getattr(part, "conv_act", None)
        if type(norm) is nn.GroupNorm and type(activation) is nn.SiLU:
            at = f"{path}.conv_norm_out".lstrip(".")
            what = "GroupNorm, SiLU -> one pass"
            if not _hooked(norm, activation) and _set_forward(
                "group_norm", at, norm, _group_norm_silu, what, done
            ):
                done.replace(part, "conv_act", nn.Identity())
                done._done.add(id(norm))
    elif type(part) is nn.GroupNorm and id(part) not in done._done:
        what = "GroupNorm -> group_norm_silu without activation"
        _set_forward("group_norm", path, part, _group_norm, what, done)


# Vector quantisers --------------------------------------------------------------------------------


def _vector_quantizer(
    quantizer: VectorQuantizer, z: Tensor
) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
    codebook = quantizer.embedding.weight
    indices = vq_nearest(z.detach(), codebook.detach(), channel_dim=1)  # [b, h, w]
    codes = quantizer.embedding(indices).movedim(-1, 1)
    commitment = (codes.detach() - z).square().mean()
    movement = (codes - z.detach()).square().mean()
    if quantizer.legacy:  # beta on the other term: the bug that is kept for old checkpoints
        loss = commitment + quantizer.beta * movement
    else:
        loss = quantizer.beta * commitment + movement
    quantized = (z + (codes - z).detach()).contiguous()
    if quantizer.remap is not None:
        indices = quantizer.remap_to_used(indices)
    if not quantizer.sane_index_shape:
        indices = indices.reshape(-1) if quantizer.remap is None else indices.reshape(-1, 1)
    return quantized, loss, (None, None, indices)


def _swap_vq(path: str, part: Any, done: Acceleration) -> None:
    if type(part) is VectorQuantizer:
        what = "VectorQuantizer -> vq_nearest"
        _set_forward("vq", path, part, _vector_quantizer, what, done)


# Attention ----------------------------------------------------------------------------------------


def _swap_attention(path: str, part: Any, done: Acceleration) -> None:
    before = getattr(part, "processor", None)
    if type(part) is not attention_processor.Attention:
        return
    for theirs, ours in (
        (attention_processor.AttnProcessor2_0, AttnProcessor2_0),
        (sana_transformer.SanaAttnProcessor2_0, SanaAttnProcessor2_0),
    ):
        if type(before) is theirs:
            done.replace(part, "processor", ours(before))
            what = f"{theirs.__name__} -> attention"
            done.swaps.append(Swap("attention", f"{path}.processor".lstrip("."), what))


# Linear attention ---------------------------------------------------------------------------------


class _LinearAttention(SanaLinearAttnProcessor2_0):
    """SANA's attention by our kernel where there is one, by the processor before elsewhere."""

    def __init__(self, before: attention_processor.SanaLinearAttnProcessor2_0) -> None:
        self.before = before

    def __call__(
        self,
        attn: attention_processor.Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        ours = hidden_states.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        call = super().__call__ if ours else self.before
        result: Tensor = call(attn, hidden_states, encoder_hidden_states, attention_mask)
        return result


def _swap_linear_attention(path: str, part: Any, done: Acceleration) -> None:
    before = getattr(part, "processor", None)
    if type(before) is attention_processor.SanaLinearAttnProcessor2_0:
        done.replace(part, "processor", _LinearAttention(before))
        what = "SanaLinearAttnProcessor2_0 -> linear_attention"
        done.swaps.append(Swap("linear_attention", f"{path}.processor".lstrip("."), what))


# Each is called with the path of the pipeline ("") and of every module in it, and swaps what it
# knows through `Acceleration.replace`, which undoes it. A new op is a line here.
_SWAPS: dict[str, Callable[[str, Any, Acceleration], None]] = {
    "scheduler": _swap_scheduler,
    "group_norm": _swap_group_norm,
    "vq": _swap_vq,
    "attention": _swap_attention,
    "linear_attention": _swap_linear_attention,
}
