# SPDX-License-Identifier: Apache-2.0
"""Integers: arithmetic, logic, shifts and bit fields (PTX manual 9.7.1, 9.7.2, 9.7.8)."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.compiler import Compiler, Step, instruction
from ptx.faults import NotModelled, Violation
from ptx.parser import Instruction, Name, Pair
from ptx.values import DTYPES

if TYPE_CHECKING:
    from ptx.warps import Warps

Array = np.ndarray[Any, Any]
Match = re.Match[str]

_WIDER = {np.int16: np.int32, np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64}


@instruction(r"(add|sub|min|max)\.(?P<type>[us](16|32|64))")
@instruction(r"(and|or|xor)\.(?P<type>b(16|32|64)|pred)")
def _two_operands(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    function = {
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[match[1]]  # fmt: skip
    if dtype is np.bool_ and any(getattr(o, "negated", False) for o in ins.operands):
        raise NotModelled("a negated predicate here")
    target, a, b = ins.operands
    return code.compute(function, target, dtype, (a, dtype), (b, dtype))


@instruction(r"(add|sub)\.sat\.s32")
def _saturating(code: Compiler, ins: Instruction, match: Match) -> Step:
    sign = 1 if match[1] == "add" else -1

    def function(a: Array, b: Array) -> Array:
        exact = np.asarray(a, np.int64) + sign * np.asarray(b, np.int64)
        return np.clip(exact, -(2**31), 2**31 - 1).astype(np.int32)

    target, a, b = ins.operands
    return code.compute(function, target, np.int32, (a, np.int32), (b, np.int32))


@instruction(r"(neg|abs)\.(?P<type>s(16|32|64))")
@instruction(r"(not|cnot)\.(?P<type>b(16|32|64)|pred)")
def _one_operand(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    functions: dict[str, Any] = {
        "neg": np.negative,
        "abs": np.abs,
        "not": np.logical_not if dtype is np.bool_ else np.invert,
        "cnot": lambda x: (x == 0).astype(dtype),
    }
    if match[1] == "cnot" and dtype is np.bool_:
        raise NotModelled("cnot.pred")
    return code.compute(functions[match[1]], ins.operands[0], dtype, (ins.operands[1], dtype))


@instruction(r"(mul|mad)\.(?P<half>lo|hi|wide)\.(?P<type>[us](16|32|64))")
def _multiply(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    half = match["half"]
    result = dtype
    if half == "wide":
        if dtype not in _WIDER:
            raise NotModelled("a product of 128 bits")
        result = _WIDER[dtype]
        product = _wide(result)
    elif half == "hi":
        product = _high64(dtype) if dtype in (np.int64, np.uint64) else _high(dtype)
    else:
        product = np.multiply
    target, a, b, *addend = ins.operands
    if match[1] == "mul":
        return code.compute(product, target, result, (a, dtype), (b, dtype))
    return code.compute(
        lambda x, y, z: product(x, y) + z, target, result, (a, dtype), (b, dtype),
        (addend[0], result),
    )  # fmt: skip


def _wide(result: Any) -> Any:
    return lambda a, b: np.multiply(np.asarray(a, result), b, dtype=result, casting="unsafe")


def _high(dtype: Any) -> Any:
    wide = _WIDER[dtype]
    bits = wide(8 * np.dtype(dtype).itemsize)
    return lambda a, b: ((np.asarray(a, wide) * np.asarray(b, wide)) >> bits).astype(dtype)


def _high64(dtype: Any) -> Any:
    """The upper half of a product of 128 bits, by halves of 32 bits."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)

    def unsigned(a: Array, b: Array) -> Array:
        a, b = np.asarray(a, np.uint64), np.asarray(b, np.uint64)
        cross = (a >> half) * (b & low) + (((a & low) * (b & low)) >> half)
        other = (a & low) * (b >> half) + (cross & low)
        return (a >> half) * (b >> half) + (cross >> half) + (other >> half)

    def signed(a: Array, b: Array) -> Array:
        a, b = np.asarray(a, np.int64), np.asarray(b, np.int64)
        high = unsigned(a.astype(np.uint64), b.astype(np.uint64)).astype(np.int64)
        return high - np.where(a < 0, b, np.int64(0)) - np.where(b < 0, a, np.int64(0))

    return signed if dtype is np.int64 else unsigned


@instruction(r"(mul24|mad24)\.lo\.(?P<type>[us]32)")
def _multiply24(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]

    def cut(x: Array) -> Array:
        x = np.asarray(x, dtype)
        return (x << dtype(8)) >> dtype(8)

    target, a, b, *addend = ins.operands
    if addend:
        return code.compute(
            lambda x, y, z: cut(x) * cut(y) + z,
            target,
            dtype,
            *((o, dtype) for o in (a, b, addend[0])),
        )
    return code.compute(lambda x, y: cut(x) * cut(y), target, dtype, (a, dtype), (b, dtype))


@instruction(r"sad\.(?P<type>[us](16|32|64))")
def _sum_of_differences(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    target, *sources = ins.operands
    return code.compute(
        lambda a, b, c: np.maximum(a, b) - np.minimum(a, b) + c,
        target, dtype, *((o, dtype) for o in sources),
    )  # fmt: skip


@instruction(r"(div|rem)\.(?P<type>[us](16|32|64))")
def _divide(code: Compiler, ins: Instruction, match: Match) -> Step:
    """Truncated division; by zero it is a fault, since its result is unspecified."""
    dtype = DTYPES[match["type"]]
    quotient = match[1] == "div"
    target, a, b = ins.operands
    divisor = code.source(b, dtype)

    def function(x: Array, y: Array) -> Array:
        y = np.where(y == 0, dtype(1), y)
        if not quotient:
            return np.fmod(x, y)
        if np.dtype(dtype).kind == "u":
            return np.floor_divide(x, y)
        return np.floor_divide(x - np.fmod(x, y), y)

    compute = code.compute(function, target, dtype, (a, dtype), (b, dtype))

    def step(w: "Warps") -> None:
        zero = w.active & (w.registers[divisor] == 0)
        if zero.any():
            raise Violation("division by zero", "of integers", int(zero.argmax()))
        compute(w)

    return step


@instruction(r"(shl|shr)\.(?P<type>[bus](16|32|64))")
def _shift(code: Compiler, ins: Instruction, match: Match) -> Step:
    """Shifts by more than the width give zero, or the sign."""
    dtype = DTYPES[match["type"]]
    bits = 8 * np.dtype(dtype).itemsize
    left = match[1] == "shl"
    arithmetic = np.dtype(dtype).kind == "i"
    target, a, b = ins.operands

    def function(x: Array, n: Array) -> Array:
        count = np.minimum(n, np.uint32(bits - 1)).astype(dtype)
        moved = np.left_shift(x, count) if left else np.right_shift(x, count)
        if arithmetic and not left:
            return moved
        return np.where(n < bits, moved, dtype(0))

    known = code.slots[code.source(b, np.uint32)]
    if known[0] == "constant" and int(known[1]) < bits:
        shift = np.left_shift if left else np.right_shift
        amount = dtype(int(known[1]))
        return code.compute(lambda x: shift(x, amount), target, dtype, (a, dtype))
    return code.compute(function, target, dtype, (a, dtype), (b, np.uint32))


@instruction(r"shf\.(?P<way>l|r)\.(?P<mode>wrap|clamp)\.b32")
def _funnel_shift(code: Compiler, ins: Instruction, match: Match) -> Step:
    left, wrap = match["way"] == "l", match["mode"] == "wrap"

    def function(low: Array, high: Array, n: Array) -> Array:
        both = (np.asarray(high, np.uint64) << np.uint64(32)) | np.asarray(low, np.uint64)
        count = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        moved = (both << count) >> np.uint64(32) if left else both >> count
        return moved.astype(np.uint32)

    target, a, b, c = ins.operands
    return code.compute(function, target, np.uint32, *((o, np.uint32) for o in (a, b, c)))


@instruction(r"bfe\.(?P<type>[us](32|64))")
def _extract(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    bits = 8 * np.dtype(dtype).itemsize
    signed = np.dtype(dtype).kind == "i"

    def function(x: Array, position: Array, length: Array) -> Array:
        x = np.asarray(x, dtype)
        position = (np.asarray(position) & np.uint32(255)).astype(np.int64)
        length = (np.asarray(length) & np.uint32(255)).astype(np.int64)
        unsigned = x.astype(f"u{bits // 8}")
        moved = _shift_right(unsigned, position, bits)
        mask = _mask(length, bits)
        field = moved & mask
        if not signed:
            return field
        top = np.minimum(position + length - 1, bits - 1)
        sign = (_shift_right(unsigned, top, bits) & unsigned.dtype.type(1)) != 0
        # The field may run over the end: the bits beyond it are the sign as well.
        within = np.maximum(np.minimum(length, bits - position), 0)
        extended = field | ~_mask(within, bits)
        return np.where(length == 0, 0, np.where(sign, extended, field)).astype(dtype)

    target, a, b, c = ins.operands
    return code.compute(function, target, dtype, (a, dtype), (b, np.uint32), (c, np.uint32))


def _shift_right(x: Array, n: Array, bits: int) -> Array:
    kind = x.dtype.type
    return np.where(n < bits, x >> np.minimum(n, bits - 1).astype(kind), kind(0))


def _mask(length: Array, bits: int) -> Array:
    """`length` ones."""
    kind = np.dtype(f"u{bits // 8}").type
    some = (kind(1) << np.minimum(length, bits - 1).astype(kind)) - kind(1)
    return np.where(length >= bits, ~kind(0), some).astype(kind)


@instruction(r"bfi\.(?P<type>b(32|64))")
def _insert(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    bits = 8 * np.dtype(dtype).itemsize

    def function(field: Array, into: Array, position: Array, length: Array) -> Array:
        position = (np.asarray(position) & np.uint32(255)).astype(np.int64)
        length = (np.asarray(length) & np.uint32(255)).astype(np.int64)
        shift = np.minimum(position, bits - 1).astype(dtype)
        mask = np.where(position < bits, _mask(length, bits) << shift, dtype(0))
        return (into & ~mask) | ((np.asarray(field, dtype) << shift) & mask)

    target, a, b, c, d = ins.operands
    return code.compute(
        function, target, dtype, (a, dtype), (b, dtype), (c, np.uint32), (d, np.uint32)
    )


@instruction(r"bmsk\.(?P<mode>clamp|wrap)\.b32")
def _bit_mask(code: Compiler, ins: Instruction, match: Match) -> Step:
    wrap = match["mode"] == "wrap"

    def function(position: Array, length: Array) -> Array:
        position, length = np.asarray(position, np.int64), np.asarray(length, np.int64)
        if wrap:
            position, length = position & 31, length & 31
        else:
            position, length = np.minimum(position, 32), np.minimum(length, 32)
        ones = (np.int64(1) << length) - 1
        return ((ones << position) & 0xFFFFFFFF).astype(np.uint32)

    target, a, b = ins.operands
    return code.compute(function, target, np.uint32, (a, np.uint32), (b, np.uint32))


@instruction(r"(popc|clz|brev)\.b(?P<bits>32|64)")
def _count_bits(code: Compiler, ins: Instruction, match: Match) -> Step:
    bits = int(match["bits"])
    dtype = DTYPES[f"b{bits}"]
    functions: dict[str, Any] = {
        "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
        "clz": lambda x: (bits - _bit_length(np.atleast_1d(x))).astype(np.uint32),
        "brev": lambda x: _reversed(np.atleast_1d(x)),
    }
    result = dtype if match[1] == "brev" else np.uint32
    return code.compute(functions[match[1]], ins.operands[0], result, (ins.operands[1], dtype))


def _bit_length(x: Array) -> Array:
    """The number of the highest bit set, from 1; 0 for 0."""
    high = np.frexp((x >> x.dtype.type(x.itemsize * 4)).astype(np.float64))[1]
    low = np.frexp((x & x.dtype.type((1 << x.itemsize * 4) - 1)).astype(np.float64))[1]
    return np.where(high > 0, high + x.itemsize * 4, low)


def _reversed(x: Array) -> Array:
    octets = np.ascontiguousarray(x).view(np.uint8).reshape(-1, x.itemsize)
    bits = np.unpackbits(octets, axis=1, bitorder="little")[:, ::-1]
    return np.packbits(bits, axis=1, bitorder="little").view(x.dtype).reshape(x.shape)


@instruction(r"(bfind)(?P<shift>\.shiftamt)?\.(?P<type>[us](32|64))")
def _find_bit(code: Compiler, ins: Instruction, match: Match) -> Step:
    dtype = DTYPES[match["type"]]
    bits = 8 * np.dtype(dtype).itemsize

    def function(x: Array) -> Array:
        x = np.atleast_1d(x)
        plain = np.where(x < 0, ~x, x).astype(f"u{bits // 8}")
        length = _bit_length(plain)
        found = (bits - length) if match["shift"] else length - 1
        return np.where(length == 0, -1, found).astype(np.int64).astype(np.uint32)

    return code.compute(function, ins.operands[0], np.uint32, (ins.operands[1], dtype))


@instruction(r"(fns)\.b32")
def _find_nth(code: Compiler, ins: Instruction, match: Match) -> Step:
    def function(mask: Array, base: Array, offset: Array) -> Array:
        mask, base, offset = np.broadcast_arrays(mask, base, np.asarray(offset, np.int32))
        result = np.full(mask.shape, 0xFFFFFFFF, np.uint32)
        for i in range(mask.size):
            bits = [b for b in range(32) if int(mask.flat[i]) >> b & 1]
            start, count = int(base.flat[i]), int(offset.flat[i])
            if count == 0:
                found = [start] if start in bits else []
            elif count > 0:
                found = [b for b in bits if b >= start][count - 1 : count]
            else:
                found = [b for b in reversed(bits) if b <= start][-count - 1 : -count]
            if found:
                result.flat[i] = found[0]
        return result

    target, a, b, c = ins.operands
    return code.compute(function, target, np.uint32, (a, np.uint32), (b, np.uint32), (c, np.int32))


@instruction(r"(lop3)(\.(?P<join>or|and))?\.b32")
def _logic(code: Compiler, ins: Instruction, match: Match) -> Step:
    """Any function of three bits, by its table."""
    if match["join"]:
        raise NotModelled("lop3 with a predicate")
    target, a, b, c, table = ins.operands
    bits = int(code.slots[code.source(table, np.uint32)][1])

    def function(x: Array, y: Array, z: Array) -> Array:
        result = np.zeros(np.broadcast_shapes(np.shape(x), np.shape(y), np.shape(z)), np.uint32)
        for i in range(8):
            if bits >> i & 1:
                result |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        return result

    return code.compute(function, target, np.uint32, *((o, np.uint32) for o in (a, b, c)))


@instruction(r"(prmt)\.b32(?P<mode>\.(f4e|b4e|rc8|ecl|ecr|rc16))?")
def _permute(code: Compiler, ins: Instruction, match: Match) -> Step:
    """Bytes of a and b chosen by nibbles of c; the top bit of a nibble spreads the sign."""
    if match["mode"]:
        raise NotModelled(f"prmt{match['mode']}")

    def function(a: Array, b: Array, c: Array) -> Array:
        both = (np.asarray(b, np.uint64) << np.uint64(32)) | np.asarray(a, np.uint64)
        result = np.uint32(0)
        for j in range(4):
            nibble = (c >> np.uint32(4 * j)) & np.uint32(15)
            byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(
                np.uint32
            ) & np.uint32(255)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            byte = np.where(nibble & np.uint32(8), sign, byte)
            result = result | (byte << np.uint32(8 * j))
        return result

    target, a, b, c = ins.operands
    return code.compute(function, target, np.uint32, *((o, np.uint32) for o in (a, b, c)))


@instruction(r"(add|sub|mad)(?P<half>\.lo|\.hi)?(?P<in>c)?(?P<out>\.cc)?\.(?P<type>[us](32|64))")
@instruction(r"(addc|subc|madc)(?P<half>\.lo|\.hi)?(?P<out>\.cc)?\.(?P<type>[us](32|64))")
def _extended(code: Compiler, ins: Instruction, match: Match) -> Step:
    """Arithmetic with the carry flag, which is a register of its own here."""
    name, carry_in = match[1].removesuffix("c"), match[1].endswith("c")
    if match["out"] is None and not carry_in:
        raise NotModelled(ins.opcode)
    dtype = DTYPES[match["type"]]
    unsigned = DTYPES["u" + match["type"][1:]]
    flag = "%carry"
    code.function.registers.setdefault(flag, "pred")
    carry = code.source(Name(flag), np.bool_)
    target, a, b, *rest = ins.operands
    high = (
        _high64(dtype)
        if dtype in (np.int64, np.uint64)
        else _high(dtype)
        if dtype in _WIDER
        else None
    )
    slots = [code.source(o, dtype) for o in (a, b, *rest)]
    to = code.target(target, unsigned)

    def step(w: "Warps") -> None:
        r = w.registers
        values = [r[slot] for slot in slots]
        if name == "mad":
            product = (
                high(values[0], values[1]) if match["half"] == ".hi" else values[0] * values[1]
            )
            x, y = np.asarray(product).astype(unsigned), np.asarray(values[2]).astype(unsigned)
        else:
            x, y = (np.asarray(v).astype(unsigned) for v in values)
        bit = r[carry].astype(unsigned) if carry_in else unsigned(0)
        if name == "sub":
            total = x - y - bit
            out = (x < y) | ((x == y) & (bit != 0))
        else:
            total = x + y + bit
            out = (total < x) | ((total == x) & (bit != 0))
        keep = slice(None) if w.mask is None else w.mask
        r[to][keep] = np.broadcast_to(total, w.count)[keep]
        if match["out"]:
            r[carry][keep] = np.broadcast_to(out, w.count)[keep]

    return step


@instruction(r"(dp4a)\.(?P<first>[us]32)\.(?P<second>[us]32)")
def _dot_product(code: Compiler, ins: Instruction, match: Match) -> Step:
    def split(x: Array, kind: str) -> list[Array]:
        narrow = np.int8 if kind == "s32" else np.uint8
        return [
            ((np.asarray(x, np.uint32) >> np.uint32(8 * j)) & np.uint32(255))
            .astype(np.uint8).astype(narrow).astype(np.int64)
            for j in range(4)
        ]  # fmt: skip

    def function(a: Array, b: Array, c: Array) -> Array:
        pairs = zip(split(a, match["first"]), split(b, match["second"]), strict=True)
        total = sum((x * y for x, y in pairs), np.asarray(c, np.int64))
        return np.asarray(total).astype(np.int32)

    target, a, b, c = ins.operands
    return code.compute(function, target, np.int32, (a, np.uint32), (b, np.uint32), (c, np.int32))


def pair(operand: Any) -> tuple[Name, Name | None]:
    """The destinations of `a|b`."""
    if isinstance(operand, Pair):
        return operand.first, operand.second
    return operand, None
