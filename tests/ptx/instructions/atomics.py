# SPDX-License-Identifier: Apache-2.0
"""Atomics and reductions in memory (PTX manual 9.7.13). Lanes go in their order, one by one."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.compiler import Compiler, Step, instruction
from ptx.faults import NotModelled
from ptx.instructions.memory import addresses_of, check_aligned, place
from ptx.parser import Instruction, Name
from ptx.values import DTYPES, flush, narrow, pack, unpack, widen

if TYPE_CHECKING:
    from ptx.memory import Region
    from ptx.warps import Warps

Array = np.ndarray[Any, Any]
Match = re.Match[str]

_ORDER = r"(\.(relaxed|acquire|release|acq_rel))?(\.(cta|cluster|gpu|sys))?"
_SPACE = r"(\.(?P<space>global|shared(::cta)?))?"

_OPERATIONS: dict[str, Any] = {
    "add": lambda old, b: old + b,
    "min": lambda old, b: np.minimum(old, b),
    "max": lambda old, b: np.maximum(old, b),
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "exch": lambda old, b: np.broadcast_to(b, old.shape),
    "inc": lambda old, b: np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - old.dtype.type(1)),
    "cas": lambda old, b, c: np.where(old == b, c, old),
}
_TYPES = {
    "add": "u32 s32 u64 f32 f64 f16 bf16 f16x2 bf16x2",
    "min": "u32 s32 u64 s64", "max": "u32 s32 u64 s64",
    "and": "b32 b64", "or": "b32 b64", "xor": "b32 b64", "exch": "b32 b64 b16",
    "inc": "u32", "dec": "u32", "cas": "b16 b32 b64",
}  # fmt: skip


def _half_add(kind: str) -> Any:
    half = kind.removesuffix("x2")

    def one(old: Array, b: Array) -> Array:
        return narrow(widen(old, half) + widen(b, half), half)

    if half == kind:
        return one

    def both(old: Array, b: Array) -> Array:
        (a, c), (d, e) = unpack(old, half), unpack(b, half)
        return pack(one(a, d), one(c, e))

    return both


def _flushed_add(old: Array, b: Array) -> Array:
    """Of float32 in global memory, where subnormal numbers count as zeros."""
    return flush(flush(old) + flush(b))


@instruction(rf"(atom|red){_ORDER}{_SPACE}\.(?P<op>add|min|max|and|or|xor|exch|inc|dec|cas)"
             r"(?P<noftz>\.noftz)?"
             r"\.(?P<type>[usb](16|32|64)|f16|bf16|f16x2|bf16x2|f32|f64)")  # fmt: skip
def _atomic(code: Compiler, ins: Instruction, match: Match) -> Step:
    name, kind = match["op"], match["type"]
    narrow_float = kind in ("f16", "bf16", "f16x2", "bf16x2")
    if kind not in _TYPES[name].split() or bool(match["noftz"]) != narrow_float:
        raise NotModelled(ins.opcode)
    dtype = DTYPES[kind]
    operation = _half_add(kind) if narrow_float else _OPERATIONS[name]
    outside = _flushed_add if (name, kind) == ("add", "f32") else operation
    space = (match["space"] or "").split("::")[0]
    operands = list(ins.operands)
    target: int | None = None
    if match[1] == "atom":
        destination = operands.pop(0)
        if not (isinstance(destination, Name) and destination.name == "_"):
            target = code.target(destination, dtype)
    elif name in ("exch", "cas"):
        raise NotModelled(ins.opcode)
    find = addresses_of(code, operands[0])
    slots = [code.source(o, dtype) for o in operands[1:]]
    width = np.dtype(dtype).itemsize

    def step(w: "Warps") -> None:
        lanes = w.lanes
        addresses = find(w)
        check_aligned(addresses, width, lanes, "atomic")
        for region, offsets, which in place(w, space, addresses, lanes, width, "atomic"):
            here = lanes[which]
            region.check(offsets, width, w.stamps[here], here, "atomic")
            values = [np.broadcast_to(w.registers[s], w.count)[here] for s in slots]
            function = operation if region is w.shared else outside
            old = _one_by_one(region, offsets, function, values, dtype)
            if target is not None:
                w.registers[target][here] = old

    return step


def _one_by_one(
    region: "Region", offsets: Array, operation: Any, values: list[Array], dtype: Any
) -> Array:
    """Applies an operation lane by lane: in each round the first left of every address."""
    memory = region.typed(dtype)
    index = offsets // memory.itemsize
    old = np.empty(len(index), dtype)
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    start = np.maximum.accumulate(np.where(first, np.arange(len(index)), 0))
    rank = np.arange(len(index)) - start
    for turn in range(int(rank.max()) + 1 if len(rank) else 0):
        now = order[rank == turn]
        before = memory[index[now]]
        old[now] = before
        memory[index[now]] = operation(before, *(v[now] for v in values))
    return old
