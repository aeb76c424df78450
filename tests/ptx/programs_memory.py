# SPDX-License-Identifier: Apache-2.0
"""Programs about memory: atomics, matrices in shared memory, asynchronous copies and barriers."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import references as ref
from ptx.programs import Problem, Program, each, strided
from ptx.table import LANES, column, numpy_type

__all__ = ["PROGRAMS"]

Array = np.ndarray[Any, Any]
Generator = np.random.Generator

# Atomics ------------------------------------------------------------------------------------------

_CELLS = 8


def _operations(kind: str, space: str) -> dict[str, Callable[..., Any]]:
    """What comes after what was there before, by the name of the operation."""
    if kind == "f32":
        add = ref.exactly(lambda a, b: a + b, "f32")
        # In global memory subnormal numbers are flushed, as the manual says of atom.add.
        return {"add": ref.ftz(add) if space == "global" else add}
    if kind == "f64":
        return {"add": ref.exactly(lambda a, b: a + b, "f64")}
    if kind in ("f16", "bf16"):
        return {"add.noftz": ref.half(ref.exactly(lambda a, b: a + b, kind), kind)}
    if kind in ("f16x2", "bf16x2"):
        return {
            "add.noftz": ref.halves(ref.exactly(lambda a, b: a + b, kind[:-2]), kind[:-2])
        }  # fmt: skip
    if kind == "b16":
        return {"cas": lambda old, b, c: c if old == b else old}
    if kind[0] == "b":
        return {
            "exch": lambda _, b: b, "and": lambda old, b: old & b, "or": lambda old, b: old | b,
            "xor": lambda old, b: old ^ b, "cas": lambda old, b, c: c if old == b else old,
        }  # fmt: skip
    operations: dict[str, Callable[..., Any]] = {"min": min, "max": max}
    if kind != "s64":
        operations["add"] = lambda old, b: ref.wrap(int(old) + int(b), kind)
    if kind == "u32":
        operations["inc"] = lambda old, b: 0 if old >= b else old + 1
        operations["dec"] = lambda old, b: b if old == 0 or old > b else old - 1
    return operations


_KINDS = ("u32", "s32", "u64", "s64", "b16", "b32", "b64", "f32", "f64", "f16", "f16x2",
          "bf16", "bf16x2")  # fmt: skip


def _target(kind: str) -> str:
    return "sm_90" if kind.startswith("bf16") else "sm_75"


def _of_its_own(space: str, name: str, kind: str, function: Callable[..., Any]) -> Program:
    """Every thread has a cell of its own: what was there, and what is there afterwards."""
    dtype = numpy_type(kind)
    width = np.dtype(dtype).itemsize
    register = {2: "%h", 4: "%r", 8: "%a"}[width] + "{}"
    old, value, swapped, after = (register.format(i) for i in (4, 5, 6, 7))
    bits = f"b{8 * width}"
    cas = name == "cas"

    def problem(random: Generator) -> Problem:
        before, values = (column(kind, place, random) for place in (0, 1))
        sources = [values, column(kind, 2, random)] if cas else [values]
        if cas:  # half of them succeed
            values[::2] = before[::2]
        then = [function(*each) for each in zip(before, *sources, strict=True)]
        return Problem([before, *sources], np.stack([before, np.array(then, dtype)]))

    if space == "global":
        cell, place = "[%a3]", f"add.u64 %a3, %a0, {LANES * width};"
    else:
        cell, place = "[%r0]", f"mad.lo.u32 %r0, %t, {width}, %tile;"
    lines = [
        each("%a0", "%out", width), each("%a1", "%in0", width), each("%a2", "%in1", width), place,
        f"ld.global.{bits} {old}, [%a1];", f"st.{space}.{bits} {cell}, {old};",
        f"ld.global.{bits} {value}, [%a2];",
    ]  # fmt: skip
    if cas:
        lines += [each("%a1", "%in2", width), f"ld.global.{bits} {swapped}, [%a1];"]
    operands = ", ".join([old, cell, value, *([swapped] if cas else [])])
    lines += [
        f"atom.{space}.{name}.{kind} {operands};", f"st.global.{bits} [%a0], {old};",
        f"ld.{space}.{bits} {after}, {cell};",
        f"st.global.{bits} [%a0+{LANES * width}], {after};",
    ]  # fmt: skip
    return Program(f"atom.{space}.{name}.{kind}", "\n".join(lines), problem, LANES,
                   LANES * width if space == "shared" else 0, _target(kind))  # fmt: skip


def _crowd(space: str, name: str, kind: str, function: Callable[..., Any]) -> Program:
    """Many threads on each of a few cells, with numbers for which their order is no matter."""
    dtype = numpy_type(kind)
    width = np.dtype(dtype).itemsize
    before, value = (register + "4" for register in ({2: "%h", 4: "%r", 8: "%a"}[width], "%d"))
    value = before[:-1] + "5"
    bits = f"b{8 * width}"

    def small(count: int, random: Generator) -> Array:
        numbers = random.integers(0, 16, count)
        if kind.startswith(("f", "bf")):
            numbers = numbers - 8
        if name in ("inc", "dec"):
            numbers[:] = numbers[0]
        if kind.startswith(("f16", "bf16")):  # 64 of them add up exactly
            encode = ref.f16_bits if kind.startswith("f16") else ref.bf16_bits
            halves = np.array([encode(float(x // 4)) for x in numbers], np.uint16)
            if kind.endswith("x2"):
                return halves.astype(np.uint32) | np.roll(halves, 1).astype(np.uint32) << 16
            return halves.view(dtype)
        return numbers.astype(dtype)

    def problem(random: Generator) -> Problem:
        cells, values = small(_CELLS, random), small(LANES, random)
        if name in ("min", "max", "and", "or", "xor"):
            values = column(kind, 0, random)
        expected = [
            functools.reduce(function, values[i::_CELLS], cell) for i, cell in enumerate(cells)
        ]
        return Problem([cells, values], np.array(expected, dtype))

    if space == "global":
        cell, place = "[%a3]", f"mad.wide.u32 %a3, %r1, {width}, %out;"
    else:
        cell, place = "[%r0]", f"mad.lo.u32 %r0, %r1, {width}, %tile;"
    lines = [
        f"and.b32 %r1, %t, {_CELLS - 1};", f"setp.lt.u32 %p0, %t, {_CELLS};",
        each("%a0", "%out", width), each("%a1", "%in0", width), each("%a2", "%in1", width), place,
        f"@%p0 ld.global.{bits} {before}, [%a1];", f"@%p0 st.{space}.{bits} {cell}, {before};",
        f"ld.global.{bits} {value}, [%a2];", "bar.sync 0;",
        f"red.{space}.{name}.{kind} {cell}, {value};", "bar.sync 0;",
    ]  # fmt: skip
    if space == "shared":
        lines += [f"@%p0 ld.shared.{bits} {before}, {cell};",
                  f"@%p0 st.global.{bits} [%a0], {before};"]  # fmt: skip
    return Program(f"red.{space}.{name}.{kind}", "\n".join(lines), problem, LANES,
                   _CELLS * width if space == "shared" else 0, _target(kind))  # fmt: skip


def _tickets() -> Program:
    """All threads count up one word: each gets a number of its own."""
    return Program("atom.shared.add.u32:tickets", "\n".join([
        "setp.eq.u32 %p0, %t, 0;", "@%p0 st.shared.u32 [%tile], 0;", "bar.sync 0;",
        "atom.shared.add.u32 %r0, [%tile], 1;", "mad.wide.u32 %a0, %r0, 4, %out;",
        "mov.u32 %r1, 1;", "st.global.u32 [%a0], %r1;",
    ]), lambda _: Problem([], np.ones(LANES, np.uint32)), LANES, 4)  # fmt: skip


def _locks() -> Program:
    """All threads try to take a free word: one of them succeeds."""
    return Program("atom.shared.cas.b32:locks", "\n".join([
        "setp.eq.u32 %p0, %t, 0;", "@%p0 st.shared.u32 [%tile], 0;",
        "@%p0 st.shared.u32 [%tile+4], 0;", "bar.sync 0;", "add.u32 %r1, %t, 1;",
        "atom.shared.cas.b32 %r0, [%tile], 0, %r1;", "setp.eq.u32 %p1, %r0, 0;",
        "@%p1 red.shared.add.u32 [%tile+4], 1;", "bar.sync 0;",
        "@%p0 ld.shared.u32 %r2, [%tile+4];", "@%p0 st.global.u32 [%out], %r2;",
    ]), lambda _: Problem([], np.ones(1, np.uint32)), LANES, 8)  # fmt: skip


def _atomics() -> list[Program]:
    programs = [_tickets(), _locks()]
    for space in ("global", "shared"):
        for kind in _KINDS:
            for name, function in _operations(kind, space).items():
                programs.append(_of_its_own(space, name, kind, function))
                if name not in ("exch", "cas"):
                    programs.append(_crowd(space, name, kind, function))
    return programs


# Matrices in shared memory ------------------------------------------------------------------------


def _lanes_of(matrices: Array, trans: bool) -> Array:
    """What lanes hold of matrices `[count, 8, 8]` of 16 bits, `[32, count]` words: lane l the
    elements 2 (l % 4) and the next of row l / 4, or of that column."""
    result = np.empty((32, len(matrices), 2), np.uint16)
    for lane in range(32):
        for i, matrix in enumerate(matrices):
            rows = matrix.T if trans else matrix
            result[lane, i] = rows[lane // 4, 2 * (lane % 4) :][:2]
    return result.view(np.uint32)[..., 0]


def _matrices() -> list[Program]:
    programs = []
    word = [f"%r{i}" for i in range(4)]
    # Row t of all matrices lies in a place that has nothing to do with the next one's.
    place = "mul.lo.u32 %r8, %t, 5; and.b32 %r8, %r8, 31; mad.lo.u32 %r8, %r8, 16, %tile;"
    four = ", ".join(word)

    def some(random: Generator) -> Array:
        return random.integers(0, 1 << 16, (4, 8, 8), dtype=np.uint16)

    for count in (1, 2, 4):
        for trans in (False, True):
            form = f"sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16"
            some_words = ", ".join(word[:count])

            def load(random: Generator, n: int = count, t: bool = trans) -> Problem:
                matrices = some(random)
                return Problem([matrices], _lanes_of(matrices[:n], t))

            def store(random: Generator, n: int = count, t: bool = trans) -> Problem:
                matrices = some(random)[:n]
                return Problem([_lanes_of(matrices, t)], matrices)

            programs.append(Program(f"ldmatrix.{form}", "\n".join([
                place, each("%a0", "%in0", 16), f"ld.global.v4.b32 {{{four}}}, [%a0];",
                f"st.shared.v4.b32 [%r8], {{{four}}};", "bar.sync 0;",
                f"ldmatrix.{form} {{{some_words}}}, [%r8];", each("%a1", "%out", 4 * count),
                strided("st.global.b32", word[:count], "%a1"),
            ]), load, shared=512))  # fmt: skip
            programs.append(Program(f"stmatrix.{form}", "\n".join([
                place, each("%a0", "%in0", 4 * count),
                strided("ld.global.b32", word[:count], "%a0"),
                f"stmatrix.{form} [%r8], {{{some_words}}};", "bar.sync 0;",
                f"setp.lt.u32 %p0, %t, {8 * count};", each("%a1", "%out", 16),
                f"@%p0 ld.shared.v4.b32 {{{four}}}, [%r8];",
                f"@%p0 st.global.v4.b32 [%a1], {{{four}}};",
            ]), store, shared=512, target="sm_90"))  # fmt: skip

    def turn(random: Generator) -> Problem:
        matrix = some(random)[:1]
        return Problem([_lanes_of(matrix, False)], _lanes_of(matrix, True))

    programs.append(Program("movmatrix.sync.aligned.m8n8.trans.b16", "\n".join([
        each("%a0", "%in0", 4), each("%a1", "%out", 4), "ld.global.b32 %r0, [%a0];",
        "movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;", "st.global.b32 [%a1], %r1;",
    ]), turn))  # fmt: skip
    return programs


# Copies -------------------------------------------------------------------------------------------


def _copy(cache: str, width: int, filled: bool) -> Program:
    """Two copies of every thread, of `width` bytes, which another one then reads.

    With `filled` the first has as many bytes as a buffer says, and the rest are zeros.
    """

    def problem(random: Generator) -> Problem:
        data = random.integers(1, 256, (2, 64, width), dtype=np.uint8)
        sizes = (np.arange(64) % (width + 1)).astype(np.uint32)
        kept = np.arange(width) < sizes[:, None] if filled else True
        expected = np.stack([np.where(kept, data[0], 0).astype(np.uint8), data[1]])
        return Problem([data, sizes], np.roll(expected, -1, axis=1))

    form = f"cp.async.{cache}.shared.global"
    bits = f"b{8 * min(width, 8)}"
    words = ["%a4", "%a5"][: -(-width // 8)]
    copied = words[0] if width <= 8 else f"{{{', '.join(words)}}}"
    if width == 4:
        copied = "%r9"
    vector = ".v2" if width == 16 else ""

    def through(offset: int) -> list[str]:
        return [f"ld.shared{vector}.{bits} {copied}, [%r4+{offset}];",
                f"st.global{vector}.{bits} [%a2+{offset}], {copied};"]  # fmt: skip

    return Program(f"{form}:{width}{':filled' if filled else ''}", "\n".join([
        each("%a0", "%in0", width), each("%a1", "%in1", 4), each("%a2", "%out", width),
        f"mad.lo.u32 %r3, %t, {width}, %tile;", "ld.global.u32 %r2, [%a1];",
        f"{form} [%r3], [%a0], {width}{', %r2' if filled else ''};", "cp.async.commit_group;",
        f"{form} [%r3+{64 * width}], [%a0+{64 * width}], {width};", "cp.async.commit_group;",
        "add.u32 %r4, %t, 1;", "and.b32 %r4, %r4, 63;", f"mad.lo.u32 %r4, %r4, {width}, %tile;",
        "cp.async.wait_group 1;", "bar.sync 0;", *through(0),
        "cp.async.wait_group 0;", "bar.sync 0;", *through(64 * width),
    ]), problem, 64, 128 * width, "sm_80")  # fmt: skip


# Barriers in shared memory ------------------------------------------------------------------------


def _wait(label: str, parity: int, barrier: str = "[%tile]") -> list[str]:
    """PTX: waits for the end of a phase."""
    return [f"{label}:", f"mbarrier.try_wait.parity.shared::cta.b64 %p6, {barrier}, {parity};",
            f"@!%p6 bra {label};"]  # fmt: skip


def _init(arrivals: int, *barriers: str) -> list[str]:
    """PTX: begins with barriers."""
    return ["setp.eq.u32 %p5, %t, 0;",
            *(f"@%p5 mbarrier.init.shared::cta.b64 {at}, {arrivals};" for at in barriers),
            "@%p5 fence.mbarrier_init.release.cluster;", "bar.sync 0;"]  # fmt: skip


def _handed_over() -> Program:
    """One warp fills a place twice, the other one empties it: they tell each other by barriers."""

    def problem(random: Generator) -> Problem:
        words = random.integers(0, 1 << 32, (2, 32), dtype=np.uint32)
        return Problem([words], words[:, ::-1].copy())

    full, empty = "[%tile]", "[%tile+8]"
    fill = [
        [f"ld.global.b32 %r1, [%a0+{128 * phase}];", "st.shared.b32 [%r0+16], %r1;",
         f"mbarrier.arrive.shared::cta.b64 _, {full};"]
        for phase in (0, 1)
    ]  # fmt: skip
    take = [
        [*_wait(f"full{phase}", phase, full), "ld.shared.b32 %r3, [%r2+16];",
         f"mbarrier.arrive.shared::cta.b64 _, {empty};",
         f"st.global.b32 [%a1+{128 * phase}], %r3;"]
        for phase in (0, 1)
    ]  # fmt: skip
    return Program("mbarrier", "\n".join([
        *_init(32, full, empty), "and.b32 %r4, %t, 31;", "mad.lo.u32 %r0, %r4, 4, %tile;",
        "mad.wide.u32 %a0, %r4, 4, %in0;", "mad.wide.u32 %a1, %r4, 4, %out;",
        "xor.b32 %r5, %r4, 31;", "mad.lo.u32 %r2, %r5, 4, %tile;", "setp.lt.u32 %p0, %t, 32;",
        "@%p0 bra reader;", *fill[0], *_wait("empty0", 0, empty), *fill[1], "bra over;",
        "reader:", *take[0], *take[1], "over:",
    ]), problem, 64, 16 + 128, "sm_90")  # fmt: skip


def _bulk_load(size: int) -> Program:
    """Two copies in bulk, one after the other to the same place, of each of which all threads read
    their words."""

    def problem(random: Generator) -> Problem:
        words = random.integers(0, 1 << 32, (2, size // 4), dtype=np.uint32)
        return Problem([words], words.copy())

    def phase(number: int) -> list[str]:
        at = f"[%a0+{number * size}]" if number else "[%a0]"
        return [
            f"@%p5 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%tile], {size};",
            "@%p5 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], "
            f"{at}, {size}, [%tile];", *_wait(f"phase{number}", number),
            "@%p0 ld.shared.b32 %r2, [%r1];", f"@%p0 st.global.b32 [%a1+{number * size}], %r2;",
            "bar.sync 0;",
        ]  # fmt: skip

    return Program(f"cp.async.bulk:load:{size}", "\n".join([
        *_init(1, "[%tile]"), "mov.u64 %a0, %in0;", each("%a1", "%out", 4),
        "add.u32 %r0, %tile, 1024;", "mad.lo.u32 %r1, %t, 4, %r0;",
        f"setp.lt.u32 %p0, %t, {size // 4};", *phase(0), *phase(1),
    ]), problem, 128, 1024 + size, "sm_90")  # fmt: skip


def _bulk_store() -> Program:
    def problem(random: Generator) -> Problem:
        words = random.integers(0, 1 << 32, 128, dtype=np.uint32)
        return Problem([words], words.copy())

    return Program("cp.async.bulk:store", "\n".join([
        each("%a0", "%in0", 4), "ld.global.b32 %r0, [%a0];", "mad.lo.u32 %r1, %t, 4, %tile;",
        "st.shared.b32 [%r1], %r0;", "fence.proxy.async.shared::cta;", "bar.sync 0;",
        "setp.ne.u32 %p0, %t, 0;", "@%p0 bra over;",
        "cp.async.bulk.global.shared::cta.bulk_group [%out], [%tile], 512;",
        "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;", "over:",
    ]), problem, 128, 512, "sm_90")  # fmt: skip


PROGRAMS: list[Program] = [
    *_atomics(), *_matrices(), *(_copy("ca", width, False) for width in (4, 8, 16)),
    _copy("cg", 16, False), *(_copy("ca", width, True) for width in (4, 8, 16)),
    _copy("cg", 16, True), _handed_over(), *(_bulk_load(size) for size in (16, 48, 512)),
    _bulk_store(),
]  # fmt: skip
