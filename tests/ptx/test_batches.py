# SPDX-License-Identifier: Apache-2.0
"""Instructions that are computed together give what they give one after another."""

from typing import Any

import numpy as np
import pytest

from ptx.launch import Bench, Empty
from ptx.values import exact_fma32

Array = np.ndarray[Any, Any]
REGISTERS, LANES = 7, 96
HEAD = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p0, .param .u64 p1)
{
.reg .b64 %a<4>;
.reg .f32 %f<8>;
.reg .b32 %t;
.reg .pred %p;
mov.u32 %t, %tid.x;
setp.lt.u32 %p, %t, 40;
ld.param.u64 %a1, [p0];
ld.param.u64 %a2, [p1];
mad.wide.u32 %a1, %t, 28, %a1;
mad.wide.u32 %a2, %t, 28, %a2;
"""


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
@pytest.mark.parametrize("seed", range(8))
def test_order_within_a_block_does_not_show(seed: int) -> None:
    """Few registers, so that all kinds of dependence occur; some for a part of the lanes."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((LANES, REGISTERS)).astype(np.float32)
    out = np.zeros_like(x)
    registers = list(x.T.copy())
    lines = [f"ld.global.f32 %f{i}, [%a2+{4 * i}];" for i in range(REGISTERS)]
    for _ in range(60):
        to, a, b, c = generator.integers(0, REGISTERS, 4)
        kind = generator.integers(0, 8)
        chosen = np.arange(LANES) < 40 if kind == 0 else np.ones(LANES, bool)
        guard = "@%p " if kind == 0 else ""
        if kind < 6:
            lines.append(f"{guard}fma.rn.f32 %f{to}, %f{a}, %f{b}, %f{c};")
            value = exact_fma32(registers[a], registers[b], registers[c])
        elif kind == 6:
            lines.append(f"fma.rn.f32 %f{to}, %f{a}, 0f3F000000, %f{c};")
            value = exact_fma32(registers[a], np.full(LANES, 0.5, np.float32), registers[c])
        else:
            lines.append(f"min.f32 %f{to}, %f{a}, %f{b};")
            value = np.fmin(registers[a], registers[b])
        registers[to] = np.where(chosen, value, registers[to])
    lines += [f"st.global.f32 [%a1+{4 * i}], %f{i};" for i in range(REGISTERS)]
    Bench("\n".join([HEAD, *lines, "ret;", "}", ""])).launch("k", [Empty(out), x], block=LANES)
    np.testing.assert_array_equal(out, np.stack(registers, 1))


def test_programs_share_the_room_of_their_registers() -> None:
    """There are hundreds of them, with up to thousands of registers of thousands of lanes."""
    text = HEAD + "ld.global.f32 %f1, [%a2];\nst.global.f32 [%a1], %f1;\nret;\n}\n"
    x = np.arange(LANES * REGISTERS, dtype=np.float32).reshape(LANES, REGISTERS)
    rooms = set()
    for each in (text, text.replace("%f1", "%f7")):
        bench = Bench(each)
        for lanes in (LANES, 32):
            out = np.zeros_like(x)
            bench.launch("k", [out, x], block=lanes)
            np.testing.assert_array_equal(out[:lanes, 0], x[:lanes, 0])
        for program in bench._programs.values():
            for registers in program._pool.values():
                rooms |= {id(r.base) for r in registers.take() if getattr(r, "ndim", 0)}
    assert len(rooms) == 3  # of 8 bytes, of 4, and of predicates
