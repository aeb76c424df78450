# SPDX-License-Identifier: Apache-2.0
"""Moves between registers, and addresses (PTX manual 9.7.9)."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.compiler import Compiler, Step, instruction
from ptx.faults import NotModelled
from ptx.memory import GENERIC_LOCAL, GENERIC_SHARED
from ptx.parser import Instruction, Name, Vector
from ptx.values import DTYPES

if TYPE_CHECKING:
    from ptx.warps import Warps

Array = np.ndarray[Any, Any]
Match = re.Match[str]


@instruction(r"(mov)\.(?P<type>pred|[usb](16|32|64)|f16|f32|f64)")
def _mov(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    target, source = ins.operands
    if isinstance(target, Vector):
        return _split(code, target, source, dtype)
    if isinstance(source, Vector):
        return _join(code, target, source, dtype)
    if isinstance(source, Name) and source.name in code.function.tables:
        raise NotModelled("the address of a branch table")
    return code.compute(np.positive if dtype is not np.bool_ else _same, target, dtype,
                        (source, dtype))  # fmt: skip


def _same(x: Array) -> Array:
    return x


def _split(code: Compiler, target: Vector, source: Any, dtype: Any) -> Step:
    part = np.dtype(f"u{np.dtype(dtype).itemsize // len(target.items)}").type
    slots = [code.target(item, part) for item in target.items]
    whole = np.dtype(f"u{np.dtype(dtype).itemsize}").type
    value = code.source(source, whole)

    def step(w: "Warps") -> None:
        x = np.array(w.registers[value])  # a copy: the target may be the source
        pieces = x.reshape(-1, 1).view(part)
        for i, slot in enumerate(slots):
            if slot is None:
                continue
            if w.mask is None:
                w.registers[slot][...] = pieces[:, i]
            else:
                np.copyto(w.registers[slot], pieces[:, i], where=w.mask)

    return step


def _join(code: Compiler, target: Any, source: Vector, dtype: Any) -> Step:
    whole = np.dtype(f"u{np.dtype(dtype).itemsize}").type
    part = np.dtype(f"u{np.dtype(dtype).itemsize // len(source.items)}").type
    if code.width(target) != np.dtype(whole).itemsize:
        raise NotModelled("a register of another width")
    to = code.target(target, whole)
    assert to is not None
    slots = [code.source(item, part) for item in source.items]

    def step(w: "Warps") -> None:
        r = w.registers
        pieces = r[to].view(part).reshape(w.count, -1)  # none of the sources, which are narrower
        for i, slot in enumerate(slots):
            if w.mask is None:
                pieces[:, i] = r[slot]
            else:
                np.copyto(pieces[:, i], r[slot], where=w.mask)

    return step


@instruction(r"(cvta)(?P<to>\.to)?\.(?P<space>global|shared(::cta)?|local|const)\.u64")
def _cvta(code: Compiler, ins: Instruction, match: Match) -> Step:
    window = {"s": GENERIC_SHARED, "l": GENERIC_LOCAL}.get(match["space"][0], 0)
    offset = np.uint64(window)
    target, source = ins.operands
    if not window:
        return code.compute(np.positive, target, np.uint64, (source, np.uint64))
    if match["to"]:
        return code.compute(lambda x: x - offset, target, np.uint64, (source, np.uint64))
    return code.compute(lambda x: x + offset, target, np.uint64, (source, np.uint64))


@instruction(r"(isspacep)\.(?P<space>global|shared(::cta)?|local|const)")
def _isspacep(code: Compiler, ins: Instruction, match: Match) -> Step:
    space = match["space"].split("::")[0]

    def function(x: Array) -> Array:
        shared = (x >= GENERIC_SHARED) & (x < GENERIC_LOCAL)
        local = x >= GENERIC_LOCAL
        return {"shared": shared, "local": local}.get(space, ~(shared | local))

    if space == "const":
        raise NotModelled("isspacep.const")
    return code.compute(function, ins.operands[0], np.bool_, (ins.operands[1], np.uint64))
