# SPDX-License-Identifier: Apache-2.0
"""Every class of fault, planted in `kernels/faults.cu`, is found where it is; the twins pass."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptx import build
from ptx.faults import Fault, NotModelled
from ptx.launch import Bench, Empty

pytestmark = pytest.mark.skipif(build.nvcc() is None, reason="there is no nvcc on the PATH")

SOURCE = Path(__file__).parent / "kernels" / "faults.cu"
BLOCKS, THREADS = 2, 64

# Kernel: kind, detail, and what is not as usual: blocks, bytes of dynamic shared memory, further
# arguments, whether y starts out unwritten, the marker of the line.
FAULTS: dict[str, dict[str, Any]] = {
    "shared_race_without_barrier": {
        "kind": "race", "detail": r"read of tile \+ 128 .*after a write by thread 32 of block 0",
        "thread": 0},
    "shared_race_of_reuse": {
        "kind": "race", "detail": r"write of tile \+ \d+ .*after a read by thread \d+ of block 0"},
    "shared_race_within_a_warp": {"kind": "race", "detail": r"read of tile \+ 4 .*by thread 1 "},
    "shared_race_of_two_writers": {"kind": "race", "detail": r"write of tile \+ 0 "},
    "global_race_between_threads": {"kind": "race", "detail": r"read of y \+ 4 of 512 bytes"},
    "global_race_between_blocks": {
        "kind": "race", "detail": r"write of y \+ 0 of 512 bytes after a write by thread 0 "},
    "global_race_of_blocks_with_barrier": {
        "kind": "race", "detail": r"read of y \+ 0 .*after a write by thread 0 of block 0"},
    "global_race_with_an_atomic": {"kind": "race", "detail": r"read of y \+ 0 .*after a write"},
    "read_beyond_the_end": {
        "kind": "out of bounds", "detail": r"read of 4 bytes at x \+ 512 of 512 bytes",
        "thread": 63, "block": 1},
    "write_before_the_start": {
        "kind": "out of bounds", "detail": r"write of 4 bytes at y \+ -4 of 512", "thread": 0},
    "write_far_away": {"kind": "out of bounds", "detail": "far from every buffer", "thread": 1},
    "shared_beyond_the_end": {
        "kind": "out of bounds", "detail": "offset 256 of 256 bytes of shared memory",
        "dynamic": 256, "thread": 63},
    "shared_into_the_neighbour": {
        "kind": "out of bounds", "detail": r"outside of variable, view or part: first \+ 256",
        "more": [np.int32(1)], "thread": 63},
    "local_beyond_the_end": {
        "kind": "out of bounds", "detail": "offset 32 of 32 bytes of local memory",
        "more": [np.int32(8)]},
    "shared_never_written": {
        "kind": "uninitialised read", "detail": r"shared memory \+ 252", "dynamic": 256,
        "thread": 63},
    "global_never_written": {"kind": "uninitialised read", "detail": r"y \+ 0", "empty": True},
    "local_never_written": {
        "kind": "uninitialised read", "detail": "local memory", "more": [np.int32(4)]},
    "misaligned_vector": {"kind": "misaligned", "detail": "read of 16 bytes at .*, 4 past"},
    "barrier_in_a_branch": {
        "kind": "divergent barrier", "detail": "wait here and at|never come here", "line": None},
    "barrier_of_some": {"kind": "divergent barrier", "detail": "wait here and at", "line": None},
    "mask_of_absent_lanes": {"kind": "warp mask", "detail": "names threads that never come"},
    "mask_without_oneself": {"kind": "warp mask", "detail": "that its mask does not name"},
    "shuffle_from_an_absent_lane": {"kind": "warp mask", "detail": "from lane 20"},
    "copy_not_waited_for": {
        "kind": "asynchronous copy", "detail": r"read of bytes whose cp.async .*: stage \+ "},
    "copy_without_barrier": {"kind": "race", "detail": r"read of stage \+ "},
    "copy_never_waited_for": {
        "kind": "asynchronous copy", "detail": "ends while a cp.async", "line": None},
    "copy_beyond_the_end": {
        "kind": "out of bounds", "detail": r"asynchronous read of 4 bytes at x \+ 512"},
    "bulk_copy_not_waited_for": {
        "kind": "asynchronous copy", "detail": r"stage \+ 0", "arch": "90"},
    "mbarrier_not_waited_for": {
        "kind": "race", "detail": r"stage \+ \d+ .*after a (read|write)", "line": None,
        "arch": "90"},
    "mbarrier_released_too_early": {
        "kind": "race", "detail": r"write of stage \+ 0 .*after a read by thread \d+ of block 0",
        "arch": "90"},
    "mbarrier_that_never_completes": {"kind": "deadlock", "detail": "mbarrier", "arch": "90",
                                      "line": None},
    "division_by_zero": {"kind": "division by zero", "detail": "", "more": [np.int32(3)]},
}  # fmt: skip

TWINS: dict[str, dict[str, Any]] = {
    "shared_with_barrier": {"result": lambda x: x.reshape(2, 2, 32)[:, ::-1].reshape(-1)},
    "shared_reuse_with_barrier": {
        "result": lambda x: 3 * x.reshape(2, 64)[:, ::-1].reshape(-1) + 3},
    "shared_within_a_warp": {"result": lambda x: x.reshape(-1, 2)[:, ::-1].reshape(-1)},
    "global_atomics": {"result": None, "empty": False},
    "shared_into_the_neighbour": {"result": lambda x: x, "more": [np.int32(0)]},
    "local_beyond_the_end": {"result": None, "more": [np.int32(7)]},
    "shared_all_written": {"result": lambda x: x, "dynamic": 256},
    "aligned_vector": {"result": None},
    "barrier_after_exits": {"result": None},
    "mask_of_those_present": {"result": None},
    "copy_waited_for": {"result": lambda x: 2 * x.reshape(2, 2, 32)[:, ::-1].reshape(-1)},
    "mbarrier_handover": {
        "result": lambda x: _handed_over(x.reshape(2, 2, 32)).reshape(-1), "arch": "90"},
    "bulk_copy_waited_for": {"result": lambda x: x, "arch": "90"},
    "division_by_zero": {"result": None, "more": [np.int32(4)]},
}  # fmt: skip


def _handed_over(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of every block nothing for the warp that writes, and for the other one both of its rounds."""
    return np.stack([0 * x[:, 0], 2 * x[:, 0, ::-1] + 1], 1)


def _launch(name: str, case: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    bench = Bench(build.compile_ptx(SOURCE, case.get("arch", "80")))
    x = np.arange(BLOCKS * THREADS, dtype=np.float32)
    y = np.zeros_like(x)
    arguments = [x, Empty(y) if case.get("empty", False) else y, *case.get("more", [])]
    bench.launch(name, arguments, grid=BLOCKS, block=THREADS, dynamic=case.get("dynamic", 0))
    return x, y


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str) -> None:
    case = FAULTS[name]
    with pytest.raises(Fault) as caught:
        _launch(name, case)
    fault = caught.value
    assert fault.kind == case["kind"], fault
    assert re.search(case["detail"], fault.detail), fault
    assert fault.kernel == name
    assert fault.instruction
    if "thread" in case:
        assert fault.thread == (case["thread"], 0, 0), fault
    if "block" in case:
        assert fault.block == (case["block"], 0, 0), fault
    if "line" not in case:
        lines = SOURCE.read_text().splitlines()
        (line,) = (i for i, text in enumerate(lines, 1) if text.endswith(f"// FAULT {name}"))
        assert re.search(rf"\bfaults\.cu:{line}\b", fault.location), fault
    assert str(fault).startswith(fault.kind)


@pytest.mark.parametrize("name", TWINS)
def test_twin_passes(name: str) -> None:
    case = TWINS[name]
    x, y = _launch(name, case)
    if case["result"]:
        np.testing.assert_array_equal(y, case["result"](x))


def test_unknown_text_is_refused() -> None:
    head = ".version 8.0\n.target sm_80\n.address_size 64\n"
    kernel = head + ".visible .entry k()\n{\n.reg .b32 %r<3>;\nBODY\nret;\n}\n"
    for body, message in (
        ("add.s32 %r1, %r2, 1;", None),
        ("tcgen05.fence::before_thread_sync;", "tcgen05"),
        ("add.s33 %r1, %r2, 1;", "add.s33"),
        ("add.rn.s32 %r1, %r2, 1;", "add.rn.s32"),
        ("ld.global.L3.u32 %r1, [%r2];", "ld.global.L3"),
        ("add.s32 %r1, %r2, 1..2;", "1..2"),
        (".maxnreg 12;", "maxnreg"),
        ("mov.u32 %r1, %clock;", "%clock"),
        ("call other, ();", "other"),
    ):
        text = kernel.replace("BODY", body)
        if message is None:
            Bench(text).launch("k", [])
            continue
        with pytest.raises((NotModelled, KeyError), match=re.escape(message)):
            Bench(text).launch("k", [])
    with pytest.raises(NotModelled, match="top level"):
        Bench(head + ".samplerref s;")
