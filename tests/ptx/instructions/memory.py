# SPDX-License-Identifier: Apache-2.0
"""Loads and stores (PTX manual 9.7.9.8 to 9.7.9.12), and how addresses become buffers."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.compiler import Compiler, Step, instruction
from ptx.faults import NotModelled, Violation
from ptx.memory import GENERIC_LOCAL, GENERIC_SHARED, Region
from ptx.parser import Address, Instruction, Name, Operand, Vector
from ptx.values import DTYPES

if TYPE_CHECKING:
    from ptx.warps import Warps

__all__ = ["addresses_of", "check_aligned", "place"]

Array = np.ndarray[Any, Any]
Match = re.Match[str]

_SCOPE = r"\.(cta|cluster|gpu|sys)"
_EVICT = (
    r"(\.(ca|cg|cs|lu|cv|wb|wt))?"
    r"(\.L1::(evict_normal|evict_unchanged|evict_first|evict_last|no_allocate))?"
)
_PREFETCH = r"(\.L2::(64B|128B|256B))?"
_VALUE = r"(?P<vector>\.v[24])?\.(?P<type>[usb](8|16|32|64)|f16|f32|f64)"
_SPACE = r"(\.(?P<space>const|global|local|param(::entry|::func)?|shared(::cta)?))?"


def addresses_of(code: Compiler, operand: Operand) -> Callable[["Warps"], Array]:
    """The addresses in the active lanes, as int64, for an operand `[base + offset]`."""
    if not isinstance(operand, Address):
        raise NotModelled(f"the address {operand}")
    dtype = np.uint64
    if code.is_register(operand.base) and code.width(operand.base) == 4:
        dtype = np.uint32
    slot, offset = code.source(operand.base, dtype), operand.offset

    def run(w: "Warps") -> Array:
        base = w.registers[slot]
        if base.ndim == 0:
            return np.full(w.number, int(base) + offset, np.int64)
        result: Array = base[w.chosen].astype(np.int64)
        if offset:
            result += offset
        return result

    return run


def check_aligned(addresses: Array, width: int, lanes: Array, verb: str) -> None:
    """A fault unless all addresses are multiples of the width."""
    off = addresses & (width - 1)
    if np.count_nonzero(off):
        at = int((off != 0).argmax())
        raise Violation(
            "misaligned",
            f"{verb} of {width} bytes at {int(addresses[at]):#x}, {int(off[at])} past a multiple",
            int(lanes[at]),
        )


def place(
    w: "Warps", space: str, addresses: Array, lanes: Array, width: int, verb: str
) -> list[tuple[Region, Array, Any]]:
    """Where accesses fall: regions, offsets in them, and which of `lanes` those are."""
    if space == "":
        if int(addresses.max()) < GENERIC_SHARED:
            return w.device.memory.place(addresses, width, lanes, verb)
        result = []
        shared = (addresses >= GENERIC_SHARED) & (addresses < GENERIC_LOCAL)
        local = addresses >= GENERIC_LOCAL
        for chosen, window, name in (
            (~(shared | local), 0, "global"),
            (shared, GENERIC_SHARED, "shared"),
            (local, GENERIC_LOCAL, "local"),
        ):
            which = np.flatnonzero(chosen)
            if len(which):
                parts = place(w, name, addresses[which] - window, lanes[which], width, verb)
                result += [(region, offsets, which[part]) for region, offsets, part in parts]
        return result
    if space in ("global", "const"):
        return w.device.memory.place(addresses, width, lanes, verb)
    if space == "shared":
        region, size, base = w.shared, w.shared_size, w.shared_base
    else:
        region, size, base = w.local, w.local_size, w.local_base
    if int(addresses.min()) < 0 or int(addresses.max()) + width > size:
        bad = (addresses < 0) | (addresses + width > size)
        at = int(bad.argmax())
        raise Violation(
            "out of bounds",
            f"{verb} of {width} bytes at offset {int(addresses[at])} of {size} bytes of "
            f"{region.name}",
            int(lanes[at]),
        )
    return [(region, addresses + base[w.chosen if lanes is w.lanes else lanes], slice(None))]


@instruction(rf"(ld)(\.weak)?(?P<order>\.volatile|\.(relaxed|acquire){_SCOPE})?{_SPACE}{_EVICT}"
             rf"{_PREFETCH}(?P<nc>){_VALUE}")  # fmt: skip
@instruction(rf"(ld)(?P<order>)\.(?P<space>global)(\.(ca|cg|cs))?(?P<nc>\.nc){_EVICT}"
             rf"{_PREFETCH}{_VALUE}")  # fmt: skip
@instruction(rf"(ldu)(?P<order>)\.(?P<space>global)(?P<nc>){_VALUE}")
def _ld(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    space = (match["space"] or "").split("::")[0]
    target, source = ins.operands
    targets = target.items if isinstance(target, Vector) else (target,)
    if len(targets) != int((match["vector"] or ".v1")[2:]):
        raise NotModelled("a vector of another length")
    slots = [code.target(item, dtype) for item in targets]
    width = np.dtype(dtype).itemsize * len(targets)
    assert isinstance(source, Address)
    if space == "param":
        if not isinstance(source.base, Name) or source.base.name not in code.local:
            return _ld_parameter(code, source, slots, dtype)
        space = "local"
    find = addresses_of(code, source)
    kind = "relaxed read" if match["order"] else "read"
    constant = bool(match["nc"])

    def step(w: "Warps") -> None:
        lanes = w.lanes
        addresses = find(w)
        check_aligned(addresses, width, lanes, "read")
        for region, offsets, which in place(w, space, addresses, lanes, width, "read"):
            here = lanes[which]
            chosen = w.chosen if len(here) == w.number else here
            region.check(offsets, width, w.stamps[chosen], here, kind, constant=constant)
            for slot, value in zip(slots, region.load(offsets, dtype, len(slots)), strict=True):
                if slot is not None:
                    w.registers[slot][chosen] = value

    return step


def _ld_parameter(code: Compiler, source: Address, slots: list[int | None], dtype: Any) -> Step:
    """From the kernel's parameters: one value for all, or by an offset in a register."""
    size = np.dtype(dtype).itemsize
    if isinstance(source.base, Name) and source.base.name in code.parameters:
        start, length = code.parameters[source.base.name]
        start += source.offset
        if source.offset + size * len(slots) > length:
            raise NotModelled("a read beyond a parameter")
        values = [code._new("parameter", start + size * j, dtype) for j in range(len(slots))]

        def step(w: "Warps") -> None:
            r = w.registers
            for slot, value in zip(slots, values, strict=True):
                if slot is not None:
                    if w.mask is None:
                        r[slot][...] = r[value]
                    else:
                        np.copyto(r[slot], r[value], where=w.mask)

        return step
    find = addresses_of(code, source)

    def indexed(w: "Warps") -> None:
        lanes, addresses = w.lanes, find(w)
        size_all = size * len(slots)
        check_aligned(addresses, size_all, lanes, "read")
        bad = (addresses < 0) | (addresses + size_all > len(w.parameters))
        if bad.any():
            raise Violation(
                "out of bounds", "read beyond the kernel's parameters",
                int(lanes[int(bad.argmax())]),
            )  # fmt: skip
        octets = np.frombuffer(w.parameters, np.uint8)
        for j, slot in enumerate(slots):
            at = addresses[:, None] + (j * size + np.arange(size))
            if slot is not None:
                w.registers[slot][lanes] = octets[at].view(dtype)[:, 0]

    return indexed


@instruction(
    rf"(st)(\.weak)?(?P<order>\.volatile|\.(relaxed|release){_SCOPE})?{_SPACE}{_EVICT}{_VALUE}"
)
def _st(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    space = (match["space"] or "").split("::")[0]
    target, source = ins.operands
    sources = source.items if isinstance(source, Vector) else (source,)
    if len(sources) != int((match["vector"] or ".v1")[2:]):
        raise NotModelled("a vector of another length")
    slots = [code.source(item, dtype) for item in sources]
    width = np.dtype(dtype).itemsize * len(sources)
    if space == "param":
        assert isinstance(target, Address)
        if not isinstance(target.base, Name) or target.base.name not in code.local:
            raise NotModelled("a store to the kernel's parameters")
        space = "local"
    if space == "const":
        raise NotModelled(ins.opcode)
    find = addresses_of(code, target)
    kind = "relaxed write" if match["order"] else "write"

    def step(w: "Warps") -> None:
        lanes = w.lanes
        addresses = find(w)
        check_aligned(addresses, width, lanes, "write")
        for region, offsets, which in place(w, space, addresses, lanes, width, "write"):
            here = lanes[which]
            chosen = w.chosen if len(here) == w.number else here
            region.check(offsets, width, w.stamps[chosen], here, kind)
            values = [
                value[chosen] if value.ndim else value
                for value in (w.registers[slot] for slot in slots)
            ]
            region.store(offsets, values, dtype)

    return step


@instruction(r"(prefetch)(\.(global|local))?\.(L1|L2)")
@instruction(r"(prefetchu)\.L1")
@instruction(r"(discard)\.global\.L2")
def _prefetch(code: Compiler, ins: Instruction, match: Match) -> Step:
    if match[1] == "discard":
        raise NotModelled(ins.opcode)
    addresses_of(code, ins.operands[0])
    return lambda w: None
