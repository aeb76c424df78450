# SPDX-License-Identifier: Apache-2.0
"""cvt: between integers, floats of all widths, and pairs of halves (PTX manual 9.7.9.21)."""

import re
from typing import Any

import numpy as np

from ptx.compiler import Compiler, Step, instruction
from ptx.faults import NotModelled
from ptx.instructions.floating import round32
from ptx.parser import Instruction
from ptx.values import DTYPES, float_to_bf16, flush, nan_to_canonical, narrow, pack, saturate, widen

Array = np.ndarray[Any, Any]
Match = re.Match[str]

_INTEGER = r"[us](8|16|32|64)"
_FLOAT = r"f16|bf16|f32|f64"
_TO_INTEGER = {".rni": np.rint, ".rzi": np.trunc, ".rmi": np.floor, ".rpi": np.ceil}


@instruction(rf"(cvt)(?P<sat>\.sat)?\.(?P<to>{_INTEGER})\.(?P<from>[us](8|16|32|64))")
def _integers(code: Compiler, ins: Instruction, match: Match) -> Step:
    to, source = DTYPES[match["to"]], DTYPES[match["from"]]
    target, value = ins.operands

    def saturated(x: Array) -> Array:
        info, own = np.iinfo(to), np.iinfo(source)
        low, high = max(info.min, own.min), min(info.max, own.max)
        return np.clip(x, source(low), source(high)).astype(to)

    function = saturated if match["sat"] else lambda x: np.asarray(x).astype(to)
    return code.compute(function, target, to, (value, source))


@instruction(rf"(cvt)(?P<mode>\.r[nzmp]i)(?P<ftz>\.ftz)?(?P<sat>\.sat)?\.(?P<to>{_INTEGER})"
             rf"\.(?P<from>{_FLOAT})")  # fmt: skip
def _float_to_integer(code: Compiler, ins: Instruction, match: Match) -> Step:
    """Out of range gives the nearest integer; NaN gives 0, and 2^63 (of s64 -2^63) in 64 bits."""
    to, kind = DTYPES[match["to"]], match["from"]
    if match["ftz"] and kind != "f32":
        raise NotModelled(ins.opcode)
    info = np.iinfo(to)
    nan = 0 if info.bits < 64 else (1 << 63 if info.min == 0 else info.min)

    def function(x: Array) -> Array:
        x = np.atleast_1d(widen(x, kind) if kind in ("f16", "bf16") else x)
        if match["ftz"]:
            x = flush(x)
        whole = _TO_INTEGER[match["mode"]](x.astype(np.float64))
        missing = np.isnan(whole)
        low, high = whole <= float(info.min), whole >= float(info.max)
        inside = np.where(missing | low | high, 0, whole).astype(to)
        result = np.where(low, to(info.min), np.where(high, to(info.max), inside))
        return np.where(missing, to(nan), result)

    dtype = DTYPES[kind]
    return code.compute(function, ins.operands[0], to, (ins.operands[1], dtype))


@instruction(rf"(cvt)(?P<mode>\.r[nzmp])(?P<sat>\.sat)?\.(?P<to>{_FLOAT})\.(?P<from>{_INTEGER})")
def _integer_to_float(code: Compiler, ins: Instruction, match: Match) -> Step:
    source, kind, mode = DTYPES[match["from"]], match["to"], match["mode"]
    wide = np.dtype(source).itemsize == 8

    def function(x: Array) -> Array:
        x = np.atleast_1d(x)
        if kind == "f64":
            if mode != ".rn" and wide:
                raise NotModelled(ins.opcode)
            value: Array = x.astype(np.float64)
        elif kind == "f32" and mode == ".rn":
            value = x.astype(np.float32)
        else:
            exact = _odd64(x) if wide else x.astype(np.float64)
            if kind == "f32":
                value = round32(exact, mode)
            elif mode == ".rn":
                value = narrow(exact, kind)
            else:
                raise NotModelled(ins.opcode)
        return saturate(value) if match["sat"] else value

    if match["sat"] and kind == "bf16":
        raise NotModelled(ins.opcode)
    return code.compute(function, ins.operands[0], DTYPES[kind], (ins.operands[1], source))


def _odd64(x: Array) -> Array:
    """float64 from integers of 64 bits, rounded to odd."""
    near = x.astype(np.float64)
    inexact = np.array([int(a) != int(b) for a, b in zip(near, x, strict=True)], bool)
    away = np.array([abs(int(a)) > abs(int(b)) for a, b in zip(near, x, strict=True)], bool)
    bits = near.view(np.int64)
    even = (bits & 1) == 0
    fixed = np.where(inexact & even, np.where(away, bits - 1, bits + 1), bits)
    return fixed.view(np.float64)


@instruction(rf"(cvt)(?P<mode>\.r[nzmp]i?|)(?P<ftz>\.ftz)?(?P<sat>\.sat)?(?P<relu>\.relu)?"
             rf"\.(?P<to>{_FLOAT})\.(?P<from>{_FLOAT})")  # fmt: skip
def _floats(code: Compiler, ins: Instruction, match: Match) -> Step:
    to, source, mode = match["to"], match["from"], match["mode"]
    sizes = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}
    integral = mode.endswith("i")
    narrows = sizes[to] < sizes[source]
    if narrows and mode not in (".rn", ".rz", ".rm", ".rp"):
        raise NotModelled(ins.opcode)
    if to in ("f16", "bf16") and narrows and mode not in (".rn", ".rz"):
        raise NotModelled(ins.opcode)
    if {to, source} == {"f16", "bf16"} or (integral and to != source):
        raise NotModelled(ins.opcode)
    if match["sat"] and to == "bf16":
        raise NotModelled(ins.opcode)

    def function(x: Array) -> Array:
        x = np.atleast_1d(x)
        if source in ("f16", "bf16"):
            x = widen(x, source)
        if match["ftz"] and source == "f32":
            x = flush(x)
        if integral:
            x = _TO_INTEGER[mode](x)
        if match["relu"]:
            x = np.where(np.isnan(x), x, np.maximum(x, 0))
        if match["sat"]:
            x = saturate(x)
        if to == "f64":
            return x.astype(np.float64)
        if to == "f32":
            if source == "f64":
                x = round32(x, mode)
            x = nan_to_canonical(x.astype(np.float32)) if source in ("f16", "bf16", "f64") else x
            return flush(x) if match["ftz"] else x
        if mode == ".rz":
            return float_to_bf16(x, "rz") if to == "bf16" else _toward_zero16(x)
        return narrow(x, to)

    dtype = DTYPES[source]
    return code.compute(function, ins.operands[0], DTYPES[to], (ins.operands[1], dtype))


def _toward_zero16(x: Array) -> Array:
    near = x.astype(np.float16)
    away = np.abs(near.astype(np.float64)) > np.abs(x.astype(np.float64))
    return np.where(away, np.nextafter(near, np.float16(0)), near)


@instruction(r"(cvt)\.(?P<mode>rn|rz)(?P<relu>\.relu)?\.(?P<to>f16x2|bf16x2)\.f32")
def _pairs(code: Compiler, ins: Instruction, match: Match) -> Step:
    """The first source becomes the upper half."""
    half = match["to"][:-2]

    def one(x: Array) -> Array:
        x = np.atleast_1d(x)
        if match["relu"]:
            x = np.where(np.isnan(x), x, np.maximum(x, np.float32(0)))
        if match["mode"] == "rz":
            return float_to_bf16(x, "rz") if half == "bf16" else _toward_zero16(x)
        return narrow(x, half)

    target, high, low = ins.operands
    return code.compute(
        lambda a, b: pack(*np.broadcast_arrays(one(b), one(a))), target, np.uint32,
        (high, np.float32), (low, np.float32),
    )  # fmt: skip


@instruction(r"(cvt)\.(?P<mode>rna|rn|rz)\.tf32\.f32")
def _tf32(code: Compiler, ins: Instruction, match: Match) -> Step:
    """10 bits of fraction; `rna` rounds ties away from zero."""

    def function(x: Array) -> Array:
        bits = np.atleast_1d(x).view(np.uint32)
        if match["mode"] == "rna":
            rounded = bits + np.uint32(0x1000)
        elif match["mode"] == "rn":
            rounded = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        else:
            rounded = bits
        finite = (bits & np.uint32(0x7F800000)) != 0x7F800000
        return np.where(finite, rounded & np.uint32(0xFFFFE000), bits)

    return code.compute(function, ins.operands[0], np.uint32, (ins.operands[1], np.float32))
