# SPDX-License-Identifier: Apache-2.0
"""Buffers, and what may be done with them.

A `Region` is one buffer: a tensor, a variable, or the shared or local memory of all threads that
run together. Its state is kept by granules, as large as the narrowest access so far, so that
neighbours of 16 bits are told apart and float32 costs no more than it must.
"""

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np

from ptx.faults import Violation, variable_name
from ptx.races import Shadow, stamped_thread, stamped_who

__all__ = ["GENERIC_LOCAL", "GENERIC_SHARED", "GlobalMemory", "Region", "host_bytes"]

Array = np.ndarray[Any, Any]

_NUMBERS = np.arange(16)
_SHIFTS = {1 << shift: shift for shift in range(5)}
# Windows of generic addresses, far above any address of the host.
GENERIC_SHARED, GENERIC_LOCAL = 1 << 56, 1 << 57


def host_bytes(address: int, size: int) -> Array:
    """The host's memory at an address, as bytes."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class Region:
    """One buffer.

    Args:
        name: For reports.
        data: Its bytes, from `origin` on.
        origin: The address of `data[0]`, a multiple of 16.
        low, high: The bytes that belong to it, as offsets in `data`.
        granule: Size in bytes of what state is kept for, 1 to 8.
        written: Whether it starts out written to; or granules that do.
        part: Offsets are reported modulo this: the size of one block's or thread's share.
        symbols: Names of the variables in a share by their offsets.
    """

    def __init__(
        self, name: str, data: Array, origin: int = 0, low: int = 0, high: int | None = None, *,
        granule: int = 4, written: bool = True, part: int = 0,
        symbols: dict[int, str] | None = None, races: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.data, self.origin = name, data, origin
        self.low, self.high = low, len(data) if high is None else high
        self.shift = granule.bit_length() - 1
        count = -(-len(data) // granule)
        self.written: Array | None = None if written else np.zeros(count, bool)
        self.holes: Array | None = None  # granules between the elements of a strided tensor
        self.pending: Array | None = None  # granules that an asynchronous copy will write
        self.pending_count = 0
        self.reading: Array | None = None  # how many products under way read a granule
        self.ordinary: Array | None = None  # granules that only a fence shows to the async proxy
        self.shadow = Shadow(count) if races else None
        self._part, self._symbols = part, symbols or {}
        self._parts: list[tuple[int, int, str]] = []  # of a workspace
        self._typed: dict[Any, Array] = {}

    # Reports --------------------------------------------------------------------------------------

    def describe(self, offset: int) -> str:
        """Buffer and offset in words, for an offset in `data`."""
        if self._part:
            offset %= self._part
            starts = [start for start in self._symbols if start <= offset]
            if starts:
                start = max(starts)
                name = variable_name(self._symbols[start])
                return f"{name} + {offset - start} ({self.name} + {offset})"
            return f"{self.name} + {offset} of {self._part} bytes"
        if self._parts:
            low, high, name = min(self._parts, key=lambda p: max(p[0] - offset, offset - p[1] + 1))
            return f"{name} in {self.name} + {offset - low} of {high - low} bytes"
        return f"{self.name} + {offset - self.low} of {self.high - self.low} bytes"

    # State ----------------------------------------------------------------------------------------

    def granules(self, offsets: Array, width: int) -> Array:
        """Indices of the granules of accesses of `width` bytes, `width / granule` for each."""
        if width < (1 << self.shift):
            self._refine(width)
        first = offsets >> self.shift
        count = width >> self.shift
        if count == 1:
            return first
        result: Array = (first[:, None] + _NUMBERS[:count]).reshape(-1)
        return result

    def _refine(self, width: int) -> None:
        factor = (1 << self.shift) // width
        self.shift = width.bit_length() - 1
        for name in ("written", "holes", "pending", "reading", "ordinary"):
            if (state := getattr(self, name)) is not None:
                setattr(self, name, np.repeat(state, factor))
        self.pending_count *= factor
        if self.shadow:
            self.shadow.refine(factor)

    def make_holes(self, ranges: list[tuple[int, int]]) -> None:
        """Bytes from `low` to `high` of every share belong to nobody."""
        if not ranges:
            return
        share = np.zeros(self._part or len(self.data), bool)
        for low, high in ranges:
            share[low:high] = True
        holes = np.tile(share, len(self.data) // len(share))
        self.holes = holes.reshape(-1, 1 << self.shift).all(1)

    def take_part(self, start: int, low: int, high: int, name: str) -> None:
        """Bytes `low` to `high` are a part of a workspace: from its `start` on, only parts may be
        touched. One that begins at `start` is the first."""
        while (start | low | high) & ((1 << self.shift) - 1):
            self._refine(1 << self.shift >> 1)
        if low == start:
            self._parts = []
            self.holes = np.zeros(-(-len(self.data) // (1 << self.shift)), bool)
            self.holes[start >> self.shift :] = True
        assert self.holes is not None
        self.holes[low >> self.shift : high >> self.shift] = False
        self._parts.append((low, high, name))

    def mark_written(self, low: int, high: int) -> None:
        """The host has written to bytes `low` to `high` of `data`."""
        if self.written is not None:
            if (low | high) & ((1 << self.shift) - 1):
                self._refine(1)
            self.written[low >> self.shift : high >> self.shift] = True

    def all_written(self) -> bool:
        if self.written is None:
            return True
        part = self.written[self.low >> self.shift : -(-self.high >> self.shift)]
        return bool(part.all())

    def first_unwritten(self) -> int:
        """The offset of the first byte that was never written to."""
        assert self.written is not None
        start = self.low >> self.shift
        return int((start + (~self.written[start:]).argmax()) << self.shift)

    # Accesses -------------------------------------------------------------------------------------

    def check(
        self, offsets: Array, width: int, stamps: Array, lanes: Array, kind: str,
        *, constant: bool = False,
    ) -> None:  # fmt: skip
        """Checks accesses that are within bounds and aligned, and notes them.

        Args:
            offsets: In `data`, one for each of `lanes`.
            width: Bytes of an access.
            stamps: See `races.py`.
            lanes: For reports.
            kind: "read", "write", "atomic" (which is both), "relaxed read" or "relaxed write" (as
                volatile ones are: no race with atomics).
            constant: A read by way of the cache that does not see this kernel's writes.
        """
        granules = self.granules(offsets, width)
        each = len(granules) // max(len(offsets), 1)
        if each > 1:
            stamps = np.repeat(stamps, each)
        atomic = kind in ("atomic", "relaxed read", "relaxed write")
        writes = kind in ("write", "atomic", "relaxed write")

        def complain(fault: str, detail: str, at: int) -> None:
            offset = int(granules[at]) << self.shift
            raise Violation(fault, f"{detail}{self.describe(offset)}", int(lanes[at // each]))

        # Of shared memory, reads of what nobody could have written to show below.
        if self.holes is not None and (writes or self.written is None or self._parts):
            bad = self.holes[granules]
            if np.count_nonzero(bad):
                complain(
                    "out of bounds",
                    f"{kind} outside of variable, view or part: ",
                    int(bad.argmax()),
                )
        if self.pending_count and self.pending is not None:
            bad = self.pending[granules]
            if np.count_nonzero(bad):
                complain(
                    "asynchronous copy",
                    f"{kind} of bytes whose cp.async has not been waited for: ",
                    int(bad.argmax()),
                )
        if (
            writes
            and self.reading is not None
            and (np.count_nonzero(bad := self.reading[granules] > 0))
        ):
            complain(
                "wgmma", "write of bytes that a product not waited for reads: ", int(bad.argmax())
            )
        if kind != "write" and kind != "relaxed write" and self.written is not None:
            there = self.written[granules]
            if np.count_nonzero(there) < len(there):
                complain("uninitialised read", "nobody has written to ", int((~there).argmax()))
        if self.shadow is not None:
            if writes:
                race = self.shadow.write(granules, stamps, atomic)
                if race:
                    earlier, at, who = race
                    self._race("write", earlier, at, who, granules, lanes, each)
            else:
                conflict = self.shadow.read(granules, stamps, atomic)
                if conflict:
                    self._race("read", "write", *conflict, granules, lanes, each)
                if constant and np.count_nonzero(bad := self.shadow.written(granules)):
                    complain(
                        "race", "ld.global.nc after a write in the same launch of ",
                        int(bad.argmax()),
                    )  # fmt: skip
        if writes and self.written is not None:
            self.written[granules] = True
        if writes and self.ordinary is not None:
            self.ordinary[granules] = True

    def _race(
        self, now: str, earlier: str, at: int, who: int, granules: Array, lanes: Array, each: int
    ) -> None:
        block, thread = stamped_thread(who)
        place = self.describe(int(granules[at]) << self.shift)
        raise Violation(
            "race",
            f"{now} of {place} after a {earlier} by thread {thread} of block {block}, "
            "with nothing between that orders them",
            int(lanes[at // each]),
        )

    def typed(self, dtype: Any, count: int = 1) -> Array:
        """`data` as an array of `dtype`, or of as many rows of `count` as there are."""
        view = self._typed.get((dtype, count))
        if view is None:
            size = np.dtype(dtype).itemsize * count
            view = self.data[: len(self.data) // size * size].view(dtype)
            if count > 1:
                view = view.reshape(-1, count)
            self._typed[dtype, count] = view
        return view

    def load(self, offsets: Array, dtype: Any, count: int) -> list[Array]:
        """`count` consecutive elements at each offset, as `count` arrays."""
        view = self.typed(dtype)
        if count == 1:
            return [view[offsets >> _SHIFTS[view.itemsize]]]
        shift = _SHIFTS.get(view.itemsize * count)
        if shift is not None and not (self._part | self.origin) & ((1 << shift) - 1):
            return list(self.typed(dtype, count)[offsets >> shift].T)
        first = offsets >> _SHIFTS[view.itemsize]
        return [view[first + j] for j in range(count)]

    def store(self, offsets: Array, values: list[Array], dtype: Any) -> None:
        view = self.typed(dtype)
        first = offsets >> _SHIFTS[view.itemsize]
        for j, value in enumerate(values):
            view[first + j if j else first] = value

    # Asynchronous copies --------------------------------------------------------------------------

    def begin_copy(self, offsets: Array, width: int, stamps: Array, lanes: Array) -> None:
        """An asynchronous copy will write here: until it has, nobody may touch it."""
        self.check(offsets, width, stamps, lanes, "write")
        granules = self.granules(offsets, width)
        if self.pending is None:
            self.pending = np.zeros(-(-len(self.data) // (1 << self.shift)), bool)
        self.pending[granules] = True
        self.pending_count = int(np.count_nonzero(self.pending))

    def finish_copy(self, offsets: Array, width: int) -> None:
        """The copy is done, as far as the thread that waited for it can tell."""
        assert self.pending is not None
        self.pending[self.granules(offsets, width)] = False
        self.pending_count = int(np.count_nonzero(self.pending))

    # Products, and the asynchronous proxy ---------------------------------------------------------

    def track_proxies(self) -> None:
        """Begins to note which stores are ordinary ones."""
        self.ordinary = np.zeros(-(-len(self.data) // (1 << self.shift)), bool)
        self.reading = np.zeros(len(self.ordinary), np.int16)

    def of_async_proxy(self, offsets: Array, width: int) -> None:
        """What was just written there came by a bulk copy."""
        if self.ordinary is not None:
            self.ordinary[self.granules(offsets, width)] = False

    def show_to_async_proxy(self, stamps: Array) -> None:
        """A fence by the threads with these stamps: products may read what they have written."""
        if self.ordinary is None or self.shadow is None:
            return
        granules = np.flatnonzero(self.ordinary)
        mine = np.isin(self.shadow.writers(granules), stamped_who(stamps))
        self.ordinary[granules[mine]] = False

    def check_proxy(self, offsets: Array, width: int, lane: int) -> None:
        granules = self.granules(offsets, width)
        if self.ordinary is not None and (bad := self.ordinary[granules]).any():
            place = self.describe(int(granules[bad.argmax()]) << self.shift)
            raise Violation(
                "wgmma", f"read of what was stored without a fence.proxy.async since: {place}", lane
            )

    def begin_reads(self, offsets: Array, width: int) -> None:
        """A product reads there until `end_reads`."""
        granules = self.granules(offsets, width)
        assert self.reading is not None
        np.add.at(self.reading, granules, 1)

    def end_reads(self, offsets: Array, width: int) -> None:
        granules = self.granules(offsets, width)
        assert self.reading is not None
        np.add.at(self.reading, granules, -1)


class GlobalMemory:
    """All buffers that kernels can reach by global addresses."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._lows = np.zeros(0, np.int64)

    def set_regions(self, regions: Iterable[Region]) -> None:
        self.regions = sorted(regions, key=lambda r: r.origin + r.low)
        self._lows = np.array([r.origin + r.low for r in self.regions], np.int64)

    def place(
        self, addresses: Array, width: int, lanes: Array, verb: str
    ) -> list[tuple[Region, Array, Any]]:
        """Regions, offsets in them, and which of `addresses` those are."""
        if not self.regions:
            raise Violation("out of bounds", f"{verb} at {int(addresses[0]):#x}, with no buffer "
                            "at all", int(lanes[0]))  # fmt: skip
        low, high = int(addresses.min()), int(addresses.max())
        index = max(int(np.searchsorted(self._lows, low, side="right")) - 1, 0)
        region = self.regions[index]
        if low >= region.origin + region.low and high + width <= region.origin + region.high:
            return [(region, addresses - region.origin, slice(None))]
        numbers = np.maximum(np.searchsorted(self._lows, addresses, side="right") - 1, 0)
        result = []
        for number in np.unique(numbers):
            region = self.regions[number]
            which = np.flatnonzero(numbers == number)
            offsets = addresses[which] - region.origin
            bad = (offsets < region.low) | (offsets + width > region.high)
            if bad.any():
                at = int(bad.argmax())
                self._outside(int(addresses[which][at]), width, int(lanes[which][at]), verb)
            result.append((region, offsets, which))
        return result

    def _outside(self, address: int, width: int, lane: int, verb: str) -> None:
        def distance(region: Region) -> int:
            start, end = region.origin + region.low, region.origin + region.high
            return max(start - address, address + width - end)

        near = min(self.regions, key=distance)
        if distance(near) > 1 << 20:
            detail = f"{verb} of {width} bytes at {address:#x}, far from every buffer"
        else:
            detail = f"{verb} of {width} bytes at {near.describe(address - near.origin)}"
        raise Violation("out of bounds", detail, lane)
