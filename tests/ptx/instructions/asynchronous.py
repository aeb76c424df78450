# SPDX-License-Identifier: Apache-2.0
"""cp.async, mbarrier and bulk copies of one dimension (PTX manual 9.7.9.25, 9.7.13.15).

A copy is done, as far as the kernel may know, when its thread has waited for it; until then its
destination may not be touched. What is copied is what was there when the copy began. Who has waited
at an mbarrier comes after what those had done who arrived there, copies in bulk among them.
"""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.compiler import Compiler, Control, Step, instruction
from ptx.faults import NotModelled, Violation
from ptx.instructions.memory import addresses_of, check_aligned, place
from ptx.parser import Immediate, Instruction, Operand
from ptx.warps import WARP

if TYPE_CHECKING:
    from ptx.warps import Warps

Array = np.ndarray[Any, Any]
Match = re.Match[str]


@dataclass
class Copy:
    """Copies under way: of each lane `data` to `offsets` of shared memory, in the lane's group."""

    lanes: Array
    offsets: Array
    data: Array  # [lane, bytes]
    groups: Array
    bulk: bool = False
    stamps: Array | None = None  # of the lanes, when an mbarrier is to tell that it is done

    def part(self, chosen: Array) -> "Copy":
        return Copy(
            self.lanes[chosen], self.offsets[chosen], self.data[chosen], self.groups[chosen],
            self.bulk, None if self.stamps is None else self.stamps[chosen],
        )  # fmt: skip


@dataclass
class Barrier:
    """An mbarrier: arrivals that are still expected, bytes too, and phases completed."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    copies: list[Copy] = field(default_factory=list)
    # What those who arrived have told, so far and up to the end of the last phase.
    told: Array | None = None
    known: Array | None = None

    def tell(self, told: Array) -> None:
        self.told = told if self.told is None else np.maximum(self.told, told)

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            self.known = self.told


def _finish(w: "Warps", copy: Copy) -> None:
    width = copy.data.shape[1]
    step = width if width <= 16 else 16
    for start in range(0, width, step):
        offsets = copy.offsets + start
        w.shared.finish_copy(offsets, step)
        stamps = w.stamps[copy.lanes] if copy.stamps is None else copy.stamps
        w.shared.check(offsets, step, stamps, copy.lanes, "write")
        if copy.bulk:
            w.shared.of_async_proxy(offsets, step)
        columns = [copy.data[:, start + j] for j in range(step)]
        w.shared.store(offsets, columns, np.uint8)


@instruction(
    r"(cp)\.async\.(?P<cache>ca|cg)\.shared(::cta|::cluster)?\.global(\.L2::(64B|128B|256B))?"
)
def _cp_async(code: Compiler, ins: Instruction, match: Match) -> Step:
    """`[to], [from], bytes [, bytes to read]`: the rest is filled with zeros."""
    to, source, size, *rest = ins.operands
    assert isinstance(size, Immediate)
    width = size.value
    if width not in (4, 8, 16) or (match["cache"] == "cg" and width != 16) or len(rest) > 1:
        raise NotModelled(ins.text)
    find_to, find_source = addresses_of(code, to), addresses_of(code, source)
    amount = code.source(rest[0], np.uint32) if rest else None

    def step(w: "Warps") -> None:
        lanes = w.lanes
        targets, sources = find_to(w), find_source(w)
        count = np.full(len(lanes), width)
        if amount is not None:
            count = np.broadcast_to(w.registers[amount], w.count)[lanes].astype(np.int64)
            if (count > width).any():
                raise Violation("asynchronous copy", "more bytes to read than to copy",
                                int(lanes[int((count > width).argmax())]))  # fmt: skip
        check_aligned(targets, width, lanes, "asynchronous write")
        check_aligned(sources, width, lanes, "asynchronous read")
        data = np.zeros((len(lanes), width), np.uint8)
        for size in np.unique(count[count > 0]):
            chosen = np.flatnonzero(count == size)
            unit = int(size) & -int(size)  # a partial read need not be a power of two
            for start in range(0, int(size), unit):
                at, here = sources[chosen] + start, lanes[chosen]
                for region, offsets, which in place(
                    w, "global", at, here, unit, "asynchronous read"
                ):
                    part = here[which]
                    region.check(offsets, unit, w.stamps[part], part, "read")
                    for j, value in enumerate(region.load(offsets, np.uint8, unit)):
                        data[chosen[which], start + j] = value
        ((_, offsets, _),) = place(w, "shared", targets, lanes, width, "asynchronous write")
        w.shared.begin_copy(offsets, width, w.stamps[lanes], lanes)
        w.copies.append(Copy(lanes, offsets, data, w.copy_groups[lanes]))

    return step


@instruction(r"(cp)\.async\.(?P<what>commit_group|wait_all|wait_group)")
def _cp_async_groups(code: Compiler, ins: Instruction, match: Match) -> Step:
    what = match["what"]
    keep = 0
    if what == "wait_group":
        (number,) = ins.operands
        assert isinstance(number, Immediate)
        keep = number.value

    def step(w: "Warps") -> None:
        if what == "commit_group":
            w.copy_groups[w.lanes] += 1
            return
        left = []
        for copy in w.copies:
            done = w.active[copy.lanes]
            if what == "wait_group":
                done &= copy.groups < w.copy_groups[copy.lanes] - keep
            if done.all():
                _finish(w, copy)
            elif done.any():
                _finish(w, copy.part(done))
                left.append(copy.part(~done))
            else:
                left.append(copy)
        w.copies = left

    return step


# mbarrier -----------------------------------------------------------------------------------------

_SHARED = r"(?P<space>\.shared(::cta)?)?"
_ORDER = r"(\.(relaxed|acquire|release))?(\.(cta|cluster))?"


def _barriers(code: Compiler, operand: Operand, space: str | None) -> Any:
    """A function to the keys of the barriers that the active lanes name."""
    find = addresses_of(code, operand)

    def run(w: "Warps") -> tuple[Array, Array]:
        lanes, addresses = w.lanes, find(w)
        check_aligned(addresses, 8, lanes, "mbarrier")
        keys = np.empty(len(lanes), np.int64)
        for region, offsets, which in place(
            w, "shared" if space else "", addresses, lanes, 8, "mbarrier"
        ):
            if region is not w.shared:
                raise Violation("mbarrier", "not in shared memory", int(lanes[which][0]))
            keys[which] = offsets
        return lanes, keys

    return run


def _known(w: "Warps", key: int, lane: int) -> Barrier:
    barrier = w.mbarriers.get(key)
    if barrier is None:
        raise Violation("mbarrier", f"not initialised: {w.shared.describe(key)}", lane)
    return barrier  # type: ignore[no-any-return]


@instruction(rf"(mbarrier)\.init{_SHARED}\.b64")
def _init(code: Compiler, ins: Instruction, match: Match) -> Step:
    find = _barriers(code, ins.operands[0], match["space"])
    count = code.source(ins.operands[1], np.uint32)

    def step(w: "Warps") -> None:
        lanes, keys = find(w)
        w.shared.check(keys, 8, w.stamps[lanes], lanes, "write")
        counts = np.broadcast_to(w.registers[count], w.count)[lanes]
        for key, number in zip(keys.tolist(), counts.tolist(), strict=True):
            w.mbarriers[key] = Barrier(number, number)

    return step


@instruction(rf"(mbarrier)\.inval{_SHARED}\.b64")
def _invalidate(code: Compiler, ins: Instruction, match: Match) -> Step:
    find = _barriers(code, ins.operands[0], match["space"])

    def step(w: "Warps") -> None:
        for lane, key in zip(*(x.tolist() for x in find(w)), strict=True):
            _known(w, key, lane)
            del w.mbarriers[key]

    return step


@instruction(
    rf"(mbarrier)\.(?P<verb>arrive|arrive_drop)(?P<expect>\.expect_tx)?{_ORDER}{_SHARED}\.b64"
)
def _arrive(code: Compiler, ins: Instruction, match: Match) -> Step:
    target, where, *rest = ins.operands
    find = _barriers(code, where, match["space"])
    to = code.target(target, np.uint64)
    amount = code.source(rest[0], np.uint32) if rest else None

    def step(w: "Warps") -> None:
        lanes, keys = find(w)
        # A reader of the barrier's bytes: makes sure that its initialisation is ordered before.
        w.shared.check(keys, 8, w.stamps[lanes], lanes, "relaxed read")
        told = w.release(lanes)
        for lane, key in zip(lanes.tolist(), keys.tolist(), strict=True):
            barrier = _known(w, key, lane)
            barrier.tell(told[lane // WARP])
            number = (
                int(np.broadcast_to(w.registers[amount], w.count)[lane])
                if amount is not None
                else 1
            )
            if to is not None:
                w.registers[to][lane] = barrier.phase
            if match["expect"]:
                barrier.bytes += number
                number = 1
            if number > barrier.pending:
                raise Violation("mbarrier", f"more arrivals than the {barrier.count} expected at "
                                f"{w.shared.describe(key)}", lane)  # fmt: skip
            barrier.pending -= number
            if match["verb"] == "arrive_drop":
                barrier.count -= number
            barrier.settle()

    return step


@instruction(
    rf"(mbarrier)\.(?P<verb>expect_tx|complete_tx)(\.relaxed)?(\.(cta|cluster))?{_SHARED}\.b64"
)
def _transactions(code: Compiler, ins: Instruction, match: Match) -> Step:
    find = _barriers(code, ins.operands[0], match["space"])
    amount = code.source(ins.operands[1], np.uint32)
    sign = 1 if match["verb"] == "expect_tx" else -1

    def step(w: "Warps") -> None:
        lanes, keys = find(w)
        for lane, key in zip(lanes.tolist(), keys.tolist(), strict=True):
            barrier = _known(w, key, lane)
            barrier.bytes += sign * int(np.broadcast_to(w.registers[amount], w.count)[lane])
            barrier.settle()

    return step


@instruction(rf"(mbarrier)\.(test_wait|try_wait)(?P<parity>\.parity)?{_ORDER}{_SHARED}\.b64")
def _wait(code: Compiler, ins: Instruction, match: Match) -> Control:
    """Waits until the phase is over: both forms are taken to be retried until they succeed."""
    target, where, state, *_ = ins.operands
    find = _barriers(code, where, match["space"])
    to = code.target(target, np.bool_)
    slot = code.source(state, np.uint32 if match["parity"] else np.uint64)

    def step(w: "Warps") -> Array:
        """Which of the active lanes are through."""
        lanes, keys = find(w)
        states = np.broadcast_to(w.registers[slot], w.count)[lanes].tolist()
        through = np.zeros(w.count, bool)
        for lane, key, wanted in zip(lanes.tolist(), keys.tolist(), states, strict=True):
            barrier = _known(w, key, lane)
            over = (barrier.phase & 1) != wanted if match["parity"] else barrier.phase != wanted
            through[lane] = over
            if over:
                copies, barrier.copies = barrier.copies, []
                for copy in copies:
                    _finish(w, copy)
                if barrier.known is not None:
                    w.acquire(lane, barrier.known)
        if through.any() and to is not None:
            w.registers[to][through] = True
        return through

    return Control("wait", step=step)


@instruction(r"(cp)\.async\.mbarrier\.arrive(?P<noinc>\.noinc)?(?P<space>\.shared(::cta)?)?\.b64")
def _cp_async_arrive(code: Compiler, ins: Instruction, match: Match) -> Step:
    """The barrier sees an arrival when the thread's copies so far are done."""
    find = _barriers(code, ins.operands[0], match["space"])

    def step(w: "Warps") -> None:
        lanes, keys = find(w)
        of_lane = dict(zip(lanes.tolist(), keys.tolist(), strict=True))
        stamps = w.stamps
        told = w.release(lanes)
        left = []
        for copy in w.copies:
            mine = w.active[copy.lanes]
            for key in {of_lane[lane] for lane in copy.lanes[mine].tolist()}:
                chosen = mine & np.array([of_lane.get(x) == key for x in copy.lanes.tolist()])
                part = copy.part(chosen)
                part.stamps = stamps[part.lanes]
                _known(w, key, int(copy.lanes[0])).copies.append(part)
            if not mine.all():
                left.append(copy.part(~mine))
        w.copies = left
        for lane, key in of_lane.items():
            barrier = _known(w, key, lane)
            barrier.tell(told[lane // WARP])
            if match["noinc"]:
                if barrier.pending == 0:
                    raise Violation("mbarrier", "more arrivals than expected", lane)
                barrier.pending -= 1
            barrier.settle()

    return step


# Bulk copies --------------------------------------------------------------------------------------


def _bulk_operands(lanes: Array, size: Array, *addresses: Array) -> None:
    for each in addresses:
        check_aligned(each, 16, lanes, "bulk copy")
    bad = (size % 16 != 0) | (size <= 0)
    if bad.any():
        at = int(bad.argmax())
        raise Violation("misaligned", f"bulk copy of {int(size[at])} bytes", int(lanes[at]))


@instruction(r"(cp)\.async\.bulk\.shared::(cluster|cta)\.global\.mbarrier::complete_tx::bytes")
def _bulk_load(code: Compiler, ins: Instruction, match: Match) -> Step:
    to, source, size, where = ins.operands
    find_to, find_source = addresses_of(code, to), addresses_of(code, source)
    amount = code.source(size, np.uint32)
    barriers = _barriers(code, where, "shared")

    def step(w: "Warps") -> None:
        lanes, keys = barriers(w)
        targets, sources = find_to(w), find_source(w)
        sizes = np.broadcast_to(w.registers[amount], w.count)[lanes].astype(np.int64)
        _bulk_operands(lanes, sizes, targets, sources)
        for i, lane in enumerate(lanes):
            here = np.full(int(sizes[i]) // 16, lane)
            spread = 16 * np.arange(len(here))
            data = np.empty((len(here), 16), np.uint8)
            for region, offsets, which in place(
                w, "global", sources[i] + spread, here, 16, "bulk read"
            ):
                region.check(offsets, 16, w.stamps[here[which]], here[which], "read")
                for j, value in enumerate(region.load(offsets, np.uint8, 16)):
                    data[which, j] = value
            ((_, offsets, _),) = place(w, "shared", targets[i] + spread, here, 16, "bulk write")
            w.shared.begin_copy(offsets, 16, w.stamps[here], here)
            barrier = _known(w, int(keys[i]), int(lane))
            stamps = w.stamps[here]
            barrier.copies.append(
                Copy(here, offsets, data, np.zeros(len(here), np.int64), True, stamps)
            )
            barrier.tell(w.release(lanes[i : i + 1])[int(lane) // WARP])
            barrier.bytes -= int(sizes[i])
            barrier.settle()

    return step


@instruction(r"(cp)\.async\.bulk\.global\.shared::cta\.bulk_group")
def _bulk_store(code: Compiler, ins: Instruction, match: Match) -> Step:
    to, source, size = ins.operands
    find_to, find_source = addresses_of(code, to), addresses_of(code, source)
    amount = code.source(size, np.uint32)

    def step(w: "Warps") -> None:
        lanes, targets, sources = w.lanes, find_to(w), find_source(w)
        sizes = np.broadcast_to(w.registers[amount], w.count)[lanes].astype(np.int64)
        _bulk_operands(lanes, sizes, targets, sources)
        for i, lane in enumerate(lanes):
            here = np.full(int(sizes[i]) // 16, lane)
            spread = 16 * np.arange(len(here))
            ((_, offsets, _),) = place(w, "shared", sources[i] + spread, here, 16, "bulk read")
            w.shared.check(offsets, 16, w.stamps[here], here, "read")
            data = np.stack(w.shared.load(offsets, np.uint8, 16), 1)
            for region, at, which in place(
                w, "global", targets[i] + spread, here, 16, "bulk write"
            ):
                region.check(at, 16, w.stamps[here[which]], here[which], "write")
                region.store(at, [data[which, j] for j in range(16)], np.uint8)

    return step


@instruction(r"(cp)\.async\.bulk\.(commit_group|wait_group(\.read)?)")
def _bulk_groups(code: Compiler, ins: Instruction, match: Match) -> Step:
    """Stores are done at once here, so there is nothing to wait for."""
    return lambda w: None
