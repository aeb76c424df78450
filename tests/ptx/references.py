# SPDX-License-Identifier: Apache-2.0
"""What instructions should give, lane by lane, in plain Python: the references of `table.py`.

They work on integers and on exact fractions that are rounded once; none of them uses the emulator's
own arithmetic. A reference that returns None leaves the lane out.
"""

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

__all__ = [
    "FORMATS",
    "bf16",
    "bf16_bits",
    "bfe",
    "bfi",
    "compare",
    "divide",
    "exactly",
    "f16",
    "f16_bits",
    "finite",
    "flush",
    "ftz",
    "funnel",
    "half",
    "halves",
    "maximum",
    "minimum",
    "near",
    "prmt",
    "protected",
    "quotient",
    "reciprocal",
    "relu",
    "root",
    "round_to",
    "rsqrt",
    "sat",
    "shift",
    "signs_differ",
    "tf32",
    "to",
    "to_integer",
    "truncated",
    "whole",
    "within",
    "wrap",
]


def wrap(value: int, kind: str) -> int:
    bits = int(kind[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def round_to(
    exact: Fraction, digits: int, smallest: int, largest: float, mode: str = "rn"
) -> float:
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


FORMATS = {"f16": (11, -24, 65504.0), "bf16": (8, -133, float.fromhex("0x1.fep127")),
            "f32": (24, -149, float.fromhex("0x1.fffffep127")),
            "f64": (53, -1074, float.fromhex("0x1.fffffffffffffp1023"))}  # fmt: skip


def to(kind: str, mode: str = "rn") -> Callable[[Any], float]:
    def run(value: Any) -> float:
        if isinstance(value, float) and (math.isnan(value) or math.isinf(value) or value == 0):
            return value
        return round_to(Fraction(value), *FORMATS[kind], mode=mode)

    return run


def exactly(formula: Callable[..., Any], kind: str, mode: str = "rn") -> Callable[..., float]:
    """A formula in fractions, rounded once; in float where an argument is not finite or 0."""

    def run(*arguments: Any) -> float:
        values = [float(a) for a in arguments]
        if all(math.isfinite(v) for v in values):
            exact = formula(*(Fraction(v) for v in values))
            if exact != 0:
                return round_to(exact, *FORMATS[kind], mode=mode)
            zero = float(formula(*values))
            return -0.0 if mode == "rm" and zero == 0 and signs_differ(formula, values) else zero
        return float(formula(*values))

    return run


def signs_differ(formula: Callable[..., Any], values: list[float]) -> bool:
    """Whether an exact zero is a cancelled sum, which rounds down to -0."""
    product = math.copysign(1, float(formula(*values))) > 0 and any(values)
    return bool(product)


def bf16(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", int(bits) << 16))[0])


def bf16_bits(value: float) -> int:
    if math.isnan(value):
        return 0x7FFF
    return struct.unpack("<I", struct.pack("<f", to("bf16")(value)))[0] >> 16


def f16_bits(value: float) -> int:
    if math.isnan(value):
        return 0x7FFF
    return struct.unpack("<H", struct.pack("<e", to("f16")(value)))[0]


def f16(bits: int) -> float:
    return float(struct.unpack("<e", struct.pack("<H", int(bits)))[0])


def flush(value: float) -> float:
    return math.copysign(0.0, value) if abs(value) < 2.0**-126 else value


def ftz(reference: Callable[..., float]) -> Callable[..., float]:
    return lambda *a: flush(reference(*(flush(float(v)) for v in a)))


def sat(reference: Callable[..., float]) -> Callable[..., float]:
    def run(*arguments: Any) -> float:
        value = reference(*arguments)
        return 0.0 if math.isnan(value) else min(max(value, 0.0), 1.0) + 0.0

    return run


def minimum(a: float, b: float, *, nan: bool = False, sign: int = 1) -> float:
    a, b = float(a), float(b)
    if math.isnan(a) or math.isnan(b):
        return math.nan if nan or (math.isnan(a) and math.isnan(b)) else b if math.isnan(a) else a
    if a == b:
        return a if sign * math.copysign(1, a) < sign * math.copysign(1, b) else b
    return min(a, b) if sign > 0 else max(a, b)


def maximum(a: float, b: float, **how: Any) -> float:
    return minimum(a, b, sign=-1, **how)


def halves(operation: Callable[..., float], kind: str) -> Callable[..., int]:
    """Both halves of pairs."""
    decode, encode = (bf16, bf16_bits) if kind == "bf16" else (f16, f16_bits)

    def run(*pairs: Any) -> int:
        low = encode(operation(*(decode(int(p) & 0xFFFF) for p in pairs)))
        high = encode(operation(*(decode(int(p) >> 16) for p in pairs)))
        return low | high << 16

    return run


def half(operation: Callable[..., float], kind: str) -> Callable[..., Any]:
    if kind == "f16":
        return lambda *a: operation(*(float(v) for v in a))
    return lambda *a: bf16_bits(operation(*(bf16(v) for v in a)))


def truncated(a: int, b: int) -> int:
    return int(math.copysign(1, a) * math.copysign(1, b)) * (abs(a) // abs(b))


def to_integer(kind: str, rounding: Callable[[float], Any]) -> Callable[[Any], int]:
    bits = int(kind[1:])
    low, high = (
        (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    )

    def run(value: Any) -> int:
        value = float(value)
        if math.isnan(value):
            return 0 if bits < 64 else (1 << 63 if low == 0 else low)
        if math.isinf(value):
            return high if value > 0 else low
        return int(min(max(int(rounding(value)), low), high))

    return run


def compare(relation: str) -> Callable[..., bool]:
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


def prmt(a: int, b: int, c: int) -> int:
    octets = int(a).to_bytes(4, "little") + int(b).to_bytes(4, "little")
    result = 0
    for j in range(4):
        nibble = int(c) >> 4 * j & 15
        byte = octets[nibble & 7]
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * j
    return result


def bfe(kind: str) -> Callable[..., int]:
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
        return wrap(result, kind)

    return run


def bfi(field: int, into: int, position: int, length: int) -> int:
    position, length = int(position) & 255, int(length) & 255
    result = int(into)
    for i in range(length):
        if position + i < 32:
            result = result & ~(1 << position + i) | (int(field) >> i & 1) << position + i
    return result


def shift(kind: str, left: bool) -> Callable[..., int]:
    bits = int(kind[1:])

    def run(x: int, n: int) -> int:
        n = min(int(n), bits)
        return wrap(int(x) << n if left else int(x) >> n, kind)

    return run


def funnel(left: bool, wrap: bool) -> Callable[..., int]:
    def run(low: int, high: int, n: int) -> int:
        n = int(n) & 31 if wrap else min(int(n), 32)
        both = int(high) << 32 | int(low)
        return (both << n >> 32 if left else both >> n) & 0xFFFFFFFF

    return run


def divide(a: float, b: float) -> float:
    if b == 0:
        return (
            math.nan
            if a == 0 or math.isnan(a)
            else math.copysign(math.inf, a) * math.copysign(1, b)
        )
    return a / b


def quotient(kind: str) -> Callable[..., float]:
    def run(a: Any, b: Any) -> float:
        a, b = float(a), float(b)
        if not (math.isfinite(a) and math.isfinite(b)) or a == 0 or b == 0:
            return divide(a, b)
        return round_to(Fraction(a) / Fraction(b), *FORMATS[kind])

    return run


def root(kind: str) -> Callable[[Any], float]:
    def run(value: Any) -> float:
        value = float(value)
        if value <= 0 or not math.isfinite(value):
            return value if value == 0 or value == math.inf else math.nan
        scale = 1 << 400
        exact = Fraction(
            math.isqrt(int(Fraction(value) * scale * scale * 4**1100 // 1)), scale * 2**1100
        )
        return round_to(exact, *FORMATS[kind])

    return run


def protected(function: Callable[[float], float]) -> Callable[[Any], float]:
    """A function of math, with the results of CUDA where Python raises."""

    def run(value: Any) -> float:
        try:
            return function(float(value))
        except OverflowError:
            return math.inf
        except (ValueError, ZeroDivisionError):
            x = float(value)
            if x == 0:
                return (
                    math.copysign(math.inf, x)
                    if function is reciprocal or function is rsqrt
                    else -math.inf
                )
            return math.nan

    return run


def reciprocal(x: float) -> float:
    return 1 / x


def rsqrt(x: float) -> float:
    return 1 / math.sqrt(x)


def finite(reference: Callable[..., float]) -> Callable[..., Any]:
    """Only where neither overflow in a directed rounding nor the sign of a zero counts."""

    def run(*arguments: Any) -> Any:
        if not all(2.0**-60 < abs(float(a)) < 2.0**60 for a in arguments):
            return None
        value = reference(*arguments)
        return None if value == 0 else value

    return run


def near(function: Callable[[float], float]) -> Callable[[Any], Any]:
    return lambda x: function(float(x)) if abs(float(x)) <= 2 * math.pi else None


def within(reference: Callable[..., float]) -> Callable[..., Any]:
    """Only where the manual gives an error: 2^-126 <= |divisor| <= 2^126, and no subnormals."""

    def run(a: Any, b: Any) -> Any:
        value = reference(a, b)
        ok = 2.0**-126 <= abs(float(b)) <= 2.0**126 and 2.0**-120 < abs(value) < 2.0**120
        return value if ok else None

    return run


def relu(reference: Callable[..., float]) -> Callable[..., float]:
    def run(a: float, b: float, c: float) -> float:
        plain = a * b + c
        return plain if math.isnan(plain) else reference(a, b, c)

    return run


def whole(value: Any, rounding: Callable[[float], int]) -> float:
    value = float(value)
    return math.copysign(float(rounding(value)), value) if math.isfinite(value) else value


def tf32(value: Any) -> int | None:
    bits = struct.unpack("<I", struct.pack("<f", float(value)))[0]
    if bits & 0x7F800000 == 0x7F800000:
        return None
    return (bits + 0x1000) & 0xFFFFE000
