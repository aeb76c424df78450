# SPDX-License-Identifier: Apache-2.0
"""Programs of products of matrices: mma.sync of a warp, wgmma of a warpgroup.

Every form is there twice: with small integers, for which any order of sums gives the same number,
so that every element has to be right; and with normal ones. How sums of those round is left open by
the manual: tensor cores add a few products at a time, aligned to the largest and truncated (Fasi et
al. 2021), so that each product may lose a unit of float32, or of float16, of the largest sum.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import references as ref
from ptx import warpgroups
from ptx.programs import Problem, Program, each, strided

__all__ = ["PROGRAMS", "allowed"]

Array = np.ndarray[Any, Any]
Generator = np.random.Generator


def allowed(a: Array, b: Array, c: Array, unit: float = 2.0**-23) -> Array:
    """How far off the sums `a b + c` may be, for a unit in the last place of 1."""
    terms = a.shape[1] + 2
    result: Array = terms * unit * (np.abs(a) @ np.abs(b) + np.abs(c))
    return result


# Of a warp ----------------------------------------------------------------------------------------


def _bf16(x: Array) -> Array:
    return np.array([ref.bf16_bits(v) for v in x.flat], np.uint16).reshape(x.shape)


def _of_bf16(bits: Array) -> Array:
    return np.array([ref.bf16(v) for v in bits.flat]).reshape(bits.shape)


def _encode(kind: str, x: Array) -> tuple[Array, Array]:
    """Numbers as elements of registers, and what those are worth."""
    if kind == "bf16":
        return _bf16(x), _of_bf16(_bf16(x))
    if kind == "f16":
        return x.astype(np.float16), x.astype(np.float16).astype(np.float64)
    if kind == "tf32":
        bits = x.astype(np.float32).view(np.uint32)
        finite = np.isfinite(x)
        bits[finite] = [ref.tf32(v) for v in x[finite].astype(np.float32)]
        return bits, bits.view(np.float32).astype(np.float64)
    whole = x.astype(np.int8 if kind == "s8" else np.uint8)
    return whole, whole.astype(np.float64)


def _registers(matrix: Array, rows: int) -> Array:
    """A `[rows, k]` or B^T `[8, k]` as words of lanes, `[32, count]`: register j of lane
    4 group + t has row group, or that and 8 by turns, and from column t on as many as fit."""
    per = 4 // matrix.itemsize
    halves = rows // 8
    count = matrix.shape[1] // (4 * per) * halves
    result = np.empty((32, count, per), matrix.dtype)
    for lane in range(32):
        for j in range(count):
            column = j // halves * 4 * per + lane % 4 * per
            result[lane, j] = matrix[lane // 4 + j % halves * 8, column : column + per]
    return result.view(np.uint32)[..., 0]


def _sums(matrix: Array) -> Array:
    """C `[16, 8]` as the four elements of every lane."""
    result = np.empty((32, 4), matrix.dtype)
    for lane in range(32):
        for i in range(4):
            result[lane, i] = matrix[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2]
    return result


def _mma(
    k: int, kinds: tuple[str, str], result: str, numbers: str, target: str, saturate: bool = False
) -> Program:
    """out = a b + c; `numbers` are "whole", "normal" or "special"."""
    form = (f"mma.sync.aligned.m16n8k{k}.row.col{'.satfinite' if saturate else ''}"
            f".{result}.{kinds[0]}.{kinds[1]}.{result}")  # fmt: skip
    integers = result == "s32"
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[result]

    def some(random: Generator, shape: tuple[int, int], kind: str) -> Array:
        if integers:
            return random.integers(*((-128, 128) if kind == "s8" else (0, 256)), shape)
        if numbers == "whole":
            return random.integers(-4, 5, shape).astype(np.float64)
        return random.standard_normal(shape)

    def problem(random: Generator) -> Problem:
        left, right = some(random, (16, k), kinds[0]), some(random, (8, k), kinds[1])
        if numbers == "special":
            left[3, 1], left[5, 2], left[12, 0], right[6, 3] = np.inf, np.nan, -np.inf, np.inf
        (a, a_worth), (b, b_worth) = _encode(kinds[0], left), _encode(kinds[1], right)
        c = some(random, (16, 8), "s8").astype(dtype)
        if saturate:
            c[:] = np.where(c > 0, 2**31 - 1, -(2**31))
        exact = a_worth @ b_worth.T + c
        if saturate:
            exact = np.clip(exact, -(2**31), 2**31 - 1)
        inputs = [_registers(a, 16), _registers(b, 8), _sums(c)]
        unit = 0.0 if numbers == "whole" else 2.0 ** (-10 if result == "f16" else -23)
        error = allowed(a_worth, b_worth.T, c.astype(np.float64), unit) if unit else np.zeros(1)
        return Problem(inputs, _sums(exact.astype(dtype)), _sums(error) if unit else 0.0)

    per = {"bf16": 2, "f16": 2, "tf32": 1, "s8": 4, "u8": 4}[kinds[0]]
    a = [f"%r{i}" for i in range(k // 2 // per)]
    b = [f"%r{16 + i}" for i in range(k // 4 // per)]
    c = [f"%d{i}" for i in range(2 if result == "f16" else 4)]
    sides = ", ".join(f"{{{', '.join(side)}}}" for side in (c, a, b, c))
    return Program(f"{form}:{numbers}", "\n".join([
        each("%a0", "%in0", 4 * len(a)), strided("ld.global.b32", a, "%a0"),
        each("%a1", "%in1", 4 * len(b)), strided("ld.global.b32", b, "%a1"),
        each("%a2", "%in2", 4 * len(c)), strided("ld.global.b32", c, "%a2"),
        f"{form} {sides};", each("%a3", "%out", 4 * len(c)), strided("st.global.b32", c, "%a3"),
    ]), problem, target=target)  # fmt: skip


def _of_warps() -> list[Program]:
    programs = []
    for kind, result, depths in (
        ("bf16", "f32", (8, 16)), ("f16", "f32", (8, 16)), ("f16", "f16", (8, 16)),
        ("tf32", "f32", (4, 8)),
    ):  # fmt: skip
        for k in depths:
            target = "sm_75" if (kind, k) == ("f16", 8) else "sm_80"
            programs += [
                _mma(k, (kind, kind), result, numbers, target)
                for numbers in ("whole", "normal", *(["special"] if result == "f32" else []))
            ]
    for k in (16, 32):
        programs += [
            _mma(k, (a, b), "s32", "whole", "sm_80") for a in ("s8", "u8") for b in ("s8", "u8")
        ]
    return [*programs, _mma(32, ("s8", "s8"), "s32", "whole", "sm_80", saturate=True)]


# Of a warpgroup -----------------------------------------------------------------------------------


def _wgmma(
    n: int, kind: str, numbers: str, *, swizzle: int = 128, first: int = 0, add: int = 1
) -> Program:
    some: Callable[[Generator, tuple[int, int]], Array] = (
        (lambda random, shape: random.integers(-4, 5, shape).astype(np.float64))
        if numbers == "whole"
        else (lambda random, shape: random.standard_normal(shape))
    )
    shapes = (warpgroups.ROWS, warpgroups.COLUMNS), (n, warpgroups.COLUMNS)

    def problem(random: Generator) -> Problem:
        (a, a_worth), (b, b_worth) = (_encode(kind, some(random, shape)) for shape in shapes)
        c = some(random, (warpgroups.ROWS, n)).astype(np.float32)
        image, _ = warpgroups.image(a.view(np.uint16), b.view(np.uint16), swizzle, first)
        start = c.astype(np.float64) if add else np.zeros(c.shape)
        expected = (a_worth @ b_worth.T + start).astype(np.float32)
        error: Array | float = 0.0
        if numbers != "whole":
            error = warpgroups.fragments(allowed(a_worth, b_worth.T, start), n)
        inputs = [image, warpgroups.fragments(c, n)]
        return Problem(inputs, warpgroups.fragments(expected, n), error)

    nothing = np.zeros((n, warpgroups.COLUMNS), np.uint16)
    image, second = warpgroups.image(nothing[:0], nothing, swizzle, first)
    a, b = (warpgroups.descriptor(start + 2 * first, swizzle) for start in (0, second))
    name = f"wgmma.m64n{n}k16.f32.{kind}:{numbers}:{swizzle}:{first}{'' if add else ':set'}"
    return Program(name, warpgroups.code(n, image.nbytes, kind, (a, b), add=add), problem, 128,
                   image.nbytes, "sm_90a")  # fmt: skip


def _of_warpgroups() -> list[Program]:
    programs = [
        _wgmma(n, kind, numbers)
        for n in (8, 32, 80, 128, 256)
        for kind in (("bf16", "f16") if n == 32 else ("bf16",))
        for numbers in ("whole", "normal")
    ]
    return [
        *programs, *(_wgmma(24, "bf16", "whole", swizzle=swizzle) for swizzle in (0, 32, 64)),
        *(_wgmma(40, "bf16", "whole", first=first) for first in (16, 32, 48)),
        _wgmma(40, "bf16", "whole", swizzle=64, first=16), _wgmma(16, "bf16", "whole", add=0),
    ]  # fmt: skip


PROGRAMS: list[Program] = [*_of_warps(), *_of_warpgroups()]
