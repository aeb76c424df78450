# SPDX-License-Identifier: Apache-2.0
"""Each of `cases.py`, alone in a kernel, against its reference."""

import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from ptx import build
from ptx.cases import CASES, AnyCase, runs_on
from ptx.conformance import check, emulate


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_instruction(case: AnyCase) -> None:
    check(case, emulate(case))


def test_names_are_different() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_what_runs_where() -> None:
    needed = {case.target: case for case in CASES}
    assert sorted(needed) == ["sm_75", "sm_80", "sm_90", "sm_90a"]
    for capability, count in ((70, 0), (75, 1), (86, 2), (90, 4), (100, 3)):
        assert sum(runs_on(case, capability) for case in needed.values()) == count


@pytest.mark.skipif(build.nvcc() is None, reason="there is no nvcc on the PATH")
def test_assembler_takes_them(tmp_path: Path) -> None:
    """A GPU that a case says it runs on has all that is in it."""
    of_target: dict[str, list[str]] = defaultdict(list)
    for case in CASES:
        header, kernel = case.text().split(".visible", 1)
        kernels = of_target[case.target]
        kernels.append(".visible" + kernel.replace(" k(", f" k{len(kernels)}(", 1))
        kernels[0] = header + kernels[0] if len(kernels) == 1 else kernels[0]
    for target, kernels in of_target.items():
        path = tmp_path / f"{target}.ptx"
        path.write_text("\n".join(kernels))
        done = subprocess.run(
            [str(build.nvcc()), f"-arch={target}", "-cubin", "-Xptxas=-O0", str(path), "-o",
             str(tmp_path / "cubin")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[:2000]
