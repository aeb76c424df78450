# SPDX-License-Identifier: Apache-2.0
"""Types of PTX in numpy, and the arithmetic that numpy lacks.

bfloat16 and packed pairs are held as their bits. float32 and float16 results are rounded once,
also those of fma; approximate instructions are off by up to the error that the PTX manual allows
them, so that code which relies on more than that shows.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

__all__ = [
    "DTYPES",
    "SIGNED",
    "approximate",
    "bf16_to_float",
    "exact_fma32",
    "exact_fma64",
    "float_to_bf16",
    "flush",
    "nan_to_canonical",
    "narrow",
    "pack",
    "round_to_odd_sum",
    "saturate",
    "truncate_to_float32",
    "unpack",
    "widen",
]

Array = np.ndarray[Any, Any]

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
    "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32, "tf32": np.uint32,
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
}  # fmt: skip
SIGNED: dict[Any, Any] = {
    np.uint8: np.int8, np.uint16: np.int16, np.uint32: np.int32, np.uint64: np.int64
}  # fmt: skip

# Bits of float64: those that float32 lacks, the first of them; and of powers of 2, shifted left.
_BELOW_FLOAT32, _HALF_FLOAT32 = np.uint64(0x1FFFFFFF), np.uint64(0x10000000)
_LARGE, _SMALL = (np.uint64(2 * (1023 + power << 52)) for power in (480, -480))
_ONE, _SMALLEST_NORMAL = np.uint64(1), np.uint64(2 * (1023 - 126 << 52))
_CANONICAL = {np.float32: 0x7FFFFFFF, np.float16: 0x7FFF}  # the NaN that instructions return


def bf16_to_float(bits: Array) -> Array:
    """float32 from the bits of bfloat16."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(value: Array, mode: str = "rn") -> Array:
    """Bits of bfloat16 from float32 or float64, rounded once; `mode` is rn or rz."""
    value = np.asarray(value)
    if value.dtype == np.float64:
        value = _float64_to_odd32(value)
    bits = np.atleast_1d(value.astype(np.float32)).view(np.uint32).reshape(value.shape)
    if mode == "rz":
        result = (bits >> np.uint32(16)).astype(np.uint16)
    else:
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        result = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), result)


def _float64_to_odd32(value: Array) -> Array:
    """float32 by round to odd: rounding that again to fewer bits is as if done once."""
    near = value.astype(np.float32)
    bits = np.atleast_1d(near).view(np.uint32).reshape(near.shape)
    inexact = (near.astype(np.float64) != value) & np.isfinite(near)
    away = np.abs(near.astype(np.float64)) > np.abs(value)
    even = (bits & np.uint32(1)) == 0
    step = np.where(away, bits - np.uint32(1), bits + np.uint32(1))
    fixed = np.where(inexact & even, step, bits)
    return np.atleast_1d(fixed).view(np.float32).reshape(near.shape)


def widen(bits: Array, kind: str) -> Array:
    """float32 values of f16 or bf16."""
    return bf16_to_float(bits) if kind == "bf16" else np.asarray(bits).astype(np.float32)


def narrow(value: Array, kind: str) -> Array:
    """f16 (as float16) or bf16 (as bits) from float32 or float64, rounded once to nearest."""
    if kind == "bf16":
        return float_to_bf16(value)
    return nan_to_canonical(value.astype(np.float16))


def unpack(pair: Array, kind: str) -> tuple[Array, Array]:
    """The low and the high half of an f16x2 or bf16x2, each as `kind` f16 or bf16 holds it."""
    pair = np.asarray(pair, np.uint32)
    low, high = (pair & np.uint32(0xFFFF)).astype(np.uint16), (pair >> np.uint32(16)).astype("u2")
    return (low, high) if kind == "bf16" else (low.view(np.float16), high.view(np.float16))


def pack(low: Array, high: Array) -> Array:
    """An f16x2 or bf16x2 from its halves."""
    low, high = (np.atleast_1d(x).view(np.uint16).reshape(np.shape(x)) for x in (low, high))
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def nan_to_canonical(value: Array) -> Array:
    """NaNs as instructions other than moves return them."""
    nan = np.isnan(value)
    if not nan.any():
        return value
    width = np.uint32 if value.dtype == np.float32 else np.uint16
    canonical = np.array([_CANONICAL[value.dtype.type]], width).view(value.dtype)[0]
    return np.where(nan, canonical, value)


def flush(value: Array) -> Array:
    """`.ftz`: subnormal float32 to zero of the same sign."""
    small = np.abs(value) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), value), value)


def saturate(value: Array) -> Array:
    """`.sat`: to [0, 1], NaN to 0."""
    return np.fmin(np.fmax(value, value.dtype.type(0)), value.dtype.type(1))


def round_to_odd_sum(product: Array, addend: Array) -> Array:
    """product + addend in float64, rounded to odd, so that a second rounding is harmless."""
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = np.atleast_1d(total).view(np.int64).reshape(np.shape(total))
    fix = (error != 0) & ((bits & 1) == 0) & np.isfinite(total)
    toward = np.where((error > 0) == (total > 0), bits + 1, bits - 1)
    return np.atleast_1d(np.where(fix, toward, bits)).view(np.float64).reshape(np.shape(total))


def exact_fma32(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f32. The float64 product is exact; the sum is redone where rounding twice shows."""
    product = a.astype(np.float64)
    product *= b.astype(np.float64)  # in place: float64 numbers of numpy become new ones
    addend = c.astype(np.float64)
    total = product + addend
    if total.ndim == 0:
        return round_to_odd_sum(product, addend).astype(np.float32)
    result: Array = total.astype(np.float32)
    bits = total.view(np.uint64)
    middle = (bits & _BELOW_FLOAT32) == _HALF_FLOAT32  # between two float32
    size = bits + bits
    size -= _ONE  # so that zeros are large
    if np.count_nonzero(middle) or size.min() < _SMALLEST_NORMAL:
        at = np.flatnonzero(middle | (size < _SMALLEST_NORMAL))
        parts = (np.broadcast_to(x, total.shape)[at] for x in (product, addend))
        result[at] = round_to_odd_sum(*parts).astype(np.float32)
    return result


def exact_fma64(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f64 by Boldo and Melquiond (2008), in rational numbers where that could overflow.

    Where both factors are float32 numbers their product is exact, and there is nothing to it.
    """
    if np.ndim(a) and _all_float32(a) and _all_float32(b):
        return a * b + c
    a, b, c = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, np.float64)) for x in (a, b, c)))
    high, low = _two_product(a, b)
    bits = np.concatenate([a, b, c, high]).view(np.uint64)
    bits = bits + bits
    if bits.max() < _LARGE:
        bits -= _ONE  # so that zeros are large
        if bits.min() > _SMALL:
            result, known = _fma64_of_usual_numbers(high, low, c)
            if np.count_nonzero(known) == len(known):
                return result
    return _fma64_of_any_numbers(a, b, c, high, low)


def _fma64_of_usual_numbers(high: Array, low: Array, c: Array) -> tuple[Array, Array]:
    """high + low + c, where nothing overflows or underflows; and where it is known to be right.

    It is where a small change to what was rounded does not change the result.
    """
    total, rest = _two_sum(high, c)
    rest += low
    doubt = np.abs(rest)
    doubt *= 2.0**-51
    result = total + (rest - doubt)
    known = result == total + (rest + doubt)
    zero = result == 0
    if np.count_nonzero(zero):  # its sign
        result = np.where(zero, high + c, result)
    return result, known


def _fma64_of_any_numbers(a: Array, b: Array, c: Array, high: Array, low: Array) -> Array:
    t_high, t_low = _two_sum(c, low)
    v_high, v_low = _two_sum(high, t_high)
    result = v_high + round_to_odd_sum(t_low, v_low)
    plain = a * b + c
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    # The sum of the parts loses the sign of an exact zero.
    result = np.where(finite & ~((result == 0) & (plain == 0)), result, plain)
    with np.errstate(all="ignore"):
        sizes = [np.abs(x) for x in (a, b, c, high)]
    risky = np.zeros(a.shape, bool)
    for size in sizes:
        risky |= (size > 2.0**480) | ((size != 0) & (size < 2.0**-480))
    for i in np.flatnonzero(risky & finite):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        try:
            result[i] = float(exact) if exact else plain[i]
        except OverflowError:
            result[i] = np.inf if exact > 0 else -np.inf
    return result


def _all_float32(x: Array) -> bool:
    return np.count_nonzero(x.astype(np.float32) == x) == x.size


def truncate_to_float32(exact: Array) -> Array | None:
    """float32 from float64, rounded towards zero; None where some are not normal float32."""
    bits = exact.view(np.uint64)
    size = bits + bits
    size -= _ONE
    if size.min() < _SMALLEST_NORMAL or not np.abs(exact).max() < 2.0**128:
        return None
    return (bits & ~_BELOW_FLOAT32).view(np.float64).astype(np.float32)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    product = a * b
    halves = []
    for x in (a, b):
        scaled = x * 134217729.0  # 2^27 + 1, Veltkamp's splitting
        high = scaled - (scaled - x)
        halves.append((high, x - high))
    (ah, al), (bh, bl) = halves
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


def approximate(
    function: Callable[[Array], Array], relative: float, absolute: float = 0.0
) -> Callable[[Array], Array]:
    """`function` in float64, then off by a fixed share of the error that the manual allows.

    The share is from -1 to 1, by a hash of the argument: the same argument gives the same result,
    and neighbours err independently. Zeros, infinities and NaNs stay what they are.
    """

    def run(x: Array) -> Array:
        x = np.atleast_1d(x)
        exact = function(x.astype(np.float64))
        bits = x.view(np.uint32 if x.dtype == np.float32 else np.uint64).astype(np.uint64)
        mixed = (bits * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
        share = mixed.astype(np.float64) * (2 / 2**24) - 1
        # Half a unit in the last place is left for the rounding of the result itself.
        error = np.maximum(relative - 2.0**-24, 0) * np.abs(exact) + absolute
        moved = np.where(np.isfinite(exact) & (exact != 0), exact + share * error, exact)
        return moved.astype(x.dtype)

    return run
