# SPDX-License-Identifier: Apache-2.0
"""One tiny kernel per instruction, its inputs, and what it should give, in plain Python.

The table serves twice: `test_instructions.py` holds the emulator to it, and `record.py` runs the
same kernels on a GPU, whose outputs `test_recorded.py` then holds both to. What takes more than one
instruction, or memory, is in `programs.py`.
"""

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx import references as ref

__all__ = ["CASES", "LANES", "Case", "column", "numpy_type"]

Array = np.ndarray[Any, Any]
LANES = 512

_NUMPY = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.uint32,
          "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32}  # fmt: skip


def numpy_type(kind: str) -> Any:
    """How values of a type lie in memory."""
    return (
        _NUMPY.get(kind)
        or np.dtype(("i" if kind[0] == "s" else "u") + str(int(kind[1:]) // 8)).type
    )


# What Turing lacks.
_AMPERE = re.compile(r"bf16|tf32|\.NaN|\.relu|^redux|^(min|max)\.f16|^cvt.*f16x2")


@dataclass(frozen=True)
class Case:
    """An instruction with register operands of given types.

    Attributes:
        reference: The result from one value of every source.
        relative, absolute: The error that the PTX manual documents.
        extra: Text after the operands, such as an immediate.
        warp: The reference is given a lane's number, and of the source the values of its warp.
    """

    opcode: str
    result: str
    sources: tuple[str, ...]
    reference: Callable[..., Any]
    relative: float = 0.0
    absolute: float = 0.0
    extra: str = ""
    warp: bool = False

    threads = LANES

    @property
    def name(self) -> str:
        return self.opcode + self.extra.replace(", ", ":")

    @property
    def target(self) -> str:
        """The least that it needs."""
        return "sm_80" if _AMPERE.search(self.opcode) else "sm_75"

    @property
    def is_exact(self) -> bool:
        return self.relative == self.absolute == 0

    def inputs(self) -> list[Array]:
        """Special values against each other first, then random ones; the same for everybody."""
        generator = np.random.default_rng(zlib.crc32(self.name.encode()))
        return [column(kind, i, generator) for i, kind in enumerate(self.sources)]

    def empty(self) -> Array:
        """Room for the results."""
        return np.zeros(LANES, numpy_type(self.result))

    def text(self) -> str:
        """PTX of a kernel `k(out, in0, in1, ...)` that runs the instruction once per thread."""
        kinds = self.result, *self.sources
        width = {kind: 8 * np.dtype(numpy_type(kind)).itemsize for kind in kinds}
        lines = [".version 8.0", f".target {self.target}", ".address_size 64", ""]
        parameters = ", ".join(f".param .u64 p{i}" for i in range(len(kinds)))
        lines += [f".visible .entry k({parameters})", "{", ".reg .b64 %a<9>;", ".reg .b32 %t;",
                  ".reg .b32 %c<9>;", ".reg .pred %p<9>;", ".reg .b16 %h<9>;"]  # fmt: skip
        names = []
        for i, kind in enumerate(kinds):
            declared = "pred" if kind == "pred" else f"b{max(width[kind], 16)}"
            lines.append(f".reg .{declared} %v{i};")
            names.append(f"%v{i}")
        lines.append("mov.u32 %t, %tid.x;")
        for i, kind in enumerate(kinds):
            lines += [f"ld.param.u64 %a{i}, [p{i}];",
                      f"mad.wide.u32 %a{i}, %t, {width[kind] // 8}, %a{i};"]  # fmt: skip
            if i == 0:
                continue
            if kind == "pred":
                lines += [f"ld.global.u32 %c{i}, [%a{i}];", f"setp.ne.u32 %v{i}, %c{i}, 0;"]
            else:
                lines.append(f"ld.global.b{width[kind]} %v{i}, [%a{i}];")
        lines.append(f"{self.opcode} {', '.join(names)}{self.extra};")
        if self.result == "pred":
            lines += ["selp.u32 %c0, 1, 0, %v0;", "st.global.u32 [%a0], %c0;"]
        else:
            lines.append(f"st.global.b{width[self.result]} [%a0], %v0;")
        return "\n".join([*lines, "ret;", "}", ""])


# Inputs -------------------------------------------------------------------------------------------

_SPECIAL32 = [0x0, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000,
              0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F000000,
              0x40200000, 0x3FC00000, 0x4F000000, 0xCF000000, 0x5F000000, 0x33800000]  # fmt: skip


def column(kind: str, place: int, generator: np.random.Generator) -> Array:
    """A source of the instruction, its `place`-th."""
    dtype = numpy_type(kind)
    bits = 8 * np.dtype(dtype).itemsize
    raw = generator.integers(0, 1 << 63, LANES, dtype=np.uint64, endpoint=False) * np.uint64(2)
    if kind == "pred":
        return (raw >> np.uint64(63)).astype(np.uint32)
    if kind == "f32":
        special = np.array(_SPECIAL32, np.uint32).view(np.float32)
    elif kind == "f64":
        special = np.array(
            [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 5e-324, 1e308, 2.5, 0.5, 2.0**63,
             -(2.0**63), 1e-310, 2.0**32, -2.5, 2.0**-200, 3.0, 1e16, -7.0]
        )  # fmt: skip
    elif kind in ("f16", "bf16", "f16x2", "bf16x2"):
        halves = [0, 0x8000, 0x3C00, 0xBC00, 0x7C00, 0xFC00, 0x7E00, 1, 0x8001, 0x0400,
                  0x7BFF, 0x3F80, 0xBF80, 0x7F80, 0xFF80, 0x7FC0, 0x0080, 0x7F7F, 0x4000,
                  0x3800]  # fmt: skip
        special = np.array(halves, np.uint16).astype(np.uint16 if bits == 16 else np.uint32)
        if bits == 32:
            special = special | (np.roll(special, 7) << np.uint32(16))
        special = special.view(dtype)
    else:
        top = 1 << (bits - 1)
        wanted = [0, 1, 2, 3, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, 5, 7, 8, 15, 16, 31,
                  32, 33, 63, 64, 255]  # fmt: skip
        special = np.array([v & (2 * top - 1) for v in wanted], f"u{bits // 8}").view(dtype)
    count = len(special)
    index = np.arange(LANES)
    chosen = special[index % count if place == 0 else (index // count + 7 * (place - 1)) % count]
    if kind in ("f32", "f64") and place < 3:
        # Exponents near each other, so that sums round and do not just absorb.
        noise = generator.standard_normal(LANES) * 2.0 ** generator.integers(-6, 7, LANES)
        random = noise.astype(dtype)
    elif kind in ("u8", "s8"):
        random = (raw >> np.uint64(56)).astype(np.uint8).view(dtype)
    else:
        random = (raw >> np.uint64(64 - bits)).astype(f"u{bits // 8}").view(dtype)
        if kind in ("u32", "s32", "b32") and place > 0:
            random = np.where(index % 2 == 0, random, (random.view(np.uint32) % 40).view(dtype))
    result: Array = np.where(index < LANES * 3 // 4, chosen, random).astype(dtype)
    return result


# The table ----------------------------------------------------------------------------------------


def _c(opcode: str, signature: str, reference: Callable[..., Any], **how: Any) -> Case:
    """`signature` is "result source source ..."."""
    result, *sources = signature.split()
    return Case(opcode, result, tuple(sources), reference, **how)


def _integers() -> list[Case]:
    cases = []
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        bits, two = int(kind[1:]), f"{kind} {kind} {kind}"
        wrap = lambda f, k=kind: lambda *a: ref.wrap(f(*(int(v) for v in a)), k)  # noqa: E731
        cases += [
            _c(f"add.{kind}", two, wrap(lambda a, b: a + b)),
            _c(f"sub.{kind}", two, wrap(lambda a, b: a - b)),
            _c(f"mul.lo.{kind}", two, wrap(lambda a, b: a * b)),
            _c(f"mul.hi.{kind}", two, wrap(lambda a, b, n=bits: a * b >> n)),
            _c(f"mad.lo.{kind}", f"{two} {kind}", wrap(lambda a, b, c: a * b + c)),
            _c(f"min.{kind}", two, wrap(min)),
            _c(f"max.{kind}", two, wrap(max)),
            _c(f"setp.lt.{kind}", f"pred {kind} {kind}", lambda a, b: a < b),
            _c(f"setp.ge.{kind}", f"pred {kind} {kind}", lambda a, b: a >= b),
            _c(f"shr.{kind}", f"{kind} {kind} u32", ref.shift(kind, False)),
            _c(f"selp.{kind}", f"{kind} {kind} {kind} pred", lambda a, b, p: a if p else b),
        ]
        if bits < 64:
            wide = f"{kind[0]}{2 * bits}"
            cases += [
                _c(f"mul.wide.{kind}", f"{wide} {kind} {kind}", lambda a, b: int(a) * int(b)),
                _c(f"mad.wide.{kind}", f"{wide} {kind} {kind} {wide}",
                   lambda a, b, c, k=wide: ref.wrap(int(a) * int(b) + int(c), k)),
            ]  # fmt: skip
        if kind[0] == "s":
            cases += [
                _c(f"neg.{kind}", f"{kind} {kind}", wrap(lambda a: -a)),
                _c(f"abs.{kind}", f"{kind} {kind}", wrap(abs)),
            ]
    for kind in ("b16", "b32", "b64"):
        mask, two = (1 << int(kind[1:])) - 1, f"{kind} {kind} {kind}"
        cases += [
            _c(f"and.{kind}", two, lambda a, b: int(a) & int(b)),
            _c(f"or.{kind}", two, lambda a, b: int(a) | int(b)),
            _c(f"xor.{kind}", two, lambda a, b: int(a) ^ int(b)),
            _c(f"not.{kind}", f"{kind} {kind}", lambda a, m=mask: ~int(a) & m),
            _c(f"shl.{kind}", f"{kind} {kind} u32", ref.shift("u" + kind[1:], True)),
        ]
    for kind in ("u32", "u64", "s32", "s64"):
        cases += [
            _c(f"bfe.{kind}", f"{kind} {kind} u32 u32", ref.bfe(kind)),
            _c(f"bfind.{kind}", f"u32 {kind}",
               lambda a: (~int(a) if a < 0 else int(a)).bit_length() - 1 & 0xFFFFFFFF),
        ]  # fmt: skip
    for bits in (32, 64):
        cases += [
            _c(f"popc.b{bits}", f"u32 b{bits}", lambda a: int(a).bit_count()),
            _c(f"clz.b{bits}", f"u32 b{bits}", lambda a, n=bits: n - int(a).bit_length()),
            _c(f"brev.b{bits}", f"b{bits} b{bits}",
               lambda a, n=bits: int(f"{int(a):0{n}b}"[::-1], 2)),
        ]  # fmt: skip
    three = "b32 b32 b32 b32"
    majority = lambda a, b, c: (a & b | a & c | b & c) & 0xFFFFFFFF  # noqa: E731
    parity = lambda a, b, c: (a ^ b ^ c) & 0xFFFFFFFF  # noqa: E731
    return [
        *cases,
        _c("add.sat.s32", "s32 s32 s32",
           lambda a, b: min(max(int(a) + int(b), -(2**31)), 2**31 - 1)),
        _c("mul24.lo.u32", "u32 u32 u32",
           lambda a, b: (int(a) & 0xFFFFFF) * (int(b) & 0xFFFFFF) & 0xFFFFFFFF),
        _c("sad.s32", "s32 s32 s32 s32",
           lambda a, b, c: ref.wrap(abs(int(a) - int(b)) + int(c), "s32")),
        _c("bfi.b32", "b32 b32 b32 u32 u32", ref.bfi),
        _c("prmt.b32", three, ref.prmt),
        _c("lop3.b32", three, lambda a, b, c: majority(int(a), int(b), int(c)), extra=", 0xe8"),
        _c("lop3.b32", three, lambda a, b, c: parity(int(a), int(b), int(c)), extra=", 0x96"),
        _c("shf.l.wrap.b32", three, ref.funnel(True, True)),
        _c("shf.l.clamp.b32", three, ref.funnel(True, False)),
        _c("shf.r.wrap.b32", three, ref.funnel(False, True)),
        _c("shf.r.clamp.b32", three, ref.funnel(False, False)),
        _c("cnot.b32", "b32 b32", lambda a: int(a == 0)),
    ]  # fmt: skip


def _floats() -> list[Case]:
    cases = []
    formulas: dict[str, Callable[..., Any]] = {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b
    }  # fmt: skip
    fma: Callable[..., Any] = lambda a, b, c: a * b + c  # noqa: E731
    for kind in ("f32", "f64"):
        two = f"{kind} {kind} {kind}"
        for name, formula in formulas.items():
            cases.append(_c(f"{name}.{kind}", two, ref.exactly(formula, kind)))
        cases += [
            _c(f"fma.rn.{kind}", f"{two} {kind}", ref.exactly(fma, kind)),
            _c(f"div.rn.{kind}", two, ref.quotient(kind)),
            _c(f"sqrt.rn.{kind}", f"{kind} {kind}", ref.root(kind)),
            _c(f"rcp.rn.{kind}", f"{kind} {kind}", lambda a, k=kind: ref.quotient(k)(1.0, a)),
            _c(f"min.{kind}", two, ref.minimum),
            _c(f"max.{kind}", two, ref.maximum),
            _c(f"neg.{kind}", f"{kind} {kind}", lambda a: -float(a)),
            _c(f"abs.{kind}", f"{kind} {kind}", lambda a: abs(float(a))),
            _c(f"copysign.{kind}", two, lambda a, b: math.copysign(float(b), float(a))),
        ]
        for relation in ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu",
                         "geu", "num", "nan"):  # fmt: skip
            cases.append(
                _c(f"setp.{relation}.{kind}", f"pred {kind} {kind}", ref.compare(relation))
            )
    for name, formula in formulas.items():
        exact = ref.exactly(formula, "f32")
        cases += [
            _c(f"{name}.ftz.f32", "f32 f32 f32", ref.ftz(exact)),
            _c(f"{name}.sat.f32", "f32 f32 f32", ref.sat(exact)),
        ]
    for mode in ("rz", "rm", "rp"):
        cases.append(
            _c(f"fma.{mode}.f32", "f32 f32 f32 f32", ref.finite(ref.exactly(fma, "f32", mode)))
        )
        cases.append(
            _c(
                f"mul.{mode}.f32",
                "f32 f32 f32",
                ref.finite(ref.exactly(formulas["mul"], "f32", mode)),
            )
        )
    return [
        *cases,
        _c("fma.rn.ftz.f32", "f32 f32 f32 f32", ref.ftz(ref.exactly(fma, "f32"))),
        _c("fma.rn.sat.f32", "f32 f32 f32 f32", ref.sat(ref.exactly(fma, "f32"))),
        _c("min.NaN.f32", "f32 f32 f32", lambda a, b: ref.minimum(a, b, nan=True)),
        _c("max.NaN.f32", "f32 f32 f32", lambda a, b: ref.maximum(a, b, nan=True)),
        _c("ex2.approx.f32", "f32 f32", ref.protected(lambda x: 2.0**x), relative=2.0**-22),
        _c("ex2.approx.ftz.f32", "f32 f32", ref.ftz(ref.protected(lambda x: 2.0**x)),
           relative=2.0**-22),
        _c("lg2.approx.f32", "f32 f32", ref.protected(math.log2), relative=2.0**-22,
           absolute=2.0**-22),
        _c("rcp.approx.f32", "f32 f32", ref.protected(ref.reciprocal), relative=2.0**-23),
        _c("sqrt.approx.f32", "f32 f32", ref.protected(lambda x: math.copysign(math.sqrt(x), x)),
           relative=2.0**-23),
        _c("rsqrt.approx.f32", "f32 f32", ref.protected(ref.rsqrt), relative=2.0**-22.9),
        _c("tanh.approx.f32", "f32 f32", lambda x: math.tanh(x), relative=2.0**-11),
        _c("sin.approx.f32", "f32 f32", ref.near(math.sin), absolute=2.0**-20.5),
        _c("cos.approx.f32", "f32 f32", ref.near(math.cos), absolute=2.0**-20.5),
        _c("div.full.f32", "f32 f32 f32", ref.within(ref.quotient("f32")), relative=2.0**-22),
        _c("div.approx.f32", "f32 f32 f32", ref.within(ref.quotient("f32")), relative=2.0**-22),
        _c("testp.subnormal.f32", "pred f32", lambda a: 0 < abs(float(a)) < 2.0**-126),
        _c("testp.normal.f32", "pred f32", lambda a: 2.0**-126 <= abs(float(a)) < math.inf),
    ]  # fmt: skip


def _halfs() -> list[Case]:
    cases = []
    operations: dict[str, tuple[int, Callable[..., Any]]] = {
        "add": (2, lambda a, b: a + b), "sub": (2, lambda a, b: a - b),
        "mul": (2, lambda a, b: a * b), "fma.rn": (3, lambda a, b, c: a * b + c),
    }  # fmt: skip
    for kind in ("f16", "bf16"):
        for name, (count, formula) in operations.items():
            if kind == "bf16" and name != "fma.rn":
                continue  # PTX has these from sm_90 on
            exact = ref.exactly(formula, kind)
            cases += [
                _c(f"{name}.{kind}", " ".join([kind] * (count + 1)), ref.half(exact, kind)),
                _c(f"{name}.{kind}x2", " ".join([f"{kind}x2"] * (count + 1)),
                   ref.halves(exact, kind)),
            ]  # fmt: skip
        for name, function in (("min", ref.minimum), ("max", ref.maximum)):
            nan = lambda a, b, f=function: f(a, b, nan=True)  # noqa: E731
            cases += [
                _c(f"{name}.{kind}", f"{kind} {kind} {kind}", ref.half(function, kind)),
                _c(f"{name}.NaN.{kind}", f"{kind} {kind} {kind}", ref.half(nan, kind)),
                _c(f"{name}.{kind}x2", f"{kind}x2 {kind}x2 {kind}x2", ref.halves(function, kind)),
            ]
        cases.append(_c(f"neg.{kind}x2", f"{kind}x2 {kind}x2", lambda a: int(a) ^ 0x80008000))
    relu: Callable[..., Any] = lambda a, b, c: max(a * b + c, 0)  # noqa: E731
    return [
        *cases,
        _c("fma.rn.relu.f16", "f16 f16 f16 f16",
           ref.half(ref.relu(ref.exactly(relu, "f16")), "f16")),
        _c("add.sat.f16", "f16 f16 f16",
           ref.half(ref.sat(ref.exactly(operations["add"][1], "f16")), "f16")),
        _c("ex2.approx.f16", "f16 f16", ref.half(ref.protected(lambda x: 2.0**x), "f16"),
           relative=2.0**-9.9, absolute=2.0**-24),
        _c("tanh.approx.f16", "f16 f16", ref.half(math.tanh, "f16"), relative=2.0**-10.987,
           absolute=2.0**-24),
    ]  # fmt: skip


def _conversions() -> list[Case]:
    cases = []
    roundings = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for kind in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
        for source in ("f32", "f64", "f16"):
            for mode, rounding in roundings.items():
                if mode in ("rni", "rzi") or kind == "s32":
                    cases.append(
                        _c(f"cvt.{mode}.{kind}.{source}", f"{kind} {source}",
                           ref.to_integer(kind, rounding))
                    )  # fmt: skip
        for target in ("f32", "f64", "f16"):
            if int(kind[1:]) >= 16:
                cases.append(
                    _c(f"cvt.rn.{target}.{kind}", f"{target} {kind}",
                       lambda a, t=target: ref.to(t)(int(a)))
                )  # fmt: skip
        for target in ("s16", "u16", "s32", "u32", "s64", "u64"):
            if target != kind and int(kind[1:]) >= 16:
                cases.append(
                    _c(f"cvt.{target}.{kind}", f"{target} {kind}",
                       lambda a, t=target: ref.wrap(int(a), t))
                )  # fmt: skip
    for mode in ("rni", "rzi", "rmi", "rpi"):
        cases.append(
            _c(f"cvt.{mode}.f32.f32", "f32 f32", lambda a, r=roundings[mode]: ref.whole(a, r))
        )
    pair = lambda decode: lambda a, b: decode(float(b)) | decode(float(a)) << 16  # noqa: E731
    return [
        *cases,
        _c("cvt.sat.u8.s32", "u8 s32", lambda a: min(max(int(a), 0), 255)),
        _c("cvt.f64.f32", "f64 f32", float),
        _c("cvt.rn.f32.f64", "f32 f64", lambda a: ref.to("f32")(float(a))),
        _c("cvt.rz.f32.f64", "f32 f64", lambda a: ref.to("f32", "rz")(float(a))),
        _c("cvt.rm.f32.f64", "f32 f64", lambda a: ref.to("f32", "rm")(float(a))),
        _c("cvt.rp.f32.f64", "f32 f64", lambda a: ref.to("f32", "rp")(float(a))),
        _c("cvt.rn.f16.f32", "f16 f32", lambda a: ref.to("f16")(float(a))),
        _c("cvt.rz.f16.f32", "f16 f32", lambda a: ref.to("f16", "rz")(float(a))),
        _c("cvt.f32.f16", "f32 f16", float),
        _c("cvt.rn.bf16.f32", "bf16 f32", lambda a: ref.bf16_bits(float(a))),
        _c("cvt.rn.f16x2.f32", "f16x2 f32 f32", pair(ref.f16_bits)),
        _c("cvt.rn.bf16x2.f32", "bf16x2 f32 f32", pair(ref.bf16_bits)),
        _c("cvt.sat.f32.f32", "f32 f32", ref.sat(float)),
        _c("cvt.ftz.f32.f32", "f32 f32", lambda a: ref.flush(float(a))),
        _c("cvt.rna.tf32.f32", "b32 f32", ref.tf32),
    ]  # fmt: skip


def _divisions() -> list[Case]:
    """By numbers that are known, so that none of them is 0."""
    cases = []
    for kind in ("s32", "u32", "s64", "u64"):
        for by in (1, 3, 7, 641, 0x7FFFFFFF, *((-3, -1000) if kind[0] == "s" else ())):
            truncated = lambda a, b=by: (abs(int(a)) // abs(b)) * (-1 if (a < 0) != (b < 0) else 1)  # noqa: E731
            cases += [
                _c(f"div.{kind}", f"{kind} {kind}", truncated, extra=f", {by}"),
                _c(f"rem.{kind}", f"{kind} {kind}",
                   lambda a, b=by, f=truncated: int(a) - f(a) * b, extra=f", {by}"),
            ]  # fmt: skip
    return cases


def _warps() -> list[Case]:
    """By whole warps: shuffles, also of 4 or 8 lanes at a time, votes and sums."""
    cases = []

    def shuffle(mode: str, operand: int, lanes: int, source: Callable[[int], int]) -> None:
        # Beyond the lanes that go together a lane keeps its own.
        limit = (32 - lanes) << 8 | (0 if mode == "up" else 31)
        same = lambda a, b: a // lanes == b // lanes  # noqa: E731
        cases.append(_c(
            f"shfl.sync.{mode}.b32", "b32 b32",
            lambda lane, v: v[source(lane)] if same(source(lane), lane) else v[lane],
            extra=f", {operand}, {limit}, -1", warp=True,
        ))  # fmt: skip

    for lanes in (32, 8, 4):
        for step in (1, 3):
            shuffle("bfly", step, lanes, lambda lane, s=step: lane ^ s)
            shuffle("up", step, lanes, lambda lane, s=step: lane - s)
            shuffle("down", step, lanes, lambda lane, s=step: lane + s)
            shuffle("idx", step, lanes, lambda lane, s=step, n=lanes: lane // n * n + s)
    bits = lambda p: sum(bool(x) << i for i, x in enumerate(p))  # noqa: E731
    signed = lambda total: ref.wrap(total, "s32")  # noqa: E731
    return [
        *cases,
        _c("vote.sync.ballot.b32", "b32 pred", lambda _, p: bits(p), extra=", -1", warp=True),
        _c("vote.sync.any.pred", "pred pred", lambda _, p: p.any(), extra=", -1", warp=True),
        _c("vote.sync.all.pred", "pred pred", lambda _, p: p.all(), extra=", -1", warp=True),
        _c("vote.sync.uni.pred", "pred pred", lambda _, p: p.all() or not p.any(), extra=", -1",
           warp=True),
        _c("redux.sync.add.s32", "s32 s32", lambda _, v: signed(sum(map(int, v))), extra=", -1",
           warp=True),
        _c("redux.sync.max.s32", "s32 s32", lambda _, v: max(map(int, v)), extra=", -1",
           warp=True),
        _c("redux.sync.min.u32", "u32 u32", lambda _, v: min(map(int, v)), extra=", -1",
           warp=True),
    ]  # fmt: skip


CASES: list[Case] = [
    *_integers(), *_divisions(), *_floats(), *_halfs(), *_conversions(), *_warps(),
]  # fmt: skip
