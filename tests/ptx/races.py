# SPDX-License-Identifier: Apache-2.0
"""Data races: two threads touch the same bytes, one of them writes, and nothing orders them.

Every access leaves a stamp, 64 bits: the block, the thread in it, the epoch of its warp, and how
many `__syncwarp` it has taken part in. Of two accesses to one granule the first comes before the
second if they are of one thread, or of one block and the second warp has learned, at a barrier of
the block or at an mbarrier, that the first one's epoch is over (`Clocks`), or of one warp and a
`__syncwarp` lies between. Blocks are never ordered within a launch. Atomics do not race with each
other.

Kept for every granule: the last writer and the last two readers, which are different threads. Reads
are logged first and entered when a write comes: most intervals read what they do not write.
"""

from typing import Any

import numpy as np

__all__ = ["THREADS_PER_BLOCK", "Clocks", "Shadow", "stamp", "stamped_thread", "stamped_who"]

Array = np.ndarray[Any, Any]

THREADS_PER_BLOCK = 1024
_WARP_BITS, _BLOCK_BITS = 14, 14  # of numbers of syncs and of epochs
_THREAD_SHIFT = _WARP_BITS + _BLOCK_BITS
_LAST_EPOCH = (1 << _BLOCK_BITS) - 1
_EPOCHS = _LAST_EPOCH << _WARP_BITS
_WARP_SYNCS = (1 << _WARP_BITS) - 1
_OTHER_THREAD, _OTHER_WARP = 1 << _THREAD_SHIFT, 1 << (_THREAD_SHIFT + 5)
_BLOCK_SHIFT = _THREAD_SHIFT + 10
_OTHER_BLOCK = 1 << _BLOCK_SHIFT
_LOG_LIMIT = 1 << 23  # accesses


def stamp(block: Array, thread: Array, epochs: Array, warp_syncs: Array) -> Array:
    """Stamps of threads; never 0, which stands for nobody."""
    who = ((block + 1) << 10) | thread
    when = ((epochs << _WARP_BITS) & _EPOCHS) | (warp_syncs & _WARP_SYNCS)
    return (who << _THREAD_SHIFT) | when


def stamped_thread(value: int) -> tuple[int, int]:
    """Block and thread of a stamp."""
    who = int(value) >> _THREAD_SHIFT
    return (who >> 10) - 1, who & 1023


def stamped_who(stamps: Array) -> Array:
    """Numbers of the threads of stamps, different for any two of a grid."""
    return stamps >> _THREAD_SHIFT


class Clocks:
    """What the warps of a block know of each other (vector clocks, Lamport 1978, Mattern 1989).

    A warp that arrives at a barrier ends an epoch of its own; a warp that has waited there knows
    that those of all who arrived are over, and what they knew.

    Attributes:
        epochs: `[block, warp]`, the number of the epoch that lasts.
        known: `[block, warp, other warp]`, the last epoch of the other that is known to be over.
    """

    def __init__(self, first_block: int, blocks: int, warps: int) -> None:
        self.first_block = first_block
        self.epochs = np.ones((blocks, warps), np.int64)
        self.known = np.zeros((blocks, warps, warps), np.int64)

    def release(self, block: int, warp: int) -> Array:
        """Ends an epoch; returns what others may know from now on."""
        told: Array = self.known[block, warp].copy()
        told[warp] = self.epochs[block, warp]
        self.epochs[block, warp] += 1
        return told

    def acquire(self, block: int, warp: int, told: Array) -> None:
        np.maximum(self.known[block, warp], told, out=self.known[block, warp])

    def barrier(self, blocks: Array) -> None:
        """All warps of these blocks have arrived and waited."""
        told = np.maximum(self.known[blocks].max(1), self.epochs[blocks])
        self.known[blocks] = told[:, None]
        self.epochs[blocks] += 1

    def ordered(self, earlier: Array, now: Array) -> Array:
        """Whether accesses come before those of the same block now."""
        block = (now >> _BLOCK_SHIFT) - 1 - self.first_block
        warp, other = ((stamps >> (_THREAD_SHIFT + 5)) & 31 for stamps in (now, earlier))
        epoch = (earlier & _EPOCHS) >> _WARP_BITS
        # Numbers of epochs go round: what is known is never far ahead.
        lead = (self.known[block, warp, other] - epoch) & _LAST_EPOCH
        result: Array = lead <= _LAST_EPOCH // 2
        return result


class Shadow:
    """The stamps of `count` granules.

    Attributes:
        clocks: Of the blocks that run, for all buffers.
    """

    clocks = Clocks(0, 0, 0)

    def __init__(self, count: int) -> None:
        self.count = count
        self.dirty = False  # written to since the last reset or barrier of all
        self._writer: Array | None = None
        self._atomic = np.zeros(0, bool)
        self._readers: list[Array] = []
        self._log: list[tuple[Array, Array]] = []
        self._logged = 0

    def reset(self) -> None:
        """Forgets everything: a new launch."""
        self._writer = None
        self._readers = []
        self.interval_over()

    def interval_over(self) -> None:
        """All threads have passed a barrier: nothing from before it can race."""
        self.dirty = False
        self._log.clear()
        self._logged = 0

    def refine(self, factor: int) -> None:
        """Every granule becomes `factor` granules."""
        self._enter_reads()
        self.count *= factor
        if self._writer is not None:
            self._writer = np.repeat(self._writer, factor)
            self._atomic = np.repeat(self._atomic, factor)
        self._readers = [np.repeat(r, factor) for r in self._readers]

    def read(self, granules: Array, stamps: Array, atomic: bool = False) -> tuple[int, int] | None:
        """Notes a read; returns where it races with an earlier write, and that write's stamp."""
        self._log.append((granules, stamps))
        self._logged += len(granules)
        if self._logged > _LOG_LIMIT:
            self._enter_reads()
        if not self.dirty or self._writer is None:
            return None
        earlier = self._writer[granules]
        bad = self._unordered(earlier, stamps)
        if bad is not None and atomic:
            bad &= ~self._atomic[granules]
        return _first(bad, earlier)

    def write(
        self, granules: Array, stamps: Array, atomic: bool = False
    ) -> tuple[str, int, int] | None:
        """Notes a write; returns "write" or "read", where, and the stamp of what it races with."""
        if self._writer is None:
            self._writer = np.zeros(self.count, np.int64)
            self._atomic = np.zeros(self.count, bool)
        self._enter_reads()
        if self.dirty:
            earlier = self._writer[granules]
            bad = self._unordered(earlier, stamps)
            if bad is not None and atomic:
                bad &= ~self._atomic[granules]
            if (found := _first(bad, earlier)) is not None:
                return "write", *found
        for readers in self._readers:
            earlier = readers[granules]
            bad = self._unordered(earlier, stamps)
            if (found := _first(bad, earlier)) is not None:
                return "read", *found
        self.dirty = True
        self._writer[granules] = stamps
        self._atomic[granules] = atomic
        if not atomic:
            last = self._writer[granules]
            if (found := _first(last != stamps, last)) is not None:
                return "write", *found
        return None

    def _unordered(self, earlier: Array, now: Array) -> Array | None:
        """Where an earlier access by another thread is not ordered before the one now, if any."""
        differs = earlier ^ now
        found = differs >= _OTHER_THREAD
        found &= earlier != 0
        if not np.count_nonzero(found):
            return None
        found &= (differs >= _OTHER_WARP) | ((differs & _WARP_SYNCS) == 0)
        here = np.flatnonzero(found & (differs < _OTHER_BLOCK))
        if here.size:
            found[here] = ~self.clocks.ordered(earlier[here], now[here])
        return found

    def written(self, granules: Array) -> Array:
        """Which granules were written to since the last reset."""
        if self._writer is None:
            return np.zeros(len(granules), bool)
        result: Array = self._writer[granules] != 0
        return result

    def writers(self, granules: Array) -> Array:
        """The numbers of the threads that wrote to them last."""
        if self._writer is None:
            return np.zeros(len(granules), np.int64)
        return stamped_who(self._writer[granules])

    def _enter_reads(self) -> None:
        for granules, stamps in self._log:
            if not self._readers:
                self._readers = [np.zeros(self.count, np.int64) for _ in range(2)]
            last, other = self._readers
            before = last[granules]
            moved = (before ^ stamps) >= _OTHER_THREAD
            other[granules[moved]] = before[moved]
            last[granules] = stamps
            lost = last[granules] != stamps  # another thread of the same instruction
            other[granules[lost]] = stamps[lost]
        self._log.clear()
        self._logged = 0


def _first(bad: Array | None, earlier: Array) -> tuple[int, int] | None:
    if bad is None or not np.count_nonzero(bad):
        return None
    at = int(bad.argmax())
    return at, int(earlier[at])
