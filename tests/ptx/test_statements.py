# SPDX-License-Identifier: Apache-2.0
"""Instructions that are no function of one thread's registers, written out as PTX."""

from typing import Any

import numpy as np
import pytest

from ptx.faults import Fault
from ptx.launch import Bench, Empty

Array = np.ndarray[Any, Any]

HEAD = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out, .param .u64 in)
{
.reg .b64 %rd<9>;
.reg .b32 %r<40>;
.reg .b16 %h<9>;
.reg .pred %p<9>;
.shared .align 16 .b8 tile[1024];
mov.u32 %r0, %tid.x;
ld.param.u64 %rd0, [out];
ld.param.u64 %rd1, [in];
mad.wide.u32 %rd2, %r0, 16, %rd0;
mad.wide.u32 %rd3, %r0, 16, %rd1;
ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd3];
mov.u32 %r10, tile;
mad.lo.u32 %r11, %r0, 16, %r10;
"""
TAIL = """
st.global.v4.u32 [%rd2], {%r5, %r6, %r7, %r8};
ret;
}
"""


def _run(body: str, words: Array, block: int = 32) -> Array:
    """`body` finds its four words in %r1 to %r4 and leaves four in %r5 to %r8."""
    out = np.zeros((block, 4), np.uint32)
    Bench(HEAD + body + TAIL).launch("k", [Empty(out), words], block=block)
    return out


def _words(block: int = 32, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 2**32, (block, 4), dtype=np.uint32)


def _matrices(words: Array) -> Array:
    """The four 8 x 8 matrices of 16 bits whose rows threads 8 i + r hold."""
    return words.view(np.uint16).reshape(4, 8, 8)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(trans: str) -> None:
    """Lane l gets of each matrix the elements 2 (l % 4) and the next of row l / 4."""
    words = _words()
    out = _run(
        "st.shared.v4.u32 [%r11], {%r1, %r2, %r3, %r4};\nbar.sync 0;\n"
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r5, %r6, %r7, %r8}}, [%r11];",
        words,
    )
    for lane in range(32):
        for i, matrix in enumerate(_matrices(words)):
            m = matrix.T if trans else matrix
            low, high = m[lane // 4, 2 * (lane % 4)], m[lane // 4, 2 * (lane % 4) + 1]
            assert out[lane, i] == int(low) | int(high) << 16


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix(trans: str) -> None:
    words = _words()
    out = _run(
        f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r11], {{%r1, %r2, %r3, %r4}};\n"
        "bar.sync 0;\nld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r11];",
        words,
    )
    for i, matrix in enumerate(_matrices(out)):
        m = matrix.T if trans else matrix
        for lane in range(32):
            low, high = m[lane // 4, 2 * (lane % 4)], m[lane // 4, 2 * (lane % 4) + 1]
            assert words[lane, i] == int(low) | int(high) << 16


def test_movmatrix() -> None:
    words = _words()
    body = "\n".join(
        f"movmatrix.sync.aligned.m8n8.trans.b16 %r{5 + i}, %r{1 + i};" for i in range(4)
    )
    out = _run(body, words)
    for i in range(4):
        before = np.ascontiguousarray(words[:, i]).view(np.uint16).reshape(8, 8)
        after = np.ascontiguousarray(out[:, i]).view(np.uint16).reshape(8, 8)
        np.testing.assert_array_equal(after, before.T)


def test_carries() -> None:
    """Sums and differences of 64 bits in halves."""
    words = _words()
    words[:8, ::2] = 0xFFFFFFFF
    out = _run(
        "add.cc.u32 %r5, %r1, %r3;\naddc.u32 %r6, %r2, %r4;\n"
        "sub.cc.u32 %r7, %r1, %r3;\nsubc.u32 %r8, %r2, %r4;",
        words,
    )
    wide = np.ascontiguousarray(words).view(np.uint64)
    both = np.stack([wide[:, 0] + wide[:, 1], wide[:, 0] - wide[:, 1]], 1)
    np.testing.assert_array_equal(out.view(np.uint64), both)


@pytest.mark.parametrize("count", [0, 4, 12, 16])
def test_copies_fill_up_with_zeros(count: int) -> None:
    words = _words()
    out = _run(
        f"mov.u32 %r20, {count};\n"
        "cp.async.cg.shared.global [%r11], [%rd3], 16, %r20;\ncp.async.commit_group;\n"
        "cp.async.wait_group 0;\nld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r11];",
        words,
    )
    expected = words.view(np.uint8).reshape(32, 16).copy()
    expected[:, count:] = 0
    np.testing.assert_array_equal(out.view(np.uint8).reshape(32, 16), expected)


def test_copies_wait_for_the_right_groups() -> None:
    body = (
        "cp.async.ca.shared.global [%r11], [%rd3], 16;\ncp.async.commit_group;\n"
        "cp.async.commit_group;\ncp.async.wait_group {};\n"
        "ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r11];"
    )
    words = _words()
    np.testing.assert_array_equal(_run(body.format(1), words), words)  # an empty group counts
    with pytest.raises(Fault, match=r"asynchronous copy: .*tile \+ 0 "):
        _run(body.format(2), words)


def test_copies_arrive_at_an_mbarrier() -> None:
    """Threads copy for each other, and a barrier in shared memory counts the arrivals."""
    words = _words(64)
    body = (
        "setp.eq.u32 %p1, %r0, 0;\nadd.u32 %r12, %r10, 0;\n"
        ".shared .align 8 .b8 gate[8];\nmov.u32 %r13, gate;\n"
        "@%p1 mbarrier.init.shared.b64 [%r13], 64;\nbar.sync 0;\n"
        "cp.async.cg.shared.global [%r11], [%rd3], 16;\n"
        "cp.async.mbarrier.arrive.noinc.shared.b64 [%r13];\n"
        "again: mbarrier.try_wait.parity.shared.b64 %p2, [%r13], 0;\n@!%p2 bra again;\n"
        "xor.b32 %r14, %r11, 512;\nld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r14];"
    )
    out = _run(body.replace("xor.b32 %r14, %r11, 512;", "xor.b32 %r14, %r0, 32;\n"
               "mad.lo.u32 %r14, %r14, 16, %r10;"), words, block=64)  # fmt: skip
    np.testing.assert_array_equal(out, np.roll(words, 32, axis=0))


def test_atomics() -> None:
    """All threads on one word; what was there before comes back in the order of lanes."""
    words = _words(seed=3)
    body = (
        "setp.eq.u32 %p1, %r0, 0;\n@%p1 st.shared.u32 [%r10], 1000;\nbar.sync 0;\n"
        "atom.shared.{} %r5, [%r10], {};\nbar.sync 0;\nld.shared.u32 %r6, [%r10];\n"
        "mov.u32 %r7, 0;\nmov.u32 %r8, 0;"
    )
    values = [1000, *words[:, 0].tolist()]
    functions: dict[str, Any] = {"add.u32": sum, "max.u32": max, "min.u32": min}
    for name, function in functions.items():
        out = _run(body.format(name, "%r1"), words)
        before = [function(values[: i + 1]) & 0xFFFFFFFF for i in range(33)]
        assert out[:, 0].tolist() == before[:32]
        assert (out[:, 1] == before[32]).all()
    assert _run(body.format("exch.b32", "%r1"), words)[:, 0].tolist() == values[:32]
    assert _run(body.format("inc.u32", "3"), words)[:, 0].tolist() == [
        1000, *(i % 4 for i in range(31))
    ]  # fmt: skip
    swapped = _run(body.format("cas.b32", "1000, 7"), words)
    assert swapped[:, 0].tolist() == [1000, *[7] * 31]


@pytest.mark.parametrize(
    ("op", "function"), [("min", min), ("max", max), ("add", sum)], ids=["min", "max", "add"]
)
def test_redux(op: str, function: Any) -> None:
    words = _words()
    out = _run(
        f"redux.sync.{op}.s32 %r5, %r1, 0xffffffff;\nmov.u32 %r6, 0;\nmov.u32 %r7, 0;\n"
        "mov.u32 %r8, 0;",
        words,
    )
    expected = int(function(words[:, 0].astype(np.int32).astype(np.int64).tolist())) & 0xFFFFFFFF
    assert (out[:, 0] == expected).all()


def test_lanes_that_come_later_are_waited_for() -> None:
    """A shuffle of a whole warp whose halves arrive by different ways."""
    words = _words()
    out = _run(
        "setp.lt.u32 %p1, %r0, 16;\n@%p1 bra late;\nmov.u32 %r9, %r2;\nbra join;\n"
        "late: mov.u32 %r9, %r1;\nbra join;\njoin:\n"
        "shfl.sync.bfly.b32 %r5, %r9, 16, 0x1f, 0xffffffff;\nmov.u32 %r6, 0;\nmov.u32 %r7, 0;\n"
        "mov.u32 %r8, 0;",
        words,
    )
    expected = np.concatenate([words[16:, 1], words[:16, 0]])
    np.testing.assert_array_equal(out[:, 0], expected)
