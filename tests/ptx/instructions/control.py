# SPDX-License-Identifier: Apache-2.0
"""Branches, exits, barriers and fences (PTX manual 9.7.12, 9.7.13)."""

import re
from typing import TYPE_CHECKING

import numpy as np

from ptx.compiler import Compiler, Control, Step, instruction
from ptx.faults import NotModelled, Violation
from ptx.parser import Instruction, Name

if TYPE_CHECKING:
    from ptx.warps import Warps

Match = re.Match[str]


@instruction(r"(bra)(\.uni)?")
def _bra(code: Compiler, ins: Instruction, match: Match) -> Control:
    (target,) = ins.operands
    assert isinstance(target, Name)
    return Control("branch", labels=(target.name,))


@instruction(r"(brx)\.idx(\.uni)?")
def _brx(code: Compiler, ins: Instruction, match: Match) -> Control:
    index, table = ins.operands
    assert isinstance(table, Name)
    labels = tuple(code.function.tables[table.name])
    return Control("branch", labels=labels, index=code.source(index, np.uint32))


@instruction(r"(ret|exit)(\.uni)?")
def _exit(code: Compiler, ins: Instruction, match: Match) -> Control:
    return Control("exit")


@instruction(r"(trap|brkpt)")
def _trap(code: Compiler, ins: Instruction, match: Match) -> Step:
    def step(w: "Warps") -> None:
        raise Violation("trap", "the kernel stopped itself", int(w.lanes[0]))

    return step


@instruction(r"(bar|barrier)(\.cta)?\.sync(\.aligned)?")
def _barrier(code: Compiler, ins: Instruction, match: Match) -> Control:
    """`bar.sync id [, threads]`; `barrier.cta.sync` without `.aligned` too."""
    number, *count = ins.operands
    slots = (code.source(number, np.uint32), code.source(count[0], np.uint32) if count else None)
    return Control("barrier", barrier=(*slots, ""))


@instruction(r"(bar|barrier)(\.cta)?\.red\.(?P<op>popc|and|or)(\.aligned)?\.(?P<type>u32|pred)")
def _barrier_reduction(code: Compiler, ins: Instruction, match: Match) -> Control:
    target, number, *count, chosen = ins.operands
    slot, negated = code.predicate(chosen)
    popc = match["op"] == "popc"
    if popc != (match["type"] == "u32"):
        raise NotModelled(ins.opcode)
    to = code.target(target, np.uint32 if popc else np.bool_)

    def step(w: "Warps") -> None:
        """For lanes whose whole block has arrived."""
        value = w.registers[slot]
        value = ~value if negated else value
        votes = (value & w.active).reshape(w.blocks, w.stride).sum(1)
        live = w.active.reshape(w.blocks, w.stride).sum(1)
        result = {"popc": votes, "and": votes == live, "or": votes > 0}[match["op"]]
        w.registers[to][w.lanes] = result[w.local_block[w.lanes]]

    slots = (code.source(number, np.uint32), code.source(count[0], np.uint32) if count else None)
    return Control("barrier", step=step, barrier=(*slots, match["op"]))


@instruction(r"(bar)\.warp\.sync")
def _warp_barrier(code: Compiler, ins: Instruction, match: Match) -> Control:
    def step(w: "Warps") -> None:
        w.warp_syncs = w.warp_syncs.copy()
        w.warp_syncs[w.lanes] += 1
        w.restamp()

    return Control("warp", step=step, index=code.source(ins.operands[0], np.uint32))


@instruction(r"(membar)\.(cta|gl|sys)")
@instruction(r"(fence)(\.(sc|acq_rel|acquire|release))?\.(cta|cluster|gpu|sys)")
@instruction(r"(fence)\.mbarrier_init\.release\.cluster")
def _fence(code: Compiler, ins: Instruction, match: Match) -> Step:
    """Orders accesses of one thread, which they are here. It orders no two threads."""
    return lambda w: None


@instruction(r"(fence)\.proxy\.async(\.(global|shared::cta|shared::cluster))?")
def _proxy_fence(code: Compiler, ins: Instruction, match: Match) -> Step:
    """Shows what this thread has stored to bulk copies and products."""
    return lambda w: w.shared.show_to_async_proxy(w.stamps[w.lanes])


@instruction(r"(nanosleep)\.u32")
def _sleep(code: Compiler, ins: Instruction, match: Match) -> Step:
    return lambda w: None
