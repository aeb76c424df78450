# SPDX-License-Identifier: Apache-2.0
"""The scheduler's step against the float64 reference."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import scheduler_noise, scheduler_step
from t2p_fast.ops.scheduler_coefficients import Column

pytestmark = pytest.mark.usefixtures("poisoned_empty")

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Shapes about the edges of vectors (4, 8, 16), groups of four, chunks (512) and tasks (16384).
SHAPES = [(1,), (3, 1), (1, 4, 8, 8), (2, 3, 5, 7), (2, 513), (3, 63), (1, 16384), (2, 4, 65, 65)]


def _table(steps: int, seed: int = 0) -> Tensor:
    """Coefficients of any kind, those of the log variance small."""
    table = torch.randn(steps, 16, generator=torch.Generator().manual_seed(seed))
    table[:, Column.LOG_VARIANCE : Column.LOG_VARIANCE_OF + 1] *= 0.5
    return table


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, **names: int) -> Any:
    """Random tensors by name; a number is how often the channels are repeated."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(
            [n * (times if i == 1 else 1) for i, n in enumerate(shape)], generator=generator
        ).to(dtype)
        for name, times in names.items()
    }


def _reference(
    table: Tensor, index: int | Tensor, tensors: dict[str, Tensor], **options: Any
) -> Any:
    """The step in float64."""
    batch = len(tensors["sample"])
    rows = table.double()[index if isinstance(index, Tensor) else [index] * batch]
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    history = tuple(wide.pop(name) for name in ("history1", "history2") if name in wide)
    sample, output = wide.pop("sample"), wide.pop("model_output")
    return reference.scheduler_step(sample, output, rows, history=history, **wide, **options)


def _allowance(
    table: Tensor, index: int | Tensor, tensors: dict[str, Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    """What rounding in float32 may change: a few units of the sum of all magnitudes.

    Every product and sum errs by at most a unit of the terms added up so far (Higham, section 3.1);
    the longest chain has about 12. The bound passes an error on, no larger than divided by s >= 1.
    """
    scale = options.get("guidance_scale", 1.0)
    if "uncond_output" in tensors:
        tensors = dict(tensors)
        output, uncond = tensors["model_output"], tensors.pop("uncond_output")
        first = uncond[:, : tensors["sample"].shape[1]] if uncond.ndim > 1 else uncond
        wide = output.double().abs()
        if output.shape != first.shape:
            half = wide[:, : first.shape[1]]
            half += (abs(scale) + 1) * (half + first.double().abs())
        else:
            wide = (abs(scale) + 1) * (wide + first.double().abs())
        factor = 1 + 10 * abs(options.get("guidance_rescale", 0.0))
        tensors["model_output"] = wide * factor
    kept = {k: v for k, v in options.items() if k == "learned_variance"}
    absolute = {k: v.double().abs() for k, v in tensors.items()}
    if options.get("learned_variance"):  # the variance itself keeps its sign
        signed = tensors["model_output"].double()
        absolute["model_output"][:, signed.shape[1] // 2 :] = signed[:, signed.shape[1] // 2 :]
    signs = table.abs()
    signs[:, 10:12] = table[:, 10:12]
    prev, x0 = _reference(signs, index, absolute, **kept)
    bounded = options.get("clip") is not None or options.get("threshold") is not None
    if bounded:
        prev = prev + signs[:, Column.PREV_X0].max() * x0
        if options.get("threshold") is not None:
            shape = [len(x0), *[1] * (x0.ndim - 1)]
            x0 = x0 + x0.reshape(len(x0), -1).amax(1).view(shape)
            prev = prev + signs[:, Column.PREV_X0].max() * x0
    return 16 * 2.0**-24 * prev, 16 * 2.0**-24 * x0


def _assert_close(ours: Tensor, truth: Tensor, allowance: Tensor) -> None:
    error = (ours.double().cpu() - truth).abs()
    limits = torch.finfo(ours.dtype)
    rounding = UNIT[ours.dtype] * (truth.abs() + allowance) + limits.tiny * limits.eps
    worst = (error - allowance - rounding).max() if error.numel() else torch.tensor(0.0)
    assert worst <= 0, f"error {error.max():.3g} exceeds what rounding allows by {worst:.3g}"


def _to(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _run(tensors: dict[str, Tensor], table: Tensor, index: Any, **options: Any) -> Any:
    tensors = dict(tensors)
    history = [tensors.pop(name) for name in ("history1", "history2") if name in tensors]
    sample, output = tensors.pop("sample"), tensors.pop("model_output")
    return scheduler_step(sample, output, table, index, history=history, **tensors, **options)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(list(UNIT)),
    guided=st.booleans(),
    rescale=st.sampled_from([0.0, 0.7]),
    bound=st.sampled_from([{}, {"clip": 0.8}, {"threshold": (0.9, 2.5)}, {"threshold": (0.5, 1)}]),
    extras=st.sets(st.sampled_from(["shift", "history1", "history2", "noise"])),
    learned=st.booleans(),
    each=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_step_is_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, guided: bool, rescale: float, bound: Any,
    extras: set[str], learned: bool, each: bool, seed: int, device: torch.device,
) -> None:  # fmt: skip
    if "history2" in extras:
        extras.add("history1")
    learned = learned and len(shape) > 1
    names = {"sample": 1, "model_output": 2 if learned else 1, **dict.fromkeys(sorted(extras), 1)}
    options: dict[str, Any] = {**bound, "learned_variance": learned}
    if guided:
        names["uncond_output"] = 1
        options |= {"guidance_scale": 3.5}
        if math.prod(shape[1:]) > 1:
            options["guidance_rescale"] = rescale
    tensors, table = _inputs(shape, dtype, seed, **names), _table(5, seed)
    index: Any = torch.arange(shape[0]) % 5 if each else seed % 5
    truth = _reference(table, index, tensors, **options)
    allowance = _allowance(table, index, tensors, **options)
    moved = index.to(device) if each else index
    results = _run(_to(tensors, device), table.to(device), moved, **options)
    for ours, exact, allowed in zip(results, truth, allowance, strict=True):
        assert ours.dtype == dtype
        _assert_close(ours, exact, allowed)


# Gradients ----------------------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {},
    {"clip": 0.7},
    {"threshold": (0.8, 3.0)},
    {"threshold": (0.8, 1.0)},
    {"learned_variance": True},
    {"learned_variance": True, "clip": 0.7},
]


def _case(options: Any, dtype: torch.dtype, guided: bool) -> tuple[dict[str, Tensor], Any]:
    names = {"sample": 1, "model_output": 2 if "learned_variance" in options else 1, "shift": 1,
             "history1": 1, "history2": 1, "noise": 1}  # fmt: skip
    if guided:
        names["uncond_output"] = 1
        options = {**options, "guidance_scale": 2.5, "guidance_rescale": 0.6}
    return _inputs((2, 2, 3, 3), dtype, 1, **names), options


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_gradcheck(options: Any, guided: bool) -> None:
    tensors, options = _case(options, torch.float64, guided)
    table, names = _table(3).double(), list(tensors)
    index = torch.tensor([1, 0])

    def step(*values: Tensor) -> Any:
        return _run(dict(zip(names, values, strict=True)), table, index, **options)

    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    torch.autograd.gradcheck(step, leaves)


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize("options", CASES, ids=str)
def test_gradients_are_those_of_the_reference(
    options: Any, dtype: torch.dtype, device: torch.device
) -> None:
    tensors, options = _case(options, dtype, True)
    table = _table(3)
    ours = {k: v.to(device).requires_grad_() for k, v in tensors.items()}
    truth = {k: v.double().requires_grad_() for k, v in tensors.items()}
    weights = _inputs((2, 2, 3, 3), dtype, 7, prev=1, x0=1)
    for inputs, results in (
        (ours, _run(ours, table.to(device), 2, **options)),
        (truth, _reference(table, 2, truth, **options)),
    ):
        loss = sum(
            (result * weight.to(result)).sum()
            for result, weight in zip(results, weights.values(), strict=True)
        )
        torch.autograd.backward([loss], inputs=list(inputs.values()))
    for name, tensor in truth.items():
        grad = ours[name].grad
        assert grad is not None
        assert tensor.grad is not None
        scale = tensor.grad.abs().max()
        atol = float(20 * UNIT[torch.float32] * scale + UNIT[dtype] * scale)
        torch.testing.assert_close(
            grad.double().cpu(), tensor.grad, rtol=2 * UNIT[dtype], atol=atol, msg=name
        )


def test_gradient_through_drawn_noise() -> None:
    """The backward draws the same noise again."""
    t = _inputs((2, 2, 3, 3), torch.float32, sample=1, model_output=2)
    table = _table(1)
    grads = []
    for kwargs in ({"seed": 5, "offset": 3}, {"noise": scheduler_noise((2, 2, 3, 3), 5, 3)}):
        output = t["model_output"].clone().requires_grad_()
        prev, _ = scheduler_step(t["sample"], output, table, learned_variance=True, **kwargs)
        prev.sin().sum().backward()
        grads.append(output.grad)
    torch.testing.assert_close(grads[0], grads[1])


# The contract with torch --------------------------------------------------------------------------


def test_opcheck(device: torch.device, opcheck: Callable[..., object]) -> None:
    op = torch.ops.t2p_fast.scheduler_step.default
    for options, guided in ((CASES[1], False), (CASES[2], True), (CASES[4], True)):
        t, options = _case(options, torch.float32, guided)
        t = {k: v.to(device).requires_grad_() for k, v in t.items()}
        bounds = {"clip": (1, 0.7, 0.0), "threshold": (2, 3.0, 0.8)}
        bound = next((bounds[name] for name in bounds if name in options), (0, 1.0, 0.0))
        index = torch.tensor([1, 0], device=device)
        opcheck(op, (
            t["sample"], t["model_output"], _table(3).to(device), index, 0, t.get("uncond_output"),
            2.5, 0.6 if guided else 0.0, *bound, "learned_variance" in options, t["shift"],
            t["history1"], t["history2"], None, True, None, 3, 1, not guided,
        ))  # fmt: skip
    like = torch.empty(2, 5, device=device)
    opcheck(torch.ops.t2p_fast.scheduler_noise.default, (like, None, 3, 1))


@pytest.mark.not_emulated(reason="torch traces it as on a CPU")
def test_compile(device: torch.device) -> None:
    t = _to(_inputs((2, 3, 4, 4), torch.float32, sample=1, model_output=1, uncond_output=1), device)
    table = _table(4).to(device)

    def step(x: Tensor, c: Tensor, u: Tensor) -> Tensor:
        prev, x0 = scheduler_step(
            x, c, table, 1, uncond_output=u, guidance_scale=2.0, clip=1.0, seed=4
        )
        return prev.sin() + x0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = [tensor.requires_grad_() for tensor in t.values()]
    ours, expected = compiled(*arguments), step(*arguments)
    torch.testing.assert_close(ours, expected)
    ours, expected = (torch.autograd.grad(r.sum(), arguments) for r in (ours, expected))
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), step(*arguments))


def test_vmap() -> None:
    t = _inputs((3, 2, 4, 4), torch.float32, sample=1, model_output=1)
    table = _table(1)
    x, c = t["sample"][:, None], t["model_output"][:, None]
    ours = torch.vmap(lambda a, b: scheduler_step(a, b, table))(x, c)
    for a, b in zip(ours, scheduler_step(t["sample"], t["model_output"], table), strict=True):
        assert torch.equal(a[:, 0], b)


def test_forward_mode_is_refused() -> None:
    t = _inputs((1, 2), torch.float32, sample=1, model_output=1)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        torch.func.jvp(
            lambda x: scheduler_step(x, t["model_output"], _table(1))[0],
            (t["sample"],),
            (t["sample"],),
        )


def test_shapes_without_data() -> None:
    x = torch.empty(2, 3, 4, device="meta")
    prev, x0 = scheduler_step(x, x, torch.empty(5, 16, device="meta"), 2)
    assert prev.shape == x0.shape == x.shape


def test_mixed_dtypes_use_the_widest() -> None:
    t = _inputs((2, 3, 4), torch.bfloat16, sample=1, model_output=1)
    table = _table(1)
    ours = scheduler_step(t["sample"].float(), t["model_output"], table)
    expected = scheduler_step(t["sample"].float(), t["model_output"].float(), table)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert torch.equal(ours[0], scheduler_step(t["sample"].float(), t["model_output"],
                                               table.double(), return_x0=False))  # fmt: skip


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded", "halves"])
def test_layouts(layout: str, device: torch.device) -> None:
    x, c, u = (torch.randn(4, 3, 6, 5, device=device) for _ in range(3))
    if layout == "channels_last":
        x, c = (t.to(memory_format=torch.channels_last) for t in (x, c))
    elif layout == "strided":
        x, c = x[..., ::2], c[..., 1::2].expand(-1, -1, -1, 2)[..., :1].expand_as(x[..., ::2])
        u = u[..., :3]
    elif layout == "expanded":
        c = c[:1].expand_as(x)
    else:
        c, u = torch.cat([c, u]).chunk(2)
    table = _table(1).to(device)
    ours = scheduler_step(x, c, table, uncond_output=u, guidance_scale=2.0, seed=1)
    plain = [t.clone(memory_format=torch.contiguous_format) for t in (x, c, u)]
    expected = scheduler_step(*plain[:2], table, uncond_output=plain[2], guidance_scale=2.0, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_out(device: torch.device) -> None:
    t = _to(_inputs((2, 3, 5, 5), torch.float32, sample=1, model_output=1, noise=1), device)
    x, c, table = t["sample"], t["model_output"], _table(1).to(device)
    expected = scheduler_step(x, c, table, noise=t["noise"], threshold=(0.9, 2.0))
    prev, x0 = torch.empty_like(x), torch.empty_like(x)
    ours = scheduler_step(x, c, table, noise=t["noise"], threshold=(0.9, 2.0), out=(prev, x0))
    assert ours[0] is prev
    assert ours[1] is x0
    own = x.clone()
    scheduler_step(own, c, table, noise=t["noise"], threshold=(0.9, 2.0), return_x0=False, out=own)
    for result in (prev, own):
        assert torch.equal(result, expected[0])
    assert torch.equal(x0, expected[1])
    big = torch.randn(3, 3, 5, 5, device=device)
    with pytest.raises(ValueError, match="without being the same memory"):
        scheduler_step(big[:2], c, table, return_x0=False, out=big[1:])
    with pytest.raises(ValueError, match=r"out must be contiguous, of the shape \[2, 3, 5, 5\]"):
        scheduler_step(x, c, table, return_x0=False, out=torch.empty(2, 3, device=device))
    with pytest.raises(ValueError, match=r"with return_x0=True out must be \(prev, x0\)"):
        scheduler_step(x, c, table, out=prev)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="out cannot be used where a gradient is wanted"):
        scheduler_step(x.clone().requires_grad_(), c, table, return_x0=False, out=prev)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_not_finite(bad: float, device: torch.device) -> None:
    x, c = (torch.randn(2, 300, device=device) for _ in range(2))
    table = torch.ones(1, 16, device=device)
    clean = scheduler_step(x, c, table, clip=0.5)
    c[0, 7] = bad
    prev, x0 = scheduler_step(x, c, table, clip=0.5)
    assert prev[0, 7].isnan() if math.isnan(bad) else x0[0, 7] == math.copysign(0.5, bad)
    others = torch.ones_like(x, dtype=torch.bool)
    others[0, 7] = False
    assert torch.equal(x0[others], clean[1][others])
    _, x0 = scheduler_step(x, c, table, threshold=(0.9, 4.0))
    assert x0[0].isnan().all() == math.isnan(bad)
    assert x0[1].isfinite().all()


def test_guidance_rescale_of_a_constant(device: torch.device) -> None:
    """No spread to be brought back to: no division by zero."""
    x = torch.randn(1, 3, 4, 4, device=device)
    c, u = torch.full_like(x, 2.0), torch.zeros_like(x)
    table = _table(1).to(device)
    ours = scheduler_step(
        x, c, table, uncond_output=u, guidance_scale=3.0, guidance_rescale=0.7, return_x0=False
    )
    assert torch.equal(ours, scheduler_step(x, 3 * c, table, return_x0=False))


def test_empty(device: torch.device) -> None:
    for shape in ((0, 3, 4), (2, 0, 4)):
        x = torch.empty(shape, device=device)
        prev, x0 = scheduler_step(x, x, _table(1).to(device), threshold=(0.9, 2.0), seed=1)
        assert prev.shape == x0.shape == shape


def test_errors(device: torch.device) -> None:
    x, table = torch.randn(2, 3, 4, device=device), _table(5).to(device)
    with pytest.raises(ValueError, match=r"model_output is \[2, 3\] but sample is \[2, 3, 4\]"):
        scheduler_step(x, x[..., 0], table)
    with pytest.raises(ValueError, match=r"but sample is .*, it needs twice the channels"):
        scheduler_step(x, x, table, learned_variance=True)
    with pytest.raises(ValueError, match=r"noise is \[1, 3, 4\] but sample is \[2, 3, 4\]"):
        scheduler_step(x, x, table, noise=x[:1])
    with pytest.raises(ValueError, match=r"coefficients must be \[t, 16\], got \[5, 15\]"):
        scheduler_step(x, x, table[:, :15])
    with pytest.raises(ValueError, match=r"index 5 is outside \[0, 5\)"):
        scheduler_step(x, x, table, 5)
    with pytest.raises(ValueError, match=r"index is \[3\] but sample has a batch of 2"):
        scheduler_step(x, x, table, torch.zeros(3, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"seed is \[3\] but sample has a batch of 2"):
        scheduler_step(x, x, table, seed=torch.zeros(3, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match=r"sample must be float32, bfloat16, float16 .*got int64"):
        scheduler_step(x.long(), x, table)
    with pytest.raises(TypeError, match="model_output must be a tensor, got a list"):
        scheduler_step(x, x.tolist(), table)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="clip and threshold exclude each other"):
        scheduler_step(x, x, table, clip=1.0, threshold=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"the bound of x0 is -1\.0, it must be positive"):
        scheduler_step(x, x, table, clip=-1.0)
    with pytest.raises(ValueError, match=r"the quantile of the threshold is 1\.5, expected 0 to 1"):
        scheduler_step(x, x, table, threshold=(1.5, 2.0))
    with pytest.raises(ValueError, match="history has 3 tensors, at most 2 are used"):
        scheduler_step(x, x, table, history=(x, x, x))
    with pytest.raises(ValueError, match="noise and seed exclude each other"):
        scheduler_step(x, x, table, noise=x, seed=1)
    with pytest.raises(ValueError, match="model_output is on meta but sample is on"):
        scheduler_step(x, x.to("meta"), table)


@pytest.mark.parametrize("index", [-1, 5])
def test_index_out_of_range(index: int, device: torch.device, kernels: str) -> None:
    x, table = torch.randn(2, 3, device=device), _table(5).to(device)
    each = torch.tensor([0, index], device=device)
    if kernels == "cuda":
        assert scheduler_step(x, x, table, each)[0][1].isnan().all()
        return
    with pytest.raises(IndexError, match=rf"index {index} is outside \[0, 5\)"):
        scheduler_step(x, x, table, each)
