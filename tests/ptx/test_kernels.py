# SPDX-License-Identifier: Apache-2.0
"""Whole kernels as nvcc compiles them (`kernels/broad.cu`), and every form of mma.sync."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptx import build
from ptx.launch import Bench, Empty
from ptx.values import bf16_to_float, float_to_bf16

Array = np.ndarray[Any, Any]
needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="there is no nvcc on the PATH")


@pytest.fixture(scope="module", params=["80", "90"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(build.compile_ptx(Path(__file__).parent / "kernels" / "broad.cu", request.param))


def _random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@needs_nvcc
def test_gemm_on_tensor_cores(bench: Bench) -> None:
    m, n, k = 32, 24, 80
    a, b = float_to_bf16(_random(m, k)), float_to_bf16(_random(n, k, seed=1))
    c = np.zeros((m, n), np.float32)
    mangled = bench.find("gemm_bf16")
    for y in range(m // 16):  # launches here have one dimension
        part = np.zeros((16, n), np.float32)
        bench.launch(
            mangled, [a[16 * y : 16 * y + 16], b, Empty(part), np.int32(n), np.int32(k)],
            grid=n // 8,
        )  # fmt: skip
        c[16 * y : 16 * y + 16] = part
    exact = bf16_to_float(a).astype(np.float64) @ bf16_to_float(b).T.astype(np.float64)
    np.testing.assert_allclose(c, exact, rtol=0, atol=k * 2.0**-23 * np.abs(exact).max())


@needs_nvcc
def test_functions(bench: Bench) -> None:
    x = np.abs(_random(96)) + np.float32(0.01)
    y = np.zeros((96, 16), np.float32)
    bench.launch("functions", [x, Empty(y)], block=96)
    t = torch.from_numpy(x).double()
    truth = torch.stack(
        [t.exp(), t.log(), t.sin(), t.cos(), t.tanh(), t.erf(), t**float(np.float32(1.7)),
         t.rsqrt(), t.log1p(), t ** (1 / 3), t % float(np.float32(0.7)), t.round(), t.exp(),
         t.rsqrt(), t.sigmoid(), t.log()], 1,
    ).numpy()  # fmt: skip
    np.testing.assert_allclose(y, truth, rtol=2e-6, atol=1e-7)
    fast = np.zeros_like(y)
    bench.launch("fast_functions", [x, Empty(fast)], block=96)
    columns = [0, 1, 2, 3, 6, 14]
    np.testing.assert_allclose(fast[:, columns], truth[:, columns], rtol=1e-5, atol=2e-6)
    assert (fast[:, 0] != truth[:, 0].astype(np.float32)).mean() > 0.3  # it does err


@needs_nvcc
def test_philox(bench: Bench) -> None:
    out = np.zeros((64, 4), np.uint32)
    bench.launch("philox", [Empty(out), np.uint32(1234)], block=64)
    for thread in range(64):
        c, k = [thread, 0, 0, 0], [1234, 0]
        for _ in range(10):
            p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(q >> 32) ^ c[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ c[3] ^ k[1], p & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        assert out[thread].tolist() == c


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "dtype", "error"),
    [("float", torch.float32, 1e-6), ("half", torch.float16, 2.0**-11),
     ("bfloat", torch.bfloat16, 2.0**-8)],
)  # fmt: skip
def test_softmax(bench: Bench, name: str, dtype: torch.dtype, error: float) -> None:
    x = torch.from_numpy(_random(5, 77)).to(dtype)
    y = torch.zeros_like(x)
    carrier = {2: torch.int16, 4: torch.int32}[x.element_size()]
    arrays = [t.view(carrier).numpy() for t in (x, y)]
    bench.launch(f"softmax_{name}", [arrays[0], Empty(arrays[1]), np.int32(77)], grid=5, block=64)
    truth = x.double().softmax(1)
    assert ((y.double() - truth).abs() <= error * truth + 1e-7).all()


@needs_nvcc
def test_atomics(bench: Bench) -> None:
    x = np.random.default_rng(0).integers(0, 10, 500).astype(np.int32)
    counts = np.zeros(10, np.int32)
    bench.launch(
        "histogram", [x, counts, np.int32(500), np.int32(10)], grid=3, block=64, dynamic=40
    )
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=10))
    keys = np.abs(_random(300))
    best = np.full(1, 2**64 - 1, np.uint64)
    bench.launch("packed_minimum", [keys, best, np.int32(300)], grid=5, block=64)
    assert int(best[0]) & 0xFFFFFFFF == keys.argmin()
    product = np.ones(1, np.float32)
    factors = np.array([1, 2, 4, 0.5] * 8, np.float32)
    bench.launch("compare_and_swap", [product, factors])
    assert product[0] == 4.0**8


@needs_nvcc
def test_control_flow(bench: Bench) -> None:
    x = np.abs(_random(64))
    y = np.zeros(64, np.float32)
    bench.launch("control", [x, Empty(y)], block=64)

    def polynomial(v: float, degree: int) -> float:
        return sum(i * v**i for i in range(degree + 1))

    for t in range(64):
        v = float(x[t])
        expected = [polynomial(v, 3), v * (t % 6) + 1, v / 3, polynomial(v, t % 5), -v,
                    v * (t // 8 % 6), v**0.5, 7.0][t % 8]  # fmt: skip
        assert y[t] == pytest.approx(expected, rel=1e-6)


@needs_nvcc
def test_warps(bench: Bench) -> None:
    x = np.random.default_rng(0).integers(0, 99, 64).astype(np.int32)
    out = np.zeros((64, 8), np.uint32)
    bench.launch("warps", [x, Empty(out)], block=64)
    for t in range(64):
        warp = x[t // 32 * 32 :][:32].tolist()
        expected = [
            sum((v & 1) << i for i, v in enumerate(warp)), 3 in warp, max(warp) < 100,
            sum((v % 4 == x[t] % 4) << i for i, v in enumerate(warp)), sum(warp[: t % 32 + 1]),
            sum(warp), warp[t % 32 // 8 * 8 + 5], int((x & 1).sum()),
        ]  # fmt: skip
        assert out[t].tolist() == [int(e) for e in expected]


@needs_nvcc
def test_vectors(bench: Bench) -> None:
    x, h = _random(32, 4), _random(64).astype(np.float16)
    y, g = np.zeros_like(x), np.zeros_like(h)
    bench.launch("vectors", [x, h, Empty(y), Empty(g)])
    np.testing.assert_array_equal(y, x[:, ::-1])
    np.testing.assert_array_equal(g, (h.astype(np.float64) ** 2 + 0.5).astype(np.float16))


@needs_nvcc
def test_module_variables(bench: Bench) -> None:
    y = np.zeros(32, np.float32)
    bench.launch("module_variables", [Empty(y)])
    np.testing.assert_array_equal(y, np.tile([1, 2, 3, 4], 8))


# mma.sync, element by element as the manual writes it (9.7.14.5) ----------------------------------

_MMA = [
    ("m16n8k8", "f32", "bf16"), ("m16n8k16", "f32", "bf16"), ("m16n8k8", "f32", "f16"),
    ("m16n8k16", "f32", "f16"), ("m16n8k16", "f16", "f16"), ("m16n8k4", "f32", "tf32"),
    ("m16n8k8", "f32", "tf32"), ("m16n8k16", "s32", "s8"), ("m16n8k32", "s32", "s8"),
    ("m16n8k32", "s32", "u8"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "result", "kind"), _MMA)
def test_mma(shape: str, result: str, kind: str) -> None:
    k = int(shape.split("k")[1])
    per = {"tf32": 1, "bf16": 2, "f16": 2, "s8": 4, "u8": 4}[kind]
    counts = [2 if result == "f16" else 4, k // per // 2, k // per // 4,
              2 if result == "f16" else 4]  # fmt: skip
    generator = np.random.default_rng(k)
    if kind in ("s8", "u8"):
        dtype = np.int8 if kind == "s8" else np.uint8
        info = np.iinfo(dtype)
        a, b = (generator.integers(info.min, info.max, s).astype(dtype) for s in ((16, k), (k, 8)))
        c = generator.integers(-1000, 1000, (16, 8)).astype(np.int32)
        exact = a.astype(np.int64) @ b.astype(np.int64) + c
    else:
        a, b, c = (generator.standard_normal(s).astype(np.float32)
                   for s in ((16, k), (k, 8), (16, 8)))  # fmt: skip
        if kind == "bf16":
            a, b = float_to_bf16(a), float_to_bf16(b)
            exact = bf16_to_float(a).astype(np.float64) @ bf16_to_float(b) + c
        elif kind == "f16":
            a, b = a.astype(np.float16), b.astype(np.float16)
            c = c.astype(np.float16) if result == "f16" else c
            exact = a.astype(np.float64) @ b.astype(np.float64) + c
        else:
            a, b = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b))
            exact = a.astype(np.float64) @ b.astype(np.float64) + c
    registers = [np.zeros((32, count, per), a.dtype) for count in counts[1:3]]
    for lane in range(32):
        group, t = lane >> 2, lane & 3
        for i in range(counts[1] * per):
            register, element = divmod(i, per)
            row = group if register % 2 == 0 else group + 8
            column = t * per + element + register // 2 * 4 * per
            registers[0][lane, register, element] = a[row, column]
        for i in range(counts[2] * per):
            register, element = divmod(i, per)
            registers[1][lane, register, element] = b[t * per + element + register * 4 * per, group]
    fragments = np.zeros((32, 4), c.dtype)
    for lane in range(32):
        for i in range(4):
            fragments[lane, i] = c[(lane >> 2) + 8 * (i >= 2), (lane & 3) * 2 + (i & 1)]
    words = [np.ascontiguousarray(r).view(np.uint32).reshape(32, -1) for r in registers]
    words.append(np.ascontiguousarray(fragments).view(np.uint32).reshape(32, -1))
    out = np.zeros((32, counts[0]), np.uint32)
    Bench(
        _mma_ptx(f"mma.sync.aligned.{shape}.row.col.{result}.{kind}.{kind}.{result}", counts)
    ).launch("k", [Empty(out), *words])
    got = out.view(c.dtype).reshape(32, 4)
    for lane in range(32):
        for i in range(4):
            expected = exact[(lane >> 2) + 8 * (i >= 2), (lane & 3) * 2 + (i & 1)]
            if result == "s32":
                assert got[lane, i] == expected
            else:
                unit = 2.0**-23 if result == "f32" else 2.0**-10
                assert abs(float(got[lane, i]) - expected) <= unit * max(abs(expected), 1e-3)


def _mma_ptx(opcode: str, counts: list[int]) -> str:
    lines = [".version 8.0", ".target sm_80", ".address_size 64",
             ".visible .entry k(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3)",
             "{", ".reg .b64 %a<4>;", ".reg .b32 %t;", "mov.u32 %t, %tid.x;"]  # fmt: skip
    for i, count in enumerate(counts):
        lines += [f".reg .b32 %v{i}_<{count}>;", f"ld.param.u64 %a{i}, [p{i}];",
                  f"mad.wide.u32 %a{i}, %t, {4 * count}, %a{i};"]  # fmt: skip
        if i:
            lines += [f"ld.global.b32 %v{i}_{j}, [%a{i}+{4 * j}];" for j in range(count)]
    operands = ", ".join(
        "{" + ", ".join(f"%v{i}_{j}" for j in range(count)) + "}" for i, count in enumerate(counts)
    )
    lines.append(f"{opcode} {operands};")
    lines += [f"st.global.b32 [%a0+{4 * j}], %v0_{j};" for j in range(counts[0])]
    return "\n".join([*lines, "ret;", "}", ""])
