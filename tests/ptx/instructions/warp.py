# SPDX-License-Identifier: Apache-2.0
"""Instructions of a warp: shuffles, votes, matches, reductions (PTX manual 9.7.9.6, 9.7.13).

Each carries a mask of the lanes that take part. The scheduler waits until those have come, and
reports a mask that names lanes which never do; a step here sees complete warps only.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.compiler import Compiler, Control, Step, instruction
from ptx.faults import Violation
from ptx.instructions.integer import pair
from ptx.parser import Instruction
from ptx.values import DTYPES
from ptx.warps import WARP, warp_words

if TYPE_CHECKING:
    from ptx.warps import Warps

Array = np.ndarray[Any, Any]
Match = re.Match[str]


def _sources(mode: str, lane: Array, offset: Array, limit: Array) -> tuple[Array, Array]:
    """From which lane each lane reads, and whether that is within its segment."""
    offset = offset & 31
    segment, clamp = (limit >> 8) & 31, limit & 31
    last = (lane & segment) | (clamp & ~segment)
    if mode == "up":
        source = lane - offset
        valid = source >= last
    elif mode == "idx":
        source = (lane & segment) | (offset & ~segment)
        valid = source <= last
    else:
        source = lane + offset if mode == "down" else lane ^ offset
        valid = source <= last
    return np.where(valid, source, lane), valid


@instruction(r"(shfl)\.sync\.(?P<mode>up|down|bfly|idx)\.b32")
def _shuffle(code: Compiler, ins: Instruction, match: Match) -> Control:
    first, second = pair(ins.operands[0])
    a, b, c, mask = ins.operands[1:]
    slots = [code.source(o, np.uint32) for o in (a, b, c)]
    to = code.target(first, np.uint32)
    flag = code.target(second, np.bool_) if second else None
    mode = match["mode"]

    constants = [code.slots[slot] for slot in slots[1:]]
    table = None
    if all(kind == "constant" for kind, _, _ in constants):
        table = _sources(mode, np.arange(WARP), *(np.int64(value) for _, value, _ in constants))

    tables: dict[int, tuple[Array, Array]] = {}  # by the number of lanes

    def step(w: "Warps") -> None:
        r = w.registers
        value = np.broadcast_to(r[slots[0]], w.count)
        if table is not None and w.whole:
            if w.count not in tables:
                first = np.repeat(np.arange(0, w.count, WARP), WARP)
                source, valid = (np.tile(column, w.count // WARP) for column in table)
                tables[w.count] = first + source, valid
            where, valid = tables[w.count]
            for slot, result in ((to, value[where]), (flag, valid)):
                if slot is None:
                    continue
                if w.mask is None:
                    r[slot][...] = result
                else:
                    np.copyto(r[slot], result, where=w.mask)
            return
        lanes = w.lanes
        lane = w.lane[lanes].astype(np.int64)
        offset, limit = (np.broadcast_to(r[s], w.count)[lanes].astype(np.int64) for s in slots[1:])
        source, valid = _sources(mode, lane, offset, limit)
        where = lanes - lane + source
        missing = ~w.active[where]
        if missing.any():
            at = int(missing.argmax())
            raise Violation(
                "warp mask",
                f"shuffle from lane {int(source[at])}, which does not take part",
                int(lanes[at]),
            )
        result = value[where]
        if to is not None:
            r[to][lanes] = result
        if flag is not None:
            r[flag][lanes] = valid

    return Control("warp", step=step, index=code.source(mask, np.uint32))


def _bits(w: "Warps", chosen: Array) -> Array:
    """For every lane, the bits of its warp where `chosen` holds in an active lane."""
    return warp_words(chosen & w.active)


@instruction(r"(vote)\.sync\.(?P<mode>all|any|uni)\.pred")
@instruction(r"(vote)\.sync\.(?P<mode>ballot)\.b32")
def _vote(code: Compiler, ins: Instruction, match: Match) -> Control:
    target, chosen, mask = ins.operands
    slot, negated = code.predicate(chosen)
    mode = match["mode"]
    to = code.target(target, np.uint32 if mode == "ballot" else np.bool_)

    def step(w: "Warps") -> None:
        value = w.registers[slot]
        value = np.broadcast_to(~value if negated else value, w.count)
        yes, all_lanes = _bits(w, value), _bits(w, w.active)
        result = {
            "ballot": yes, "any": yes != 0, "all": yes == all_lanes,
            "uni": (yes == 0) | (yes == all_lanes),
        }[mode]  # fmt: skip
        if to is not None:
            np.copyto(w.registers[to], result, where=w.active)

    return Control("warp", step=step, index=code.source(mask, np.uint32))


@instruction(r"(activemask)\.b32")
def _activemask(code: Compiler, ins: Instruction, match: Match) -> Step:
    """The lanes that are here. Here, as on hardware, that may be fewer than a reader expects."""
    to = code.target(ins.operands[0], np.uint32)

    def step(w: "Warps") -> None:
        np.copyto(w.registers[to], _bits(w, w.active), where=w.active)

    return step


@instruction(r"(match)\.(?P<mode>any|all)\.sync\.b(?P<bits>32|64)")
def _match(code: Compiler, ins: Instruction, match: Match) -> Control:
    first, second = pair(ins.operands[0])
    value, mask = ins.operands[1:]
    slot = code.source(value, DTYPES[f"b{match['bits']}"])
    to = code.target(first, np.uint32)
    flag = code.target(second, np.bool_) if second else None
    all_alike = match["mode"] == "all"

    def step(w: "Warps") -> None:
        values = np.broadcast_to(w.registers[slot], w.count).reshape(-1, WARP)
        active = w.active.reshape(-1, WARP)
        alike = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
        words = alike @ (np.uint64(1) << np.arange(WARP, dtype=np.uint64))
        result = words.astype(np.uint32).reshape(-1)
        if all_alike:
            same = result == _bits(w, w.active)
            result = np.where(same, result, np.uint32(0))
            if flag is not None:
                np.copyto(w.registers[flag], same, where=w.active)
        if to is not None:
            np.copyto(w.registers[to], result, where=w.active)

    return Control("warp", step=step, index=code.source(mask, np.uint32))


@instruction(r"(redux)\.sync\.(?P<op>add|min|max)\.(?P<type>[us]32)")
@instruction(r"(redux)\.sync\.(?P<op>and|or|xor)\.(?P<type>b32)")
def _redux(code: Compiler, ins: Instruction, match: Match) -> Control:
    dtype = DTYPES[match["type"]]
    target, value, mask = ins.operands
    slot, to = code.source(value, dtype), code.target(target, dtype)
    info = np.iinfo(dtype)
    function, neutral = {
        "add": (np.add, 0), "min": (np.minimum, info.max), "max": (np.maximum, info.min),
        "and": (np.bitwise_and, info.max), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
    }[match["op"]]  # fmt: skip

    def step(w: "Warps") -> None:
        values = np.broadcast_to(w.registers[slot], w.count)
        chosen = np.where(w.active, values, dtype(neutral)).reshape(-1, WARP)
        total = function.reduce(chosen, axis=1, dtype=dtype)
        if to is not None:
            np.copyto(w.registers[to], np.repeat(total, WARP), where=w.active)

    return Control("warp", step=step, index=code.source(mask, np.uint32))


@instruction(r"(elect)\.sync")
def _elect(code: Compiler, ins: Instruction, match: Match) -> Control:
    first, second = pair(ins.operands[0])
    to = code.target(first, np.uint32)
    flag = code.target(second, np.bool_) if second else None

    def step(w: "Warps") -> None:
        active = w.active.reshape(-1, WARP)
        leader = np.repeat(active.argmax(1).astype(np.uint32), WARP)
        if to is not None:
            np.copyto(w.registers[to], leader, where=w.active)
        if flag is not None:
            np.copyto(w.registers[flag], w.lane == leader, where=w.active)

    return Control("warp", step=step, index=code.source(ins.operands[1], np.uint32))
