# SPDX-License-Identifier: Apache-2.0
"""How the package's ops get the emulated device, and what is checked at their edges."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptx import build

ROOT = Path(__file__).parents[2]

# Runs in a process of its own: the emulated device has to be there before the ops are imported.
PROGRAM = """
import torch
from ptx.build import build
from ptx.emulation import install
from ptx.faults import Fault

emulation = install(build())
from t2p_fast import ops
from t2p_fast._library import _C

x, codebook = torch.randn(70, 40), torch.randn(33, 40)
indices, distance = ops.vq_nearest(x, codebook, return_distance=True)
assert torch.equal(indices, torch.cdist(x.double(), codebook.double()).argmin(1))
print("launched:", *emulation.device.launches)
never = emulation.device.never_launched()
assert "t2p::vq::center_kernel" not in never
assert "t2p::vq::total_kernel" in never

def workspace(*tensors):
    return torch.zeros(_C.vq_workspace_size(70, 33, 40, "l2"))

def attempt(name, call):
    try:
        call()
        print(name, "passed")
    except Fault as fault:
        print(name, "found:", fault)

found = torch.empty(70, dtype=torch.int64)
rows = x[:, :, None]
attempt("as it is", lambda: _C.vq_nearest(
    rows, codebook, "l2", None, workspace(), found, torch.empty(70), 1))
wide = torch.zeros(70, 80)[:, ::2]
attempt("a strided output", lambda: _C.vq_lookup(indices, codebook, wide[:, :, None], 1))
assert torch.equal(wide, codebook[indices])

def forgetful():
    return torch.empty(3, 4).fill_(0), x.new_empty(5)

def read_of_nothing():
    _C.vq_lookup(indices.new_empty(70), codebook, torch.empty(70, 40, 1), 1)
    return x

def writes_itself():
    codes = x.new_empty(70, 40, 1)
    _C.vq_lookup(indices, codebook, codes, 1)
    return codes

attempt("a result never written", emulation.on_cuda(forgetful))
attempt("an input never written", emulation.on_cuda(read_of_nothing))
attempt("a result written", emulation.on_cuda(writes_itself))
attempt("a host that waits", emulation.on_cuda(lambda: x.new_zeros(1).item()))
assert not x.is_cuda
try:
    _C.vq_lookup(indices, codebook, rows[:3], 1)
except ValueError as error:
    print("error:", error)
"""


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_emulated_device() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT / "tests", capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for kernel in ("center_kernel", "norms_kernel", "scan_kernel", "resolve_kernel"):
        assert kernel in lines[0]
    found = dict(re.findall(r"^(.+?) (passed|found: .+)$", done.stdout, re.MULTILINE))
    assert found["as it is"] == found["a strided output"] == found["a result written"] == "passed"
    assert "unwritten result: element (0,) of result 1" in found["a result never written"]
    missing = found["an input never written"]
    assert "uninitialised read: nobody has written to indices + 0 of 560 bytes" in missing
    assert re.search(r"in t2p::vq::lookup_kernel<float> at vq_cuda_lookup\.cu:\d+", missing)
    assert "synchronisation: the host would wait for the GPU" in found["a host that waits"]
    assert lines[-1].startswith("error: vq_lookup: indices")


def test_nothing_of_it_is_in_the_package() -> None:
    for path in (ROOT / "python").rglob("*.py"):
        assert "_C_emulated" not in path.read_text(), path
    assert torch.empty(1).is_cuda is False
