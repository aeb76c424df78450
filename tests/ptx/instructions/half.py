# SPDX-License-Identifier: Apache-2.0
"""float16, bfloat16 and pairs of them (PTX manual 9.7.4).

A sum or product in float32 rounds to either like the exact one, because float32 has more than twice
their digits and two; fma goes through float64 rounded to odd.
"""

import re
from typing import Any

import numpy as np

from ptx.compiler import Compiler, Step, instruction
from ptx.faults import NotModelled
from ptx.instructions.floating import extremum
from ptx.parser import Instruction
from ptx.values import (
    DTYPES,
    approximate,
    narrow,
    pack,
    round_to_odd_sum,
    saturate,
    unpack,
    widen,
)

Array = np.ndarray[Any, Any]
Match = re.Match[str]

_TYPE = r"(?P<type>f16|f16x2|bf16|bf16x2)"


def _lift(function: Any, kind: str, ftz: bool = False) -> Any:
    """A function of float32 arrays as one of halves, or of both halves of pairs."""
    half = kind.removesuffix("x2")

    def one(*arguments: Array) -> Array:
        wide = [widen(x, half) for x in arguments]
        if ftz:
            wide = [_flush16(x) for x in wide]
        value = function(*wide)
        if ftz:
            value = _flush16(value)
        return narrow(value, half)

    if half == kind:
        return one

    def both(*arguments: Array) -> Array:
        pairs = [unpack(x, half) for x in arguments]
        return pack(one(*(p[0] for p in pairs)), one(*(p[1] for p in pairs)))

    return both


def _flush16(x: Array) -> Array:
    return np.where(np.abs(x) < 2.0**-14, np.copysign(x.dtype.type(0), x), x)


def _fma(a: Array, b: Array, c: Array) -> Array:
    a, b, c = (np.atleast_1d(np.asarray(x, np.float64)) for x in (a, b, c))
    return round_to_odd_sum(
        a * b, np.broadcast_to(c, np.broadcast_shapes(a.shape, b.shape, c.shape))
    )


@instruction(rf"(add|sub|mul)(\.rn)?(?P<ftz>\.ftz)?(?P<sat>\.sat)?\.{_TYPE}")
@instruction(rf"(fma)\.rn(?P<ftz>\.ftz)?(?P<sat>\.sat)?(?P<relu>\.relu)?\.{_TYPE}")
def _arithmetic(code: Compiler, ins: Instruction, match: Match) -> Step:
    kind = match["type"]
    if kind[0] == "b" and (match["ftz"] or match["sat"]):
        raise NotModelled(ins.opcode)
    plain = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _fma}[match[1]]
    relu = "relu" in match.groupdict() and match["relu"]

    def function(*arguments: Array) -> Array:
        value = plain(*arguments)
        if match["sat"]:
            value = saturate(value)
        return np.where(np.isnan(value), value, np.maximum(value, 0)) if relu else value

    dtype = DTYPES[kind]
    target, *sources = ins.operands
    return code.compute(
        _lift(function, kind, bool(match["ftz"])), target, dtype, *((o, dtype) for o in sources)
    )


@instruction(rf"(min|max)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?\.{_TYPE}")
def _min_max(code: Compiler, ins: Instruction, match: Match) -> Step:
    kind = match["type"]
    if kind[0] == "b" and match["ftz"]:
        raise NotModelled(ins.opcode)
    dtype = DTYPES[kind]
    target, a, b = ins.operands
    function = _lift(extremum(match[1], bool(match["nan"])), kind, bool(match["ftz"]))
    return code.compute(function, target, dtype, (a, dtype), (b, dtype))


@instruction(rf"(neg|abs)(?P<ftz>\.ftz)?\.{_TYPE}")
def _sign(code: Compiler, ins: Instruction, match: Match) -> Step:
    """The sign bits only, whatever the rest."""
    kind = match["type"]
    if match["ftz"]:
        raise NotModelled(ins.opcode)
    dtype = np.uint32 if kind.endswith("x2") else np.uint16
    bits = dtype(0x80008000 if kind.endswith("x2") else 0x8000)

    def function(x: Array) -> Array:
        return x ^ bits if match[1] == "neg" else x & ~bits

    return code.compute(function, ins.operands[0], dtype, (ins.operands[1], dtype))


@instruction(r"(ex2|tanh)\.approx(?P<ftz>\.ftz)?\.(?P<type>f16|f16x2|bf16|bf16x2)")
def _function(code: Compiler, ins: Instruction, match: Match) -> Step:
    """Errors: 2^-9.9 for f16 ex2, 2^-10.987 for f16 tanh, 2^-7 and 2^-8 for bf16 (manual 9.7.4)."""
    kind = match["type"]
    exact = {"ex2": np.exp2, "tanh": np.tanh}[match[1]]
    errors = {"ex2": (2.0**-9.9, 2.0**-7), "tanh": (2.0**-10.987, 2.0**-8)}[match[1]]
    # The rounding to the narrow type is part of the documented error.
    error = max(errors[kind[0] == "b"] - (2.0**-9 if kind[0] == "b" else 2.0**-12), 0)
    dtype = DTYPES[kind]
    return code.compute(
        _lift(approximate(exact, error), kind, bool(match["ftz"]) and kind[0] == "f"),
        ins.operands[0], dtype, (ins.operands[1], dtype),
    )  # fmt: skip
