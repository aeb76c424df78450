# SPDX-License-Identifier: Apache-2.0
"""Products of warpgroups that are under way: what nobody may touch until they are waited for."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.faults import Violation

if TYPE_CHECKING:
    from ptx.warps import Warps

__all__ = ["PIECE", "Products"]

Array = np.ndarray[Any, Any]

PIECE = 16  # bytes of shared memory that are read together


class Products:
    """The products of the warpgroups of one `Warps` that are under way.

    Attributes:
        pending: By accumulator: the lanes that may not touch it, their group, and its value.
        unfenced: By accumulator: the lanes that have written to it since the last fence.
        reads: Group, lanes and offsets in shared memory of every product.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.groups = np.zeros(count, np.int64)  # that every lane has committed
        self.pending: dict[str, tuple[Array, Array, Array, int]] = {}
        self.unfenced: dict[str, Array] = {}
        self.reads: list[tuple[int, Array, Array]] = []

    def touch(self, w: "Warps", names: tuple[str, ...], written: frozenset[str]) -> None:
        """An instruction other than wgmma uses these registers."""
        for name in names:
            if name in self.pending:
                bad = self.pending[name][0] & w.active
                if bad.any():
                    verb = "write to" if name in written else "read of"
                    raise Violation("wgmma", f"{verb} the accumulator {name}, whose product has "
                                    "not been waited for", int(bad.argmax()))  # fmt: skip
            if name in written:
                before = self.unfenced.get(name)
                self.unfenced[name] = w.active.copy() if before is None else before | w.active

    def wait(self, w: "Warps", left: int) -> None:
        """The active lanes wait until at most `left` of their groups are under way."""
        over = self.groups - left
        for name, (lanes, groups, values, slot) in list(self.pending.items()):
            done = lanes & w.active & (groups < over)
            if done.any():
                w.registers[slot][done] = values[done]
                lanes &= ~done
                if not lanes.any():
                    del self.pending[name]
        still = []
        for group, lanes, offsets in self.reads:
            if (w.active[lanes] & (over[lanes] > group)).any():
                w.shared.end_reads(offsets, PIECE)
            else:
                still.append((group, lanes, offsets))
        self.reads = still

    def check_over(self) -> None:
        """At the end of a kernel."""
        for name, (lanes, *_) in self.pending.items():
            raise Violation("wgmma", f"the kernel ends while a product into {name} is under way",
                            int(lanes.argmax()))  # fmt: skip
