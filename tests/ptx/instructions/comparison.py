# SPDX-License-Identifier: Apache-2.0
"""Comparison and selection (PTX manual 9.7.6)."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.compiler import Compiler, Step, instruction
from ptx.faults import NotModelled
from ptx.instructions.integer import pair
from ptx.parser import Instruction
from ptx.values import DTYPES, flush, unpack, widen

if TYPE_CHECKING:
    from ptx.warps import Warps

Array = np.ndarray[Any, Any]
Match = re.Match[str]

_RELATIONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_COMPARISON = r"(?P<relation>eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan)"
_TYPE = r"(?P<type>[us](16|32|64)|b(16|32|64)|f16|bf16|f32|f64)"


def _compare(relation: str, kind: str, ftz: bool) -> Any:
    """The relation as a function of two arrays; float forms that end in u hold for NaN."""
    floating = kind in ("f16", "bf16", "f32", "f64")
    if relation in _UNSIGNED:
        if kind[0] != "u":
            raise NotModelled(f"{relation} of {kind}")
        relation = _UNSIGNED[relation]
    if kind[0] == "b" and kind != "bf16" and relation not in ("eq", "ne"):
        raise NotModelled(f"{relation} of {kind}")
    if not floating:
        if relation not in _RELATIONS:
            raise NotModelled(f"{relation} of {kind}")
        return _RELATIONS[relation]

    def prepare(x: Array) -> Array:
        x = widen(x, kind) if kind in ("f16", "bf16") else np.asarray(x)
        return flush(x) if ftz else x

    if relation in ("num", "nan"):

        def function(a: Array, b: Array) -> Array:
            unordered = np.isnan(prepare(a)) | np.isnan(prepare(b))
            return unordered if relation == "nan" else ~unordered

    elif relation.endswith("u"):
        plain = _RELATIONS[relation[:-1]]

        def function(a: Array, b: Array) -> Array:
            a, b = prepare(a), prepare(b)
            return plain(a, b) | np.isnan(a) | np.isnan(b)

    elif relation == "ne":

        def function(a: Array, b: Array) -> Array:
            a, b = prepare(a), prepare(b)
            return (a != b) & ~np.isnan(a) & ~np.isnan(b)

    else:
        plain = _RELATIONS[relation]
        if not ftz and kind in ("f32", "f64"):
            return plain

        def function(a: Array, b: Array) -> Array:
            return plain(prepare(a), prepare(b))

    return function


@instruction(rf"(setp)\.{_COMPARISON}(\.(?P<join>and|or|xor))?(?P<ftz>\.ftz)?\.{_TYPE}")
def _setp(code: Compiler, ins: Instruction, match: Match) -> Step:
    kind = match["type"]
    compare = _compare(match["relation"], kind, bool(match["ftz"]))
    dtype = DTYPES[kind]
    first, second = pair(ins.operands[0])
    a, b, *rest = ins.operands[1:]
    if not match["join"] and second is None:
        return code.compute(compare, first, np.bool_, (a, dtype), (b, dtype))
    slots = code.source(a, dtype), code.source(b, dtype)
    joined = code.predicate(rest[0]) if match["join"] else None
    join = _JOINS.get(match["join"] or "")
    to = code.target(first, np.bool_)
    other = code.target(second, np.bool_) if second else None

    def step(w: "Warps") -> None:
        r = w.registers
        holds = compare(r[slots[0]], r[slots[1]])
        fails = np.logical_not(holds)
        if joined is not None and join is not None:
            with_this = ~r[joined[0]] if joined[1] else r[joined[0]]
            holds, fails = join(holds, with_this), join(fails, with_this)
        keep = w.active
        if to is not None:
            np.copyto(r[to], holds, where=keep)
        if other is not None:
            np.copyto(r[other], fails, where=keep)

    return step


@instruction(
    r"(setp)\.(?P<relation>eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)"
    r"(?P<ftz>\.ftz)?\.(?P<type>f16x2|bf16x2)"
)
def _setp_pair(code: Compiler, ins: Instruction, match: Match) -> Step:
    kind = match["type"][:-2]
    compare = _compare(match["relation"], kind, False)
    first, second = pair(ins.operands[0])
    if second is None:
        raise NotModelled("a comparison of pairs with one result")
    slots = [code.source(o, np.uint32) for o in ins.operands[1:]]
    targets = code.target(first, np.bool_), code.target(second, np.bool_)

    def step(w: "Warps") -> None:
        halves = [unpack(w.registers[slot], kind) for slot in slots]
        for half, to in enumerate(targets):
            if to is not None:
                holds = compare(halves[0][half], halves[1][half])
                np.copyto(w.registers[to], holds, where=w.active)

    return step


@instruction(rf"(set)\.{_COMPARISON}(?P<ftz>\.ftz)?\.(?P<result>u32|s32|f32)\.{_TYPE}")
def _set(code: Compiler, ins: Instruction, match: Match) -> Step:
    compare = _compare(match["relation"], match["type"], bool(match["ftz"]))
    dtype, result = DTYPES[match["type"]], DTYPES[match["result"]]
    yes = result(1) if result is np.float32 else np.array([0xFFFFFFFF], np.uint32).view(result)[0]
    target, a, b = ins.operands
    return code.compute(
        lambda x, y: np.where(compare(x, y), yes, result(0)), target, result, (a, dtype), (b, dtype)
    )


@instruction(
    r"(set)\.(?P<relation>eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)(?P<ftz>\.ftz)?"
    r"\.(?P<result>f16x2|bf16x2|u32)\.(?P<type>f16x2|bf16x2)"
)
def _set_pair(code: Compiler, ins: Instruction, match: Match) -> Step:
    kind = match["type"][:-2]
    compare = _compare(match["relation"], kind, False)
    yes = {"f16x2": 0x3C00, "bf16x2": 0x3F80, "u32": 0xFFFF}[match["result"]]

    def function(x: Array, y: Array) -> Array:
        (a, b), (c, d) = unpack(x, kind), unpack(y, kind)
        low, high = compare(a, c), compare(b, d)
        return low * np.uint32(yes) | high * np.uint32(yes << 16)

    target, a, b = ins.operands
    return code.compute(function, target, np.uint32, (a, np.uint32), (b, np.uint32))


@instruction(r"(selp)\.(?P<type>[us](16|32|64)|b(16|32|64)|f16|f32|f64)")
def _selp(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    target, a, b, chosen = ins.operands
    slot, negated = code.predicate(chosen)
    slots = code.source(a, dtype), code.source(b, dtype)
    if negated:
        slots = slots[::-1]
    to = code.target(target, dtype)

    def step(w: "Warps") -> None:
        r = w.registers
        value = np.where(r[slot], r[slots[0]], r[slots[1]])
        if w.mask is None:
            r[to][...] = value
        else:
            np.copyto(r[to], value, where=w.mask)

    return step


@instruction(r"(slct)(?P<ftz>\.ftz)?\.(?P<type>[usb](16|32|64)|f32|f64)\.(?P<by>s32|f32)")
def _slct(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype, by = DTYPES[match["type"]], DTYPES[match["by"]]
    ftz = bool(match["ftz"])

    def function(a: Array, b: Array, c: Array) -> Array:
        return np.where((flush(c) if ftz else c) >= 0, a, b)

    target, a, b, c = ins.operands
    return code.compute(function, target, dtype, (a, dtype), (b, dtype), (c, by))
