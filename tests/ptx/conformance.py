# SPDX-License-Identifier: Apache-2.0
"""Holds outputs to the references of `cases.py`: those of the emulator, and those of a GPU."""

from typing import Any

import numpy as np

from ptx.cases import AnyCase
from ptx.launch import Bench, Empty
from ptx.programs import Program
from ptx.table import LANES, Case, numpy_type

__all__ = ["check", "emulate"]

Array = np.ndarray[Any, Any]


def emulate(case: AnyCase) -> Array:
    """What the emulator makes of a case."""
    out = case.empty()
    Bench(case.text()).launch("k", [Empty(out), *case.inputs()], block=case.threads)
    return out


def check(case: AnyCase, out: Array) -> None:
    """Asserts that an output is what the reference says, where it says anything."""
    if isinstance(case, Program):
        _check_program(case, out)
    else:
        _check_lanes(case, case.inputs(), out)


def _check_program(program: Program, out: Array) -> None:
    expected = program.numbers.expected
    if out.dtype.kind != "f":
        np.testing.assert_array_equal(out, expected, err_msg=program.name)
        return
    wanted, got = expected.astype(np.float64), out.astype(np.float64)
    with np.errstate(invalid="ignore"):
        near = np.abs(got - wanted) <= program.numbers.allowed
    right = near | (got == wanted) | (np.isnan(got) & np.isnan(wanted))
    assert right.all(), [
        f"{program.name}{list(map(int, at))} is {got[tuple(at)]}, expected {wanted[tuple(at)]}"
        for at in np.argwhere(~right)[:5]
    ]


def _check_lanes(case: Case, columns: list[Array], out: Array) -> None:
    for lane in range(LANES):
        values = [column[lane] for column in columns]
        if case.warp:
            values = [lane % 32, *(column[lane - lane % 32 :][:32] for column in columns)]
        expected = case.reference(*values)
        if expected is None:
            continue
        got = out[lane]
        about = f"{case.opcode}({', '.join(map(str, values))}) is {got}, expected {expected}"
        if case.result == "pred":
            assert bool(got) == bool(expected), about
        elif not case.result.startswith("f") or case.result.endswith("x2"):
            assert int(got) == int(expected), about
        else:
            _check_float(case, float(got), float(expected), about)


def _check_float(case: Case, got: float, expected: float, about: str) -> None:
    """Equal, also in the sign of zero; or within the documented error."""
    if (case.relative or case.absolute) and abs(expected) < np.inf:
        with np.errstate(over="ignore"):
            if np.isinf(numpy_type(case.result)(expected)):
                expected = float(np.copysign(np.inf, expected))
    if np.isnan(expected):
        assert np.isnan(got), about
    elif case.relative == case.absolute == 0 or expected == 0 or not np.isfinite(expected):
        limit = numpy_type(case.result)(expected)
        assert got == limit, about
        assert np.signbit(got) == np.signbit(expected) or case.absolute, about
    else:
        unit = 2.0**-24 if case.result == "f32" else 2.0**-11  # the result's own rounding
        tiny = {"f32": 2.0**-149, "f16": 2.0**-24}[case.result]
        error = (case.relative + unit) * abs(expected) + case.absolute + tiny
        assert abs(got - expected) <= error, about
