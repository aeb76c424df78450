# SPDX-License-Identifier: Apache-2.0
"""All that is recorded of a GPU, and that the emulator is held to."""

from ptx import programs_memory, programs_products, table
from ptx.programs import Program
from ptx.table import Case

__all__ = ["CASES", "AnyCase", "runs_on"]

AnyCase = Case | Program
CASES: list[AnyCase] = [*table.CASES, *programs_memory.PROGRAMS, *programs_products.PROGRAMS]


def runs_on(case: AnyCase, capability: int) -> bool:
    """Whether a GPU of that compute capability, 75 for 7.5, runs the PTX of a case."""
    needed = case.target.removeprefix("sm_")
    if needed.endswith("a"):
        return capability == int(needed[:-1])
    return capability >= int(needed)
