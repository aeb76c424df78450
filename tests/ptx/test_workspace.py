# SPDX-License-Identifier: Apache-2.0
"""One workspace in parts: what goes from one into the next, planted in `kernels/workspace.cu`, is
found and told by the part's name."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from ptx import build
from ptx.device import Device
from ptx.faults import Fault
from ptx.memory import Region

pytestmark = pytest.mark.skipif(build.nvcc() is None, reason="there is no nvcc on the PATH")

SOURCE = Path(__file__).parent / "kernels" / "workspace.cu"

# Function: kind and detail.
FAULTS = {
    "write_beyond_the_first": (
        "out of bounds", "write outside of variable, view or part: first in workspace + 120 of 120 "
        "bytes"),
    "read_beyond_the_first": (
        "out of bounds", "read outside of variable, view or part: first in workspace + 120 of 120 "
        "bytes"),
    "write_before_the_third": (
        "out of bounds", "write outside of variable, view or part: third in workspace + -1 of 3 "
        "bytes"),
    "write_beyond_the_last": (
        "out of bounds", "write outside of variable, view or part: third in workspace + 3 of 3 "
        "bytes"),
    "read_of_what_nobody_wrote": (
        "uninitialised read", "nobody has written to first in workspace + 0 of 120 bytes"),
    "parts_larger_than_the_workspace": (
        "out of bounds", "second, 12000 bytes at 16096, is not in the workspace"),
}  # fmt: skip


@pytest.fixture(scope="module")
def library() -> Path:
    return build.compile_library(SOURCE)


@pytest.fixture(scope="module")
def device(library: Path) -> Device:
    return Device(library)


def _call(library: Path, device: Device, name: str) -> list[float]:
    functions = ctypes.CDLL(str(library))
    functions.workspace_bytes.restype = ctypes.c_int64
    x, memory = np.zeros(30, np.float32), np.zeros(functions.workspace_bytes() + 16, np.uint8)
    start = -memory.ctypes.data % 16
    workspace = memory[start : start + functions.workspace_bytes()]
    regions = [
        Region("x", x.view(np.uint8), x.ctypes.data, written=False),
        Region("workspace", workspace, workspace.ctypes.data, written=False),
    ]
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (x, workspace))
    with device.regions(regions):
        getattr(functions, name)(*pointers, device.index, ctypes.c_void_p(device.stream))
    return x.tolist()


def test_what_is_right_passes(library: Path, device: Device) -> None:
    assert _call(library, device, "right") == [6] * 30


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, library: Path, device: Device) -> None:
    kind, detail = FAULTS[name]
    with pytest.raises(Fault) as caught:
        _call(library, device, name)
    fault = caught.value
    assert (fault.kind, fault.detail) == (kind, detail)
    assert _call(library, device, "right") == [6] * 30  # what was wrong is over


def test_every_fault_is_there() -> None:
    planted = SOURCE.read_text().split('extern "C" {')[1].count("\nvoid ")
    assert planted == len(FAULTS) + 1
