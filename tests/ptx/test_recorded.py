# SPDX-License-Identifier: Apache-2.0
"""The emulator, and the references of `cases.py`, against what a GPU made of the same kernels."""

from pathlib import Path

import numpy as np
import pytest

from ptx.cases import CASES
from ptx.conformance import check, emulate
from ptx.record import FOLDER

RECORDED = sorted(FOLDER.glob("*.npz"))
NONE = pytest.param(
    None, marks=pytest.mark.skip("no outputs of a GPU are recorded yet: python -m ptx.record")
)


@pytest.mark.parametrize("path", RECORDED or [NONE])
def test_emulator_agrees_with_a_gpu(path: Path) -> None:
    with np.load(path) as recorded:
        for case in CASES:
            if case.name not in recorded:
                continue
            truth = recorded[case.name]
            check(case, truth)
            if case.is_exact:
                out = emulate(case)
                same = (out == truth) | ((out != out) & (truth != truth))
                assert same.all(), [
                    (case.name, tuple(at), out[tuple(at)], truth[tuple(at)])
                    for at in np.argwhere(~same)[:5]
                ]
