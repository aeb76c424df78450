# SPDX-License-Identifier: Apache-2.0
"""float32 and float64 (PTX manual 9.7.3).

Approximate instructions err as much as the manual lets them: `ERRORS` is its table. ex2, rsqrt and
the others return exactly what the manual's tables of special values say.
"""

import re
from typing import Any

import numpy as np

from ptx.compiler import Compiler, Step, instruction
from ptx.faults import NotModelled
from ptx.parser import Instruction
from ptx.values import (
    DTYPES,
    approximate,
    exact_fma32,
    exact_fma64,
    flush,
    nan_to_canonical,
    round_to_odd_sum,
    saturate,
    truncate_to_float32,
)

__all__ = ["ERRORS"]

Array = np.ndarray[Any, Any]
Match = re.Match[str]

# Largest relative and absolute error: PTX ISA 9.0, section 9.7.3, the notes of each instruction.
# sin and cos hold in [-2 pi, 2 pi]; lg2 is absolute near 1 and relative elsewhere, so the smaller.
ERRORS = {
    "ex2": (2.0**-22, 0.0),
    "lg2": (2.0**-22, 0.0),
    "sin": (0.0, 2.0**-20.5),
    "cos": (0.0, 2.0**-20.5),
    "tanh": (2.0**-11, 0.0),
    "rcp": (2.0**-23, 0.0),
    "sqrt": (2.0**-23, 0.0),
    "rsqrt": (2.0**-22.9, 0.0),
    "div": (2.0**-22, 0.0),
}
_EXACT: dict[str, Any] = {
    "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip


def _finish(function: Any, ftz: bool, sat: bool) -> Any:
    """`function` with `.ftz` and `.sat`."""
    if not ftz and not sat:
        return function

    def run(*arguments: Array) -> Array:
        if ftz:
            arguments = tuple(flush(np.asarray(x)) for x in arguments)
        value = function(*arguments)
        if ftz:
            value = flush(value)
        return saturate(value) if sat else value

    return run


@instruction(r"(add|sub|mul)(?P<mode>\.r[nzmp])?(?P<ftz>\.ftz)?(?P<sat>\.sat)?\.(?P<type>f32)")
@instruction(r"(add|sub|mul)(?P<mode>\.r[nzmp])?(?P<ftz>)(?P<sat>)\.(?P<type>f64)")
def _arithmetic(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[match[1]]
    if match["mode"] not in (None, ".rn"):
        function = _directed(match[1], match["mode"], dtype)
    target, a, b = ins.operands
    return code.compute(
        _finish(function, bool(match["ftz"]), bool(match["sat"])),
        target, dtype, (a, dtype), (b, dtype),
    )  # fmt: skip


@instruction(r"(fma|mad)(?P<mode>\.r[nzmp])?(?P<ftz>\.ftz)?(?P<sat>\.sat)?\.(?P<type>f32)")
@instruction(r"(fma|mad)(?P<mode>\.r[nzmp])(?P<ftz>)(?P<sat>)\.(?P<type>f64)")
def _fma(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    function: Any = exact_fma32 if dtype is np.float32 else exact_fma64
    if match["mode"] not in (None, ".rn"):
        function = _directed("fma", match["mode"], dtype)
    target, a, b, c = ins.operands
    return code.compute(
        _finish(function, bool(match["ftz"]), bool(match["sat"])),
        target, dtype, (a, dtype), (b, dtype), (c, dtype),
    )  # fmt: skip


def _directed(name: str, mode: str, dtype: Any) -> Any:
    """float32 arithmetic rounded toward zero, down or up, by way of float64 rounded to odd."""
    if dtype is not np.float32:
        raise NotModelled(f"{name}{mode}.f64")

    def function(a: Array, b: Array, c: Any = 0.0) -> Array:
        a, b, c = (np.atleast_1d(np.asarray(x, np.float64)) for x in (a, b, c))
        if name == "mul":
            exact = a * b
        elif name == "fma":
            exact = round_to_odd_sum(a * b, c)
        else:
            exact = round_to_odd_sum(a, b if name == "add" else -b)
        return round32(exact, mode)

    return function


def round32(exact: Array, mode: str) -> Array:
    """float32 from float64 in a rounding mode: .rn, .rz, .rm or .rp."""
    if mode == ".rz" and exact.ndim and (result := truncate_to_float32(exact)) is not None:
        return result
    near = exact.astype(np.float32)
    if mode == ".rn":
        return near
    above, below = near > exact, near < exact
    down, up = np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))
    positive = exact > 0
    if mode == ".rm":
        result = np.where(above, down, near)
    elif mode == ".rp":
        result = np.where(below, up, near)
    else:
        result = np.where(above & positive, down, np.where(below & ~positive, up, near))
    return result.astype(np.float32)


@instruction(r"(min|max)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?(?P<sign>\.xorsign\.abs)?\.(?P<type>f32)")
@instruction(r"(min|max)(?P<ftz>)(?P<nan>)(?P<sign>)\.(?P<type>f64)")
def _min_max(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    nan, sign = bool(match["nan"]), bool(match["sign"])
    target, *sources = ins.operands
    function = extremum(match[1], nan)

    def signed(a: Array, b: Array) -> Array:
        flip = np.signbit(a) ^ np.signbit(b)
        value = function(np.abs(a), np.abs(b))
        return np.where(flip, -value, value)

    chosen = signed if sign else function
    if len(sources) == 3:  # sm_100 and newer
        return code.compute(
            _finish(lambda a, b, c: chosen(chosen(a, b), c), bool(match["ftz"]), False),
            target, dtype, *((o, dtype) for o in sources),
        )  # fmt: skip
    a, b = sources
    return code.compute(
        _finish(chosen, bool(match["ftz"]), False), target, dtype, (a, dtype), (b, dtype)
    )


def extremum(name: str, nan: bool) -> Any:
    """min or max: -0 is less than +0; a NaN loses, or with `nan` wins."""
    plain = {
        ("min", False): np.fmin, ("max", False): np.fmax,
        ("min", True): np.minimum, ("max", True): np.maximum,
    }[name, nan]  # fmt: skip
    wanted = name == "min"

    def function(a: Array, b: Array) -> Array:
        value = plain(a, b)
        zeros = value == 0
        if zeros.any():
            both = zeros & (np.asarray(a) == b)
            negative = np.signbit(a) | np.signbit(b) if wanted else np.signbit(a) & np.signbit(b)
            zero = value.dtype.type(0)
            value = np.where(both, np.where(negative, -zero, zero), value)
        return nan_to_canonical(value) if value.dtype != np.float64 else value

    return function


@instruction(r"(neg|abs)(?P<ftz>\.ftz)?\.(?P<type>f32)")
@instruction(r"(neg|abs)(?P<ftz>)\.(?P<type>f64)")
def _sign(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    function = {"neg": np.negative, "abs": np.abs}[match[1]]
    return code.compute(
        _finish(function, bool(match["ftz"]), False), ins.operands[0], dtype,
        (ins.operands[1], dtype),
    )  # fmt: skip


@instruction(r"(copysign)\.(?P<type>f32|f64)")
def _copysign(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    target, a, b = ins.operands
    return code.compute(lambda x, y: np.copysign(y, x), target, dtype, (a, dtype), (b, dtype))


@instruction(r"(div)\.(?P<mode>r[nzmp]|full|approx)(?P<ftz>\.ftz)?\.(?P<type>f32)")
@instruction(r"(div)\.(?P<mode>rn)(?P<ftz>)\.(?P<type>f64)")
def _div(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    target, a, b = ins.operands
    function: Any = np.divide
    if match["mode"] in ("full", "approx"):
        approx = match["mode"] == "approx"
        error = approximate(lambda x: x, *ERRORS["div"])

        def function(x: Array, y: Array) -> Array:
            quotient = np.atleast_1d(np.divide(x, y))
            moved = np.where(np.isfinite(quotient), error(quotient), quotient)
            if approx:  # a quotient by |y| > 2^126 is 0, and NaN for an infinite x
                large = (np.abs(y) > 2.0**126) & np.isfinite(y)
                zero = np.where(np.isinf(x), np.float32(np.nan), np.float32(0))
                moved = np.where(large, zero, moved)
            return moved

    elif match["mode"] != "rn":
        raise NotModelled(ins.opcode)
    return code.compute(
        _finish(function, bool(match["ftz"]), False), target, dtype, (a, dtype), (b, dtype)
    )


@instruction(r"(rcp|sqrt|rsqrt)\.(?P<mode>approx)(?P<ftz>\.ftz)?\.(?P<type>f32)")
@instruction(r"(ex2|lg2|sin|cos)\.(?P<mode>approx)(?P<ftz>\.ftz)?\.(?P<type>f32)")
@instruction(r"(tanh)\.(?P<mode>approx)(?P<ftz>)\.(?P<type>f32)")
@instruction(r"(rcp|sqrt)\.(?P<mode>rn)(?P<ftz>\.ftz)?\.(?P<type>f32)")
@instruction(r"(rcp|sqrt)\.(?P<mode>rn)(?P<ftz>)\.(?P<type>f64)")
def _function(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    name = match[1]
    exact = _EXACT[name]
    function = exact
    if match["mode"] == "approx":
        function = approximate(exact, *ERRORS[name])
        if name in ("ex2", "sin", "cos"):
            # Powers of two, and the arguments 0, are exact in the manual's tables.
            function = _exact_where(function, exact, _integers if name == "ex2" else _zeros)
        elif name == "lg2":
            function = _exact_where(function, exact, _ones)
    return code.compute(
        _finish(function, bool(match["ftz"]), False), ins.operands[0], dtype,
        (ins.operands[1], dtype),
    )  # fmt: skip


def _integers(x: Array) -> Array:
    return np.asarray(x == 0)


def _zeros(x: Array) -> Array:
    return np.asarray(x == 0)


def _ones(x: Array) -> Array:
    return np.asarray(x == 1)


def _exact_where(function: Any, exact: Any, where: Any) -> Any:
    def run(x: Array) -> Array:
        x = np.atleast_1d(x)
        return np.where(where(x), exact(x), function(x))

    return run


@instruction(r"(rcp|rsqrt)\.approx\.ftz\.f64")
def _coarse64(code: Compiler, ins: Instruction, match: Match) -> Step:
    """Only the upper 20 bits of the fraction are kept: what software division starts from."""
    exact = _EXACT[match[1]]

    def function(x: Array) -> Array:
        bits = np.atleast_1d(exact(np.asarray(x))).view(np.uint64)
        return (bits & np.uint64(0xFFFFFFFF00000000)).view(np.float64)

    return code.compute(function, ins.operands[0], np.float64, (ins.operands[1], np.float64))


@instruction(
    r"(testp)\.(?P<what>finite|infinite|number|notanumber|normal|subnormal)\.(?P<type>f32|f64)"
)
def _testp(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    tiny = np.finfo(dtype).tiny
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (np.asarray(x) != 0),
    }
    return code.compute(tests[match["what"]], ins.operands[0], np.bool_, (ins.operands[1], dtype))
