# SPDX-License-Identifier: Apache-2.0
"""wgmma: products of matrices that a warpgroup starts and waits for (PTX manual 9.7.15).

A warpgroup is 4 warps, the first with a number divisible by 4. Its products are computed when they
are started; what they read may not be written to, and their accumulators not touched, until a warp
has waited for them. Accumulators that other instructions have written to, and shared memory that
ordinary stores have, want a fence before. Sums are exact and then truncated, as in matrix.py.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.compiler import Compiler, Control, Step, instruction
from ptx.faults import NotModelled, Violation
from ptx.instructions.floating import round32
from ptx.parser import Immediate, Instruction, Name, Vector
from ptx.products import PIECE
from ptx.values import bf16_to_float
from ptx.warps import WARP, WARPGROUP

if TYPE_CHECKING:
    from ptx.warps import Warps

Array = np.ndarray[Any, Any]
Match = re.Match[str]

ALL_LANES = 0xFFFFFFFF
_ROWS, _COLUMNS = 64, 16  # of A
# Bytes of a row of the swizzles, by the descriptor's number for them; 0 has none.
_SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}


def _matrix_addresses(descriptor: int, rows: int, lane: int) -> Array:
    """Addresses in shared memory of the pieces `[rows, 2]` of 8 elements, from a descriptor."""
    start, leading, stride = (((descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
    swizzle = _SWIZZLES[descriptor >> 62]
    if descriptor & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62):
        raise Violation("descriptor", f"{descriptor:#x} has bits that are not modelled", lane)
    row, piece = np.arange(rows)[:, None], np.arange(2)[None]
    if not swizzle:  # groups of 8 rows by 16 bytes, which lie together
        return start + row // 8 * stride + piece * leading + row % 8 * PIECE
    repeat = 8 * swizzle  # bytes after which the pattern begins again
    if start % repeat >= swizzle:
        raise Violation("descriptor", f"the matrix begins at {start}, not in the first row of a "
                        f"pattern of {repeat} bytes", lane)  # fmt: skip
    if start % swizzle + 2 * PIECE > swizzle:
        raise Violation("descriptor", "the matrix runs over the end of a row", lane)
    linear = start + row // 8 * stride + row % 8 * swizzle + piece * PIECE
    bits = swizzle // 16 - 1
    result: Array = linear ^ ((linear >> 7) & bits) << 4
    return result


def _matrix(w: "Warps", descriptor: int, rows: int, lanes: Array) -> tuple[Array, Array]:
    """Bits `[rows, 16]` of a matrix in shared memory, and the offsets of its pieces."""
    addresses = _matrix_addresses(descriptor, rows, int(lanes[0])).reshape(-1)
    base = int(w.shared_base[lanes[0]])
    bad = addresses + PIECE > w.shared_size
    if bad.any():
        at = int(addresses[bad.argmax()])
        raise Violation("out of bounds", f"wgmma reads 16 bytes at offset {at} of {w.shared_size} "
                        "bytes of shared memory", int(lanes[0]))  # fmt: skip
    offsets = addresses + base
    readers = np.full(len(offsets), lanes[0])
    w.shared.check(offsets, PIECE, w.stamps[readers], readers, "read")
    w.shared.check_proxy(offsets, PIECE, int(lanes[0]))
    bits = np.stack(w.shared.load(offsets, np.uint16, 8), 1).reshape(rows, _COLUMNS)
    return bits, offsets


@instruction(
    r"(wgmma)\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k16\.f32\.(?P<kind>bf16|f16)\.(bf16|f16)"
)
def _mma_async(code: Compiler, ins: Instruction, match: Match) -> Control:
    """`{d}, a, b, scale-d, scale-a, scale-b, transpose-a, transpose-b`, both in shared memory."""
    n = int(match["n"])
    d, a, b, scale, *constants = ins.operands
    values = [c.value for c in constants if isinstance(c, Immediate)]
    if (
        n % 8 or not 8 <= n <= 256 or not ins.opcode.endswith(f"{match['kind']}.{match['kind']}")
        or not isinstance(d, Vector) or len(d.items) != n // 2 or isinstance(a, Vector)
        or len(values) != 4 or any(v not in (1, -1) for v in values[:2]) or values[2:] != [0, 0]
    ):  # fmt: skip
        raise NotModelled(ins.text)
    names = [item.name for item in d.items if isinstance(item, Name)]
    slots = [code.source(item, np.float32) for item in d.items]
    left, right = code.source(a, np.uint64), code.source(b, np.uint64)
    keep, negated = code.predicate(scale)
    sign = values[0] * values[1]

    def number(bits: Array) -> Array:
        value = bf16_to_float(bits) if match["kind"] == "bf16" else bits.view(np.float16)
        return value.astype(np.float64)

    def step(w: "Warps") -> None:
        products = w.products
        for name in names:
            bad = products.unfenced.get(name)
            if bad is not None and (bad & w.active).any():
                raise Violation("wgmma", f"{name} was written to and no wgmma.fence came since",
                                int((bad & w.active).argmax()))  # fmt: skip
        all_lanes = w.lanes.reshape(-1, WARPGROUP)
        before = np.empty((len(slots), w.count), np.float32)
        for i, (name, slot) in enumerate(zip(names, slots, strict=True)):
            before[i] = w.registers[slot]
            if name in products.pending:
                lanes, _, value, _ = products.pending[name]
                before[i] = np.where(lanes, value, before[i])
        after = before.copy()
        for lanes in all_lanes:
            first = int(lanes[0])
            operands = []
            for slot, rows in ((left, _ROWS), (right, n)):
                every = np.broadcast_to(w.registers[slot], w.count)[lanes]
                if (every != every[0]).any():
                    raise Violation("descriptor", "not the same in all threads", first)
                bits, offsets = _matrix(w, int(every[0]), rows, lanes)
                w.shared.begin_reads(offsets, PIECE)
                products.reads.append((int(products.groups[first]), lanes, offsets))
                operands.append(number(np.ascontiguousarray(bits)))
            total = sign * (operands[0] @ operands[1].T)
            add = np.broadcast_to(w.registers[keep], w.count)[lanes]
            if (add != add[0]).any():
                raise Violation("wgmma", "scale-d is not the same in all threads", first)
            if add[0] != negated:
                total = total + _unfold(before[:, lanes], n)
            after[:, lanes] = _fold(round32(total, ".rz"), n)
        for i, (name, slot) in enumerate(zip(names, slots, strict=True)):
            lanes = w.active.copy()
            groups = products.groups.copy()
            if name in products.pending:
                old, old_groups, *_ = products.pending[name]
                groups = np.where(w.active, groups, old_groups)
                lanes |= old
            products.pending[name] = (lanes, groups, after[i], slot)

    return Control("warpgroup", step=step)


def _unfold(registers: Array, n: int) -> Array:
    """C `[64, n]`: of warp w, register 4 j + 2 i + e holds row 16 w + 8 i + group, column 8 j +
    2 t + e."""
    values = registers.reshape(n // 8, 2, 2, 4, 8, 4)  # [j, i, e, warp, group, t]
    return values.transpose(3, 1, 4, 0, 5, 2).reshape(_ROWS, n).astype(np.float64)


def _fold(matrix: Array, n: int) -> Array:
    values = matrix.reshape(4, 2, 8, n // 8, 4, 2)  # [warp, i, group, j, t, e]
    return values.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, WARPGROUP)


@instruction(r"(wgmma)\.fence\.sync\.aligned")
def _fence(code: Compiler, ins: Instruction, match: Match) -> Control:
    def step(w: "Warps") -> None:
        for name, lanes in list(w.products.unfenced.items()):
            lanes &= ~w.active
            if not lanes.any():
                del w.products.unfenced[name]

    return Control("warp", step=step, index=code.constant(ALL_LANES, np.uint32))


@instruction(r"(wgmma)\.commit_group\.sync\.aligned")
def _commit(code: Compiler, ins: Instruction, match: Match) -> Control:
    def step(w: "Warps") -> None:
        w.products.groups[w.lanes] += 1

    return Control("warp", step=step, index=code.constant(ALL_LANES, np.uint32))


@instruction(r"(wgmma)\.wait_group\.sync\.aligned")
def _wait(code: Compiler, ins: Instruction, match: Match) -> Control:
    (number,) = ins.operands
    assert isinstance(number, Immediate)
    return Control("warp", step=lambda w: w.products.wait(w, number.value),
                   index=code.constant(ALL_LANES, np.uint32))  # fmt: skip


@instruction(r"(setmaxnreg)\.(inc|dec)\.sync\.aligned\.u32")
def _registers(code: Compiler, ins: Instruction, match: Match) -> Step:
    """How many registers there are is ptxas's affair: nothing happens here."""
    (number,) = ins.operands
    if not isinstance(number, Immediate) or number.value % 8 or not 24 <= number.value <= 256:
        raise NotModelled(ins.text)
    return lambda w: None


assert WARPGROUP == 4 * WARP
