# SPDX-License-Identifier: Apache-2.0
"""group_norm_silu against the float64 reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import group_norm_silu

pytestmark = pytest.mark.usefixtures("poisoned_empty")

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Channels, groups and positions about the edges of vectors (4, 8, 16), tiles of channels (32),
# blocks (8192 elements in runs of 2048, 64 positions) and of what one thread does alone (16384).
SHAPES = [
    ((1, 1), 1), ((3, 6), 2), ((2, 32, 1, 1), 4), ((1, 4, 7), 2), ((2, 6, 5, 7), 3),
    ((2, 33, 8, 8), 11), ((1, 40, 8, 8), 40), ((2, 48, 3, 3), 1), ((1, 3, 27, 29), 3),
    ((1, 2, 33, 64), 1), ((2, 32, 13, 5), 8), ((1, 8, 3, 5, 4), 2), ((1, 10, 43, 43), 2),
]  # fmt: skip
EXTRAS = ("weight", "bias", "residual", "scale", "shift")


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, extras: Any = EXTRAS,
    mean: float = 0.0, spread: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, Any] = {
        "x": shape, "weight": shape[1:2], "bias": shape[1:2], "residual": shape,
        "scale": shape[:2], "shift": shape[:2],
    }  # fmt: skip
    tensors = {
        name: torch.randn(size, generator=generator)
        for name, size in shapes.items()
        if name == "x" or name in extras
    }
    tensors["x"] = mean + spread * tensors["x"]
    return {
        name: tensor.to(dtype) if name in ("x", "residual") else tensor
        for name, tensor in tensors.items()
    }


def _laid_out(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """x and the residual with their channels last, in memory."""
    if layout == "contiguous":
        return tensors
    return {
        name: t.movedim(1, -1).contiguous().movedim(-1, 1) if name in ("x", "residual") else t
        for name, t in tensors.items()
    }


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _call(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], groups: int, **options: Any
) -> Tensor:
    tensors = dict(tensors)
    return function(tensors.pop("x"), groups, **tensors, **options)


def _truth(tensors: dict[str, Tensor], groups: int, **options: Any) -> Tensor:
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    return _call(reference.group_norm_silu, wide, groups, **options)


def _allowance(tensors: dict[str, Tensor], groups: int) -> Tensor:
    """What float32 may change: 33 units of the magnitudes that are added up.

    A normalised value errs by its own roundings and, through mean and variance, by the sums of a
    block: chains of at most 2048 / 4 / 4 additions on four lanes, whose errors are of either sign.
    SiLU's slope is below 1.1, its own error below 2e-7 |z|.
    """
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    x = wide["x"]
    xhat = reference.group_norm_silu(x, groups, activation="none").abs()
    shape = [-1, x.shape[1], *[1] * (x.ndim - 2)]
    gain = (
        wide["weight"].abs().reshape(shape) if "weight" in wide else torch.ones(shape[1:]).double()
    )
    offset = (
        wide["bias"].abs().reshape(shape) if "bias" in wide else torch.zeros(shape[1:]).double()
    )
    if "scale" in wide:
        factor = 1 + wide["scale"].abs().reshape(shape)
        gain, offset = gain * factor, offset * factor
    if "shift" in wide:
        offset = offset + wide["shift"].abs().reshape(shape)
    total = gain * (1 + xhat) + offset
    if "residual" in wide:
        total = total + wide["residual"].abs()
    return 2e-6 * total


def _assert_close(ours: Tensor, truth: Tensor, allowance: Tensor) -> None:
    limits = torch.finfo(ours.dtype)
    error = (ours.double().cpu() - truth).abs()
    rounding = UNIT[ours.dtype] * (truth.abs() + allowance) + limits.tiny * limits.eps
    worst = (error - allowance - rounding).max()
    assert worst <= 0, f"error {error.max():.3g} exceeds what rounding allows by {worst:.3g}"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(list(UNIT)),
    layout=st.sampled_from(["contiguous", "channels last"]),
    activation=st.sampled_from(["silu", "none"]),
    extras=st.sets(st.sampled_from(EXTRAS)),
    inplace=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_is_the_reference(
    shape: tuple[tuple[int, ...], int], dtype: torch.dtype, layout: str, activation: str,
    extras: set[str], inplace: bool, seed: int, device: torch.device,
) -> None:  # fmt: skip
    size, groups = shape
    tensors = _inputs(size, dtype, seed, extras)
    truth = _truth(tensors, groups, activation=activation)
    allowance = _allowance(tensors, groups)
    moved = _moved(_laid_out(tensors, layout), device)
    moved["x"] = moved["x"].clone()
    ours = _call(group_norm_silu, moved, groups, activation=activation, inplace=inplace)
    assert ours.dtype == dtype
    assert ours.stride() == moved["x"].stride()
    assert (ours.data_ptr() == moved["x"].data_ptr()) == inplace
    _assert_close(ours, truth, allowance)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 4, 96, 96), torch.float32), ((1, 2, 192, 176), torch.float16),
     ((1, 2, 136, 152), torch.bfloat16), ((1, 3, 53, 53), torch.float32),
     ((2, 3, 43, 41), torch.float16), ((1, 5, 35, 47), torch.bfloat16),
     ((1, 3, 84, 82), torch.float32), ((1, 1, 168, 248), torch.float16),
     ((1, 3, 88, 160), torch.bfloat16), ((2, 1, 75, 71), torch.float32),
     ((1, 7, 29, 27), torch.float16)],
    ids=str,
)  # fmt: skip
def test_group_larger_than_a_block(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    """Several blocks of a GPU share a group, forwards and backwards."""
    tensors = _inputs(shape, dtype, 9, ("weight", "residual"), mean=2.0)
    ours = {k: v.requires_grad_() for k, v in _moved(_laid_out(tensors, layout), device).items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
    y, truth = _call(group_norm_silu, ours, 1), _truth(exact, 1)
    _assert_close(y.detach(), truth.detach(), _allowance(tensors, 1).detach())
    y.backward(torch.ones_like(y))
    truth.backward(torch.ones_like(truth))
    for name, limit in (("x", max(1e-5, 4 * UNIT[dtype])), ("weight", 1e-2)):
        torch.testing.assert_close(
            ours[name].grad.double().cpu(), exact[name].grad, rtol=limit, atol=limit, msg=name
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("mean", [1e4, -3e5])
def test_mean_far_from_zero(mean: float, layout: str, device: torch.device) -> None:
    """The error is that of data about zero: x - mean is exact in float32."""
    tensors = _inputs((2, 32, 17, 19), torch.float32, 1, (), mean=mean)
    ours = _call(group_norm_silu, _moved(_laid_out(tensors, layout), device), 4)
    _assert_close(ours, _truth(tensors, 4), _allowance(tensors, 4))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(
    "kind", ["first is far off", "ramp", "steps", "constant", "one spike", "tiny", "huge"]
)
def test_awkward_values(kind: str, layout: str, device: torch.device) -> None:
    """What the guess of a block's mean is wrong about, and the ends of the range."""
    x = torch.randn(1, 8, 24, 24, generator=torch.Generator().manual_seed(3))
    flat = x.view(1, 8, -1)
    if kind == "first is far off":
        flat[..., :80] += 1e4
    elif kind == "ramp":
        flat += torch.arange(576) * 100.0
    elif kind == "steps":
        flat += (torch.arange(576) // 100) * 1e5
    elif kind == "constant":
        x.fill_(0.1)
    elif kind == "one spike":
        flat[0, 3, 500] = 1e6
    else:
        x *= 1e-15 if kind == "tiny" else 1e15
    tensors = {"x": x}
    eps = 1e-30 if kind == "tiny" else 1e-5
    ours = _call(group_norm_silu, _moved(_laid_out(tensors, layout), device), 2, eps=eps)
    truth = _truth(tensors, 2, eps=eps)
    torch.testing.assert_close(ours.double().cpu(), truth, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_group(value: float, layout: str, device: torch.device) -> None:
    tensors = _inputs((2, 8, 5, 5), torch.float32, 2, ())
    expected = _call(group_norm_silu, tensors, 4)
    tensors["x"][1, 3, 2, 2] = value
    ours = _call(group_norm_silu, _moved(_laid_out(tensors, layout), device), 4).cpu()
    assert ours[1, 2:4].isnan().all()
    ours[1, 2:4] = expected[1, 2:4]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_large_inputs_of_silu(device: torch.device) -> None:
    bias = torch.tensor([-3e38, -1e30, -200.0, -88.0, -87.0, -20.0, 20.0, 90.0, 1e30, 3e38])
    x = torch.zeros(1, 10, 4, device=device)
    ours = group_norm_silu(x, 10, bias=bias.to(device)).cpu()
    truth = torch.nn.functional.silu(bias.double())
    error = (ours.double() - truth[None, :, None]).abs()
    assert (error <= 2e-7 * bias.abs().double()[None, :, None]).all()


def test_empty(device: torch.device) -> None:
    for shape in ((0, 4, 3, 3), (2, 4, 0)):
        x = torch.empty(shape, requires_grad=True, device=device)
        y = group_norm_silu(x, 2)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_large_results_are_those_of_their_parts(layout: str) -> None:
    """From 16 MiB on the CPU writes past the caches, and other samples are what makes it so."""
    tensors = _laid_out(_inputs((2, 16, 256, 513), torch.float32, 5, ("weight",)), layout)
    x, weight = tensors["x"], tensors["weight"]
    whole = group_norm_silu(x, 4, weight)
    assert whole.nbytes > 2**24
    for i in range(2):
        part = group_norm_silu(_laid_out({"x": x[i : i + 1]}, layout)["x"], 4, weight)
        assert torch.equal(whole[i : i + 1], part)


@pytest.mark.parametrize("shape", [(2, 32, 40, 40), (1, 4, 200, 100)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_threads_do_not_change_a_bit(shape: tuple[int, ...], layout: str) -> None:
    tensors = _laid_out(_inputs(shape, torch.float32, 4), layout)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        own = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        y = _call(group_norm_silu, own, 4)
        y.sin().sum().backward()
        results.append([y.detach(), *(t.grad for t in own.values())])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"])
def test_every_instruction_set(isa: str, run_python: Callable[..., str]) -> None:
    program = """
import torch, t2p_fast
from t2p_fast import reference
from t2p_fast.ops import group_norm_silu
torch.manual_seed(0)
for dtype, limit in ((torch.float32, 4e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)):
    for fmt in (torch.contiguous_format, torch.channels_last):
        x = (3 + torch.randn(2, 36, 21, 19)).to(dtype).to(memory_format=fmt).requires_grad_()
        w, g = torch.randn(36, requires_grad=True), torch.randn(2, 36, 21, 19)
        y = group_norm_silu(x, 4, w)
        wide = [t.detach().double().requires_grad_() for t in (x, w)]
        t = reference.group_norm_silu(wide[0], 4, wide[1])
        y.backward(g.to(dtype)); t.backward(g.to(dtype).double())
        for a, b in ((y, t), (x.grad, wide[0].grad)):
            assert ((a - b).abs() <= limit * (1 + b.abs())).all(), (dtype, fmt, (a - b).abs().max())
        error = (w.grad - wide[1].grad).abs().max()
        assert error < 1e-5 * 800, error
print(t2p_fast.build_info()["isa"])
"""
    from t2p_fast import build_info

    levels = build_info()["isa_built"]
    if levels.index(isa) > levels.index(build_info()["isa"]):
        pytest.skip(f"this machine has no {isa}")
    assert run_python(program, T2P_ISA=isa).strip() == isa


# Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("extras", [(), ("weight",), ("bias", "scale"), EXTRAS], ids=str)
def test_gradcheck(activation: str, extras: tuple[str, ...]) -> None:
    tensors = {k: v.double().requires_grad_() for k, v in
               _inputs((2, 4, 3, 2), torch.float32, 5, extras).items()}  # fmt: skip
    names = list(tensors)

    def call(*values: Tensor) -> Tensor:
        return _call(
            group_norm_silu, dict(zip(names, values, strict=True)), 2, activation=activation
        )

    torch.autograd.gradcheck(call, list(tensors.values()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(list(UNIT)),
    layout=st.sampled_from(["contiguous", "channels last"]),
    activation=st.sampled_from(["silu", "none"]),
    extras=st.sets(st.sampled_from(EXTRAS)),
    mean=st.sampled_from([0.0, 100.0]),
    seed=st.integers(0, 2**20),
)
def test_gradients_are_those_of_the_reference(
    shape: tuple[tuple[int, ...], int], dtype: torch.dtype, layout: str, activation: str,
    extras: set[str], mean: float, seed: int, device: torch.device,
) -> None:  # fmt: skip
    size, groups = shape
    mean = mean if dtype == torch.float32 else 0.0
    tensors = _inputs(size, dtype, seed, extras, mean=mean)
    _check_gradients(tensors, groups, activation, layout, seed, device)


def _check_gradients(
    tensors: dict[str, Tensor], groups: int, activation: str, layout: str, seed: int,
    device: torch.device,
) -> None:  # fmt: skip
    size, dtype = tensors["x"].shape, tensors["x"].dtype
    weights = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    ours = {k: v.requires_grad_() for k, v in _moved(_laid_out(tensors, layout), device).items()}
    truth = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
    _call(group_norm_silu, ours, groups, activation=activation).backward(weights.to(device))
    _call(reference.group_norm_silu, truth, groups, activation=activation).backward(
        weights.double()
    )
    inverse = reference_inverse(truth["x"], groups)
    for name, tensor in truth.items():
        grad, exact = ours[name].grad, tensor.grad
        assert grad is not None
        assert exact is not None
        assert grad.dtype == tensors[name].dtype
        # A sum over n positions and the batch errs by a few units of the sum of the magnitudes.
        terms = 1 if name in ("x", "residual") else tensors["x"].numel() / size[1]
        scale = 1 + sum(t.abs().max() for n, t in truth.items() if n in ("weight", "scale", "bias"))
        scale = scale**2 * (inverse if name == "x" else 1)
        bound = 1e-5 * terms**0.5 * 8 * scale + 2 * UNIT[grad.dtype] * exact.abs()
        error = (grad.double().cpu() - exact).abs()
        assert (error <= bound).all(), f"{name}: {error.max():.3g}"


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(
    ("size", "groups"),
    [((2, 6, 5, 8), 3), ((1, 40, 8, 24), 5), ((2, 33, 7, 9), 11), ((1, 3, 27, 29), 3),
     ((2, 16, 7, 5), 4), ((1, 72, 3, 11), 9)],
    ids=str,
)  # fmt: skip
def test_every_width(
    size: tuple[int, ...], groups: int, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Vectors and single elements, of positions and of channels."""
    tensors = _inputs(size, dtype, 7)
    ours = _call(group_norm_silu, _moved(_laid_out(tensors, layout), device), groups)
    _assert_close(ours, _truth(tensors, groups), _allowance(tensors, groups))
    _check_gradients(tensors, groups, "silu", layout, 7, device)


def reference_inverse(x: Tensor, groups: int) -> Any:
    """The largest 1 / sqrt(var + eps), which the gradient of x is multiplied by."""
    variance = x.detach().reshape(len(x), groups, -1).var(-1, correction=0)
    return torch.rsqrt(variance + 1e-5).max()


def test_expanded_gradient() -> None:
    tensors = _inputs((2, 6, 4, 4), torch.float32, 6)
    own = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    _call(group_norm_silu, own, 3).sum().backward()
    truth = {k: v.double().requires_grad_() for k, v in tensors.items()}
    _call(reference.group_norm_silu, truth, 3).sum().backward()
    for name in own:
        torch.testing.assert_close(
            own[name].grad.double(), truth[name].grad, rtol=1e-4, atol=1e-4, msg=name
        )


# The contract with torch --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_opcheck(layout: str, device: torch.device, opcheck: Callable[..., object]) -> None:
    t = _moved(_laid_out(_inputs((2, 6, 4, 5), torch.float32, 7), layout), device)
    rest = [t[name] for name in EXTRAS]
    plain = (t["x"], 3, *rest, 1e-5, True)
    opcheck(torch.ops.t2p_fast.group_norm_silu_.default, plain)
    leaves = [v.requires_grad_() if isinstance(v, Tensor) else v for v in plain]
    opcheck(torch.ops.t2p_fast.group_norm_silu.default, leaves)
    statistics = torch.rand(2, 3, 2, dtype=torch.float64, device=device)
    opcheck(
        torch.ops.t2p_fast.group_norm_silu_backward.default,
        (t["residual"].detach(), t["x"].detach(), statistics, 3,
         *(t[name].detach() for name in ("weight", "bias", "scale", "shift")), True),
    )  # fmt: skip


@pytest.mark.not_emulated(reason="torch traces it as on a CPU")
def test_compile(device: torch.device) -> None:
    tensors = _moved(_inputs((2, 6, 4, 5), torch.float32, 8), device)
    names, values = list(tensors), [t.requires_grad_() for t in tensors.values()]

    def step(*values: Tensor) -> Tensor:
        return _call(group_norm_silu, dict(zip(names, values, strict=True)), 3).sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*values), step(*values)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad(y.sum(), values) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_vmap() -> None:
    x, scale = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4)
    ours = torch.vmap(lambda a, s: group_norm_silu(a, 2, scale=s))(x, scale)
    expected = torch.stack([group_norm_silu(a, 2, scale=s) for a, s in zip(x, scale, strict=True)])
    assert torch.equal(ours, expected)


def test_shapes_without_data() -> None:
    x = torch.empty(2, 8, 3, 3, device="meta").to(memory_format=torch.channels_last)
    y = group_norm_silu(x, 4)
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_strided_input_is_copied() -> None:
    x = torch.randn(2, 8, 6, 6)
    ours = group_norm_silu(x[:, :, ::2, 1:], 2, residual=x[:, :, 1::2, :-1])
    expected = group_norm_silu(
        x[:, :, ::2, 1:].contiguous(), 2, residual=x[:, :, 1::2, :-1].contiguous()
    )
    assert torch.equal(ours, expected)


def test_half_weights_and_trailing_ones() -> None:
    x, w, s = torch.randn(2, 8, 6, 6).bfloat16(), torch.randn(8).bfloat16(), torch.randn(2, 8)
    ours = group_norm_silu(x, 2, w, scale=s[:, :, None, None])
    assert torch.equal(ours, group_norm_silu(x, 2, w.float(), scale=s))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 8, 3, dtype=torch.int64)}, TypeError, "x must be float32, bfloat16"),
        ({"x": torch.zeros(8)}, ValueError, r"x must be \[b, c, ...\], got \[8\]"),
        ({"num_groups": 3}, ValueError, "num_groups=3 does not divide the 8 channels"),
        ({"num_groups": 0}, ValueError, "num_groups=0 does not divide"),
        ({"weight": torch.ones(7)}, ValueError, r"weight is \[7\] but x is \[2, 8, 3\]"),
        ({"bias": torch.ones(8, dtype=torch.int64)}, TypeError, "bias must be a floating-point"),
        ({"residual": torch.ones(2, 8, 4)}, ValueError, r"residual is \[2, 8, 4\]"),
        ({"scale": torch.ones(8)}, ValueError, r"scale is \[8\] but x is \[2, 8, 3\]"),
        ({"shift": torch.ones(2, 8, 3)}, ValueError, r"shift is \[2, 8, 3\]"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight is on meta but x is on cpu"),
        ({"activation": "gelu"}, ValueError, "activation='gelu' is not supported"),
        ({"x": torch.zeros(2, 8, 6)[..., ::2], "inplace": True}, ValueError, "inplace wants x"),
        ({"x": torch.zeros(2, 8, 3, requires_grad=True), "inplace": True}, ValueError,
         "inplace cannot be used where a gradient"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 8, 3), "num_groups": 2, **change}
    with pytest.raises(error, match=f"group_norm_silu: {text}"):
        group_norm_silu(**arguments)
