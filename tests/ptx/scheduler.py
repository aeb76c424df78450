# SPDX-License-Identifier: Apache-2.0
"""Runs a launch.

Lanes at the same instruction form a group and step together. The group with the lowest address goes
first, so that paths which have parted meet again. When no group can go on, barriers at which whole
blocks wait let go. Blocks beyond `LANES` run later, so that order within a launch is not the only
one that is ever tried: lanes of one run are side by side, those of another one after it.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.compiler import Block, Program
from ptx.faults import Fault, NotModelled, Violation, demangle
from ptx.parser import Instruction
from ptx.warps import ALL_LANES, WARP, WARPGROUP, Warps, warp_words

if TYPE_CHECKING:
    from ptx.device import Device

__all__ = ["LANES", "Scheduler", "run"]

Array = np.ndarray[Any, Any]

LANES = 8192  # that run side by side: more costs cache, fewer costs calls of numpy
_STEP_LIMIT = 20_000_000  # blocks of code; a loop that waits for what never comes ends here


def run(
    device: "Device", program: Program, grid: tuple[int, int, int], shape: tuple[int, int, int],
    parameters: bytes, dynamic: int,
) -> None:  # fmt: skip
    """Runs all blocks of a launch; raises `Fault`."""
    total = grid[0] * grid[1] * grid[2]
    threads = -(-shape[0] * shape[1] * shape[2] // WARP) * WARP
    together = max(1, LANES // threads)
    for first in range(0, total, together):
        count = min(together, total - first)
        with np.errstate(all="ignore"):
            warps = Warps(device, program, parameters, grid, shape, dynamic, first, count)
            Scheduler(warps).run()


class Scheduler:
    """The groups of lanes of one `Warps`."""

    def __init__(self, warps: Warps) -> None:
        self.w = warps
        self.groups: dict[int, Array] = {0: warps.live.copy()}
        nowhere = -1
        self.at_barrier = np.full(warps.count, nowhere)  # the block of code that it ends
        self.barrier_number = np.zeros(warps.count, np.int64)
        self.at_warp = np.full(warps.count, nowhere)
        self.warps_wait = False  # whether any do
        self.at_wait = np.full(warps.count, nowhere)
        self.at_group = np.full(warps.count, nowhere)
        self.steps = 0

    def run(self) -> None:
        w = self.w
        end = max((b.next for b in w.program.blocks.values()), default=0)
        while True:
            while self.groups:
                start = min(self.groups)
                active = self.groups.pop(start)
                if start >= end:  # the end of the code is an exit
                    w.die(active)
                    continue
                self._run_block(w.program.blocks[start], active)
            if not (self._release_waits() or self._release_barriers()):
                break
        self._check_stuck()
        try:
            if w.copies and w.copies[0].lanes.size:
                raise Violation("asynchronous copy", "the kernel ends while a cp.async is under "
                                "way", int(w.copies[0].lanes[0]))  # fmt: skip
            w.products.check_over()
        except Violation as violation:
            block = next(iter(w.program.blocks.values()))
            first = block.steps[0][1] if block.steps else block.instruction
            assert first
            raise self._fault(violation, first) from None

    def _add(self, start: int, active: Array) -> None:
        if start in self.groups:
            self.groups[start] = self.groups[start] | active
        else:
            self.groups[start] = active

    def _run_block(self, block: Block, active: Array) -> None:
        w = self.w
        self.steps += 1
        w.activate(active)
        current: Instruction | None = None
        try:
            for step, current in block.steps:  # noqa: B007 (named in reports)
                step(w)
            current = block.instruction
            if block.control is None:
                self._add(block.next, active)
            else:
                self._control(block, active)
        except Violation as violation:
            assert current
            raise self._fault(violation, current) from None
        if self.steps > _STEP_LIMIT:
            assert current
            raise self._fault(Violation("no progress", "a loop does not end"), current)

    def _control(self, block: Block, active: Array) -> None:
        w, control = self.w, block.control
        assert control
        chosen = active
        if block.guard:
            slot, negated = block.guard
            holds = w.registers[slot]
            chosen = active & ~holds if negated else active & holds
            number = np.count_nonzero(chosen)
            if number == w.number:
                chosen = active
            else:
                self._add(block.next, active & ~chosen)
            if number == 0:
                return
        if control.kind == "branch":
            if control.index is None:
                self._add(block.targets[0], chosen)
                return
            index = np.broadcast_to(w.registers[control.index], w.count)
            for number, target in enumerate(block.targets):
                part = chosen & (index == number)
                if part.any():
                    self._add(target, part)
            if (chosen & (index >= len(block.targets))).any():
                raise Violation("branch", "an index beyond the table", int(w.lanes[0]))
        elif control.kind == "exit":
            w.die(chosen)
        elif control.kind == "barrier":
            assert control.barrier
            number, threads, _ = control.barrier
            ids = np.broadcast_to(w.registers[number], w.count)
            if threads is not None:
                counts = np.broadcast_to(w.registers[threads], w.count)[chosen]
                if (counts != w.stride).any() and (counts != w.threads).any():
                    raise NotModelled("a barrier of a part of the block")
            self.at_barrier[chosen] = block.start
            self.barrier_number[chosen] = ids[chosen]
        elif control.kind == "wait":
            self._wait(block, chosen)
        elif control.kind == "warpgroup":
            self._warpgroup(block, chosen)
        else:
            self._warp(block, chosen)

    # Instructions of warps ------------------------------------------------------------------------

    def _warp(self, block: Block, chosen: Array) -> None:
        """Runs an instruction for the warps of which all lanes in the mask have come."""
        w, control = self.w, block.control
        assert control
        assert control.index is not None
        mask = w.registers[control.index]
        if mask.ndim == 0 and mask == ALL_LANES and not self.warps_wait:
            whole = w.mask is None and chosen is w.active and w.live_whole
            if not whole:
                packed = np.packbits(chosen).view(np.uint32)
                whole = ((packed == ALL_LANES) | (packed == 0)).all()
            if whole:  # the usual case, quickly
                if chosen is not w.active:
                    w.activate(chosen)
                w.whole = True
                control.step(w)
                self._add(block.next, chosen)
                return
        waiting = self.at_warp == block.start
        if waiting.any():
            chosen = chosen | waiting
        masks = np.broadcast_to(mask, w.count)
        present = warp_words(chosen)
        mine = np.uint32(1) << w.lane
        stray = chosen & ((masks & mine) == 0)
        if stray.any():
            raise Violation("warp mask", "a thread executes it that its mask does not name",
                            int(stray.argmax()))  # fmt: skip
        missing = chosen & ((masks & ~present) != 0)
        if missing.any():
            # Lanes of one mask go together: none of them goes before all are there.
            behind = np.repeat(missing.reshape(-1, WARP).any(1), WARP)
            self.at_warp[chosen & behind] = block.start
            self.warps_wait = True
            chosen = chosen & ~behind
            if not chosen.any():
                return
        self.at_warp[chosen] = -1
        self.warps_wait = bool((self.at_warp >= 0).any())
        w.activate(chosen)
        odd = chosen & (masks != present)
        if odd.any():
            # Several masks in one warp: one after another, by mask.
            for one in np.unique(masks[odd]):
                part = odd & (masks == one)
                w.activate(part)
                control.step(w)
            w.activate(chosen & ~odd)
            if not w.active.any():
                self._add(block.next, chosen)
                return
        control.step(w)
        self._add(block.next, chosen)

    def _warpgroup(self, block: Block, chosen: Array) -> None:
        """Runs an instruction for the warpgroups all of whose lanes have come."""
        w, control = self.w, block.control
        assert control
        if w.stride % WARPGROUP:
            raise Violation("warpgroup", f"a block of {w.threads} threads ends within one",
                            int(w.lanes[0]))  # fmt: skip
        chosen = chosen | (self.at_group == block.start)
        ready = np.repeat(chosen.reshape(-1, WARPGROUP).all(1), WARPGROUP)
        self.at_group[chosen & ~ready] = block.start
        self.at_group[ready] = -1
        if ready.any():
            w.activate(ready)
            control.step(w)
            self._add(block.next, ready)

    # Barriers -------------------------------------------------------------------------------------

    def _release_barriers(self) -> bool:
        """Lets go blocks all of whose live threads wait at one barrier."""
        w = self.w
        waiting = self.at_barrier >= 0
        if not waiting.any():
            return False
        per_block = waiting.reshape(w.blocks, w.stride)
        live = w.live.reshape(w.blocks, w.stride)
        complete = (per_block == live).all(1) & per_block.any(1)
        if not complete.any():
            return False
        lanes = np.repeat(complete, w.stride) & waiting
        self._check_same(lanes)
        everyone = bool(lanes.sum() == w.live.sum())
        places = self.at_barrier[lanes]
        for start in np.unique(places):
            block = w.program.blocks[int(start)]
            group = lanes & (self.at_barrier == start)
            assert block.control
            if block.control.step is not None:
                w.activate(group)
                block.control.step(w)
            self._add(block.next, group)
        self.at_barrier[lanes] = -1
        w.barrier(np.flatnonzero(complete))
        if everyone and w.shared.shadow:
            w.shared.shadow.interval_over()
        return True

    def _check_same(self, lanes: Array) -> None:
        """The threads of a block must all have come to the same barrier of the source."""
        w = self.w
        place = np.where(lanes, self.at_barrier, -1).reshape(w.blocks, w.stride)
        highest = place.max(1)
        lowest = np.where(place < 0, highest[:, None], place).min(1)
        if (highest != lowest).any():
            index = int((highest != lowest).argmax())
            first, second = (w.program.blocks[int(p[index])].instruction for p in (lowest, highest))
            assert first
            assert second
            lane = index * w.stride + int((place[index] == highest[index]).argmax())
            raise self._fault(
                Violation(
                    "divergent barrier",
                    f"threads of one block wait here and at {first.location}",
                    lane,
                ),
                second,
            )

    def _wait(self, block: Block, chosen: Array) -> None:
        w = self.w
        assert block.control
        w.activate(chosen)
        through = block.control.step(w)
        if through.any():
            self._add(block.next, through)
        self.at_wait[through] = -1
        self.at_wait[chosen & ~through] = block.start

    def _release_waits(self) -> bool:
        """Tries again those that wait on an mbarrier."""
        w = self.w
        for start in np.unique(self.at_wait[self.at_wait >= 0]):
            block = w.program.blocks[int(start)]
            try:
                self._wait(block, self.at_wait == start)
            except Violation as violation:
                assert block.instruction
                raise self._fault(violation, block.instruction) from None
        return bool(self.groups)

    # Ends -----------------------------------------------------------------------------------------

    def _check_stuck(self) -> None:
        """Nothing can go on: whoever has not exited waits for somebody who never comes."""
        w = self.w
        for places, kind, detail in (
            (self.at_warp, "warp mask", "the mask names threads that never come here"),
            (self.at_group, "warpgroup", "some threads of the warpgroup never come here"),
            (self.at_wait, "deadlock", "an mbarrier whose phase never ends"),
            (self.at_barrier, "divergent barrier", "some threads of the block never come here"),
        ):
            stuck = np.flatnonzero((places >= 0) & w.live)
            if len(stuck):
                lane = int(stuck[0])
                instruction = w.program.blocks[int(places[lane])].instruction
                assert instruction
                raise self._fault(Violation(kind, detail, lane), instruction)

    def _fault(self, violation: Violation, instruction: Instruction) -> Fault:
        thread = block = None
        if violation.lane is not None:
            thread, block = self.w.coordinates(violation.lane)
        return Fault(
            violation.kind, violation.detail, demangle(self.w.program.name),
            instruction.location, instruction.text, thread, block,
        )  # fmt: skip
