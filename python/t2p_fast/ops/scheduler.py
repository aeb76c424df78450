# SPDX-License-Identifier: Apache-2.0
"""One step of a diffusion sampler: guidance, prediction, bound, update and noise in one kernel.

The samplers differ in scalars alone, which `scheduler_coefficients` works out on the host in
float64; see there. Sizes: `b` samples of any shape, `t` steps.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from t2p_fast._checks import has_modes, is_plain, written
from t2p_fast._library import _C, define_op
from t2p_fast.memory import empty
from t2p_fast.ops.scheduler_autograd import (
    CLIP,
    NO_BOUND,
    THRESHOLD,
    Arguments,
    compute,
    gradients,
)
from t2p_fast.ops.scheduler_coefficients import Column

__all__ = ["scheduler_noise", "scheduler_step"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The tensors of a step that have the shape of the sample, by their place among the op's arguments.
_TENSORS = {
    "sample": 0, "model_output": 1, "uncond_output": 5, "shift": 12, "history1": 13,
    "history2": 14, "noise": 15,
}  # fmt: skip
_COEFFICIENTS, _INDEX, _DRAW, _SEEDS, _SEED = 2, 3, 16, 17, 18

# Noise as the op takes it, from a tensor or drawn: the tensor, whether the kernel draws, its seeds,
# its seed, and its offset. A seed of None is one out of torch's default generator.
NoiseSource = tuple[Tensor | None, bool, Tensor | None, int | None, int]
NO_NOISE: NoiseSource = (None, False, None, 0, 0)
DRAWN_NOISE: NoiseSource = (None, True, None, None, 0)


_kernel: Any = _C.scheduler_step


# The kernels, for CPU and CUDA tensors, each beside its fake --------------------------------------


def _step(*arguments: Any) -> tuple[Tensor, Tensor]:
    sample, return_x0 = arguments[0], arguments[-1]
    prev, x0 = _step_fake(*arguments)
    if sample.dtype == torch.float64:
        values = compute(_with_noise(arguments))
        return values.prev, values.x0 if return_x0 else x0
    _launch(arguments[:-1], prev, x0 if return_x0 else None)
    return prev, x0


def _launch(arguments: tuple[Any, ...], prev: Tensor, x0: Tensor | None) -> None:
    sample, workspace = arguments[0], None
    if sample.is_cuda:
        batch, bound = len(sample), arguments[8]
        rescaled = arguments[5] is not None and arguments[7] != 0
        n = sample.numel() // max(batch, 1)
        size = _C.scheduler_workspace_size(batch, n, bound == THRESHOLD, rescaled)
        workspace = sample.new_empty(size, dtype=torch.float32) if size else None
    _kernel(*arguments, workspace, prev, x0, torch.get_num_threads())


def _step_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    sample, return_x0 = arguments[0], arguments[-1]
    prev = empty(sample.shape, sample)
    return prev, empty(sample.shape if return_x0 else (0,), sample)


def _noise(like: Tensor, seeds: Tensor | None, seed: int, offset: int) -> Tensor:
    out = _noise_fake(like, seeds, seed, offset)
    _C.scheduler_noise(out, seeds, seed, offset, torch.get_num_threads())
    return out


def _noise_fake(like: Tensor, seeds: Tensor | None, seed: int, offset: int) -> Tensor:  # noqa: ARG001
    return empty(like.shape, like, torch.float32)


# Gradients ----------------------------------------------------------------------------------------


def _with_noise(arguments: Sequence[Any]) -> Arguments:
    """The arguments with the noise that the kernel draws as a tensor."""
    sample, noise = arguments[0], arguments[_TENSORS["noise"]]
    draw, seeds, seed, offset = arguments[_DRAW : _DRAW + 4]
    if noise is None and draw:
        noise = _scheduler_noise(sample, seeds, seed, offset).to(sample.dtype)
    everything = (*arguments[: _TENSORS["noise"]], noise)
    return Arguments(*everything)


def _step_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:  # noqa: ARG001
    places = [*_TENSORS.values(), _COEFFICIENTS, _INDEX, _SEEDS]
    ctx.save_for_backward(*(inputs[place] for place in places))
    ctx.others = [None if i in places else value for i, value in enumerate(inputs)]


def _step_backward(ctx: Any, grad_prev: Tensor, grad_x0: Tensor) -> tuple[Tensor | None, ...]:
    arguments = list(ctx.others)
    places = [*_TENSORS.values(), _COEFFICIENTS, _INDEX, _SEEDS]
    for place, tensor in zip(places, ctx.saved_tensors, strict=True):
        arguments[place] = tensor
    dtype = arguments[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    for place in _TENSORS.values():
        if arguments[place] is not None:
            arguments[place] = arguments[place].to(wide)
    if not arguments[-1]:  # without x0
        grad_x0 = torch.zeros_like(grad_prev)
    with torch.no_grad():
        found = gradients(_with_noise(arguments), grad_prev.to(wide), grad_x0.to(wide))
    result: list[Tensor | None] = [None] * len(arguments)
    for name, place in _TENSORS.items():
        gradient = found[name]
        if ctx.needs_input_grad[place] and gradient is not None:
            result[place] = gradient.to(dtype)
    return tuple(result)


def _step_vmap(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    if arguments[_DRAW] and info.randomness == "error":
        raise RuntimeError("scheduler_step: vmap over a random step wants randomness='same'")
    results = [
        _scheduler_step(
            *(
                value if dim is None else value.select(dim, b)
                for value, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for b in range(info.batch_size)
    ]
    prev, x0 = zip(*results, strict=True)
    return (torch.stack(prev), torch.stack(x0)), (0, 0)


_scheduler_step = define_op(
    "scheduler_step(Tensor sample, Tensor model_output, Tensor coefficients, Tensor? index, int "
    "row,"
    " Tensor? uncond_output, float guidance_scale, float guidance_rescale, int bound, float limit,"
    " float ratio, bool learned, Tensor? shift, Tensor? history1, Tensor? history2, Tensor? noise,"
    " bool draw, Tensor? seeds, int seed, int offset, bool return_x0) -> (Tensor, Tensor)",
    cpu=_step,
    fake=_step_fake,
    setup_context=_step_setup_context,
    backward=_step_backward,
    vmap=_step_vmap,
)
_scheduler_noise = define_op(
    "scheduler_noise(Tensor like, Tensor? seeds, int seed, int offset) -> Tensor",
    cpu=_noise,
    fake=_noise_fake,
)


# What users call ----------------------------------------------------------------------------------


SchedulerPlan = _C.SchedulerPlan
_plain_step = _C.scheduler_plain_step
_is_compiling = torch.compiler.is_compiling
_get_num_threads = torch.get_num_threads


def run_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    row: int,
    index: Tensor | None = None,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    bound: tuple[int, float, float] = (NO_BOUND, 1.0, 0.0),
    learned: bool = False,
    shift: Tensor | None = None,
    history1: Tensor | None = None,
    history2: Tensor | None = None,
    noise: NoiseSource = NO_NOISE,
    return_x0: bool = True,
    out: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None]:
    """The step as the registered op computes it; `bound` is its kind, limit and quantile.

    A plain step goes past the dispatcher, which would cost more than a small step itself. What the
    kernel refuses is checked and converted, and then given to the registered op.
    """
    given, draw, seeds, seed, offset = noise
    prev, x0 = out
    compiling = _is_compiling()
    if draw and seed is None and (compiling or has_modes()):  # which have to see the draw
        given = torch.randn(sample.shape, device=sample.device, dtype=sample.dtype)
        draw, seed = False, 0
    arguments = (
        sample, model_output, coefficients, index, row, uncond_output, guidance_scale,
        guidance_rescale, bound[0], bound[1], bound[2], learned, shift, history1, history2, given,
        draw, seeds, seed, offset,
    )  # fmt: skip
    if not compiling:
        try:
            results = _plain_step(arguments, prev, x0, return_x0, _get_num_threads())
            if results is not None:
                written(prev, x0)
                return results
            if is_plain(*arguments[:2], uncond_output, *arguments[12:16]) and sample.is_cuda:
                arguments = _with_seed(arguments)
                to_prev, to_x0 = prev, x0
                if to_prev is None:
                    to_prev = torch.empty_like(sample)
                    to_x0 = torch.empty_like(sample) if return_x0 else None
                _launch(arguments, to_prev, to_x0)
                written(prev, x0)
                return to_prev, to_x0
        except (TypeError, ValueError):
            if prev is not None:
                _check_out(prev, x0, arguments)
    results = _run_registered(_with_seed(arguments), return_x0)
    if prev is None:
        return results
    _check_out(prev, x0, arguments)
    for target, result in zip((prev, x0), results, strict=True):
        if target is not None and result is not None:
            target.copy_(result)
    return prev, x0


def _with_seed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with a seed where there is none yet."""
    if arguments[_SEED] is not None:
        return arguments
    return (*arguments[:_SEED], _C.scheduler_seed(), *arguments[_SEED + 1 :])


def _run_registered(arguments: Sequence[Any], return_x0: bool) -> tuple[Tensor, Tensor | None]:
    _check(arguments)
    dtype = arguments[0].dtype
    for place in _TENSORS.values():
        if arguments[place] is not None:
            dtype = torch.promote_types(dtype, arguments[place].dtype)
    prepared = list(arguments)
    for place in _TENSORS.values():
        if prepared[place] is not None:
            prepared[place] = prepared[place].to(dtype).contiguous()
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    table = prepared[_COEFFICIENTS]
    prepared[_COEFFICIENTS] = table.to(device=prepared[0].device, dtype=table_dtype).contiguous()
    for place in (_INDEX, _SEEDS):
        if prepared[place] is not None:
            prepared[place] = prepared[place].contiguous()
    prev, x0 = _scheduler_step(*prepared, return_x0)
    return prev, x0 if return_x0 else None


@overload
def scheduler_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: int | Tensor = 0,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    learned_variance: bool = False,
    shift: Tensor | None = None,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    return_x0: Literal[True] = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def scheduler_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: int | Tensor = 0,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    learned_variance: bool = False,
    shift: Tensor | None = None,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    return_x0: Literal[False],
    out: Tensor | None = None,
) -> Tensor: ...


def scheduler_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: int | Tensor = 0,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    learned_variance: bool = False,
    shift: Tensor | None = None,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    return_x0: bool = True,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of a sampler, from the coefficients of its steps.

    `m = u + s (c - u)`, `x0 = bound(a0 x + a1 m + ..)`, `prev = b0 x + b1 m + b2 x0 + ..`: see
    `t2p_fast.ops.scheduler_coefficients`, which makes the coefficients. Arithmetic is in float32,
    rounded once to the dtype of the results; float64 tensors are computed in float64 by torch.
    Differentiable in all tensors but the coefficients. Nothing waits for the device.

    Args:
        sample: x, `[b, ...]` in float32, bfloat16, float16 or float64. Where tensors differ in
            dtype, the widest is used.
        model_output: c, the network's (conditional) output, shaped as `sample`; with
            `learned_variance` `[b, 2 c, ...]`, the second half of the channels the variance.
        coefficients: `[t, 16]`. Float32 on the sample's device saves a conversion at every call.
        index: The step of all samples, or int64 `[b]`, that of each. Out of range it raises, or on
            CUDA, where a tensor of them is not looked at before, gives NaN.
        uncond_output: u, the output without the condition, for classifier-free guidance.
        guidance_scale: s; 1 is no guidance.
        guidance_rescale: phi of 2305.08891, equation 16: how far the spread of `m` over a sample is
            brought back to that of c.
        clip: Bounds `x0` to [-clip, clip]. Wants coefficients made with ``bounded=True``.
        threshold: `(ratio, most)`: dynamic thresholding (2205.11487, section 2.3) by the quantile
            `ratio` of `|x0|` over a sample, at least 1 and at most `most`. Likewise.
        learned_variance: Whether `model_output` has a variance.
        shift: g, a gradient added to the noise predicted, or to the mean, by what `coefficients`
            say.
        history: Up to two earlier results, the latest first.
        noise: z, shaped as `sample`.
        seed: Draws z in the kernel, from Philox4x32-10: the same for any device, layout of threads
            and batch. An int, or int64 `[b]`, a seed for each sample, which makes its noise
            independent of its place in the batch.
        offset: Counts the draws from one seed, such as the number of the step.
        return_x0: Whether `x0` is returned, too.
        out: Where to write, `prev` or `(prev, x0)`: contiguous, of the shape and dtype of the
            result, and not overlapping an input other than by being it. Not with gradients.

    Returns:
        `(prev, x0)`, or `prev`, in the shape of `sample`. O(b n) time; no other memory but, for
        `threshold`, as much as the sample.

    Raises:
        ValueError: Shapes, devices, an index or a bound do not fit.
        TypeError: A dtype is not supported.
    """
    bound, limit, ratio = NO_BOUND, 1.0, 0.0
    if threshold is not None:
        bound, (ratio, limit) = THRESHOLD, threshold
        if clip is not None:
            raise ValueError("scheduler_step: clip and threshold exclude each other")
    elif clip is not None:
        bound, limit = CLIP, clip
    if len(history) > 2:
        raise ValueError(f"scheduler_step: history has {len(history)} tensors, at most 2 are used")
    if seed is not None and noise is not None:
        raise ValueError("scheduler_step: noise and seed exclude each other")
    history1, history2 = (*history, None, None)[:2]
    each, row = (index, 0) if isinstance(index, Tensor) else (None, index)
    seeds, number = (seed, 0) if isinstance(seed, Tensor) else (None, seed or 0)
    target: tuple[Tensor | None, Tensor | None] = (None, None)
    if out is not None:
        if isinstance(out, tuple) != return_x0 or (isinstance(out, tuple) and len(out) != 2):
            wanted = "(prev, x0)" if return_x0 else "prev"
            raise ValueError(f"scheduler_step: with return_x0={return_x0} out must be {wanted}")
        target = out if isinstance(out, tuple) else (out, None)
    source = (noise, seed is not None, seeds, number & 0x7FFF_FFFF_FFFF_FFFF, offset)
    prev, x0 = run_step(
        sample, model_output, coefficients, row, each, uncond_output, guidance_scale,
        guidance_rescale, (bound, limit, ratio), learned_variance, shift, history1, history2,
        source, return_x0, target,
    )  # fmt: skip
    return prev if x0 is None else (prev, x0)


def scheduler_noise(
    shape: Sequence[int],
    seed: int | Tensor,
    offset: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The standard normal noise that `scheduler_step` draws from `seed` at `offset`.

    Philox4x32-10 (Salmon et al., SC 2011) and the normal distribution's quantiles, by polynomials
    to 4e-6; the same bits on every device. None is beyond 6.23.

    Args:
        shape: `[b, ...]`.
        seed, offset: As in `scheduler_step`; a tensor of seeds decides the device.
        device: Where, if `seed` is an int.

    Returns:
        float32 of that shape.

    Raises:
        ValueError: `shape` has no dimension, or there is not a seed for each sample.
    """
    seeds, number = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
    if len(shape) == 0:
        raise ValueError("scheduler_noise: shape must be [b, ...], got []")
    if seeds is not None and (seeds.ndim != 1 or len(seeds) != shape[0]):
        raise ValueError(f"scheduler_noise: seed is {list(seeds.shape)} but shape is {list(shape)}")
    device = device if seeds is None else seeds.device
    like = torch.empty((1,), dtype=torch.float32, device=device).expand(*shape)
    noise: Tensor = _scheduler_noise(like, seeds, number & 0x7FFF_FFFF_FFFF_FFFF, offset)
    return noise


# Checks -------------------------------------------------------------------------------------------


def _check(arguments: Sequence[Any]) -> None:
    """What the kernel would check, for tensors that are converted, traced or without memory."""
    op, sample, learned = "scheduler_step", arguments[0], arguments[11]
    for name, place in {**_TENSORS, "coefficients": _COEFFICIENTS}.items():
        tensor = arguments[place]
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got a {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            came = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16, float16 or float64, got {came}"
            )
        if place == _COEFFICIENTS:
            continue
        if tensor.device != sample.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but sample is on {sample.device}")
        wanted, twice = list(sample.shape), list(sample.shape)
        if sample.ndim > 1:
            twice[1] *= 2
        own = list(tensor.shape)
        may_be_twice = learned and name in ("model_output", "uncond_output")
        if own != (twice if learned and name == "model_output" else wanted) and not (
            may_be_twice and own == twice
        ):
            hint = ", it needs twice the channels" if learned and name == "model_output" else ""
            raise ValueError(f"{op}: {name} is {own} but sample is {wanted}{hint}")
    table, index, row = arguments[_COEFFICIENTS : _COEFFICIENTS + 3]
    if sample.ndim < (2 if learned else 1):
        raise ValueError(f"{op}: sample must be [b, ...], got {list(sample.shape)}")
    if table.ndim != 2 or table.shape[1] != Column.COUNT:
        raise ValueError(
            f"{op}: coefficients must be [t, {int(Column.COUNT)}], got {list(table.shape)}"
        )
    if index is None and not 0 <= row < len(table):
        raise ValueError(f"{op}: index {row} is outside [0, {len(table)})")
    for name, each in (("index", index), ("seed", arguments[_SEEDS])):
        if each is not None and (each.ndim != 1 or len(each) != len(sample)):
            raise ValueError(
                f"{op}: {name} is {list(each.shape)} but sample has a batch of {len(sample)}"
            )
    if arguments[8] != NO_BOUND and not arguments[9] > 0:
        raise ValueError(f"{op}: the bound of x0 is {arguments[9]}, it must be positive")
    if arguments[8] == THRESHOLD and not 0 <= arguments[10] <= 1:
        raise ValueError(f"{op}: the quantile of the threshold is {arguments[10]}, expected 0 to 1")


def _check_out(prev: Tensor, x0: Tensor | None, arguments: Sequence[Any]) -> None:
    op, sample = "scheduler_step", arguments[0]
    tensors = [arguments[place] for place in _TENSORS.values() if arguments[place] is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(f"{op}: out cannot be used where a gradient is wanted")
    dtype = sample.dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    for tensor in (prev,) if x0 is None else (prev, x0):
        if tensor.shape != sample.shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: out must be contiguous, of the shape {list(sample.shape)} and "
                f"{str(dtype).removeprefix('torch.')}, got {list(tensor.shape)} and "
                f"{str(tensor.dtype).removeprefix('torch.')}"
            )
        if any(_overlap(tensor, other) for other in tensors):
            raise ValueError(f"{op}: out overlaps an input without being the same memory")
    if x0 is not None and _overlap(prev, x0):
        raise ValueError(f"{op}: out[1] overlaps out[0]")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory other than by being the same."""
    if a.is_meta or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or a.numel() == 0:
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    ends = [t.data_ptr() + (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
            * t.element_size() for t in (a, b)]  # fmt: skip
    return a.data_ptr() < ends[1] and b.data_ptr() < ends[0]
