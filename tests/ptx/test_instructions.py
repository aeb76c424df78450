# SPDX-License-Identifier: Apache-2.0
"""Each instruction of `table.py`, alone in a kernel, against its reference."""

import pytest

from ptx.conformance import check, emulate
from ptx.table import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_instruction(case: Case) -> None:
    check(case, *emulate(case))
