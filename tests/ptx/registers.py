# SPDX-License-Identifier: Apache-2.0
"""The registers of the lanes that run together, in memory that all programs share."""

from typing import Any, ClassVar

import numpy as np

__all__ = ["Registers"]

Array = np.ndarray[Any, Any]


class Registers:
    """Views of the registers of one program for one number of lanes.

    A program has up to thousands of them, and there are hundreds of programs, of which one runs at
    a time. The memory grows by powers of two, so that what views still hold of smaller ones is less
    than the largest.

    Args:
        rows: How many registers there are by width in bytes, 0 for predicates.
        slots: Kind, width and row (of a predicate the row alone), and dtype; a constant is its own
            value.
        count: Lanes.
    """

    _memory: ClassVar[dict[int, Array]] = {}
    _last: ClassVar["Registers | None"] = None

    def __init__(self, rows: dict[int, int], slots: list[tuple[str, Any, Any]], count: int) -> None:
        self._used: dict[int, Array] = {}
        for width, number in rows.items():
            size = number * count * max(width, 1)
            if width not in self._memory or self._memory[width].size < size:
                self._memory[width] = np.empty(1 << (size - 1).bit_length(), np.uint8)
            self._used[width] = self._memory[width][:size].reshape(number, -1)
        wholes: dict[Any, Array] = {}

        def view(width: int, row: int, dtype: Any) -> Array:
            if (width, dtype) not in wholes:
                whole = self._used[width].view(dtype)
                wholes[width, dtype] = whole[:, :: max(width, 1) // whole.itemsize]
            result: Array = wholes[width, dtype][row]
            return result

        self._views: list[Any] = []
        for kind, what, dtype in slots:
            if kind != "register":
                self._views.append(what)
            elif dtype is np.bool_:
                self._views.append(view(0, what, dtype))
            else:
                self._views.append(view(*what, dtype))

    def take(self) -> list[Any]:
        """The views, by slot, in memory that is its own until another's are taken.

        It begins with ones, which are NaN: what others leave there may be numbers as small as take
        the emulator, and the processor, long in lanes that do not even run.
        """
        if Registers._last is not self:
            for width, used in self._used.items():
                used.fill(0xFF if width else 0)
            Registers._last = self
        return list(self._views)
