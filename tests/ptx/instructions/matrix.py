# SPDX-License-Identifier: Apache-2.0
"""ldmatrix, stmatrix, movmatrix and mma.sync (PTX manual 9.7.14).

Fragments are as the figures of the manual have them: lane = 4 group + t holds of A the rows group
and group + 8, of B the column group, of C and D the columns 2 t and 2 t + 1. Products are exact and
are summed in float64; PTX leaves the rounding of the float32 result open, and tensor cores are
known to truncate (Fasi et al. 2021), so it is truncated here.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.compiler import Compiler, Control, instruction
from ptx.faults import NotModelled
from ptx.instructions.floating import round32
from ptx.instructions.memory import addresses_of, check_aligned, place
from ptx.parser import Instruction, Operand, Vector
from ptx.values import bf16_to_float
from ptx.warps import WARP

if TYPE_CHECKING:
    from ptx.warps import Warps

Array = np.ndarray[Any, Any]
Match = re.Match[str]

ALL_LANES = 0xFFFFFFFF


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


@instruction(r"(ldmatrix)\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?"
             r"\.shared(::cta)?\.b16")  # fmt: skip
def _ldmatrix(code: Compiler, ins: Instruction, match: Match) -> Control:
    """Lane 8 i + r gives the address of row r of matrix i."""
    count, trans = int(match["count"]), bool(match["trans"])
    target, source = ins.operands
    slots = [code.target(item, np.uint32) for item in _items(target)]
    if len(slots) != count:
        raise NotModelled("another number of registers")
    find = addresses_of(code, source)

    def step(w: "Warps") -> None:
        lanes = w.lanes
        used = (w.lane[lanes] < 8 * count).nonzero()[0]
        addresses, here = find(w)[used], lanes[used]
        check_aligned(addresses, 16, here, "read")
        rows = np.empty((len(here), 8), np.uint16)
        for region, offsets, which in place(w, "shared", addresses, here, 16, "read"):
            part = here[which]
            region.check(offsets, 16, w.stamps[part], part, "read")
            rows[which] = np.stack(region.load(offsets, np.uint16, 8), 1)
        tiles = rows.reshape(-1, count, 8, 8)
        if trans:
            tiles = tiles.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(tiles).view(np.uint32).reshape(-1, count, WARP)
        for i, slot in enumerate(slots):
            if slot is not None:
                w.registers[slot][lanes] = words[:, i].reshape(-1)

    return Control("warp", step=step, index=code.constant(ALL_LANES, np.uint32))


@instruction(r"(stmatrix)\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?"
             r"\.shared(::cta)?\.b16")  # fmt: skip
def _stmatrix(code: Compiler, ins: Instruction, match: Match) -> Control:
    count, trans = int(match["count"]), bool(match["trans"])
    target, source = ins.operands
    slots = [code.source(item, np.uint32) for item in _items(source)]
    find = addresses_of(code, target)

    def step(w: "Warps") -> None:
        lanes = w.lanes
        used = (w.lane[lanes] < 8 * count).nonzero()[0]
        addresses, here = find(w)[used], lanes[used]
        check_aligned(addresses, 16, here, "write")
        words = np.stack([w.registers[s][lanes].reshape(-1, WARP) for s in slots], 1)
        tiles = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        if trans:
            tiles = tiles.transpose(0, 1, 3, 2)
        rows = np.ascontiguousarray(tiles).reshape(-1, 8)
        for region, offsets, which in place(w, "shared", addresses, here, 16, "write"):
            part = here[which]
            region.check(offsets, 16, w.stamps[part], part, "write")
            region.store(offsets, [rows[which, j] for j in range(8)], np.uint16)

    return Control("warp", step=step, index=code.constant(ALL_LANES, np.uint32))


@instruction(r"(movmatrix)\.sync\.aligned\.m8n8\.trans\.b16")
def _movmatrix(code: Compiler, ins: Instruction, match: Match) -> Control:
    to, source = code.target(ins.operands[0], np.uint32), code.source(ins.operands[1], np.uint32)

    def step(w: "Warps") -> None:
        lanes = w.lanes
        tiles = np.ascontiguousarray(w.registers[source][lanes]).view(np.uint16).reshape(-1, 8, 8)
        turned = np.ascontiguousarray(tiles.transpose(0, 2, 1)).view(np.uint32)
        if to is not None:
            w.registers[to][lanes] = turned.reshape(-1)

    return Control("warp", step=step, index=code.constant(ALL_LANES, np.uint32))


# Elements of a 32-bit register for each type, and how they become numbers.
_ELEMENTS: dict[str, tuple[int, Any]] = {
    "bf16": (2, lambda r: bf16_to_float(r.view(np.uint16)).astype(np.float64)),
    "f16": (2, lambda r: r.view(np.float16).astype(np.float64)),
    "tf32": (1, lambda r: (r & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)),
    "s8": (4, lambda r: r.view(np.int8).astype(np.int64)),
    "u8": (4, lambda r: r.view(np.uint8).astype(np.int64)),
}
# Depths that PTX knows for each type.
_DEPTHS = {"bf16": (8, 16), "f16": (8, 16), "tf32": (4, 8), "s8": (16, 32), "u8": (16, 32)}


@instruction(r"(mma)\.sync\.aligned\.m16n8k(?P<k>4|8|16|32)\.row\.col(?P<satfinite>\.satfinite)?"
             r"\.(?P<d>f32|f16|s32)\.(?P<a>bf16|f16|tf32|s8|u8)\.(?P<b>bf16|f16|tf32|s8|u8)"
             r"\.(?P<c>f32|f16|s32)")  # fmt: skip
def _mma(code: Compiler, ins: Instruction, match: Match) -> Control:
    k, a_kind, b_kind, result = int(match["k"]), match["a"], match["b"], match["d"]
    integers = a_kind in ("s8", "u8")
    if (
        k not in _DEPTHS[a_kind]
        or match["c"] != result
        or integers != (result == "s32")
        or (b_kind != a_kind and not (integers and b_kind in ("s8", "u8")))
        or (result == "f16" and a_kind != "f16")
        or (match["satfinite"] and not integers)
    ):
        raise NotModelled(ins.opcode)
    per, _ = _ELEMENTS[a_kind]
    d, a, b, c = (_items(operand) for operand in ins.operands)
    pairs = result == "f16"
    if (len(a), len(b)) != (2 * k // per // 4, k // per // 4) or {len(c), len(d)} != {
        2 if pairs else 4
    }:
        raise NotModelled("another number of registers")
    slots = {
        name: [code.source(o, np.uint32) for o in items]
        for name, items in (("a", a), ("b", b), ("c", c))
    }
    targets = [code.target(o, np.uint32) for o in d]

    def fetch(w: "Warps", name: str) -> Array:
        """[warp, register, lane]"""
        result = np.empty((w.number // WARP, len(slots[name]), WARP), np.uint32)
        for i, slot in enumerate(slots[name]):
            value = w.registers[slot]
            result[:, i] = value[w.chosen].reshape(-1, WARP) if value.ndim else value
        return result

    def step(w: "Warps") -> None:
        left = _left(_ELEMENTS[a_kind][1], fetch(w, "a"), per)
        right = _right(_ELEMENTS[b_kind][1], fetch(w, "b"), per)
        before = fetch(w, "c")
        product = left @ right
        if result == "s32":
            total = product + _unfold(before.view(np.int32)).astype(np.int64)
            if match["satfinite"]:
                total = np.clip(total, -(2**31), 2**31 - 1)
            out = _fold(total.astype(np.int32)).view(np.uint32)
        elif result == "f32":
            total = product + _unfold(before.view(np.float32)).astype(np.float64)
            out = _fold(round32(total, ".rz")).view(np.uint32)
        else:
            halves = before.view(np.float16).reshape(-1, 2, WARP, 2).transpose(0, 1, 3, 2)
            addend = _unfold(np.ascontiguousarray(halves).reshape(-1, 4, WARP))
            rounded = _fold((product + addend.astype(np.float64)).astype(np.float16))
            folded = rounded.reshape(-1, 2, 2, WARP).transpose(0, 1, 3, 2)
            out = np.ascontiguousarray(folded).view(np.uint32)[..., 0]
        for i, slot in enumerate(targets):
            if slot is not None:
                w.registers[slot][w.chosen] = out[:, i].reshape(-1)

    return Control("warp", step=step, index=code.constant(ALL_LANES, np.uint32))


def _left(number: Any, registers: Array, per: int) -> Array:
    """A `[warp, 16, k]`: register 2 j + i holds rows 8 i + group, columns from 4 per j + per t."""
    values = number(np.ascontiguousarray(registers)).reshape(
        registers.shape[0], -1, 2, 8, 4, per
    )  # [warp, j, i, group, t, element]
    return values.transpose(0, 2, 3, 1, 4, 5).reshape(registers.shape[0], 16, -1)


def _right(number: Any, registers: Array, per: int) -> Array:
    """B `[warp, k, 8]`: register j holds column group, rows from 4 per j + per t."""
    values = number(np.ascontiguousarray(registers)).reshape(
        registers.shape[0], -1, 8, 4, per
    )  # [warp, j, group, t, element]
    return values.transpose(0, 1, 3, 4, 2).reshape(registers.shape[0], -1, 8)


def _unfold(registers: Array) -> Array:
    """C `[warp, 16, 8]`: register 2 i + e holds row 8 i + group, column 2 t + e."""
    values = registers.reshape(-1, 2, 2, 8, 4)  # [warp, i, e, group, t]
    return values.transpose(0, 1, 3, 4, 2).reshape(-1, 16, 8)


def _fold(matrix: Array) -> Array:
    values = matrix.reshape(-1, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3)
    return np.ascontiguousarray(values).reshape(-1, 4, WARP)
