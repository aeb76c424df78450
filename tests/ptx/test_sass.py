# SPDX-License-Identifier: Apache-2.0
"""`.ci/sass` sees local memory and float64, and misses what a kernel promises and does not hold."""

import subprocess
import sys
from pathlib import Path

import pytest

from ptx import build

ROOT = Path(__file__).parents[2]

SOURCE = """
namespace t2p { namespace vq {
__global__ void lookup_kernel(float* x, int n) {
  float own[40];
  for (int i = 0; i < 40; ++i) own[i] = x[i] * i;
  for (int i = 0; i < n; ++i) own[i * n % 40] += own[(i + n) % 40];
  x[n] = own[n];
}
__global__ void norms_kernel(double* x) { x[0] *= 3; }
__global__ void center_kernel(double* x) { x[0] *= 3; }
__global__ void scan_kernel(float* x) { x[0] += 1; }
}}
"""


@pytest.mark.skipif(build.nvcc() is None, reason="there is no nvcc on the PATH")
def test_broken_promises_are_found(tmp_path: Path) -> None:
    source, cubin = tmp_path / "k.cu", tmp_path / "k.cubin"
    source.write_text(SOURCE)
    subprocess.run(
        [build.nvcc() or "", "-cubin", "-arch=sm_80", str(source), "-o", str(cubin)], check=True
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "sass"), str(cubin)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "no cuobjdump" in done.stderr:
        pytest.skip("there is no cuobjdump: pip install --no-deps nvidia-cuda-cuobjdump")
    assert done.returncode == 1
    problems = done.stderr
    assert "vq::lookup_kernel on sm_80 uses local memory: LDL, STL" in problems
    assert "vq::norms_kernel on sm_80 uses float64: DMUL" in problems
    assert "vq::center_kernel on" not in problems
    assert "vq::scan_kernel on sm_80 has 0 FFMA, not 1536" in problems
    assert "vq::resolve_kernel is in the table, but no such kernel is built" in problems
