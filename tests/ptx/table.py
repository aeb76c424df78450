# SPDX-License-Identifier: Apache-2.0
"""One tiny kernel per instruction, its inputs, and what it should give, in plain Python.

The table serves twice: `test_instructions.py` holds the emulator to it, and `record.py` runs the same
kernels on a GPU, whose outputs `test_recorded.py` then holds both to. References work on one lane, on
Python integers and on floats as exact fractions where rounding matters; none of them uses the
emulator's own arithmetic.
"""

import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

__all__ = ["CASES", "LANES", "Case", "inputs", "numpy_type", "ptx_of"]

Array = np.ndarray[Any, Any]
LANES = 512

_NUMPY = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.uint32,
          "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32}  # fmt: skip


def numpy_type(kind: str) -> Any:
    """How values of a type lie in memory."""
    return _NUMPY.get(kind) or np.dtype(("i" if kind[0] == "s" else "u") + str(int(kind[1:]) // 8)).type


@dataclass(frozen=True)
class Case:
    """An instruction with register operands of given types.

    Attributes:
        reference: The result from one value of every source.
        relative, absolute: The error that the PTX manual documents.
        extra: Text after the operands, such as an immediate.
    """

    opcode: str
    result: str
    sources: tuple[str, ...]
    reference: Callable[..., Any]
    relative: float = 0.0
    absolute: float = 0.0
    extra: str = ""

    @property
    def name(self) -> str:
        return self.opcode + self.extra.replace(", ", ":")


# Inputs -------------------------------------------------------------------------------------------

_SPECIAL32 = [0x0, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000,
              0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F000000,
              0x40200000, 0x3FC00000, 0x4F000000, 0xCF000000, 0x5F000000, 0x33800000]  # fmt: skip


def _bits(values: list[float], dtype: Any) -> list[Any]:
    return [dtype(v) for v in values]


def inputs(case: Case) -> list[Array]:
    """Special values against each other first, then random ones; the same for everybody."""
    seed = zlib.crc32(case.name.encode())
    generator = np.random.default_rng(seed)
    return [_column(kind, i, generator) for i, kind in enumerate(case.sources)]


def _column(kind: str, place: int, generator: np.random.Generator) -> Array:
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
        halves = [0, 0x8000, 0x3C00, 0xBC00, 0x7C00, 0xFC00, 0x7E00, 1, 0x8001, 0x0400, 0x7BFF, 0x3F80,
                  0xBF80, 0x7F80, 0xFF80, 0x7FC0, 0x0080, 0x7F7F, 0x4000, 0x3800]  # fmt: skip
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
        noise = (generator.standard_normal(LANES) * 2.0 ** generator.integers(-6, 7, LANES))
        random = noise.astype(dtype)
    elif kind in ("u8", "s8"):
        random = (raw >> np.uint64(56)).astype(np.uint8).view(dtype)
    else:
        random = (raw >> np.uint64(64 - bits)).astype(f"u{bits // 8}").view(dtype)
        if kind in ("u32", "s32", "b32") and place > 0:
            random = np.where(index % 2 == 0, random, (random.view(np.uint32) % 40).view(dtype))
    result: Array = np.where(index < LANES * 3 // 4, chosen, random).astype(dtype)
    return result


# PTX ----------------------------------------------------------------------------------------------


def ptx_of(case: Case, version: str = "8.0", target: str = "sm_80") -> str:
    """A kernel `k(out, in0, in1, ...)` that runs the instruction once per thread."""
    width = {kind: 8 * np.dtype(numpy_type(kind)).itemsize for kind in (case.result, *case.sources)}
    lines = [f".version {version}", f".target {target}", ".address_size 64", ""]
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(case.sources) + 1))
    lines += [f".visible .entry k({parameters})", "{", ".reg .b64 %a<9>;", ".reg .b32 %t;",
              ".reg .b32 %c<9>;", ".reg .pred %p<9>;", ".reg .b16 %h<9>;"]  # fmt: skip
    names = []
    for i, kind in enumerate((case.result, *case.sources)):
        declared = "pred" if kind == "pred" else f"b{max(width[kind], 16)}"
        lines.append(f".reg .{declared} %v{i};")
        names.append(f"%v{i}")
    lines.append("mov.u32 %t, %tid.x;")
    for i, kind in enumerate((case.result, *case.sources)):
        lines += [f"ld.param.u64 %a{i}, [p{i}];",
                  f"mad.wide.u32 %a{i}, %t, {width[kind] // 8}, %a{i};"]  # fmt: skip
        if i == 0:
            continue
        if kind == "pred":
            lines += [f"ld.global.u32 %c{i}, [%a{i}];", f"setp.ne.u32 %v{i}, %c{i}, 0;"]
        else:
            lines.append(f"ld.global.b{width[kind]} %v{i}, [%a{i}];")
    lines.append(f"{case.opcode} {', '.join(names)}{case.extra};")
    if case.result == "pred":
        lines += ["selp.u32 %c0, 1, 0, %v0;", "st.global.u32 [%a0], %c0;"]
    else:
        lines.append(f"st.global.b{width[case.result]} [%a0], %v0;")
    return "\n".join([*lines, "ret;", "}", ""])


# References ---------------------------------------------------------------------------------------


def _wrap(value: int, kind: str) -> int:
    bits = int(kind[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def _round(exact: Fraction, digits: int, smallest: int, largest: float, mode: str = "rn") -> float:
    """An exact number to `digits` bits, no finer than 2^smallest."""
    if exact == 0:
        return 0.0
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - digits + 1, smallest)
    quotient = exact / unit
    whole = math.floor(quotient)
    rest = quotient - whole
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
        "rz": rest > 0 and quotient < 0, "rm": False, "rp": rest > 0,
    }[mode]  # fmt: skip
    rounded = (whole + int(up)) * unit
    if abs(rounded) > Fraction(largest):
        toward = {"rn": True, "rz": False, "rm": rounded < 0, "rp": rounded > 0}[mode]
        return (math.inf if toward else largest) * (1 if rounded > 0 else -1)
    return float(rounded) if rounded else (0.0 if exact > 0 else -0.0)


_FORMATS = {"f16": (11, -24, 65504.0), "bf16": (8, -133, float.fromhex("0x1.fep127")),
            "f32": (24, -149, float.fromhex("0x1.fffffep127")),
            "f64": (53, -1074, float.fromhex("0x1.fffffffffffffp1023"))}  # fmt: skip


def _to(kind: str, mode: str = "rn") -> Callable[[Any], float]:
    def run(value: Any) -> float:
        if isinstance(value, float) and (math.isnan(value) or math.isinf(value) or value == 0):
            return value
        return _round(Fraction(value), *_FORMATS[kind], mode=mode)

    return run


def _exactly(formula: Callable[..., Any], kind: str, mode: str = "rn") -> Callable[..., float]:
    """A formula in fractions, rounded once; in float where an argument is not finite or 0."""

    def run(*arguments: Any) -> float:
        values = [float(a) for a in arguments]
        if all(math.isfinite(v) for v in values):
            exact = formula(*(Fraction(v) for v in values))
            if exact != 0:
                return _round(exact, *_FORMATS[kind], mode=mode)
            zero = float(formula(*values))
            return -0.0 if mode == "rm" and zero == 0 and _signs_differ(formula, values) else zero
        return float(formula(*values))

    return run


def _signs_differ(formula: Callable[..., Any], values: list[float]) -> bool:
    """Whether an exact zero is a cancelled sum, which rounds down to -0."""
    product = math.copysign(1, float(formula(*values))) > 0 and any(values)
    return bool(product)


def _bf16(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", int(bits) << 16))[0])


def _bf16_bits(value: float) -> int:
    if math.isnan(value):
        return 0x7FFF
    return struct.unpack("<I", struct.pack("<f", _to("bf16")(value)))[0] >> 16


def _f16_bits(value: float) -> int:
    if math.isnan(value):
        return 0x7FFF
    return struct.unpack("<H", struct.pack("<e", _to("f16")(value)))[0]


def _f16(bits: int) -> float:
    return float(struct.unpack("<e", struct.pack("<H", int(bits)))[0])


def _flush(value: float) -> float:
    return math.copysign(0.0, value) if abs(value) < 2.0**-126 else value


def _ftz(reference: Callable[..., float]) -> Callable[..., float]:
    return lambda *a: _flush(reference(*(_flush(float(v)) for v in a)))


def _sat(reference: Callable[..., float]) -> Callable[..., float]:
    def run(*arguments: Any) -> float:
        value = reference(*arguments)
        return 0.0 if math.isnan(value) else min(max(value, 0.0), 1.0) + 0.0

    return run


def _minimum(a: float, b: float, *, nan: bool = False, sign: int = 1) -> float:
    a, b = float(a), float(b)
    if math.isnan(a) or math.isnan(b):
        return math.nan if nan or (math.isnan(a) and math.isnan(b)) else b if math.isnan(a) else a
    if a == b:
        return a if sign * math.copysign(1, a) < sign * math.copysign(1, b) else b
    return min(a, b) if sign > 0 else max(a, b)


def _maximum(a: float, b: float, **how: Any) -> float:
    return _minimum(a, b, sign=-1, **how)


def _halves(operation: Callable[..., float], kind: str) -> Callable[..., int]:
    """Both halves of pairs."""
    decode, encode = (_bf16, _bf16_bits) if kind == "bf16" else (_f16, _f16_bits)

    def run(*pairs: Any) -> int:
        low = encode(operation(*(decode(int(p) & 0xFFFF) for p in pairs)))
        high = encode(operation(*(decode(int(p) >> 16) for p in pairs)))
        return low | high << 16

    return run


def _half(operation: Callable[..., float], kind: str) -> Callable[..., Any]:
    if kind == "f16":
        return lambda *a: operation(*(float(v) for v in a))
    return lambda *a: _bf16_bits(operation(*(_bf16(v) for v in a)))


def _truncated(a: int, b: int) -> int:
    return int(math.copysign(1, a) * math.copysign(1, b)) * (abs(a) // abs(b))


def _to_integer(kind: str, rounding: Callable[[float], Any]) -> Callable[[Any], int]:
    bits = int(kind[1:])
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)

    def run(value: Any) -> int:
        value = float(value)
        if math.isnan(value):
            return 0 if bits < 64 else (1 << 63 if low == 0 else low)
        if math.isinf(value):
            return high if value > 0 else low
        return int(min(max(int(rounding(value)), low), high))

    return run


def _compare(relation: str) -> Callable[..., bool]:
    plain = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b and a == a and b == b,
        "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b, "num": lambda a, b: a == a and b == b,
        "nan": lambda a, b: a != a or b != b,
    }  # fmt: skip
    if relation in plain:
        return plain[relation]
    base = plain[relation[:-1]]
    return lambda a, b: base(a, b) or a != a or b != b


def _prmt(a: int, b: int, c: int) -> int:
    octets = int(a).to_bytes(4, "little") + int(b).to_bytes(4, "little")
    result = 0
    for j in range(4):
        nibble = int(c) >> 4 * j & 15
        byte = octets[nibble & 7]
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * j
    return result


def _bfe(kind: str) -> Callable[..., int]:
    bits = int(kind[1:])

    def run(x: int, position: int, length: int) -> int:
        position, length = int(position) & 255, int(length) & 255
        pattern = int(x) & ((1 << bits) - 1)
        sign = 0
        if kind[0] == "s" and length:
            sign = pattern >> min(position + length - 1, bits - 1) & 1
        result = 0
        for i in range(bits):
            inside = i < length and position + i < bits
            result |= (pattern >> (position + i) & 1 if inside else sign) << i
        return _wrap(result, kind)

    return run


def _bfi(field: int, into: int, position: int, length: int) -> int:
    position, length = int(position) & 255, int(length) & 255
    result = int(into)
    for i in range(length):
        if position + i < 32:
            result = result & ~(1 << position + i) | (int(field) >> i & 1) << position + i
    return result


def _shift(kind: str, left: bool) -> Callable[..., int]:
    bits = int(kind[1:])

    def run(x: int, n: int) -> int:
        n = min(int(n), bits)
        return _wrap(int(x) << n if left else int(x) >> n, kind)

    return run


def _funnel(left: bool, wrap: bool) -> Callable[..., int]:
    def run(low: int, high: int, n: int) -> int:
        n = int(n) & 31 if wrap else min(int(n), 32)
        both = int(high) << 32 | int(low)
        return (both << n >> 32 if left else both >> n) & 0xFFFFFFFF

    return run


def _divide(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1, b)
    return a / b


def _quotient(kind: str) -> Callable[..., float]:
    def run(a: Any, b: Any) -> float:
        a, b = float(a), float(b)
        if not (math.isfinite(a) and math.isfinite(b)) or a == 0 or b == 0:
            return _divide(a, b)
        return _round(Fraction(a) / Fraction(b), *_FORMATS[kind])

    return run


def _root(kind: str) -> Callable[[Any], float]:
    def run(value: Any) -> float:
        value = float(value)
        if value <= 0 or not math.isfinite(value):
            return value if value == 0 or value == math.inf else math.nan
        scale = 1 << 400
        exact = Fraction(math.isqrt(int(Fraction(value) * scale * scale * 4 ** 1100 // 1)), scale * 2**1100)
        return _round(exact, *_FORMATS[kind])

    return run


def _protected(function: Callable[[float], float]) -> Callable[[Any], float]:
    """A function of math, with the results of CUDA where Python raises."""

    def run(value: Any) -> float:
        try:
            return function(float(value))
        except OverflowError:
            return math.inf
        except (ValueError, ZeroDivisionError):
            x = float(value)
            if x == 0:
                return math.copysign(math.inf, x) if function is _reciprocal or function is _rsqrt else -math.inf
            return math.nan

    return run


def _reciprocal(x: float) -> float:
    return 1 / x


def _rsqrt(x: float) -> float:
    return 1 / math.sqrt(x)


def _c(opcode: str, signature: str, reference: Callable[..., Any], **how: Any) -> Case:
    """`signature` is "result source source ..."."""
    result, *sources = signature.split()
    return Case(opcode, result, tuple(sources), reference, **how)


def _integers() -> list[Case]:
    cases = []
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        bits, two = int(kind[1:]), f"{kind} {kind} {kind}"
        wrap = lambda f, k=kind: lambda *a: _wrap(f(*(int(v) for v in a)), k)  # noqa: E731
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
            _c(f"shr.{kind}", f"{kind} {kind} u32", _shift(kind, False)),
            _c(f"selp.{kind}", f"{kind} {kind} {kind} pred", lambda a, b, p: a if p else b),
        ]
        if bits < 64:
            wide = f"{kind[0]}{2 * bits}"
            cases += [
                _c(f"mul.wide.{kind}", f"{wide} {kind} {kind}", lambda a, b: int(a) * int(b)),
                _c(f"mad.wide.{kind}", f"{wide} {kind} {kind} {wide}",
                   lambda a, b, c, k=wide: _wrap(int(a) * int(b) + int(c), k)),
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
            _c(f"shl.{kind}", f"{kind} {kind} u32", _shift("u" + kind[1:], True)),
        ]
    for kind in ("u32", "u64", "s32", "s64"):
        cases += [
            _c(f"bfe.{kind}", f"{kind} {kind} u32 u32", _bfe(kind)),
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
           lambda a, b, c: _wrap(abs(int(a) - int(b)) + int(c), "s32")),
        _c("bfi.b32", "b32 b32 b32 u32 u32", _bfi),
        _c("prmt.b32", three, _prmt),
        _c("lop3.b32", three, lambda a, b, c: majority(int(a), int(b), int(c)), extra=", 0xe8"),
        _c("lop3.b32", three, lambda a, b, c: parity(int(a), int(b), int(c)), extra=", 0x96"),
        _c("shf.l.wrap.b32", three, _funnel(True, True)),
        _c("shf.l.clamp.b32", three, _funnel(True, False)),
        _c("shf.r.wrap.b32", three, _funnel(False, True)),
        _c("shf.r.clamp.b32", three, _funnel(False, False)),
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
            cases.append(_c(f"{name}.{kind}", two, _exactly(formula, kind)))
        cases += [
            _c(f"fma.rn.{kind}", f"{two} {kind}", _exactly(fma, kind)),
            _c(f"div.rn.{kind}", two, _quotient(kind)),
            _c(f"sqrt.rn.{kind}", f"{kind} {kind}", _root(kind)),
            _c(f"rcp.rn.{kind}", f"{kind} {kind}", lambda a, k=kind: _quotient(k)(1.0, a)),
            _c(f"min.{kind}", two, _minimum),
            _c(f"max.{kind}", two, _maximum),
            _c(f"neg.{kind}", f"{kind} {kind}", lambda a: -float(a)),
            _c(f"abs.{kind}", f"{kind} {kind}", lambda a: abs(float(a))),
            _c(f"copysign.{kind}", two, lambda a, b: math.copysign(float(b), float(a))),
        ]
        for relation in ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu",
                         "geu", "num", "nan"):  # fmt: skip
            cases.append(
                _c(f"setp.{relation}.{kind}", f"pred {kind} {kind}", _compare(relation))
            )
    for name, formula in formulas.items():
        exact = _exactly(formula, "f32")
        cases += [
            _c(f"{name}.ftz.f32", "f32 f32 f32", _ftz(exact)),
            _c(f"{name}.sat.f32", "f32 f32 f32", _sat(exact)),
        ]
    for mode in ("rz", "rm", "rp"):
        cases.append(_c(f"fma.{mode}.f32", "f32 f32 f32 f32", _finite(_exactly(fma, "f32", mode))))
        cases.append(
            _c(f"mul.{mode}.f32", "f32 f32 f32", _finite(_exactly(formulas["mul"], "f32", mode)))
        )
    return [
        *cases,
        _c("fma.rn.ftz.f32", "f32 f32 f32 f32", _ftz(_exactly(fma, "f32"))),
        _c("fma.rn.sat.f32", "f32 f32 f32 f32", _sat(_exactly(fma, "f32"))),
        _c("min.NaN.f32", "f32 f32 f32", lambda a, b: _minimum(a, b, nan=True)),
        _c("max.NaN.f32", "f32 f32 f32", lambda a, b: _maximum(a, b, nan=True)),
        _c("ex2.approx.f32", "f32 f32", _protected(lambda x: 2.0**x), relative=2.0**-22),
        _c("ex2.approx.ftz.f32", "f32 f32", _ftz(_protected(lambda x: 2.0**x)),
           relative=2.0**-22),
        _c("lg2.approx.f32", "f32 f32", _protected(math.log2), relative=2.0**-22,
           absolute=2.0**-22),
        _c("rcp.approx.f32", "f32 f32", _protected(_reciprocal), relative=2.0**-23),
        _c("sqrt.approx.f32", "f32 f32", _protected(lambda x: math.copysign(math.sqrt(x), x)),
           relative=2.0**-23),
        _c("rsqrt.approx.f32", "f32 f32", _protected(_rsqrt), relative=2.0**-22.9),
        _c("tanh.approx.f32", "f32 f32", lambda x: math.tanh(x), relative=2.0**-11),
        _c("sin.approx.f32", "f32 f32", _near(math.sin), absolute=2.0**-20.5),
        _c("cos.approx.f32", "f32 f32", _near(math.cos), absolute=2.0**-20.5),
        _c("div.full.f32", "f32 f32 f32", _within(_quotient("f32")), relative=2.0**-22),
        _c("div.approx.f32", "f32 f32 f32", _within(_quotient("f32")), relative=2.0**-22),
        _c("testp.subnormal.f32", "pred f32", lambda a: 0 < abs(float(a)) < 2.0**-126),
        _c("testp.normal.f32", "pred f32", lambda a: 2.0**-126 <= abs(float(a)) < math.inf),
    ]  # fmt: skip


def _finite(reference: Callable[..., float]) -> Callable[..., Any]:
    """None, which is not compared, where overflow in a directed rounding or a zero's sign counts."""

    def run(*arguments: Any) -> Any:
        if not all(2.0**-60 < abs(float(a)) < 2.0**60 for a in arguments):
            return None
        value = reference(*arguments)
        return None if value == 0 else value

    return run


def _near(function: Callable[[float], float]) -> Callable[[Any], Any]:
    return lambda x: function(float(x)) if abs(float(x)) <= 2 * math.pi else None


def _within(reference: Callable[..., float]) -> Callable[..., Any]:
    """Only where the manual gives an error: 2^-126 <= |divisor| <= 2^126, and no subnormals."""

    def run(a: Any, b: Any) -> Any:
        value = reference(a, b)
        ok = 2.0**-126 <= abs(float(b)) <= 2.0**126 and 2.0**-120 < abs(value) < 2.0**120
        return value if ok else None

    return run


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
            exact = _exactly(formula, kind)
            cases += [
                _c(f"{name}.{kind}", " ".join([kind] * (count + 1)), _half(exact, kind)),
                _c(f"{name}.{kind}x2", " ".join([f"{kind}x2"] * (count + 1)),
                   _halves(exact, kind)),
            ]  # fmt: skip
        for name, function in (("min", _minimum), ("max", _maximum)):
            nan = lambda a, b, f=function: f(a, b, nan=True)  # noqa: E731
            cases += [
                _c(f"{name}.{kind}", f"{kind} {kind} {kind}", _half(function, kind)),
                _c(f"{name}.NaN.{kind}", f"{kind} {kind} {kind}", _half(nan, kind)),
                _c(f"{name}.{kind}x2", f"{kind}x2 {kind}x2 {kind}x2", _halves(function, kind)),
            ]
        flip = 0x80008000
        cases.append(_c(f"neg.{kind}x2", f"{kind}x2 {kind}x2", lambda a: int(a) ^ flip))
    relu: Callable[..., Any] = lambda a, b, c: max(a * b + c, 0)  # noqa: E731
    return [
        *cases,
        _c("fma.rn.relu.f16", "f16 f16 f16 f16", _half(_relu(_exactly(relu, "f16")), "f16")),
        _c("add.sat.f16", "f16 f16 f16", _half(_sat(_exactly(operations["add"][1], "f16")), "f16")),
        _c("ex2.approx.f16", "f16 f16", _half(_protected(lambda x: 2.0**x), "f16"),
           relative=2.0**-9.9, absolute=2.0**-24),
        _c("tanh.approx.f16", "f16 f16", _half(math.tanh, "f16"), relative=2.0**-10.987,
           absolute=2.0**-24),
    ]  # fmt: skip


def _relu(reference: Callable[..., float]) -> Callable[..., float]:
    def run(a: float, b: float, c: float) -> float:
        plain = a * b + c
        return plain if math.isnan(plain) else reference(a, b, c)

    return run


def _conversions() -> list[Case]:
    cases = []
    roundings = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for kind in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
        for source in ("f32", "f64", "f16"):
            for mode, rounding in roundings.items():
                if mode in ("rni", "rzi") or kind == "s32":
                    cases.append(
                        _c(f"cvt.{mode}.{kind}.{source}", f"{kind} {source}",
                           _to_integer(kind, rounding))
                    )  # fmt: skip
        for target in ("f32", "f64", "f16"):
            if int(kind[1:]) >= 16:
                cases.append(
                    _c(f"cvt.rn.{target}.{kind}", f"{target} {kind}",
                       lambda a, t=target: _to(t)(int(a)))
                )  # fmt: skip
        for target in ("s16", "u16", "s32", "u32", "s64", "u64"):
            if target != kind and int(kind[1:]) >= 16:
                cases.append(
                    _c(f"cvt.{target}.{kind}", f"{target} {kind}",
                       lambda a, t=target: _wrap(int(a), t))
                )  # fmt: skip
    for mode in ("rni", "rzi", "rmi", "rpi"):
        cases.append(
            _c(f"cvt.{mode}.f32.f32", "f32 f32", lambda a, r=roundings[mode]: _whole(a, r))
        )
    pair = lambda decode: lambda a, b: decode(float(b)) | decode(float(a)) << 16  # noqa: E731
    return [
        *cases,
        _c("cvt.sat.u8.s32", "u8 s32", lambda a: min(max(int(a), 0), 255)),
        _c("cvt.f64.f32", "f64 f32", float),
        _c("cvt.rn.f32.f64", "f32 f64", lambda a: _to("f32")(float(a))),
        _c("cvt.rz.f32.f64", "f32 f64", lambda a: _to("f32", "rz")(float(a))),
        _c("cvt.rm.f32.f64", "f32 f64", lambda a: _to("f32", "rm")(float(a))),
        _c("cvt.rp.f32.f64", "f32 f64", lambda a: _to("f32", "rp")(float(a))),
        _c("cvt.rn.f16.f32", "f16 f32", lambda a: _to("f16")(float(a))),
        _c("cvt.rz.f16.f32", "f16 f32", lambda a: _to("f16", "rz")(float(a))),
        _c("cvt.f32.f16", "f32 f16", float),
        _c("cvt.rn.bf16.f32", "bf16 f32", lambda a: _bf16_bits(float(a))),
        _c("cvt.rn.f16x2.f32", "f16x2 f32 f32", pair(_f16_bits)),
        _c("cvt.rn.bf16x2.f32", "bf16x2 f32 f32", pair(_bf16_bits)),
        _c("cvt.sat.f32.f32", "f32 f32", _sat(float)),
        _c("cvt.ftz.f32.f32", "f32 f32", lambda a: _flush(float(a))),
        _c("cvt.rna.tf32.f32", "b32 f32", _tf32),
    ]  # fmt: skip


def _whole(value: Any, rounding: Callable[[float], int]) -> float:
    value = float(value)
    return math.copysign(float(rounding(value)), value) if math.isfinite(value) else value


def _tf32(value: Any) -> int | None:
    bits = struct.unpack("<I", struct.pack("<f", float(value)))[0]
    if bits & 0x7F800000 == 0x7F800000:
        return None
    return (bits + 0x1000) & 0xFFFFE000


CASES: list[Case] = [*_integers(), *_floats(), *_halfs(), *_conversions()]
