# SPDX-License-Identifier: Apache-2.0
"""The threads that run together: blocks of a launch, padded to whole warps, side by side.

A register is a numpy array with an entry for every lane. Instructions on registers compute for all
lanes and keep the results of the active ones; what touches memory works on the active lanes only.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.memory import Region
from ptx.products import Products
from ptx.races import Clocks, Shadow, stamp

if TYPE_CHECKING:
    from ptx.compiler import Program
    from ptx.device import Device

__all__ = ["ALL_LANES", "WARP", "WARPGROUP", "Warps", "warp_words"]

Array = np.ndarray[Any, Any]
WARP = 32
WARPGROUP = 4 * WARP
ALL_LANES = 0xFFFFFFFF
_ALL = slice(None)
_FEW = 8  # one lane of so many is few


class Warps:
    """State of the lanes of `blocks` blocks from `first_block` on.

    Attributes:
        registers: Views of registers and constants, by the slots that `compiler.py` gave out.
        active: Lanes that run now, `number` of them. `mask` is the same, or None where all live
            lanes run.
        whole: Whether the active lanes are known to be whole warps.
        live: Lanes that have not exited, `alive` of them; `live_whole` if in whole warps.
        lane, block, thread: Number in the warp; of the block in the grid; in the block.
    """

    def __init__(
        self, device: "Device", program: "Program", parameters: bytes,
        grid: tuple[int, int, int], shape: tuple[int, int, int], dynamic: int,
        first_block: int, blocks: int,
    ) -> None:  # fmt: skip
        self.device, self.program, self.parameters = device, program, parameters
        self.grid, self.shape = grid, shape
        self.threads = shape[0] * shape[1] * shape[2]
        self.stride = -(-self.threads // WARP) * WARP
        self.blocks, self.count = blocks, blocks * self.stride
        number = self._every = np.arange(self.count)
        self.thread, self.local_block = number % self.stride, number // self.stride
        self.block = self.local_block + first_block
        self.lane = (self.thread % WARP).astype(np.uint32)
        self.live = self.thread < self.threads
        self.clocks = Clocks(first_block, blocks, self.stride // WARP)
        Shadow.clocks = self.clocks
        self.warp_syncs = np.zeros(self.count, np.int64)
        self.stamps = np.zeros(0, np.int64)
        self.restamp()

        size = program.shared_size + dynamic
        self.shared_size = size
        stride = max(-(-size // 128) * 128, 128)
        self.shared_base = self.local_block * stride
        self.shared = Region(
            "shared memory", np.full(blocks * stride, 0xFF, np.uint8), written=False,
            part=stride, symbols={v: k for k, v in program.shared_symbols.items()},
        )  # fmt: skip
        self.shared.make_holes(program.shared_gaps)
        self.local_size = program.local_size
        self.local_base = number * max(self.local_size, 1)
        self.local = Region(
            "local memory", np.full(self.count * max(self.local_size, 1), 0xFF, np.uint8),
            written=False, granule=1, part=max(self.local_size, 1), races=False,
        )  # fmt: skip
        self.copies: list[Any] = []  # asynchronous ones, see instructions/asynchronous.py
        self.copy_groups = np.zeros(self.count, np.int64)
        self.bulk_groups: list[Any] = []
        self.mbarriers: dict[int, Any] = {}
        self.products = Products(self.count)
        if program.accumulators:
            self.shared.track_proxies()

        self.alive = 0
        self.live_whole = False
        self.die(~self.live)
        self.activate(self.live)
        self.registers: list[Any] = program.allocate(self)

    def restamp(self) -> None:
        """Stamps anew: a new array, because logs hold the old one."""
        epochs = np.repeat(self.clocks.epochs.reshape(-1), WARP)
        self.stamps = stamp(self.block, self.thread, epochs, self.warp_syncs)

    def release(self, lanes: Array) -> dict[int, Array]:
        """Ends epochs of the warps of `lanes`; what each of them tells, by its number."""
        warps = np.unique(lanes // WARP).tolist()
        told = {warp: self.clocks.release(*divmod(warp, self.stride // WARP)) for warp in warps}
        self.restamp()
        return told

    def acquire(self, lane: int, told: Array) -> None:
        self.clocks.acquire(*divmod(lane // WARP, self.stride // WARP), told)

    def barrier(self, blocks: Array) -> None:
        """Blocks have passed a barrier, by their numbers among those that run."""
        self.clocks.barrier(blocks)
        self.restamp()

    def die(self, chosen: Array) -> None:
        """These lanes exit."""
        self.live = self.live & ~chosen
        self.alive = int(np.count_nonzero(self.live))
        words = np.packbits(self.live).view(np.uint32)
        self.live_whole = bool(((words == ALL_LANES) | (words == 0)).all())

    def activate(self, active: Array) -> None:
        """Lets these lanes run."""
        self.active, self.number = active, int(np.count_nonzero(active))
        self.mask = None if self.number == self.alive else active
        self.whole = False
        self._lanes: Array | None = None

    def put(self, to: int, function: Callable[..., Array], slots: Sequence[int]) -> None:
        """Register `to` = function(registers), in the active lanes, which are not all."""
        values = [self.registers[slot] for slot in slots]
        if _FEW * self.number < self.count:
            lanes = self.lanes
            self.registers[to][lanes] = function(*[x[lanes] if x.ndim else x for x in values])
        else:
            np.copyto(self.registers[to], function(*values), where=self.mask)

    def activity(self) -> tuple[Any, ...]:
        return self.active, self.number, self.mask, self.whole, self._lanes

    def restore(self, before: tuple[Any, ...]) -> None:
        """Lets those lanes run again that did at `activity`."""
        self.active, self.number, self.mask, self.whole, self._lanes = before

    @property
    def lanes(self) -> Array:
        """Indices of the active lanes."""
        if self._lanes is None:
            self._lanes = self._every if self.number == self.count else np.flatnonzero(self.active)
        return self._lanes

    @property
    def chosen(self) -> Any:
        """What picks the active lanes out of a register: their indices, or a slice for all."""
        return _ALL if self.number == self.count else self.lanes

    def special(self, name: str) -> Any:
        """The value of a special register: for all lanes, or one for all."""
        axis = {"x": 0, "y": 1, "z": 2}.get(name[-1], -1) if name[-2:-1] == "." else -1
        if axis >= 0:
            kind = name[1:-2]
            sizes = {"tid": self.shape, "ctaid": self.grid}.get(kind)
            if sizes is not None:
                value = self.thread if kind == "tid" else self.block
                for size in sizes[:axis]:
                    value = value // size
                return (value % sizes[axis]).astype(np.uint32)
            return np.uint32({"ntid": self.shape, "nctaid": self.grid}[kind][axis])
        one = np.uint32(1)
        match name:
            case "%laneid":
                return self.lane
            case "%warpid":
                return (self.thread // WARP).astype(np.uint32)
            case "%nwarpid":
                return np.uint32(self.stride // WARP)
            case "%lanemask_eq":
                return one << self.lane
            case "%lanemask_lt":
                return (one << self.lane) - one
            case "%lanemask_le":
                return ((one << self.lane) - one) | (one << self.lane)
            case "%lanemask_gt":
                return ~(((one << self.lane) - one) | (one << self.lane))
            case "%lanemask_ge":
                return ~((one << self.lane) - one)
            case "%dynamic_smem_size":
                return np.uint32(self.shared_size - self.program.shared_size)
            case "%total_smem_size":
                return np.uint32(self.shared_size)
            case "%smid":
                return (self.block % self.device.processors).astype(np.uint32)
            case "%nsmid":
                return np.uint32(self.device.processors)
        raise KeyError(name)

    def coordinates(self, lane: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """threadIdx and blockIdx of a lane."""

        def split(number: int, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
            return (
                number % sizes[0],
                number // sizes[0] % sizes[1],
                number // (sizes[0] * sizes[1]),
            )

        return split(int(self.thread[lane]), self.shape), split(int(self.block[lane]), self.grid)


def warp_words(chosen: Array) -> Array:
    """For every lane the bits of its warp in `chosen`."""
    words = np.packbits(chosen.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)
    return np.repeat(words[:, 0], WARP)
