# SPDX-License-Identifier: Apache-2.0
"""Instructions that numpy computes together: the same function of registers that do not depend on
each other, as unrolled loops have them. With few lanes most of an instruction's time is that of
calling numpy."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ptx.compiler import Step
    from ptx.parser import Instruction
    from ptx.warps import Warps

__all__ = ["Lanewise", "batched"]

Slot = tuple[str, Any, Any]
_NUMBERS = 8192  # that are computed together: more cost cache


@dataclass(frozen=True)
class Lanewise:
    """An instruction that does nothing but target = function(sources), lane by lane."""

    function: Callable[..., Any]
    target: int
    sources: tuple[int, ...]

    def key(self, slots: list[Slot]) -> Hashable:
        """The same for instructions that can be computed together; None if with no other."""
        kinds = [slots[source][0] for source in self.sources]
        if "register" not in kinds or "special" in kinds:
            return None
        sources = (
            slots[source][2] if kind == "register" else source
            for source, kind in zip(self.sources, kinds, strict=True)
        )
        return self.function, slots[self.target][2], *sources


def batched(
    steps: list[tuple["Step", "Instruction"]], lanewise: dict["Step", Lanewise], slots: list[Slot]
) -> list[tuple["Step", "Instruction"]]:
    """The steps of a block, with those that can be computed together as one."""
    result: list[tuple[Step, Instruction]] = []
    run: list[tuple[Step, Instruction]] = []
    for each in [*steps, None]:
        if each is not None and each[0] in lanewise:
            run.append(each)
            continue
        result += _reordered(run, lanewise, slots)
        run = []
        if each is not None:
            result.append(each)
    return result


def _reordered(
    run: list[tuple["Step", "Instruction"]], lanewise: dict["Step", Lanewise], slots: list[Slot]
) -> list[tuple["Step", "Instruction"]]:
    """Consecutive lanewise instructions, by how many others each has to come after."""
    written: dict[Any, int] = {}  # registers, and the level at which they were last
    read: dict[Any, int] = {}
    levels: dict[tuple[int, Hashable], list[tuple[Step, Instruction]]] = {}
    for number, each in enumerate(run):
        one = lanewise[each[0]]
        sources = [slots[source][1] for source in one.sources if slots[source][0] == "register"]
        target = slots[one.target][1]
        before = [written.get(register, 0) for register in (*sources, target)]
        level = 1 + max(*before, read.get(target, 0))
        written[target] = level
        for source in sources:
            read[source] = max(level, read.get(source, 0))
        key = one.key(slots)
        levels.setdefault((level, number if key is None else key), []).append(each)
    result = []
    for _, members in sorted(levels.items(), key=lambda item: item[0][0]):
        if len(members) == 1:
            result += members
        else:
            result.append((_together(members, lanewise, slots), members[0][1]))
    return result


def _together(
    members: list[tuple["Step", "Instruction"]], lanewise: dict["Step", Lanewise],
    slots: list[Slot],
) -> "Step":  # fmt: skip
    steps = [step for step, _ in members]
    each = [lanewise[step] for step in steps]
    function = each[0].function
    targets = [one.target for one in each]
    columns = [list(column) for column in zip(*(one.sources for one in each), strict=True)]
    registers = [slots[column[0]][0] == "register" for column in columns]

    def run(w: "Warps") -> None:
        size = _NUMBERS // w.count
        if size < 2:
            for step in steps:
                step(w)
            return
        r = w.registers
        for start in range(0, len(targets), size):
            part = targets[start : start + size]
            arguments = [
                np.concatenate([r[slot] for slot in column[start : start + size]])
                if several
                else r[column[0]]
                for column, several in zip(columns, registers, strict=True)
            ]
            for to, value in zip(part, function(*arguments).reshape(len(part), -1), strict=True):
                if w.mask is None:
                    r[to][...] = value
                else:
                    np.copyto(r[to], value, where=w.mask)

    return run
