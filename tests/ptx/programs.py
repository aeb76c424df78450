# SPDX-License-Identifier: Apache-2.0
"""A few instructions of a whole block with shared memory, and what they should leave in a buffer.

They are for what `table.py` cannot say: atomics, copies, barriers and products of matrices, in
`programs_memory.py` and `programs_products.py`. The three tables are used alike.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Problem", "Program", "each", "strided"]

Array = np.ndarray[Any, Any]


class Problem(NamedTuple):
    """Numbers for a program.

    Attributes:
        inputs: Its buffers.
        expected: What the output should hold, for any order in which threads may run.
        allowed: By how much each of the numbers may differ, where the hardware has a choice.
    """

    inputs: list[Array]
    expected: Array
    allowed: Array | float = 0.0


@dataclass(frozen=True)
class Program:
    """One block of threads that runs some PTX.

    The code finds in %t the number of its thread, in %out and %in0, %in1, ... the addresses of the
    buffers, in %tile that of its shared memory, on a 1024-byte boundary. Its own registers are %p,
    %h (16 bits), %r and %d (32), %a (64), with a number.

    Attributes:
        problem: Makes the numbers, the same for everybody, from a random generator.
        shared: Bytes of shared memory.
        target: The least that it needs; sm_90a is there on compute capability 9.0 alone.
    """

    name: str
    code: str
    problem: Callable[[np.random.Generator], Problem]
    threads: int = 32
    shared: int = 0
    target: str = "sm_75"

    @functools.cached_property
    def numbers(self) -> Problem:
        with np.errstate(all="ignore"):
            return self.problem(np.random.default_rng(zlib.crc32(self.name.encode())))

    @property
    def is_exact(self) -> bool:
        return not np.any(self.numbers.allowed)

    def inputs(self) -> list[Array]:
        return self.numbers.inputs

    def empty(self) -> Array:
        """Room for the results."""
        return np.zeros_like(self.numbers.expected)

    def text(self) -> str:
        """PTX of a kernel `k(out, in0, in1, ...)`."""
        buffers = ["%out", *(f"%in{i}" for i in range(len(self.inputs())))]
        parameters = ", ".join(f".param .u64 p{i}" for i in range(len(buffers)))
        tile = [f".shared .align 1024 .b8 tile[{self.shared}];", "mov.u32 %tile, tile;"]
        return "\n".join([
            ".version 8.0", f".target {self.target}", ".address_size 64",
            f".visible .entry k({parameters})", "{",
            f".reg .b64 %a<16>, {', '.join(buffers)};", ".reg .b32 %r<64>, %d<136>, %t, %tile;",
            ".reg .b16 %h<8>;", ".reg .pred %p<8>;", *(tile if self.shared else []),
            *(f"ld.param.u64 {buffer}, [p{i}];" for i, buffer in enumerate(buffers)),
            "mov.u32 %t, %tid.x;", self.code, "ret;", "}", "",
        ])  # fmt: skip


def each(target: str, base: str, width: int) -> str:
    """PTX: `target` becomes the address of what is this thread's in a buffer, `width` bytes."""
    return f"mad.wide.u32 {target}, %t, {width}, {base};"


def strided(verb: str, registers: list[str], base: str) -> str:
    """PTX: loads or stores words in a row, as `verb` ld.global.b32 or st.global.b32 says."""
    lines = []
    for i, register in enumerate(registers):
        where = f"[{base}+{4 * i}]"
        pair = (register, where) if verb.startswith("ld") else (where, register)
        lines.append(f"{verb} {', '.join(pair)};")
    return "\n".join(lines)
